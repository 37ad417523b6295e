"""Measures the launch settings of the Triton kernels on the GPU at hand, and prints its row of ``kernels/tuned.py``.

    python scripts/tune_kernels.py                           random q, k, v in bfloat16, of 64 and 128 dims
    python scripts/tune_kernels.py --inputs recorded.pt      q, k, v [1, heads, tokens, dims] of a dict in a file

From the settings that hold now, one number of a tile is changed at a time, and what is faster by more than 1% is kept,
until nothing is. A kernel's time is that of the GPU alone, by the profiler, within the whole operation. A candidate that
does not fit is passed over; one whose results differ from those of the present settings ends the script with 1. Warps and
stages of tiles with few rows (``few``), what has roles, and heads that were not measured, stay as they are.

What HSA costs depends on the data: random queries ask for far more than those of a model. Prints the row as Python, to be
pasted and formatted (``make format``), and writes benchmarks/results/tuned-CAPABILITY.json with every time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from math import inf
from pathlib import Path

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from retrofit.bench.measure import environment
from retrofit.configs import HSAConfig, MAHAConfig
from retrofit.kernels import tuned
from retrofit.kernels.hsa import triton as hsa
from retrofit.kernels.hsa import triton_decode
from retrofit.kernels.maha import triton as maha
from retrofit.kernels.pyramid import triton as pyramid
from retrofit.kernels.tuned import Pooling, Settings, Tile, Tiles
from retrofit.targets.hsa import geometry_of
from retrofit.targets.maha import bands_of

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
REPEATS = 10
"""Runs of an operation that one time is the mean of."""
GAIN = 0.99
"""A candidate counts as faster from this share of the time on."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of results that counts as rounding, relative to their norm."""
ROLES = tuple(field.name for field in fields(Settings) if field.name.endswith("_by_roles"))
UNFIT = (OutOfResources, PTXASError, CompilationError)

Operation = Callable[[], Sequence[Tensor]]
"""Runs something, and returns what must not depend on the settings."""
Value = Tile | Pooling | int
"""What is looked for at a time."""
TIMED = {
    "coarse": ("hsa", ("top_scores", "refine")),
    "vote": ("hsa", ("vote",)),
    "attend": ("hsa", ("attend_listed", "attend_run")),
    "attend_parts": ("decode", ("attend_parts",)),
    "query_gradients": ("hsa_backward", ("query_gradients",)),
    "key_gradients": ("hsa_backward", ("key_gradients", "join_gradients")),
    "maha_attend": ("maha", ("attend",)),
    "maha_query_gradients": ("maha_backward", ("query_gradients",)),
    "maha_key_gradients": ("maha_backward", ("key_gradients",)),
    "programs": ("hsa", ("vote", "attend_run")),
    "pooling": ("pool", ("halve_levels", "pool_levels", "pool_cells", "measure_spreads")),
}
"""By attribute of ``Settings``: the operation and the kernels whose time counts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    options = _options(arguments)
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    row, searches, shapes = tuned.settings(device), [], []
    for q, k, v in _inputs(options, device):
        dtype = str(q.dtype).removeprefix("torch.")
        shapes.append(f"{q.shape[1]}/{k.shape[1]} heads of {q.shape[3]} dims in {dtype}")
        work = operations(q, k, v)
        for name in options.kernels:
            operation, kernels = TIMED[name]
            kind = q.element_size(), min(dim for dim in tuned.DIMS if dim >= q.shape[3])
            # Where warps have roles, other kernels do not run.
            roles = {field: getattr(row, field) for field in ROLES}
            without = replace(row, **dict.fromkeys(ROLES))
            found, tried = search(without, name, kind, work[operation], kernels, TOLERANCE[q.dtype], device)
            row = replace(found, **roles)
            best = min(tried, key=tried.__getitem__)
            print(f"{name}, {shapes[-1]}: {best}, {tried[best]:.4f} ms, of {len(tried)}", file=sys.stderr)
            times = [{"settings": str(value), "ms": ms if ms < inf else None} for value, ms in tried.items()]
            searches.append({"settings": name, "inputs": shapes[-1], "tried": times})
    source = "recorded" if options.inputs else "random"
    found = f"{torch.cuda.get_device_name(device)}, {source} q, k, v: {', '.join(shapes)}"
    text = printed(f"SM_{capability[0]}{capability[1]}", replace(row, measured=found))
    record = {"environment": environment(device), "inputs": source, "tokens": q.shape[2], "row": text}
    path = options.output or RESULTS / f"tuned-{capability[0]}{capability[1]}.json"
    path.write_text(json.dumps({**record, "searches": searches}, indent=1) + "\n", encoding="utf-8")
    print(text)
    return 0


def search(
    row: Settings,
    name: str,
    kind: tuple[int, int],
    run: Operation,
    kernels: Sequence[str],
    tolerance: float,
    device: torch.device,
) -> tuple[Settings, dict[Value, float]]:
    """Looks for faster settings of one attribute of ``row``, for heads of one kind where that has tiles.

    Returns:
        The row with the fastest, and the milliseconds of all that were tried; infinite if they do not fit.
    """
    with tuned.using(device, row):
        expected = run()
        best = _in_use(getattr(row, name), kind)
        tried = {best: milliseconds(run, kernels)}
    candidates = list(neighbours(best))
    while candidates:
        candidate = candidates.pop(0)
        if candidate in tried:
            continue
        tried[candidate] = _time(
            _changed(row, name, kind, candidate), run, kernels, expected, tolerance, device
        )
        if tried[candidate] < GAIN * tried[best]:
            best = candidate
            candidates = list(neighbours(best))
    return _changed(row, name, kind, best), tried


def _time(
    row: Settings,
    run: Operation,
    kernels: Sequence[str],
    expected: Sequence[Tensor],
    tolerance: float,
    device: torch.device,
) -> float:
    """Milliseconds with the settings of ``row``; infinite if they do not fit."""
    with tuned.using(device, row):
        try:
            found = run()
        except UNFIT:
            return inf
        except RuntimeError as error:
            if "PassManager" in str(error):  # the compiler has no code for such a tile
                return inf
            raise
        for one, other in zip(found, expected, strict=True):
            error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)
            if not error <= tolerance:
                sys.exit(f"error: results differ by {error:.2e} with {row}; at most {tolerance} is rounding")
        return milliseconds(run, kernels)


def milliseconds(run: Operation, kernels: Sequence[str]) -> float:
    """The GPU's time for the kernels of these names in one run, on average."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    times = [event.self_device_time_total for event in profile.key_averages() if event.key in kernels]
    if not times:
        raise RuntimeError(f"the profiler has seen none of {', '.join(kernels)}")
    return float(sum(times)) / 1e3 / REPEATS


