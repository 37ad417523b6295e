"""The pyramid and the spreads, members fetched at once: few nodes, the same additions in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels.pyramid.blocked import pool, spread


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


def extend_spreads(
    x: Tensor,
    recent: Tensor,
    cells: Tensor,
    spreads: Tensor | None,
    start: Tensor,
    *,
    ratio: int,
    offset: int,
) -> Tensor:
    """As ``torch.ops.retrofit.extend_spreads``, exportable."""
    new, capacity = recent.shape[2], cells.shape[2]
    count = (capacity if spreads is None else (new + ratio - 1) // ratio) + 2
    past = x.shape[2] - offset - new
    first = torch.zeros_like(start) if spreads is None else (past - start).clamp(min=0) // ratio
    at = (first * ratio + start + offset)[:, None] + torch.arange(count * ratio, device=x.device)
    members = _rows(x, at.clamp(max=x.shape[2] - 1)).unflatten(2, (-1, ratio)).unbind(3)
    place = first[:, None] + torch.arange(count, device=x.device)
    found = spread(members, _rows(pad(cells, (0, 0, 0, 2)), place.clamp(max=capacity + 1)))
    if spreads is not None:
        place = place[:, None].expand_as(found)
        found = torch.cat([spreads, torch.zeros_like(found)], 2).scatter(2, place, found)
    return found[:, :, :capacity]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, H, C, D] of x [B, H, N, D] by index [B, C], each copied whole."""
    batch, heads, slots, width = x.shape
    base = torch.arange(batch * heads, device=x.device).unflatten(0, (batch, heads)) * slots
    at = base[..., None] + index[:, None]
    return x.reshape(-1, width).index_select(0, at.flatten()).reshape(batch, heads, -1, width)
