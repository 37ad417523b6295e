"""One page about a converted model: what was converted, what it costs, and what it does to the quality.

report(model, evaluation=evaluate(…), benchmark=benchmark(…)).save("report.html")
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from retrofit.configs import config_to_dict
from retrofit.errors import OutputError, RetrofitError

DENSE_COLOR, CONVERTED_COLOR = "#8a8f98", "#1f6feb"


@dataclass(frozen=True)
class Table:
    """Rows under named columns, with a heading; what one section of the page shows."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ModelReport:
    """Everything known about a converted model.

    Attributes:
        facts: The model as it stands: sites, targets, parameters.
        evaluation: What ``retrofit.evaluate`` found, as JSON; None if it was not run.
        benchmark: What ``retrofit.benchmark`` found, as JSON; None if it was not run.
    """

    facts: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None = None
    benchmark: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"model": self.facts, "evaluation": self.evaluation, "benchmark": self.benchmark}

    def tables(self) -> list[Table]:
        """The sections of the page, as tables."""
        tables = [_sites_table(self.facts)]
        if self.evaluation:
            tables += [_quality_table(self.evaluation), _work_table(self.evaluation)]
        if self.benchmark:
            tables.append(_speed_table(self.benchmark))
        return tables

    def __str__(self) -> str:
        facts = self.facts
        lines = [
            f"{facts['class']}: {len(facts['sites'])} converted sites, {facts['parameters']:,} parameters, "
            f"{facts['own_parameters']:,} of them retrofit's own"
        ]
        for table in self.tables():
            widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
            lines += ["", table.heading]
            lines += [
                "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                for row in (table.columns, *table.rows)
            ]
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Writes the page: ``.html`` with pictures, ``.json``, or plain text for any other ending.

        Raises:
            OutputError: If the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".html":
            text = self._html()
        elif path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2)
        else:
            text = f"{self}\n"
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path} cannot be written: {error.strerror}; choose another file") from error
        return path

    def _html(self) -> str:
        parts = [f"<h1>{html.escape(self.facts['class'])}</h1>"]
        parts += [f"<div class=figure>{picture}</div>" for picture in self._pictures()]
        for table in self.tables():
            head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in table.rows
            )
            parts.append(f"<h2>{html.escape(table.heading)}</h2><table><tr>{head}</tr>{body}</table>")
        return (
            "<!doctype html><meta charset=utf-8><title>retrofit report</title><style>"
            "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
            "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
            ".figure svg{max-width:100%;height:auto}</style>" + "\n".join(parts)
        )

    def _pictures(self) -> list[str]:
        pictures = []
        if self.evaluation:
            pictures += [_quality_picture(self.evaluation), _work_picture(self.evaluation)]
        if self.benchmark:
            pictures.append(_speed_picture(self.benchmark))
        return pictures


def report(model: nn.Module, *, evaluation: Any = None, benchmark: Any = None) -> ModelReport:
    """Gathers what is known about a converted model.

    Args:
        model: A converted model.
        evaluation: The result of ``retrofit.evaluate``, or its JSON form.
        benchmark: The result of ``retrofit.benchmark``, or its JSON form.

    Raises:
        RetrofitError: If no site of the model is converted.
    """
    from retrofit.api import sites

    found = list(sites(model))
    if not found:
        raise RetrofitError(f"{type(model).__name__} has no converted site; run retrofit convert first")
    own = {id(p): p.numel() for _, site in found for p in site.retrofit.parameters()}
    facts = {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "own_parameters": sum(own.values()),
        "sites": {path: _site_facts(site.retrofit) for path, site in found},
    }
    return ModelReport(facts=facts, evaluation=_as_dict(evaluation), benchmark=_as_dict(benchmark))


def _site_facts(target: Any) -> dict[str, Any]:
    return {
        **config_to_dict(target.config),
        "heads": target.heads,
        "kv_heads": target.kv_heads,
        "head_dim": target.head_dim,
        "causal": target.causal,
    }


def _as_dict(result: Any) -> Mapping[str, Any] | None:
    if result is None or isinstance(result, Mapping):
        return result
    found: Mapping[str, Any] = result.to_dict()
    return found


