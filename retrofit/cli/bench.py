"""``retrofit bench``: how fast a converted site is, on what the model really computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from retrofit.cli.options import Converted, Data, Device, Dtype, read_json, whole_numbers
from retrofit.cli.output import Shown, command
from retrofit.errors import ConfigError


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
    repeats: Annotated[int, typer.Option(help="Timed runs of a length, at least; the median counts.")] = 3,
    dense_until: Annotated[int | None, typer.Option(help="In place of the site's own, for HSA.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="HEADS,KV_HEADS,DIM",
            help="Bring the recorded inputs to another shape, as in 32,8,128.",
            show_default=False,
        ),
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward as well.")] = False,
    rivals: Annotated[
        str, typer.Option(help="What else to time: flex (FlexAttention on the same blocks), nsa (fla's NSA).")
    ] = "",
    graph: Annotated[
        bool, typer.Option("--graph", help="Time the converted attention in a CUDA graph as well.")
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Time each kernel of the converted attention as well, on CUDA; for HSA with dense_until=0.",
        ),
    ] = False,
    random: Annotated[bool, typer.Option("--random", help="Time independent random inputs as well.")] = False,
    decode: Annotated[
        int, typer.Option(help="Time one decoded token in a batch of so many rows as well, on CUDA.")
    ] = 0,
    scaling: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTHS",
            help="Lengths at which to time the converted attention alone, for the exponent of its time.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="An earlier result, as --json printed it, to compare with.", show_default=False),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> Shown:
    """Time one converted site of MODEL against dense attention on the same inputs."""
    sizes = whole_numbers("--lengths", lengths)
    heads = None if shape is None else whole_numbers("--shape", shape)
    if heads is not None and len(heads) != 3:
        raise ConfigError(f"--shape expects heads, kv heads and dims as in 32,8,128, got {shape!r}")

    from retrofit.bench import benchmark
    from retrofit.data import check
    from retrofit.loading import load_model

    earlier = None if compare is None else read_json(compare)
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
        shape=None if heads is None else (heads[0], heads[1], heads[2]),
        backward=backward,
        rivals=[name.strip() for name in rivals.split(",") if name.strip()],
        graph=graph,
        kernels=kernels,
        random=random,
        decode=decode,
        scaling=() if scaling is None else whole_numbers("--scaling", scaling),
    )
    document = {"model": model, **found.to_dict()}
    notes = [f"{name} left out: {reason}" for name, reason in found.left_out.items()]
    tables = [_table(found, earlier), *([_decoding(found)] if found.decoding else [])]
    tables += [_kernels(timing) for timing in found.timings if timing.kernels_us]
    if found.scaling:
        tables.append(_growth(found.scaling))
        notes.insert(0, f"converted attention's time grows as length^{found.scaling.exponent:.3f}")
    return Shown(document, [*tables, *notes], f"retrofit report {model}")


def _table(found: Any, earlier: Any) -> Table:
    where = found.environment
    shape = f"{found.shape['heads']}/{found.shape['kv_heads']} heads of {found.shape['head_dim']}"
    table = Table(
        title=f"{found.site} ({shape}) on {where['device']}, {where['threads']} threads, {found.dtype}",
        caption=f"differs from its reference by {found.error:.1e}",
        title_justify="left",
    )
    others = sorted({name for timing in found.timings for name in timing.rivals_ms})
    both = any(timing.backward for timing in found.timings)
    graph = any(timing.target_graph_ms for timing in found.timings)
    columns = [
        "tokens",
        "dense ms",
        "converted ms",
        "speed-up",
        *(["in a graph ms"] if graph else []),
        "dense_until=0 ms",
        *(f"{x} ms" for x in others),
    ]
    columns += ["both: dense ms", "converted ms", "speed-up"] if both else []
    columns += ["keys", "TFLOP/s", "dense MB", "MB"] + (["before ms"] if earlier else [])
    for column in columns:
        table.add_column(column, justify="right")
    for timing in found.timings:
        kind = "" if timing.inputs == "recorded" else f" {timing.inputs}"
        row = [
            f"{timing.length:,}{kind}",
            f"{timing.dense_ms:,.2f}",
            f"{timing.target_ms:,.2f}",
            f"{timing.speedup:.2f}",
            *([_shown(timing.target_graph_ms)] if graph else []),
            _shown(timing.target_from_0_ms),
            *(_shown(timing.rivals_ms.get(name)) for name in others),
        ]
        if timing.backward:
            dense, target = timing.backward["dense_ms"], timing.backward["target_ms"]
            row += [f"{dense:,.2f}", f"{target:,.2f}", f"{dense / target:.2f}"]
        row += [
            f"{timing.keys:,.0f}",
            f"{timing.target_tflops:,.3g}",
            f"{timing.dense_bytes / 1e6:,.0f}",
            f"{timing.target_bytes / 1e6:,.0f}",
        ]
        if earlier:
            row.append(_shown(_before(earlier, timing)))
        table.add_row(*row)
    return table


def _decoding(found: Any) -> Table:
    table = Table(title=f"one token, batch {found.decoding[0].batch}, in a CUDA graph", title_justify="left")
    for column in ("tokens before", "dense µs", "converted µs", "speed-up", "first of a block µs", "keys"):
        table.add_column(column, justify="right")
    for row in found.decoding:
        numbers = (row.dense_us, row.target_us, row.speedup, row.first_us)
        table.add_row(f"{row.length:,}", *(f"{number:,.1f}" for number in numbers), f"{row.keys:,.0f}")
    return table


def _kernels(timing: Any) -> Table:
    share = timing.selection_share
    where = "" if timing.target_from_0_ms is None else ", dense_until=0"
    table = Table(
        title=f"kernels at {timing.length:,} tokens, {timing.inputs}{where}",
        caption=None if share is None else f"pooling and selection take {share:.1%}",
        title_justify="left",
    )
    # Names of some of PyTorch's have hundreds of characters.
    table.add_column("kernel", max_width=60, no_wrap=True, overflow="ellipsis")
    table.add_column("µs", justify="right")
    for name, microseconds in timing.kernels_us.items():
        table.add_row(name, f"{microseconds:,.1f}")
    return table


def _growth(scaling: Any) -> Table:
    table = Table(title="converted attention alone", title_justify="left")
    for column in ("tokens", "converted ms", "keys"):
        table.add_column(column, justify="right")
    for length, milliseconds in scaling.target_ms.items():
        table.add_row(f"{length:,}", _shown(milliseconds), f"{scaling.keys[length]:,.0f}")
    return table


def _shown(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:,.2f}"


def _before(earlier: Any, timing: Any) -> float | None:
    """The converted attention's time of the same length and inputs in an earlier result."""
    for row in earlier.get("timings", ()):
        if row["length"] == timing.length and row.get("inputs", "recorded") == timing.inputs:
            return float(row["target_ms"])
    return None
