"""Execution of a few query blocks: which rows of keys they fetch, who sees what, and one softmax over all.

    exact_plan   blocks        →  rows int64 [B, R, E], bias [B, R, query_block, E·block]: sinks and window
    plan         choices       →  rows int64 [B, Hkv, R, S], bias [B, Hkv, R, query_block, S·block]
    attend       queries, bias, fetched keys and values  →  [B·Hkv·R, G·query_block, Dv]

The first rows are sinks and window, a fixed number. The list of leaves follows, in the order of the block's choices,
in tiles of ``LIST_TILE`` rows. Later queries only add to its end, where the earlier ones see
nothing: their sums go on with exact zeros, tile by tile, and change in no bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules, share_of_keys
from retrofit.kernels.hsa.geometry import FADE, Geometry

LIST_TOKENS = 256
"""Keys in a tile of the list of leaves, at least."""


HIDDEN = -1e30
"""Bias of a key that is not seen: its weight is exactly zero, but a row that sees nothing stays finite."""


def list_tile(geometry: Geometry) -> int:
    """Leaves in a tile of the list."""
    return max(1, LIST_TOKENS // geometry.block)


def max_tiles(choices: Tensor, geometry: Geometry) -> int:
    """Tiles that hold all choices [..., E] of a query block."""
    return -(-choices.shape[-1] // list_tile(geometry))


@lru_cache(maxsize=64)
def window_rows(geometry: Geometry, causal: bool) -> int:
    """Rows of ``block`` tokens that the windows of a query block reach into, at most."""
    g, far = geometry, geometry.window + geometry.block * geometry.query_block
    widest = 0
    for t0 in range(far * g.query_block, (far + g.block) * g.query_block, g.query_block):
        last = t0 + g.query_block - 1
        end = last // g.block + 1 if causal else g.window_end(last) // g.block
        widest = max(widest, end - g.window_start(t0) // g.block)
    return widest


def exact_rows(geometry: Geometry, causal: bool) -> int:
    """Rows of ``block`` tokens before the list: sinks, window and, not causal, the incomplete leaf."""
    return geometry.sink // geometry.block + window_rows(geometry, causal) + (not causal)


def widths(geometry: Geometry, causal: bool) -> tuple[int, int]:
    """Keys before the list, and keys in a tile of it."""
    g = geometry
    return exact_rows(g, causal) * g.block, list_tile(g) * g.block


class Listed(NamedTuple):
    """The choices of query blocks, as the execution wants them.

    Attributes:
        leaves: Chosen leaves, int64 [B, Hkv, R, E].
        share: Logarithm of how much more of its leaf each choice lets the queries see, [B, Hkv, R, E].
        seen: How many of them each query of the block may see, int64 [B, Hkv, R, query_block].
    """

    leaves: Tensor
    share: Tensor
    seen: Tensor


def listed(leaves: Tensor, choices: Tensor, geometry: Geometry, dtype: torch.dtype) -> Listed:
    """Reads the choices.

    Args:
        leaves: Leaf candidates, int64 [B, Hkv, R, C].
        choices: Of the blocks, int32 [B, Hkv, R, E].
        geometry: The sizes.
        dtype: Of the shares.
    """
    g = geometry
    _, candidate, rise = g.unpacked(choices)
    limit = g.before(torch.arange(1, g.query_block + 1, dtype=torch.int32, device=choices.device))
    count = torch.searchsorted(choices, limit.expand(*choices.shape[:-1], -1).contiguous())
    share = (rise.clamp(min=1).to(dtype) / FADE).log()
    return Listed(leaves.gather(-1, candidate.to(torch.int64)), share, count)


def exact_plan(
    block: Tensor,
    length: Tensor,
    *,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sinks, window and, not causal, the incomplete leaf: what to fetch, and who sees it.

    Args:
        block: Number of each query block, int64 [B, R].
        length: Number of real tokens of each row, int64 [B].
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        dtype: Of the bias.

    Returns:
        Rows of ``block`` tokens, int64 [B, R, E], and a bias of 0 or a very negative number,
        [B, R, query_block, E·block].
    """
    g, device = geometry, block.device
    t = _positions(block, g)
    sinks = torch.arange(g.sink // g.block, device=device).expand(*block.shape, -1)
    begin = g.window_start(t[..., :1]) // g.block
    parts = [sinks, begin + torch.arange(window_rows(g, causal), device=device)]
    if not causal:
        parts.append((g.sink // g.block + g.complete(length))[:, None, None].expand(*block.shape, 1))
    rows = torch.cat(parts, dim=-1)

    within = torch.arange(g.block, device=device)
    j, at = (rows[..., None] * g.block + within).flatten(-2)[..., None, :], t[..., None]
    in_sinks = torch.arange(j.shape[-1], device=device) < g.sink
    from_window = j >= g.window_start(at).clamp(min=g.sink)
    if causal:
        seen = (in_sinks | from_window) & (j <= at)
    else:
        whole = (g.sink + g.complete(length) * g.block)[:, None, None, None]
        tail = torch.arange(j.shape[-1], device=device) >= j.shape[-1] - g.block
        from_window = from_window & (j < torch.minimum(g.window_end(at), whole))
        seen = torch.where(tail, j >= whole, in_sinks | from_window) & (j < length[:, None, None, None])
    if sliding_window:
        seen = seen & (j > at - sliding_window)
    return rows, torch.where(seen, 0.0, HIDDEN).to(dtype)


def plan(
    exact: tuple[Tensor, Tensor],
    chosen: Listed,
    block: Tensor,
    tiles: int,
    *,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """What to fetch, and who sees it.

    Args:
        exact: What comes before the list, as from ``exact_plan``.
        chosen: The list of leaves, as from ``listed``.
        block: Number of each query block, int64 [B, R].
        tiles: Tiles of the list to execute; ``max_tiles`` always suffices.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.

    Returns:
        Rows of ``block`` tokens, int64 [B, Hkv, R, S], and a bias, very negative for what is not seen,
        [B, Hkv, R, query_block, S·block].
    """
    g, heads, device = geometry, chosen.leaves.shape[1], block.device
    rows, exact_bias = exact
    rows = rows[:, None].expand(-1, heads, -1, -1)
    exact_bias = exact_bias[:, None].expand(-1, heads, -1, -1, -1)
    if not tiles:
        return rows, exact_bias

    slots = tiles * list_tile(g)
    leaves, share = (
        F.pad(x, (0, max(0, slots - x.shape[-1])))[..., :slots] for x in (chosen.leaves, chosen.share)
    )
    share = share.to(exact_bias.dtype).repeat_interleave(g.block, dim=-1)[..., None, :]
    if causal and not sliding_window:
        bias = list_bias(chosen.seen, slots, g, exact_bias.dtype) + share
    else:
        count = chosen.seen if causal else chosen.seen[..., -1:]
        seen = torch.arange(slots, device=device) < count[..., None]
        start = (g.sink + leaves * g.block)[..., None, :]
        t = _positions(block, g)[:, None, ..., None]
        if not causal:
            seen = seen & ((start < g.window_start(t)) | (start >= g.window_end(t)))
        seen = seen.repeat_interleave(g.block, dim=-1)
        if sliding_window:
            within = torch.arange(g.block, device=device)
            seen = seen & ((start[..., None] + within).flatten(-2) > t - sliding_window)
        bias = torch.where(seen, share, HIDDEN)
    rows = torch.cat([rows, leaves + g.sink // g.block], dim=-1)
    return rows, torch.cat([exact_bias, bias], dim=-1)


def _positions(block: Tensor, geometry: Geometry) -> Tensor:
    """Positions [B, R, query_block] of the places of query blocks [B, R]."""
    return block[..., None] * geometry.query_block + torch.arange(geometry.query_block, device=block.device)


def list_bias(count: Tensor, slots: int, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Bias [..., slots·block] of queries that see the first ``count`` [...] leaves of the list.

    Each is a window onto one line 0 … 0 hidden … hidden.
    """
    width = slots * geometry.block
    line = torch.zeros(2 * width, dtype=dtype, device=count.device)
    line[width:] = HIDDEN
    windows = line.unfold(0, width, 1) if width else line.new_zeros(1, 0)
    offset = (slots - count.clamp(max=slots)) * geometry.block
    return windows.index_select(0, offset.flatten()).reshape(*count.shape, width)


def attend(
    queries: Tensor,
    bias: Tensor,
    keys: Tensor,
    values: Tensor,
    exact: int,
    tile: int,
    rules: ScoreRules = PLAIN,
) -> Tensor:
    """One softmax over the fetched keys.

    Args:
        queries: Times the scale, [X, G·Q, D].
        bias: [X, Q, W].
        keys: [X, W, D].
        values: [X, W, Dv].
        exact: Keys before the list.
        tile: Keys in a tile of the list.
        rules: What else happens to the scores; the sinks by query, [X, G·Q, 1].

    Returns:
        [X, G·Q, Dv].
    """
    logits = scores(queries, bias, keys, rules)
    weights = logits.softmax(-1)
    out = accumulate(weights, values, exact, tile)
    return out if rules.sinks is None else out * kept(logits, weights, rules.sinks)


def scores(queries: Tensor, bias: Tensor, keys: Tensor, rules: ScoreRules = PLAIN) -> Tensor:
    """queries·keys + bias, [X, G·Q, W]."""
    group = queries.shape[1] // bias.shape[1]
    if rules.softcap:
        capped = rules.capped_(torch.bmm(queries, keys.transpose(1, 2))).unflatten(1, (group, -1))
        return capped.add_(bias[:, None]).flatten(1, 2)
    start = bias[:, None].expand(-1, group, -1, -1).contiguous().flatten(1, 2)
    return start.baddbmm_(queries, keys.transpose(1, 2))


def kept(logits: Tensor, weights: Tensor, sinks: Tensor) -> Tensor:
    """Share of the softmax that the keys keep from the ``sinks`` [X, G·Q, 1]: [X, G·Q, 1]."""
    return share_of_keys(logits.amax(-1, keepdim=True), weights.amax(-1, keepdim=True), sinks)


def accumulate(weights: Tensor, values: Tensor, exact: int, tile: int) -> Tensor:
    """weights [X, G·Q, W] times values [X, W, Dv], tile by tile in a fixed order."""
    out = torch.bmm(weights[..., :exact], values[:, :exact])
    for begin in range(exact, weights.shape[-1], tile):
        end = begin + tile
        out.baddbmm_(weights[..., begin:end], values[:, begin:end])
    return out
