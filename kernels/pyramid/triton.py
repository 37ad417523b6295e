"""The pyramid by Triton kernels, to the bit as ``blocked`` computes it, and the spreads of its cells.

x [B,H,N,D], levels of the first N−T tokens  →  levels of all N tokens

Built from nothing, several levels take one launch, and the spreads none of their own; levels that are extended take one
each. What is built from nothing has gradients, by ``triton_backward``.

Nothing is read back from the device and sizes follow from shapes: a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from retrofit.kernels.launch import kernel
from retrofit.kernels.pyramid.triton_backward import pool_gradients
from retrofit.kernels.tuned import settings

MOST_CELLS = 256
"""Cells of the first level that a program pools to one of the last, at most."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(
    x: Tensor, pooling: str, weights: Sequence[Tensor | None], *, differentiable: bool = True
) -> str | None:
    """Returns what these kernels cannot do of a call, or None.

    Args:
        x: As in ``extend_pyramid``.
        pooling: As in ``extend_pyramid``.
        weights: As in ``extend_pyramid``.
        differentiable: Whether it is a call that has gradients here: levels alone, built from nothing.
    """
    if pooling not in ("mean", "max", "learned"):
        return f"pooling={pooling!r}"
    if x.dtype not in DTYPES:
        return f"{x.dtype}"
    if any(w is not None and w.dtype not in DTYPES for w in weights):
        return "weights in float64"
    if not differentiable and has_gradients(x, weights):
        return "gradients"
    return None


def has_gradients(x: Tensor, weights: Sequence[Tensor | None]) -> bool:
    """Whether anybody may ask for gradients of the pyramid of ``x``."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights))


def extend_pyramid(
    x: Tensor,
    levels: Sequence[Tensor] | None,
    start: Tensor,
    *,
    new: int,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
    weights: Sequence[Tensor | None],
) -> list[Tensor]:
    """As :func:`retrofit.kernels.pyramid.blocked.extend_pyramid`."""
    batch, heads, tokens, dim = x.shape
    if levels is None and has_gradients(x, weights):
        options = {"ratios": ratios, "offset": offset, "pooling": pooling}
        return list(_Built.apply(x, start, options, *weights))
    children, cells, taps = _prepared(x, ratios, offset, weights)
    if levels is None:
        _fill(children, cells, None, taps, start, ratios, offset, pooling)
        return cells
    tuned = settings(x.device).pooling
    sizes = accumulate(ratios, mul)
    for level, (ratio, size, known, own) in enumerate(zip(ratios, sizes, levels, cells, strict=True)):
        capacity = own.shape[2]
        own[:, :, : known.shape[2]] = known
        own[:, :, known.shape[2] :] = 0
        count = (new + size - 1) // size + 1
        if capacity:
            pool_cells[(-(-count // tuned.cells), batch * heads)](
                children, own, taps[level], start, *children.stride()[:3],
                children.shape[2], capacity, count, heads, tokens - offset - new,
                FIRST=level == 0, OFFSET=offset, SIZE=size, RATIO=ratio, DIM=dim, DIM_PAD=_padded(dim),
                POOLING=pooling, CELLS=tuned.cells, num_warps=tuned.warps, enable_fp_fusion=False,
            )  # fmt: skip
        children = own
    return cells


def build_with_spreads(
    x: Tensor,
    start: Tensor,
    *,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
    weights: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor]:
    """``extend_pyramid`` from nothing, and ``extend_spreads`` of its first level."""
    x, cells, taps = _prepared(x, ratios, offset, weights)
    spreads = x.new_empty(cells[0].shape[:3], dtype=torch.float32)
    _fill(x, cells, spreads, taps, start, ratios, offset, pooling)
    return cells, spreads


def _prepared(
    x: Tensor, ratios: Sequence[int], offset: int, weights: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], tuple[Tensor | None, ...]]:
    """x and weights as the kernels take them, and room for the cells of all levels."""
    room = max(x.shape[2] - offset, 0)
    cells = _room_for(x, [room // size for size in accumulate(ratios, mul)])
    taps = tuple(None if weight is None else weight.contiguous() for weight in weights)
    return x if x.stride(-1) == 1 else x.contiguous(), cells, taps


def _room_for(x: Tensor, counts: Sequence[int], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Levels of so many cells one after another in one tensor, where a kernel reaches all of them from one address."""
    batch, heads, _, dim = x.shape
    sizes = [batch * heads * count * dim for count in counts]
    parts = x.new_empty(sum(sizes), dtype=dtype).split(sizes)
    return [part.view(batch, heads, count, dim) for part, count in zip(parts, counts, strict=True)]


