"""``retrofit eval``: what a conversion costs and what it saves."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table

from retrofit.cli.options import Data, Device, Dtype, Model, TrustRemoteCode
from retrofit.cli.output import Shown, command


@command
def evaluate(
    model: Model,
    data: Data = "pydoc_data.topics",
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; 8,192 or the model's positions by default.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens by which sequences are apart.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Use at most so many sequences.")] = 1,
    against: Annotated[
        str | None,
        typer.Option(help="Also measure this model on the same text: the original that MODEL came from."),
    ] = None,
    against_dense: Annotated[
        bool, typer.Option(help="Also run MODEL's own weights with dense attention.")
    ] = True,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Also measure how often a hidden number is found.")
    ] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> Shown:
    """Measure the perplexity of MODEL and count the keys its queries attend to."""
    from retrofit.data import check
    from retrofit.evaluate import evaluate as measure
    from retrofit.evaluate import passkey as retrieve
    from retrofit.loading import load_model

    options: dict[str, Any] = {"length": length, "stride": stride, "sequences": sequences}
    check(data)
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    found = measure(loaded.model, data, tokenizer=loaded.tokenizer, against_dense=against_dense, **options)
    document: dict[str, Any] = {"model": model, "data": data, **found.to_dict()}
    screen: list[RenderableType] = [_perplexity(model, found)]
    if passkey:
        lengths = [size for size in (1024, 2048, 4096, 8192) if size <= found.length] or [found.length]
        retrieved = retrieve(loaded.model, loaded.tokenizer, lengths, against_dense=against_dense)
        document["passkey"] = retrieved
        screen.append(_passkey(retrieved))
    if against is not None:
        original = load_model(against, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        other = measure(original.model, data, tokenizer=original.tokenizer, start=found.start, **options)
        document["against"] = {"model": against, **other.to_dict()}
        screen.append(_perplexity(against, other))
    screen += [f"warning: {warning}" for warning in found.warnings]
    converted = bool(found.sites)
    following = f"retrofit report {model}" if converted else f"retrofit convert {model} OUTPUT --target hsa"
    return Shown(document, screen, following)


def _perplexity(name: str, found: Any) -> Table:
    table = Table(
        title=f"{name}: perplexity, {found.sequences} × {found.length:,} tokens", title_justify="left"
    )
    for column in ("positions", "tokens", "perplexity", "dense", "ratio"):
        table.add_column(column, justify="right")
    for span in (*found.bins, found.after, found.all):
        if span is not None:
            table.add_row(
                f"{span.first:,}–{span.last:,}",
                f"{span.tokens:,}",
                f"{span.perplexity:.3f}",
                "" if span.dense is None else f"{span.dense:.3f}",
                "" if span.ratio is None else f"{span.ratio:.4f}",
            )
    if found.keys is not None:
        table.caption = (
            f"keys per query {found.keys:,.0f} of {found.dense_keys:,.0f}, nodes scored {found.nodes:,.0f}; "
            f"{found.seconds:.1f} s"
        )
    return table


def _passkey(found: Any) -> Table:
    table = Table(title="passkey retrieval", title_justify="left")
    for column in ("length", "depth", "found", "dense"):
        table.add_column(column, justify="right")
    for cell in found.cells:
        dense = "" if cell.dense is None else f"{cell.dense:.0%}"
        table.add_row(f"{cell.length:,}", f"{cell.depth:.0%}", f"{cell.accuracy:.0%}", dense)
    return table
