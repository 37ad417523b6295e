"""``retrofit bench``: how fast a converted site is, on what the model really computes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from retrofit.cli.options import Converted, Data, Device, Dtype, whole_numbers
from retrofit.cli.output import Shown, command


@command
def bench(
    model: Converted,
    data: Data = "pydoc_data.topics",
    lengths: Annotated[
        str, typer.Option(help="Sequence lengths in tokens, with commas between.")
    ] = "4096,8192,16384",
    site: Annotated[
        str | None, typer.Option(help="Path of the site to time; the middle one by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of a length; the median counts.")] = 3,
    dense_until: Annotated[int | None, typer.Option(help="In place of the site's own, for HSA.")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> Shown:
    """Time one converted site of MODEL against dense attention on the same inputs."""
    sizes = whole_numbers("--lengths", lengths)

    from retrofit.benchmark import benchmark
    from retrofit.data import check
    from retrofit.loading import load_model

    check(data)
    loaded = load_model(model, dtype=dtype, device=device)
    found = benchmark(
        loaded.model,
        tokenizer=loaded.tokenizer,
        source=data,
        lengths=sizes,
        site=site,
        repeats=repeats,
        dense_until=dense_until,
    )
    document = {"model": model, **found.to_dict()}
    return Shown(document, [_table(found)], f"retrofit report {model}")


def _table(found: Any) -> Table:
    table = Table(
        title=f"{found.site} on {found.environment['device']}, {found.environment['threads']} threads, {found.dtype}",
        caption=f"differs from its reference by {found.error:.1e}",
        title_justify="left",
    )
    columns = ("tokens", "dense ms", "converted ms", "speed-up", "dense_until=0 ms", "keys", "dense MB", "MB")
    for column in columns:
        table.add_column(column, justify="right")
    for timing in found.timings:
        table.add_row(
            f"{timing.length:,}",
            f"{timing.dense_ms:,.1f}",
            f"{timing.target_ms:,.1f}",
            f"{timing.speedup:.2f}",
            "" if timing.target_from_0_ms is None else f"{timing.target_from_0_ms:,.1f}",
            f"{timing.keys:,.0f}",
            f"{timing.dense_bytes / 1e6:,.0f}",
            f"{timing.target_bytes / 1e6:,.0f}",
        )
    return table
