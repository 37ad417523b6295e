"""Launches MAHA's kernel whose warps have roles, on the GPUs and for the calls that it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels.descriptors import can_describe, described
from retrofit.kernels.launch import INTERPRETED
from retrofit.kernels.maha.triton_roles import RANGES, attend_by_roles
from retrofit.kernels.roles import SLAB
from retrofit.kernels.tuned import Tile, processors

MOST_BITS = 30
"""Of the tokens in a cell of the scale behind the last one."""
SHARED = ("KV_HEADS", "GROUP", "DIM", "SCALES", "LOG", "LOG_RATIO", "SINK", "REACHES")
"""Constants that both kernels have."""


def can_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    width: int,
    scale: float,
    sizes: Mapping[str, Any],
) -> bool:
    """Whether the kernel can do a call, steps of ``width`` cells; other arguments as in ``attend``."""
    if INTERPRETED.value or scale <= 0:
        return False
    if not sizes["DIM"] == sizes["DIM_PAD"] == sizes["VALUE_DIM"] or sizes["DIM"] % SLAB.value:
        return False
    scales, log = sizes["SCALES"], sizes["LOG"]
    if not log or scales * log > MOST_BITS or scales >= RANGES.value:
        return False
    cells = [k.shape[2] >> level * log for level in range(1, scales)]
    if any([x.shape[2] for x in levels] != cells for levels in (keys, values)):
        return False
    # A step of fewer cells than it has room for would read another head's; scales that no token reaches are not read.
    reached = [count for level, count in enumerate(cells, 1) if sizes["REACHES"][level] < k.shape[2]]
    if min(reached, default=width) < width:
        return False
    if any(x.dtype != q.dtype for x in (k, v, *keys, *values)) or k.shape[:3].numel() >= 2**31:
        return False
    return can_describe(q, k, v, *keys, *values)


def attend(
    tile: Tile,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    heads: int,
    query_block: int,
    blocks: int,
    programs: int,
    scale: float,
    sizes: Mapping[str, Any],
) -> None:
    """Writes ``out`` and ``lse``, as ``attend`` of ``triton_execute`` does with the constants ``sizes``."""
    block = [1, 1, tile.keys, SLAB.value]
    cells = [joined(levels) if levels else x for levels, x in ((keys, k), (values, v))]
    tiles = blocks * programs
    attend_by_roles[(min(tiles, processors(q.device)),)](
        described(q, [1, heads, query_block, SLAB.value]), *(described(x, block) for x in (k, v, *cells)),
        start, length, offsets, out, lse, k.shape[2], q.shape[2], blocks, tiles, scale,
        HEADS=heads, QUERY_BLOCK=query_block, **{name: sizes[name] for name in SHARED},
        KEYS=tile.keys, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def joined(levels: Sequence[Tensor]) -> Tensor:
    """The rows of all levels [B, H, M, D] as [1, 1, rows, D]: as they lie if that is one after another, or else copied."""
    first, dim = levels[0], levels[0].shape[3]
    rows = sum(x.shape[:3].numel() for x in levels)
    if rows and _adjoin(levels):
        return first.as_strided((1, 1, rows, dim), (rows * dim, rows * dim, dim, 1))
    found = torch.cat([x.reshape(-1, dim) for x in levels])
    return found[None, None] if rows else found.new_zeros(1, 1, 1, dim)


def _adjoin(levels: Sequence[Tensor]) -> bool:
    """Whether levels are parts of one tensor, one after another."""
    at = levels[0].storage_offset()
    for x in levels:
        if x.storage_offset() != at or not x.is_contiguous():
            return False
        at += x.numel()
    return len({x.untyped_storage().data_ptr() for x in levels}) == 1
