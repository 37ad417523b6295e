"""The pyramid, each level's members fetched at once: few nodes, the same additions in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from retrofit.kernels.pyramid.blocked import pool


def extend_pyramid(
    x: Tensor,
    recent: Tensor,
    start: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
) -> list[Tensor]:
    """As ``torch.ops.retrofit.extend_pyramid``, exportable."""
    tokens, new = x.shape[2] - offset, recent.shape[2]
    room = torch.sym_max(tokens, 0) if offset else tokens
    result: list[Tensor] = []
    children = x
    for level, ratio in enumerate(ratios):
        size = prod(ratios[: level + 1])
        capacity = room // size
        # Two spare cells, as in ``retrofit.kernels.pyramid.blocked``.
        count = ((new + size - 1) // size if levels else capacity) + 2
        first = (tokens - new - start).clamp(min=0) // size if levels else torch.zeros_like(start)
        members = (first * ratio)[:, None] + torch.arange(count * ratio, device=x.device)
        if level == 0:
            members = members + (start + offset)[:, None]
        found = _rows(children, members.clamp(max=children.shape[2] - 1)).unflatten(2, (-1, ratio))
        children = pool(found.unbind(3), pooling, weights[level] if weights else None)
        if levels:
            place = first[:, None] + torch.arange(count, device=x.device)
            room_for_new = torch.zeros_like(children)
            place = place[:, None, :, None].expand_as(children)
            children = torch.cat([levels[level], room_for_new], 2).scatter(2, place, children)
        result.append(children[:, :, :capacity])
    return result


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, H, C, D] of x [B, H, N, D] by index [B, C], each copied whole."""
    batch, heads, slots, width = x.shape
    base = torch.arange(batch * heads, device=x.device).unflatten(0, (batch, heads)) * slots
    at = base[..., None] + index[:, None]
    return x.reshape(-1, width).index_select(0, at.flatten()).reshape(batch, heads, -1, width)
