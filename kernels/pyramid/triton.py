"""The pyramid by a Triton kernel, one launch a level, to the bit as ``blocked`` computes it.

x [B,H,N,D], levels of the first N−T tokens  →  levels of all N tokens

Nothing is read back from the device and sizes follow from shapes: a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS = 32
"""Cells of a program."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(x: Tensor, pooling: str) -> str | None:
    """Returns what this kernel cannot do of a call, or None; it has no gradients."""
    if pooling not in ("mean", "max"):
        return f"pooling={pooling!r}"
    if x.dtype not in DTYPES:
        return f"{x.dtype}"
    if x.requires_grad and torch.is_grad_enabled():
        return "gradients"
    return None


def extend_pyramid(
    x: Tensor,
    levels: Sequence[Tensor] | None,
    start: Tensor,
    *,
    new: int,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
) -> list[Tensor]:
    """As :func:`retrofit.kernels.pyramid.blocked.extend_pyramid`, for ``mean`` and ``max``."""
    batch, heads, tokens, dim = x.shape
    room = max(tokens - offset, 0)
    result: list[Tensor] = []
    children = x if x.stride(-1) == 1 else x.contiguous()
    for level, ratio in enumerate(ratios):
        size = prod(ratios[: level + 1])
        capacity = room // size
        cells = x.new_empty(batch, heads, capacity, dim)
        known = 0 if levels is None else levels[level].shape[2]
        if levels is not None:
            cells[:, :, :known] = levels[level]
        cells[:, :, known:] = 0
        count = capacity if levels is None else (new + size - 1) // size + 1
        if capacity:
            pool_cells[(triton.cdiv(count, CELLS), batch * heads)](
                children, cells, start, *children.stride()[:3], children.shape[2], capacity, count, heads,
                tokens - offset - (tokens if levels is None else new),
                FIRST=level == 0, OFFSET=offset, SIZE=size, RATIO=ratio, DIM=dim,
                DIM_PAD=max(16, triton.next_power_of_2(dim)), MAXIMUM=pooling == "max", CELLS=CELLS,
                num_warps=4,
            )  # fmt: skip
        children = cells
        result.append(cells)
    return result


@triton.jit
def pool_cells(
    x, cells, start, stride_b, stride_h, stride_n, members, capacity, count, heads, past,
    FIRST: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr, RATIO: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, MAXIMUM: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Writes the ``count`` cells of each row of [B, H, capacity, DIM] that ``past`` tokens do not complete."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    begin = tl.load(start + b)
    cell = tl.maximum(past - begin, 0) // SIZE + tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    mine = (cell < capacity) & (tl.program_id(0) * CELLS + tl.arange(0, CELLS) < count)
    origin = cell * RATIO
    if FIRST:
        origin += begin + OFFSET
    dim = tl.arange(0, DIM_PAD)
    mask = mine[:, None] & (dim[None] < DIM)
    line = x + b * stride_b + bh % heads * stride_h + dim[None]
    at = tl.minimum(origin, members - 1).to(tl.int64)
    pooled = tl.load(line + at[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, RATIO):
        at = tl.minimum(origin + i, members - 1).to(tl.int64)
        member = tl.load(line + at[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
        pooled = tl.maximum(pooled, member) if MAXIMUM else pooled + member
    if not MAXIMUM:
        pooled = tl.div_rn(pooled, pooled * 0 + RATIO)
    out = cells + (bh * capacity + cell[:, None]) * DIM + dim[None]
    tl.store(out, pooled.to(cells.dtype.element_ty), mask=mask)