def neighbours(value: Value) -> Iterator[Value]:
    """Settings of which one number is another."""
    if isinstance(value, int):
        yield from (other for other in (value - 1, value + 1) if other >= 1)
        return
    if isinstance(value, Pooling):
        for name, number in asdict(value).items():
            yield from (
                replace(value, **{name: other}) for other in (number // 2, number * 2) if 1 <= other <= 256
            )
        return
    yield from (
        replace(value, warps=warps) for warps in (value.warps // 2, value.warps * 2) if 2 <= warps <= 16
    )
    yield from (replace(value, stages=at) for at in (value.stages - 1, value.stages + 1) if 1 <= at <= 5)
    yield from (replace(value, registers=limit) for limit in (None, 96, 128, 168) if limit != value.registers)
    yield from (replace(value, rows=rows) for rows in (value.rows // 2, value.rows * 2) if 16 <= rows <= 256)
    yield from (replace(value, keys=keys) for keys in (value.keys // 2, value.keys * 2) if 16 <= keys <= 128)


def operations(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Operation]:
    """What the kernels are timed in, with the default sizes of HSA and MAHA, on one row."""
    g, bands = geometry_of(HSAConfig(), q.shape[1] // k.shape[1]), bands_of(MAHAConfig())
    tokens, scale = q.shape[2], q.shape[3] ** -0.5
    start = torch.zeros(1, dtype=torch.int64, device=q.device)
    length = start + tokens
    grad = torch.randn_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]).contiguous()

    def pyramid_of(x: Tensor, ratios: tuple[int, ...], offset: int) -> list[Tensor]:
        options = {"ratios": ratios, "offset": offset, "pooling": "mean", "weights": [None] * len(ratios)}
        return pyramid.extend_pyramid(x, None, start, new=tokens, **options)

    def spreads_of(cells: Tensor) -> Tensor:
        return pyramid.extend_spreads(k, cells, None, start, new=tokens, ratio=g.node, offset=g.sink)

    halves = (bands.ratio,) * (bands.scales - 1)
    nodes, cells = pyramid_of(k, g.ratios, g.sink), [pyramid_of(x, halves, 0) for x in (k, v)]
    spreads = spreads_of(nodes[0])
    sizes = {"scale": scale, "sliding_window": 0, "padded": False, "geometry": g}
    forward = partial(
        hsa.hsa_attention, q, k, v, start, length, nodes, spreads, [], None, None, None, None,
        causal=True, **sizes,
    )  # fmt: skip
    out, spans, choices, lse = forward()

    def hsa_backward() -> Sequence[Tensor]:
        given = (grad, q, k, v, start, length, nodes, [], spans, choices, out, lse, None)
        return hsa.hsa_attention_backward(*given, **sizes)[:3]

    def decode() -> Sequence[Tensor]:
        state = ([x.clone() for x in nodes], spreads.clone(), spans.clone(), choices.clone())
        given = (q[:, :, -1:], k, v, start, length, *state, None, [None] * len(nodes))
        return [triton_decode.hsa_decode(*given, pooling="mean", ending=False, **sizes)]

    offsets = torch.zeros(q.shape[1], bands.scales, device=q.device)
    inputs = (q, k, v, start, length, *cells, offsets)
    options = {"scale": scale, "bands": bands, "aggregation": "convex", "regularizer": "entropy"}

    def maha_backward() -> Sequence[Tensor]:
        grad_q, keys, values, grad_offsets = maha.maha_attention_backward(grad, *inputs, **options)
        return [grad_q, *keys, *values, grad_offsets]

    def pool() -> Sequence[Tensor]:
        levels = pyramid_of(k, g.ratios, g.sink)
        return [*levels, spreads_of(levels[0]), *pyramid_of(k, halves, 0)]

    return {
        "hsa": lambda: forward()[:1],
        "hsa_backward": hsa_backward,
        "decode": decode,
        "maha": lambda: [maha.maha_attention(*inputs, **options)],
        "maha_backward": maha_backward,
        "pool": pool,
    }


def printed(name: str, row: Settings) -> str:
    """The row as Python; of heads that have the same tile only the widest is listed, where all have one."""
    lines = [f"{name} = Settings("]
    for field in fields(row):
        value = getattr(row, field.name)
        if not isinstance(value, Mapping):
            lines.append(f"    {field.name}={value!r},")
            continue
        if field.name in ROLES:
            lines.append(f"    {field.name}={{")
            lines += [f"        {kind}: {_as_python(value[kind])}," for kind in value]
            lines.append("    },")
            continue
        kinds = [(size, dim) for size, dim in sorted(value) if value.get((size, 2 * dim)) != value[size, dim]]
        lines += [f"    {field.name}=tiles(", "        {"]
        lines += [f"            {kind}: {_as_python(value[kind])}," for kind in kinds]
        lines += ["        }", "    ),"]
    return "\n".join([*lines, ")"])


def _as_python(tile: Tile) -> str:
    numbers = [tile.rows, tile.keys, tile.warps, tile.stages]
    if tile.registers is not None:
        numbers.append(tile.registers)
    few = "" if tile.few is None else f", few={tile.few}"
    return f"Tile({', '.join(map(str, numbers))}{few})"


def _in_use(value: Tiles | Pooling | int, kind: tuple[int, int]) -> Value:
    """The settings to start from, without ``few`` where every tile is of few rows."""
    if isinstance(value, Pooling | int):
        return value
    tile = value[kind]
    if tile.few is None or tile.rows >= tuned.FULL_ROWS:
        return tile
    return replace(tile, warps=tile.few[0], stages=tile.few[1], registers=None, few=None)


def _changed(row: Settings, name: str, kind: tuple[int, int], value: Value) -> Settings:
    changed = {**getattr(row, name), kind: value} if isinstance(value, Tile) else value
    return replace(row, **{name: changed})


def _inputs(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if options.inputs:
        recorded = torch.load(options.inputs, map_location=device, weights_only=True)
        yield recorded["q"], recorded["k"], recorded["v"]
        return
    generator = torch.Generator(device).manual_seed(0)
    for dtype in options.dtypes:
        for dim in options.dims:
            shapes = [(1, heads, options.tokens, dim) for heads in (options.heads, *[options.kv_heads] * 2)]
            q, k, v = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
            yield q.to(getattr(torch, dtype)), k.to(getattr(torch, dtype)), v.to(getattr(torch, dtype))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--inputs", type=Path, help="a file of torch.save with a dict of q, k and v, [1, heads, tokens, dims]"
    )
    add("--kernels", nargs="+", choices=[*TIMED], default=[*TIMED], help="the settings to look for")
    add("--dims", type=int, nargs="+", default=[64, 128], help="of a head, of random inputs")
    add("--dtypes", nargs="+", default=["bfloat16"], help="of random inputs")
    add("--tokens", type=int, default=32768, help="of random inputs")
    add("--heads", type=int, default=32, help="of random inputs")
    add("--kv-heads", type=int, default=8, help="of random inputs")
    add("--output", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