def _fill(
    x: Tensor,
    cells: list[Tensor],
    spreads: Tensor | None,
    taps: tuple[Tensor | None, ...],
    start: Tensor,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
) -> None:
    """Pools x to all levels, several in a launch; measures the spreads of the first one's cells if there is room for
    them."""
    batch, heads, _, dim = x.shape
    tuned = settings(x.device).pooling
    shared = {"OFFSET": offset, "DIM": dim, "POOLING": pooling}
    halves = spreads is None and all(ratio == 2 for ratio in ratios)
    most = tuned.members // 2 if halves else MOST_CELLS
    for first, until, span in _launches(cells, ratios, most, tuned.many):
        out = tuple(cells[first:until])
        capacities = tuple(level.shape[2] for level in out)
        arguments = (
            x, out, taps[first:until], start, *x.stride()[:3], x.shape[2], capacities, heads
        )  # fmt: skip
        if halves:
            halve_levels[(-(-2 * capacities[0] // tuned.members), batch * heads)](
                *arguments, FIRST=first == 0, LEVELS=len(out), TILE=tuned.members, DIM_PAD=_padded(dim), **shared,
                num_warps=tuned.warps, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            pool_levels[(-(-capacities[0] // span), batch * heads)](
                *arguments, spreads, FIRST=first == 0, LEVELS=len(out), RATIOS=tuple(ratios[first:until]), SPAN=span,
                CELLS=tuned.many, **_halved(dim), **shared,
                num_warps=tuned.many_warps, enable_fp_fusion=False,
            )  # fmt: skip
        x, spreads = out[-1], None


def _launches(
    cells: Sequence[Tensor], ratios: Sequence[int], most: int, many: int
) -> Iterator[tuple[int, int, int]]:
    """The levels that each launch makes, (first, until), and how many cells of the first a program has: about ``many``,
    which become whole cells of the last. At most ``most`` become one, if there are several levels."""
    first, end = 0, sum(level.shape[2] > 0 for level in cells)
    while first < end:
        until, span = first + 1, 1
        while until < end and span * ratios[until] <= most:
            until, span = until + 1, span * ratios[until]
        yield first, until, span * max(1, many // span)
        first = until


class _Built(torch.autograd.Function):
    """The levels of a pyramid from nothing, with gradients."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, start: Tensor, options: dict[str, Any], *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        x, cells, taps = _prepared(x, options["ratios"], options["offset"], weights)
        _fill(x, cells, None, taps, start, **options)
        ctx.options, ctx.levels = options, len(cells)
        ctx.save_for_backward(x, start, *cells, *taps)
        return tuple(cells)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, start, *saved = ctx.saved_tensors
        cells, taps = saved[: ctx.levels], saved[ctx.levels :]
        grad_x, grad_taps = _gradients(x, start, cells, taps, grads, **ctx.options)
        return grad_x, None, None, *grad_taps


def _gradients(
    x: Tensor,
    start: Tensor,
    cells: Sequence[Tensor],
    taps: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    *,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of x and of each level's taps, from those of the cells."""
    batch, heads, _, dim = x.shape
    tuned, most = settings(x.device).pooling, max(ratios)
    counts = [level.shape[2] for level in cells]
    heirs = [*(min(n, m * ratio) for n, m, ratio in zip(counts, counts[1:], ratios[1:], strict=False)), 0]
    grads = [grad.contiguous() for grad in grads]
    above = _room_for(x, counts, torch.float32)
    grad_x = x.new_zeros(x.shape)
    grad_taps = [None if tap is None else torch.zeros_like(tap) for tap in taps]
    for first, until, span in reversed(list(_launches(cells, ratios, MOST_CELLS, tuned.many))):
        spans = tuple(span // prod(ratios[first + 1 : level + 1]) for level in range(first, until))
        programs, own = -(-counts[first] // span), slice(first, until)
        line, below = (cells[first - 1], above[first - 1]) if first else (x, grad_x)
        parted = above[first]
        if pooling == "learned":
            parted = x.new_empty(until - first, programs, batch, heads, dim, most, dtype=torch.float32)
        pool_gradients[(programs, batch * heads)](
            line, tuple(cells[own]), tuple(taps[own]), start, tuple(grads[own]), tuple(above[own]), below, parted,
            *line.stride()[:3], line.shape[2], tuple(counts[own]), tuple(heirs[own]), heads,
            FIRST=first == 0, LEVELS=until - first, RATIOS=tuple(ratios[own]), SPANS=spans, CELLS=tuned.many,
            MOST=most, OFFSET=offset, DIM=dim, DIM_PAD=_padded(dim), POOLING=pooling, num_warps=tuned.many_warps,
        )  # fmt: skip
        if pooling == "learned":
            for level, total in enumerate(parted.sum((1, 2)), first):
                tap = taps[level]
                assert tap is not None
                grad_taps[level] = total[..., : ratios[level]].to(tap.dtype)
    return grad_x, grad_taps


def extend_spreads(
    x: Tensor, cells: Tensor, spreads: Tensor | None, start: Tensor, *, new: int, ratio: int, offset: int
) -> Tensor:
    """As :func:`retrofit.kernels.pyramid.blocked.extend_spreads`, up to rounding."""
    batch, heads, tokens, dim = x.shape
    x, cells = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cells))
    capacity, known = cells.shape[2], 0 if spreads is None else spreads.shape[2]
    found = x.new_empty(batch, heads, capacity, dtype=torch.float32)
    if spreads is not None:
        found[:, :, :known] = spreads
        found[:, :, known:] = 0
    count = capacity if spreads is None else (new + ratio - 1) // ratio + 1
    if capacity:
        tuned = settings(x.device).pooling
        measure_spreads[(-(-count // tuned.cells), batch * heads)](
            x, cells, found, start, *x.stride()[:3], *cells.stride()[:3], tokens, capacity, count, heads,
            tokens - offset - (tokens if spreads is None else new),
            OFFSET=offset, RATIO=ratio, DIM=dim, **_halved(dim), CELLS=tuned.cells, num_warps=tuned.warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return found


def extend_in_place(
    x: Tensor,
    levels: Sequence[Tensor],
    spreads: Tensor | None,
    start: Tensor,
    length: Tensor,
    *,
    new: int,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
    weights: Sequence[Tensor | None],
) -> None:
    """Brings levels and spreads, which have room for all slots of ``x``, up to the last ``new`` tokens of each row.

    Args:
        x: The members of the first level, [B, H, N, D]; what lies behind a row's tokens is not read.
        levels: Cells per level, [B, H, M, D] in rows, M at least ⌊(N − offset) / size⌋.
        spreads: Of the first level's cells, float32 [B, H, M]; None where there are none to keep.
        start: Index of each row's first token, int64 [B].
        length: Tokens of each row, the new ones included, int64 [B].
        new: Tokens since the call before.
        ratios: Members of a cell, per level.
        offset: Tokens in front of the first cell.
        pooling: As in ``extend_pyramid``.
        weights: As in ``extend_pyramid``.
    """
    batch, heads, members, dim = x.shape
    taps = tuple(None if weight is None else weight.contiguous() for weight in weights)
    tuned = settings(x.device).pooling
    grow_levels[(batch * heads,)](
        x, tuple(levels), taps, spreads, start, length, *x.stride()[:3], members, new,
        tuple(level.shape[2] for level in levels), heads,
        OFFSET=offset, LEVELS=len(levels), RATIOS=tuple(ratios), DIM=dim, **_halved(dim), POOLING=pooling,
        CELLS=tuned.cells, num_warps=tuned.warps, enable_fp_fusion=False,
    )  # fmt: skip


def _halved(dim: int) -> dict[str, int]:
    """The dims of a tile, and how often they can be halved."""
    return {"DIM_PAD": _padded(dim), "HALVINGS": _padded(dim).bit_length() - 1}


@cache
def _padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


@kernel()
def halve_levels(
    x, cells, taps, start, stride_b, stride_h, stride_n, members, capacities, heads,
    FIRST: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, OFFSET: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """Writes ``LEVELS`` levels of [B, H, capacity, DIM], each of the pairs of the one before, the first of x."""
    bh = tl.program_id(1).to(tl.int64)
    origin = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if FIRST:
        origin += tl.load(start + bh // heads).to(tl.int32) + OFFSET
    dim = tl.arange(0, DIM_PAD)
    at = tl.minimum(origin, members - 1).to(tl.int64)
    line = x + bh // heads * stride_b + bh % heads * stride_h + at[:, None] * stride_n + dim[None]
    level = tl.load(line, mask=dim[None] < DIM, other=0.0)
    for i in tl.static_range(LEVELS):
        pairs = tl.permute(tl.reshape(level.to(tl.float32), [TILE >> (i + 1), 2, DIM_PAD]), (0, 2, 1))
        left, right = tl.split(pairs)
        if POOLING == "max":
            pooled = tl.maximum(left, right)
        elif POOLING == "mean":
            pooled = (left + right) * 0.5
        else:
            tap = taps[i] + (bh % heads * DIM + dim) * 2
            one = tl.load(tap, mask=dim < DIM, other=0.0).to(tl.float32)
            two = tl.load(tap + 1, mask=dim < DIM, other=0.0).to(tl.float32)
            pooled = one[None] * left + two[None] * right
        level = pooled.to(x.dtype.element_ty)
        cell = tl.program_id(0) * (TILE >> (i + 1)) + tl.arange(0, TILE >> (i + 1))
        tl.store(
            cells[i] + (bh * capacities[i] + cell[:, None]) * DIM + dim[None],
            level,
            mask=(cell[:, None] < capacities[i]) & (dim[None] < DIM),
        )


@triton.jit
def pool_tile(
    line, stride, origin, members, mask, tap, dim,
    RATIO: tl.constexpr, DIM: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """Pools the rows origin, origin + 1, … origin + RATIO − 1 of a line of ``members`` rows, [CELLS, DIM_PAD]."""
    at = tl.minimum(origin, members - 1).to(tl.int64)
    pooled = tl.load(line + at[:, None] * stride, mask=mask, other=0.0).to(tl.float32)
    if POOLING == "learned":
        pooled *= tl.load(tap, mask=dim < DIM, other=0.0).to(tl.float32)[None]
    for i in tl.static_range(1, RATIO):
        at = tl.minimum(origin + i, members - 1).to(tl.int64)
        member = tl.load(line + at[:, None] * stride, mask=mask, other=0.0).to(tl.float32)
        if POOLING == "max":
            pooled = tl.maximum(pooled, member)
        elif POOLING == "mean":
            pooled += member
        else:
            pooled += tl.load(tap + i, mask=dim < DIM, other=0.0).to(tl.float32)[None] * member
    if POOLING == "mean":
        if RATIO & (RATIO - 1):
            pooled = tl.div_rn(pooled, pooled * 0 + RATIO)
        else:
            pooled *= 1.0 / RATIO  # as exact, and less work
    return pooled


@triton.jit
def spread_tile(
    line, stride, origin, members, mask, middle,
    RATIO: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, HALVINGS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Mean squared distance by dim of the same rows from ``middle`` [CELLS, DIM_PAD].

    Neighbours are added in ``HALVINGS`` halvings: the order is the same wherever the tile lies in registers.
    """
    total = middle * 0.0
    for i in tl.static_range(RATIO):
        at = tl.minimum(origin + i, members - 1).to(tl.int64)
        member = tl.load(line + at[:, None] * stride, mask=mask, other=0.0).to(tl.float32)
        total += (member - middle) * (member - middle)
    for i in tl.static_range(HALVINGS):
        left, right = tl.split(tl.reshape(total, [CELLS, DIM_PAD >> (i + 1), 2]))
        total = left + right
    return tl.reshape(total, [CELLS]) / (RATIO * DIM)


@kernel(do_not_specialize=["members"])
def pool_levels(
    x, cells, taps, start, stride_b, stride_h, stride_n, members, capacities, heads, spreads,
    FIRST: tl.constexpr, LEVELS: tl.constexpr, RATIOS: tl.constexpr, SPAN: tl.constexpr, CELLS: tl.constexpr,
    HALVINGS: tl.constexpr, OFFSET: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """Writes ``LEVELS`` levels of [B, H, capacity, DIM], the first from x; each program ``SPAN`` cells of it, and what
    becomes of them. If there are ``spreads`` [B, H, capacity], writes those of the first level's cells."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    dim = tl.arange(0, DIM_PAD)
    line = x + b * stride_b + h * stride_h + dim[None]
    stride, rows, origin = stride_n.to(tl.int64), members.to(tl.int64), tl.full([], 0, tl.int64)
    if FIRST:
        origin += tl.load(start + b) + OFFSET
    before, count = tl.program_id(0) * SPAN, tl.full([], SPAN, tl.int32)
    for level in tl.static_range(LEVELS):
        if level > 0:
            before, count = before // RATIOS[level], count // RATIOS[level]
        tap = x
        if POOLING == "learned":
            tap = taps[level] + (h * DIM + dim) * RATIOS[level]
        own = cells[level] + bh * capacities[level] * DIM + dim[None]
        after = tl.minimum(before + count, capacities[level])
        for at in range(before, after, CELLS):
            cell = at + tl.arange(0, CELLS)
            mask = (cell < after)[:, None] & (dim[None] < DIM)
            pooled = pool_tile(
                line, stride, origin + cell * RATIOS[level], rows, mask, tap, dim, RATIOS[level], DIM, POOLING
            )
            pooled = pooled.to(cells[level].dtype.element_ty)
            if level == 0 and spreads is not None:
                # Before anything is stored: the members are then read once for both.
                spread = spread_tile(
                    line, stride, origin + cell * RATIOS[level], rows, mask, pooled.to(tl.float32),
                    RATIOS[level], DIM, DIM_PAD, HALVINGS, CELLS,
                )  # fmt: skip
                tl.store(spreads + bh * capacities[0] + cell, spread, mask=cell < after)
            tl.store(own + cell[:, None] * DIM, pooled, mask=mask)
        tl.debug_barrier()  # the next level reads what has been written
        line, stride = own, tl.full([], DIM, tl.int64)
        rows, origin = tl.full([], capacities[level], tl.int64), tl.full([], 0, tl.int64)


@kernel()
def pool_cells(
    x, cells, taps, start, stride_b, stride_h, stride_n, members, capacity, count, heads, past,
    FIRST: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr, RATIO: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, POOLING: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Writes the ``count`` cells of each row of [B, H, capacity, DIM] that ``past`` tokens do not complete."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    begin = tl.load(start + b)
    number = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    cell = tl.maximum(past - begin, 0) // SIZE + number
    mine = (cell < capacity) & (number < count)
    origin = cell * RATIO
    if FIRST:
        origin += begin + OFFSET
    dim = tl.arange(0, DIM_PAD)
    mask = mine[:, None] & (dim[None] < DIM)
    line = x + b * stride_b + bh % heads * stride_h + dim[None]
    tap = taps
    if POOLING == "learned":
        tap = taps + (bh % heads * DIM + dim) * RATIO
    pooled = pool_tile(line, stride_n, origin, members, mask, tap, dim, RATIO, DIM, POOLING)
    out = cells + (bh * capacity + cell[:, None]) * DIM + dim[None]
    tl.store(out, pooled.to(cells.dtype.element_ty), mask=mask)


@kernel()
def measure_spreads(
    x, cells, spreads, start, stride_xb, stride_xh, stride_xn, stride_cb, stride_ch, stride_cn,
    tokens, capacity, count, heads, past,
    OFFSET: tl.constexpr, RATIO: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, HALVINGS: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """Writes ``spreads`` [B, H, capacity] of the ``count`` cells of each row that ``past`` tokens do not complete."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    begin = tl.load(start + b)
    number = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    cell = tl.maximum(past - begin, 0) // RATIO + number
    mine = (cell < capacity) & (number < count)
    dim = tl.arange(0, DIM_PAD)
    mask = mine[:, None] & (dim[None] < DIM)
    at = cells + b * stride_cb + h * stride_ch + cell[:, None] * stride_cn + dim[None]
    middle = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    line = x + b * stride_xb + h * stride_xh + dim[None]
    spread = spread_tile(
        line,
        stride_xn,
        begin + OFFSET + cell * RATIO,
        tokens,
        mask,
        middle,
        RATIO,
        DIM,
        DIM_PAD,
        HALVINGS,
        CELLS,
    )
    tl.store(spreads + bh * capacity + cell, spread, mask=mine)


@kernel(do_not_specialize=["members", "new"])
def grow_levels(
    x, cells, taps, spreads, start, length, stride_b, stride_h, stride_n, members, new, capacities, heads,
    OFFSET: tl.constexpr, LEVELS: tl.constexpr, RATIOS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    HALVINGS: tl.constexpr, POOLING: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Writes the cells [B, H, capacity, DIM] of all levels, and the spreads [B, H, capacity] of those of the first,
    that the last ``new`` tokens of each row complete."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    begin = tl.load(start + b)
    after = tl.maximum(tl.load(length + b) - OFFSET, 0)
    before = tl.maximum(after - new, 0)
    dim = tl.arange(0, DIM_PAD)
    line = x + b * stride_b + h * stride_h + (begin + OFFSET) * stride_n + dim[None]
    stride, rows = stride_n.to(tl.int64), (members - OFFSET - begin).to(tl.int64)
    for level in tl.static_range(LEVELS):
        tap = x
        if POOLING == "learned":
            tap = taps[level] + (h * DIM + dim) * RATIOS[level]
        after, before = after // RATIOS[level], before // RATIOS[level]
        own = cells[level] + bh * capacities[level] * DIM + dim[None]
        for at in range(before, after, CELLS):
            cell = at + tl.arange(0, CELLS)
            mine = cell < after
            mask = mine[:, None] & (dim[None] < DIM)
            pooled = pool_tile(
                line, stride, cell * RATIOS[level], rows, mask, tap, dim, RATIOS[level], DIM, POOLING
            )
            pooled = pooled.to(cells[level].dtype.element_ty)
            tl.store(own + cell[:, None] * DIM, pooled, mask=mask)
            if level == 0 and spreads is not None:
                middle = pooled.to(tl.float32)
                spread = spread_tile(
                    line, stride, cell * RATIOS[level], rows, mask, middle,
                    RATIOS[level], DIM, DIM_PAD, HALVINGS, CELLS,
                )  # fmt: skip
                tl.store(spreads + bh * capacities[0] + cell, spread, mask=mine)
        tl.debug_barrier()  # the next level reads what has been written
        line, stride, rows = own, tl.full([], DIM, tl.int64), tl.full([], capacities[level], tl.int64)
