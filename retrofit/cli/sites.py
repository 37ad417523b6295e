"""How sites are shown: equal neighbours in one row, what stands in the way below.

sites  path                              kind          …  FLOPs  verdict
    2  model.layers.{0–1}.self_attn      self decoder  …    50%  convertible
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

COLUMNS = ("kind", "heads", "mask", "spelling", "target")


def table(title: str, sites: Sequence[Any], whole: int) -> Table:
    """Returns one row per run of neighbouring sites that differ in nothing but their path.

    Args:
        title: Above the table.
        sites: The sites, in the model's order.
        whole: The attention operations of the example, of which the sites' shares are shown; 0 for none.
    """
    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("sites", justify="right", no_wrap=True)
    shown.add_column("path", overflow="fold")
    columns = [name for name in COLUMNS if any(_cell(site, name) for site in sites)]
    for name in columns:
        shown.add_column(name, overflow="fold", no_wrap=True)
    shown.add_column("FLOPs", justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)

    def row(site: Any) -> tuple[str, ...]:
        return (*(_cell(site, name) for name in columns), verdict(site), site.reason or "")

    for values, run in groupby(sites, key=row):
        of_run = list(run)
        share = percent(sum(site.flops for site in of_run), whole)
        shown.add_row(
            str(len(of_run)), escape(fold([site.path for site in of_run])), *values[:-2], share, values[-2]
        )
    return shown


def verdict(site: Any) -> str:
    """What became or can become of a site."""
    if site.kind == "other":
        return "no attention"
    return "convertible" if site.convertible else "refused"


def reasons(sites: Sequence[Any], whole: int) -> list[RenderableType]:
    """Returns for each reason the sites it holds for, where in the code it lies, and the rule that came nearest."""
    grouped: dict[tuple[str | None, str | None], list[Any]] = {}
    for site in sites:
        if site.reason is not None:
            grouped.setdefault((site.reason, site.near_miss), []).append(site)
    lines: list[RenderableType] = []
    for (reason, near), of_reason in grouped.items():
        share = percent(sum(site.flops for site in of_reason), whole)
        lines.append(
            f"{fold([site.path for site in of_reason])}{f' ({share} of attention FLOPs)' if share else ''}: {reason}"
        )
        if near is not None:
            lines.append(f"    nearest rule: {near}")
    return lines


def percent(part: int, whole: int) -> str:
    """``"96%"``; ``""`` where there is nothing to be a part of. What is not all is never rounded to it."""
    if not whole:
        return ""
    share = 100 * part / whole
    if 0 < share < 1 or 99 < share < 100:
        return f"{share:.1f}%" if 0.05 <= share <= 99.95 else "<0.1%" if share < 1 else ">99.9%"
    return f"{share:.0f}%"


def _cell(site: Any, name: str) -> str:
    if name == "kind":
        return " ".join(word for word in (site.kind, site.side) if word)
    if name == "heads" and site.heads is not None:
        grouped = f" on {site.kv_heads}" if site.kv_heads != site.heads else ""
        return f"{site.heads}{grouped} × {site.head_dim}"
    value = getattr(site, name)
    # A mask may hold [n, n], which rich would take for markup.
    return "" if value is None else escape(str(value))


def fold(paths: Sequence[str]) -> str:
    """Returns ``["layers.0.attn", "layers.1.attn"]`` as ``layers.{0–1}.attn``; one path as it is."""
    if len(paths) == 1:
        return paths[0] or "the model itself"
    first, last = paths[0].split("."), paths[-1].split(".")
    if len(first) != len(last):
        return f"{paths[0]} – {paths[-1]}"
    numbers = [path.split(".") for path in paths]
    parts = []
    for place, (a, b) in enumerate(zip(first, last, strict=True)):
        several = [path[place] for path in numbers if len(path) == len(first)]
        run = a.isdecimal() and several == [str(int(a) + step) for step in range(len(paths))]
        parts.append(a if a == b else f"{{{a}–{b}}}" if run else f"{{{','.join(dict.fromkeys(several))}}}")
    return ".".join(parts)
