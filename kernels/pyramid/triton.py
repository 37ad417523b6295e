"""The pyramid by Triton kernels, to the bit as ``blocked`` computes it, and the spreads of its cells.

x [B,H,N,D], levels of the first N−T tokens  →  levels of all N tokens

Built from nothing, several levels take one launch, and the spreads none of their own; levels that are extended take one
each. What is built from nothing has gradients. The kernels are those of ``triton_pool`` and ``triton_backward``.

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
from torch import Tensor
from torch.autograd.function import once_differentiable

from retrofit.kernels.pyramid.triton_backward import pool_gradients
from retrofit.kernels.pyramid.triton_pool import (
    halve_levels,
    measure_spreads,
    pool_cells,
    pool_levels,
)
from retrofit.kernels.repeat import repeated_call
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
        options = {"ratios": tuple(ratios), "offset": offset, "pooling": pooling}
        return list(_Built.apply(x, start, options, *weights))  # type: ignore[no-untyped-call]
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
    weights: Sequence[Tensor | None],
    *,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
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
    def forward(
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
        grad_x, grad_taps = repeated_call(_built_gradients, (x, start, cells, taps, grads), ctx.options)
        return grad_x, None, None, *grad_taps


def _built_gradients(
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


def growing(dim: int, device: torch.device) -> dict[str, int]:
    """Constants of ``grow_levels`` that follow from the dims and the GPU."""
    return {**_halved(dim), "CELLS": settings(device).pooling.cells}


def _halved(dim: int) -> dict[str, int]:
    """The dims of a tile, and how often they can be halved."""
    return {"DIM_PAD": _padded(dim), "HALVINGS": _padded(dim).bit_length() - 1}


@cache
def _padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))
