"""Definition of the pyramid: every complete cell pooled from its members, one after another.

x [B,H,N,D], ratios (2, 4)  →  [[B,H,⌊(N−offset)/2⌋,D], [B,H,⌊(N−offset)/8⌋,D]]

Cell i of level l in row b covers the positions offset + [i·size_l, (i+1)·size_l), position p is index start[b] + p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def build_pyramid(
    x: Tensor,
    start: Tensor,
    *,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
    weights: Sequence[Tensor | None],
) -> list[Tensor]:
    """Returns the levels over all tokens; cells that are not complete in a row are zero.

    Args:
        x: Tokens in index space, [B, H, N, D].
        start: Index of each row's first real token, int64 [B].
        ratios: Members of a cell of each level.
        offset: Position at which the grid starts.
        pooling: ``mean``, ``max``, ``attention`` or ``learned``.
        weights: Per level None, the query [H, D] (attention) or the convolution [H, D, ratio] (learned).
    """
    levels: list[Tensor] = []
    size = 1
    for ratio, weight in zip(ratios, weights, strict=True):
        size *= ratio
        capacity = max(x.shape[2] - offset, 0) // size
        rows = []
        for row, first in enumerate(start.tolist()):
            children = levels[-1][row] if levels else x[row, :, first + offset :]
            complete = max(x.shape[2] - first - offset, 0) // size
            cells = [
                _pool(children[:, i * ratio : (i + 1) * ratio], pooling, weight) for i in range(complete)
            ]
            empty = x.new_zeros(x.shape[1], x.shape[3])
            rows.append(torch.stack(cells + [empty] * (capacity - complete)) if capacity else x.new_zeros(0))
        stacked = torch.stack(rows)
        levels.append(stacked.transpose(1, 2) if capacity else x.new_zeros(*x.shape[:2], 0, x.shape[3]))
    return levels


def spreads(x: Tensor, cells: Tensor, start: Tensor, *, ratio: int, offset: int) -> Tensor:
    """Returns how far the members of each cell of level 0 lie from it: mean over members and dims of (x − cell)².

    Args:
        x: Tokens in index space, [B, H, N, D].
        cells: Level 0, [B, H, M, D], as ``build_pyramid`` returns it.
        start: Index of each row's first real token, int64 [B].
        ratio: Members of a cell.
        offset: Position at which the grid starts.

    Returns:
        [B, H, M] in float32 at least; cells that are not complete in a row have 0.
    """
    found = torch.zeros(cells.shape[:3], dtype=torch.promote_types(x.dtype, torch.float32))
    for row, first in enumerate(start.tolist()):
        for cell in range(min(cells.shape[2], max(x.shape[2] - first - offset, 0) // ratio)):
            begin = first + offset + cell * ratio
            members = x[row, :, begin : begin + ratio].to(found.dtype)
            found[row, :, cell] = (members - cells[row, :, cell, None].to(found.dtype)).square().mean((1, 2))
    return found


def _pool(members: Tensor, pooling: str, weight: Tensor | None) -> Tensor:
    # members [H, ratio, D]
    if pooling == "mean":
        return members.mean(1)
    if pooling == "max":
        return members.amax(1)
    assert weight is not None
    if pooling == "attention":
        scores = torch.einsum("hd,hrd->hr", weight, members) / members.shape[-1] ** 0.5
        return torch.einsum("hr,hrd->hd", scores.softmax(1), members)
    return torch.einsum("hdr,hrd->hd", weight, members)
