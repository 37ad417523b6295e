"""``retrofit inspect``: which attention a model has, and what of it can be converted."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.markup import escape
from rich.table import Table

from retrofit.cli.options import Device, Dtype, Model, TrustRemoteCode
from retrofit.cli.output import Shown, command
from retrofit.progress import count

COLUMNS = ("kind", "heads", "kv_heads", "head_dim", "mask", "spelling", "target", "convertible", "reason")


@command
def inspect(
    model: Model,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """List the attention sites of MODEL; changes nothing."""
    from retrofit.api import inspect as inspect_model
    from retrofit.loading import load_model

    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    found = inspect_model(loaded.model, progress=count)
    sites = [site for site in found.sites if site.kind != "other"]
    others = [site for site in found.sites if site.kind == "other"]
    convertible = sum(site.convertible for site in sites)
    document = {
        "model": model,
        "architecture": type(loaded.model).__name__,
        "convertible": convertible,
        "sites": sites,
        "other_softmax": others,
    }
    title = f"{model}: {len(sites)} attention sites, {convertible} convertible"
    tables = [_table(title, sites)]
    if others:
        tables.append(_table(f"{len(others)} modules with a softmax that is not attention", others))
    following = f"retrofit convert {model} OUTPUT --target hsa" if convertible else "retrofit convert --help"
    return Shown(document, tables, following)


def _table(title: str, sites: list[Any]) -> Table:
    """Returns one row per run of neighbouring sites that differ in nothing but their path."""
    table = Table(title=title, title_justify="left")
    table.add_column("sites", justify="right", no_wrap=True)
    table.add_column("path", overflow="fold")
    columns = [name for name in COLUMNS if any(_cell(getattr(site, name)) for site in sites)]
    for name in columns:
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=name != "reason")
    for values, run in groupby(sites, key=lambda site: tuple(_cell(getattr(site, name)) for name in columns)):
        paths = [site.path for site in run]
        table.add_row(str(len(paths)), fold(paths), *values)
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    # A reason may hold [n, n], which rich would take for markup.
    return "" if value is None else escape(str(value))


def fold(paths: list[str]) -> str:
    """Returns ``["layers.0.attn", "layers.1.attn"]`` as ``layers.{0–1}.attn``; one path as it is."""
    first, last = paths[0].split("."), paths[-1].split(".")
    if len(paths) == 1 or len(first) != len(last):
        return paths[0] if len(paths) == 1 else f"{paths[0]} – {paths[-1]}"
    parts = (a if a == b else f"{{{a}–{b}}}" for a, b in zip(first, last, strict=True))
    return ".".join(parts)
