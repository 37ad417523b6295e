"""The pyramid at once or token by token, to the same bit.

x [B,H,N,D], levels of the first N−T tokens  →  levels of all N tokens

Every reduction is written as a fixed sequence of elementwise operations: library reductions may change their
order with the shape, and a cell must not depend on how many others are pooled with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from retrofit.errors import ConfigError

POOLINGS = ("mean", "max", "attention", "learned")


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
    """Returns the pooled levels of ``x``, computing only the cells that the last ``new`` tokens complete.

    Level l pools ``ratios[l]`` members of level l−1 (of the tokens from position ``offset`` on for level 0), so
    its cells hold size_l = prod(ratios[:l+1]) tokens. A level has ⌊(N − offset)/size_l⌋ cells, what a row that
    starts at 0 completes; in other rows the cells beyond their last complete one hold anything finite.

    Args:
        x: All tokens in index space, [B, H, N, D].
        levels: The levels of the first N − new tokens; None builds from nothing.
        start: Index of each row's first real token, int64 [B].
        new: Number of tokens added since ``levels``; not read if that is None.
        ratios: Members of a cell of each level.
        offset: Position at which the grid starts.
        pooling: ``mean``, ``max``, ``attention`` (softmax over the members of query · member / √D) or
            ``learned`` (strided depthwise convolution).
        weights: Per level None, the query [H, D] (attention) or the convolution [H, D, ratio] (learned).

    Returns:
        One tensor [B, H, cells, D] of x's dtype per level.

    Raises:
        ConfigError: If ``pooling`` is unknown.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    tokens = x.shape[2] - offset
    room = torch.sym_max(tokens, 0) if offset else tokens
    result: list[Tensor] = []
    children = x
    for level, (ratio, weight) in enumerate(zip(ratios, weights, strict=True)):
        size = prod(ratios[: level + 1])
        capacity = room // size
        if levels is None and _lies_at_0(level, start):
            line = children if level else children[:, :, offset:]
            end = line.shape[2] // ratio * ratio
            children = pool([line[:, :, i:end:ratio] for i in range(ratio)], pooling, weight)
            result.append(children[:, :, :capacity])
            continue
        # Spare cells at the end take what a row cannot complete yet; with two of them no size can be 0 or 1,
        # for which torch.export would specialise.
        count = (capacity if levels is None else (new + size - 1) // size) + 2
        first = torch.zeros_like(start)
        if levels is not None:
            first = (tokens - new - start).clamp(min=0) // size
        cells = first[:, None] + torch.arange(count, device=x.device)
        origin = cells * ratio if level else cells * ratio + (start + offset)[:, None]
        last = children.shape[2] - 1
        parts = [_take(children, (origin + i).clamp(max=last)) for i in range(ratio)]
        children = pool(parts, pooling, weight)
        if levels is not None:
            place = cells[:, None, :, None].expand_as(children)
            room_for_new = torch.zeros_like(children)
            children = torch.cat([levels[level], room_for_new], 2).scatter(2, place, children)
        result.append(children[:, :, :capacity])
    return result


def extend_spreads(
    x: Tensor, cells: Tensor, spreads: Tensor | None, start: Tensor, *, new: int, ratio: int, offset: int
) -> Tensor:
    """Returns how far the members of each cell of level 0 lie from it: mean over members and dims of (x − cell)².

    It computes only what the last ``new`` tokens complete.

    Args:
        x: All tokens in index space, [B, H, N, D].
        cells: Their level 0, [B, H, M, D], as ``extend_pyramid`` returns it.
        spreads: The spreads of the first N − new tokens, [B, H, M']; None computes all.
        start: Index of each row's first real token, int64 [B].
        new: Number of tokens added since ``spreads``; not read if that is None.
        ratio: Members of a cell.
        offset: Position at which the grid starts.

    Returns:
        [B, H, M] in float32 at least; what a row does not complete has anything finite.
    """
    capacity = cells.shape[2]
    if spreads is None and _lies_at_0(0, start):
        line = x[:, :, offset : offset + capacity * ratio]
        return spread([line[:, :, i::ratio] for i in range(ratio)], cells)
    # Spare cells at the end, as in ``extend_pyramid``.
    count = (capacity if spreads is None else (new + ratio - 1) // ratio) + 2
    first = torch.zeros_like(start)
    if spreads is not None:
        first = (x.shape[2] - offset - new - start).clamp(min=0) // ratio
    at = first[:, None] + torch.arange(count, device=x.device)
    origin = at * ratio + (start + offset)[:, None]
    members = [_take(x, (origin + i).clamp(max=x.shape[2] - 1)) for i in range(ratio)]
    spare = cells.new_zeros(*cells.shape[:2], 2, cells.shape[3])
    found = spread(members, _take(torch.cat([cells, spare], 2), at.clamp(max=capacity + 1)))
    if spreads is not None:
        place = at[:, None].expand_as(found)
        found = torch.cat([spreads, torch.zeros_like(found)], 2).scatter(2, place, found)
    return found[:, :, :capacity]


def crop_pyramid(
    levels: Sequence[Tensor], tokens: int, *, ratios: Sequence[int], offset: int
) -> list[Tensor]:
    """Returns the levels of the first ``tokens`` index slots."""
    room = max(tokens - offset, 0)
    return [level[:, :, : room // prod(ratios[: i + 1])] for i, level in enumerate(levels)]


def _lies_at_0(level: int, start: Tensor) -> bool:
    """Whether the members of a level built from nothing are known to begin at index 0 in every row."""
    if torch.compiler.is_exporting() or torch.compiler.is_compiling():
        return False
    return level > 0 or (start.device.type == "cpu" and not bool(start.any()))


def _take(x: Tensor, index: Tensor) -> Tensor:
    # x [B,H,N,D], index [B,C]  →  [B,H,C,D]
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def pool(members: Sequence[Tensor], pooling: str, weight: Tensor | None) -> Tensor:
    """Pools ``ratio`` members, each [B, H, C, D], into one [B, H, C, D]; accumulates in float32 at least."""
    dtype = members[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    parts = [part.to(wide) for part in members]
    if pooling == "mean":
        # On a GPU PyTorch multiplies by the reciprocal of a number of Python's, which rounds twice.
        pooled = _sum(parts) / torch.full((), len(parts), dtype=wide, device=parts[0].device)
    elif pooling == "max":
        pooled = parts[0]
        for part in parts[1:]:
            pooled = torch.maximum(pooled, part)
    elif weight is None:
        raise ConfigError(f"pooling={pooling!r} needs a weight for every level, got None")
    elif pooling == "attention":
        query = (weight.to(wide) / parts[0].shape[-1] ** 0.5)[:, None, :]
        scores = [_halve(part * query) for part in parts]
        top = scores[0].detach()
        for score in scores[1:]:
            top = torch.maximum(top, score.detach())
        shares = [(score - top).contiguous().exp() for score in scores]
        pooled = _sum([share * part for share, part in zip(shares, parts, strict=True)]) / _sum(shares)
    else:
        taps = weight.to(wide).unbind(2)
        pooled = _sum([tap[:, None, :] * part for tap, part in zip(taps, parts, strict=True)])
    return pooled.to(dtype)


def spread(members: Sequence[Tensor], cells: Tensor) -> Tensor:
    """Mean over members and dims of (member − cell)²; each member and the cells [B, H, C, D] → [B, H, C]."""
    wide = torch.promote_types(cells.dtype, torch.float32)
    cells = cells.to(wide)
    total = _halve(_sum([(member.to(wide) - cells).square() for member in members]))
    return total.squeeze(-1) / (len(members) * cells.shape[-1])


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _halve(x: Tensor) -> Tensor:
    # Sum over the last dimension by halving, kept as size 1.
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([folded, x[..., 2 * half :]], -1) if x.shape[-1] % 2 else folded
    return x
