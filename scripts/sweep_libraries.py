"""Converts small random models of other libraries and says what became of each.

    python scripts/sweep_libraries.py [--library NAME …]  →  benchmarks/results/libraries.json, libraries.md

The rows of a library that is named are renewed, those of the others kept. Each is held against the calls to softmax
and SDPA that are counted as in ``sweep_check``, against the original's outputs for the example and for other numbers of
rows, which have other lengths, and against the original again once it is back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from library_models import MODELS, Built, Example
from sweep_check import REFUSALS, counted_calls, found, in_hsa, line, verdict
from sweep_table import why_not
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import retrofit
from retrofit.errors import RetrofitError

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TOLERANCE = 1e-5
ROWS = (2, 1, 3)
"""Of the example that is converted with, and of those that are tried besides."""


def check(build: Callable[[], Built]) -> dict[str, Any]:
    """Returns the row of one model."""
    try:
        _built(build)
    except Exception as error:  # a library that is not installed, or whose own needs are not
        return {"verdict": "not built", "error": line(error)}
    row: dict[str, Any] = {}
    try:
        row = _checked(build)
    except RetrofitError as error:
        row["error"] = line(error)
    except Exception as error:
        row |= {"crash": line(error), "trace": traceback.format_exc()[-2000:]}
    return {**row, "verdict": verdict(row)}


def _checked(build: Callable[[], Built]) -> dict[str, Any]:
    model, examples = _built(build)
    inputs = [examples(rows) for rows in ROWS]
    counted = counted_calls(_built(build)[0], *_arguments(inputs[0]))
    before = [outputs(model, given) for given in inputs]
    try:
        report = retrofit.convert(model, retrofit.DenseConfig(), inputs[0])
    except REFUSALS as error:
        sites = retrofit.inspect(model, inputs[0]).sites
        reasons = {site.path: site.reason or line(error) for site in sites}
        return {**found(sites, counted, reasons), "convertible": 0, "coverage": 0.0}
    row = found((*report.converted, *report.left), counted, report.skipped)
    row["coverage"] = report.coverage
    row["difference"] = max(map(difference, [outputs(model, given) for given in inputs], before))
    retrofit.revert(model)
    row["hsa_sites"], row["hsa_refused"] = in_hsa(model, inputs[0], report)
    if row["hsa_sites"]:
        row["hsa_difference"] = max(map(difference, [outputs(model, given) for given in inputs], before))
        retrofit.revert(model)
    row["reverted"] = all(
        torch.equal(a, b)
        for given, expected in zip(inputs, before, strict=True)
        for a, b in zip(outputs(model, given), expected, strict=True)
    )
    for key in ("difference", "hsa_difference"):
        if not row.get(key, 0.0) <= TOLERANCE:
            row["error"] = f"{key} is {row[key]:.1e}"
    return row if row["reverted"] else {**row, "error": "revert() is not bit-exact"}


def _built(build: Callable[[], Built]) -> Built:
    torch.manual_seed(0)
    model, examples = build()
    return model.eval(), examples


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), example) if isinstance(example, dict) else (example, {})


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """The floating-point tensors that ``model`` returns, without what it says of padding."""
    args, kwargs = _arguments(example)
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(*args, **kwargs))
    real = kwargs.get("attention_mask", torch.ones(0)).bool()
    return [
        leaf[real] if leaf.shape[:2] == real.shape else leaf
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value where that is above one."""
    pairs = zip(got, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def page(result: Mapping[str, Any]) -> str:
    """Returns the rows as Markdown."""
    counts = Counter(row["verdict"] for row in result["rows"]).most_common()
    totals = ", ".join(f"{count} {verdict}" for verdict, count in counts)
    made = {f"{row['torch']} on {row['date']}" for row in result["rows"]}
    lines = [
        "# Attention of other libraries",
        "",
        "Small models with random weights, MiniLM with its own; float32, CPU. Made by `scripts/sweep_libraries.py`; the\n"
        "raw results are in `libraries.json`. A difference is the largest that conversion makes to an output, in batches\n"
        "of one, two and three rows, under `DenseConfig` and under HSA in its dense limit.",
        "",
        f"torch {', '.join(sorted(made))}. {len(result['rows'])} models: {totals}.",
        "",
        "| library | model | sites | converted | verdict | difference | HSA sites | difference | why not |",
        "| --- " * 9 + "|",
    ]
    for row in result["rows"]:
        dense, sparse = (f"{row[key]:.0e}" if key in row else "" for key in ("difference", "hsa_difference"))
        kind = [f"{row['library']} {row['version']}".strip(), row["model"]]
        found_there = [row.get("sites", ""), row.get("convertible", ""), row["verdict"]]
        cells = [*kind, *found_there, dense, row.get("hsa_sites", ""), sparse, why_not(row)]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Renews the rows of the libraries that are named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--model", help="only this one, printed and not kept")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    path = given.output / "libraries.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {library: [row for row in kept if row["library"] == library] for library in MODELS}
    for library in given.library:
        about = {
            "library": library,
            "version": _version(library),
            "torch": torch.__version__.split("+")[0],
            "date": str(datetime.date.today()),
        }
        chosen = {name: build for name, build in MODELS[library].items() if given.model in (None, name)}
        rows[library] = []
        for name, build in chosen.items():
            row = {**about, "model": name, **check(build)}
            trace = row.pop("trace", "")
            print(row, trace, sep="\n", flush=True)
            rows[library].append(row)
        if given.model is None:
            result = {"rows": [row for of_library in rows.values() for row in of_library]}
            path.write_text(json.dumps(result, indent=1) + "\n")
            path.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