def _sites_table(facts: Mapping[str, Any]) -> Table:
    """One row for each run of neighbouring sites that are alike."""
    rows: list[tuple[list[str], Mapping[str, Any]]] = []
    for path, site in facts["sites"].items():
        if rows and rows[-1][1] == site:
            rows[-1][0].append(path)
        else:
            rows.append(([path], site))
    shape = ("heads", "kv_heads", "head_dim")
    return Table(
        "Sites",
        ("sites", "number", "target", *shape, "options"),
        tuple(
            (
                paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}",
                str(len(paths)),
                site["target"],
                *(str(site[name]) for name in shape),
                ", ".join(f"{k}={v}" for k, v in site.items() if k not in (*shape, "target", "causal")),
            )
            for paths, site in rows
        ),
    )


def _quality_table(evaluation: Mapping[str, Any]) -> Table:
    spans = [*evaluation["bins"], evaluation["all"]]
    if evaluation["after"]:
        spans.append(evaluation["after"])
    return Table(
        "Perplexity by position",
        ("positions", "dense", "converted", "ratio"),
        tuple(
            (
                f"{span['first']:,}–{span['last']:,}",
                _number(span["dense"], 3),
                _number(span["perplexity"], 3),
                _number(span["ratio"], 4),
            )
            for span in spans
        ),
    )


def _work_table(evaluation: Mapping[str, Any]) -> Table:
    return Table(
        f"Work per query, from position {evaluation['start']:,} on",
        ("site", "keys executed", "of dense", "nodes scored"),
        tuple(
            (
                site["path"],
                _number(site["keys"], 0),
                f"{site['keys'] / site['dense_keys']:.1%}",
                _number(site["nodes"], 0),
            )
            for site in evaluation["sites"]
        ),
    )


def _speed_table(benchmark: Mapping[str, Any]) -> Table:
    return Table(
        f"Forward time of {benchmark['site']} on {benchmark['environment']['device']}, {benchmark['dtype']}",
        (
            "tokens",
            "dense ms",
            "converted ms",
            "speed-up",
            "dense_until=0 ms",
            "keys",
            "dense MB",
            "converted MB",
        ),
        tuple(
            (
                f"{timing['length']:,}",
                _number(timing["dense_ms"], 1),
                _number(timing["target_ms"], 1),
                _number(timing["speedup"], 2),
                _number(timing["target_from_0_ms"], 1),
                _number(timing["keys"], 0),
                _number(timing["dense_bytes"] / 1e6, 0),
                _number(timing["target_bytes"] / 1e6, 0),
            )
            for timing in _recorded(benchmark)
        ),
    )


def _recorded(benchmark: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The times of what the model computes, without those of random inputs."""
    return [timing for timing in benchmark["timings"] if timing["inputs"] == "recorded"]


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _quality_picture(evaluation: Mapping[str, Any]) -> str:
    middle = [(span["first"] + span["last"]) / 2 for span in evaluation["bins"]]
    lines = {
        "dense": ([span["dense"] for span in evaluation["bins"]], DENSE_COLOR),
        "converted": ([span["perplexity"] for span in evaluation["bins"]], CONVERTED_COLOR),
    }
    return _plot("Perplexity by position", "position", "perplexity", middle, lines)


def _work_picture(evaluation: Mapping[str, Any]) -> str:
    sites = evaluation["sites"]
    lines = {
        "dense": ([site["dense_keys"] for site in sites], DENSE_COLOR),
        "converted": ([site["keys"] for site in sites], CONVERTED_COLOR),
    }
    return _plot("Keys executed per query", "site", "keys", list(range(len(sites))), lines)


def _speed_picture(benchmark: Mapping[str, Any]) -> str:
    timings = _recorded(benchmark)
    lines = {
        "dense": ([timing["dense_ms"] for timing in timings], DENSE_COLOR),
        "converted": ([timing["target_ms"] for timing in timings], CONVERTED_COLOR),
    }
    lengths = [timing["length"] for timing in timings]
    return _plot("Forward time", "tokens", "ms", lengths, lines, logarithmic=True)


def _plot(
    title: str,
    x_label: str,
    y_label: str,
    x: Sequence[float],
    lines: Mapping[str, tuple[Sequence[float | None], str]],
    *,
    logarithmic: bool = False,
) -> str:
    """Returns an SVG of ``lines`` (name → values, color) over ``x``; lines without values are left out."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RetrofitError(
            "pictures need matplotlib; pip install 'retrofit-attention[report]', or save as .json or .txt"
        ) from error

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, (values, color) in lines.items():
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            axes.plot(list(x), known, marker="o", markersize=3, label=name, color=color)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
