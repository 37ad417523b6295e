"""Summaries of what a query block does not execute: which spans each query adds, and the softmax with them.

``geometry`` defines the cover. A span takes part if it is free and its parent is not, so only children of spans
that hold an executed leaf (or an edge of what a query may see) are looked at: a number fixed by the geometry.
"""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa.blocked_execute import HIDDEN, accumulate, scores
from retrofit.kernels.hsa.geometry import Geometry


def cover(
    leaves: Tensor,
    spans: Tensor,
    choices: Tensor,
    block: Tensor,
    length: Tensor,
    highest: int,
    *,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
) -> list[tuple[Tensor, Tensor]]:
    """Per level 0 … ``highest``, spans to look at and the queries for which they are in the cover.

    Args:
        leaves: Leaf candidates, int64 [B, Hkv, R, C].
        spans: Kept spans of level 1, [B, Hkv, R, beam].
        choices: Of the blocks, int32 [B, Hkv, R, E]; a leaf that has risen at all is not summarised.
        block: Number of each query block, int64 [B, R].
        length: Number of real tokens of each row, int64 [B].
        highest: No block's top level is higher.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.

    Returns:
        Spans int64 [B, Hkv, R, W], −1 in the unused places, and bool [B, Hkv, R, query_block, W].
    """
    g = geometry
    rows = torch.arange(g.query_block, device=block.device)
    t = (block[..., None] * g.query_block + rows)[:, None]  # [B, 1, R, Q]
    whole = g.complete(length)[:, None, None].expand(-1, 1, block.shape[1])
    covered = g.covered(t[..., 0]) if causal else whole
    last = g.covered(t[..., -1]) if causal else whole
    top = g.top_level(covered)
    when = torch.where(leaves >= 0, g.first_rows(choices), g.query_block)
    rows = rows if causal else torch.full_like(rows, g.query_block - 1)

    def free(level: int, ids: Tensor) -> Tensor:
        inside = leaves[..., None, :] // g.fanout**level == ids[..., None]
        touched = torch.where(inside, when[..., None, :], g.query_block).amin(-1)
        at, size = ids[..., None, :], g.span_size(level)
        begin, tt = g.sink + at * size, t[..., None]
        limit = g.covered(tt) if causal and level == 0 else (covered // g.fanout**level)[..., None, None]
        found = (at >= 0) & (at < limit) & (touched[..., None, :] > rows[:, None])
        if not causal:
            found = found & ((begin + size <= g.window_start(tt)) | (begin >= g.window_end(tt)))
        if sliding_window:
            found = found & (begin > tt - sliding_window)
        return found

    split = _splits(spans, t, causal, sliding_window, g)
    levels = []
    for level in range(highest + 1):
        ids = _looked_at(level, split, covered, last, top, g).expand(*leaves.shape[:3], -1)
        in_cover = free(level, ids)
        has_parent = (level < top)[..., None, None]
        in_cover = in_cover & ~(has_parent & free(level + 1, torch.where(ids >= 0, ids // g.fanout, -1)))
        levels.append((ids, in_cover))
        split = _distinct(torch.where(split >= 0, split // g.fanout, -1))
    return levels


def _splits(spans: Tensor, t: Tensor, causal: bool, sliding_window: int, geometry: Geometry) -> Tensor:
    """Spans of level 1 that may be in part executed or in part out of sight, [B, Hkv, R, ·]."""
    g = geometry
    edges = []
    if not causal:
        edges += [(g.window_start(t) - g.sink) // g.block, (g.window_end(t) - g.sink) // g.block]
    if sliding_window:
        edges.append(-((sliding_window - 1 - t + g.sink) // g.block))
    parents = [edge.clamp(min=0).expand(*spans.shape[:3], -1) // g.fanout for edge in edges]
    return _distinct(torch.cat([spans.to(torch.int64), *parents], dim=-1))


def _distinct(ids: Tensor) -> Tensor:
    """``ids`` in ascending order with −1 in place of repetitions."""
    ids = ids.sort(dim=-1).values
    again = F.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
    return torch.where(again, -1, ids)


def _looked_at(
    level: int, split: Tensor, covered: Tensor, last: Tensor, top: Tensor, geometry: Geometry
) -> Tensor:
    """Spans of ``level``: children of ``split``, the right edge, or all where ``level`` is the top."""
    g = geometry
    parents, end = covered // g.fanout ** (level + 1), covered // g.fanout**level
    children = split[..., None] * g.fanout + torch.arange(g.fanout, device=split.device)
    known = (split >= 0) & (split < parents[..., None])
    children = torch.where(known[..., None], children, -1).flatten(-2)
    width = g.leaf_width - g.beam * g.fanout if level == 0 else g.fanout - 1
    edge = parents[..., None] * g.fanout + torch.arange(width, device=split.device)
    edge = torch.where(edge < (last if level == 0 else end)[..., None], edge, -1)
    below = torch.cat([children, edge.expand(*children.shape[:-1], -1)], dim=-1)
    if level == 0:
        return below
    below = F.pad(below, (0, max(0, g.beam * g.fanout - below.shape[-1])), value=-1)
    slots = torch.arange(below.shape[-1], device=split.device)
    every = torch.where(slots < end[..., None], slots, -1)
    return torch.where((top == level)[..., None], every, torch.where((top > level)[..., None], below, -1))


def cover_bias(levels: list[tuple[Tensor, Tensor]], geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """Logarithm of the node size where a node is in the cover, [B·Hkv·R, query_block, M]."""
    parts = []
    for level, (_, mask) in enumerate(levels):
        size = torch.full((), log(geometry.node_size(level)), dtype=dtype, device=mask.device)
        bias = torch.where(mask, size, HIDDEN)
        parts.append(bias.repeat_interleave(geometry.nodes_in_span(level), dim=-1).flatten(0, 2))
    return torch.cat(parts, dim=-1)


def attend_with_cover(
    queries: Tensor,
    bias: Tensor,
    keys: Tensor,
    values: Tensor,
    exact: int,
    tile: int,
    node_bias: Tensor,
    nodes: Tensor,
    value_nodes: Tensor,
    gate: Tensor,
    rules: ScoreRules = PLAIN,
) -> Tensor:
    """One softmax over the fetched keys and, times the gate, the nodes of the cover.

    Args:
        queries: Times the scale, [X, G·Q, D].
        bias: [X, Q, W].
        keys: [X, W, D].
        values: [X, W, Dv].
        exact: Keys before the list.
        tile: Keys in a tile of the list.
        node_bias: [X, Q, M].
        nodes: [X, M, D].
        value_nodes: [X, M, Dv].
        gate: At least 0, [X, G·Q, 1].
        rules: What else happens to the scores; the sinks by query, [X, G·Q, 1].

    Returns:
        [X, G·Q, Dv].
    """
    logits, scored = scores(queries, bias, keys, rules), scores(queries, node_bias, nodes, rules)
    weights, pooled = shares(logits, scored, gate, exact, tile, rules.sinks)
    return accumulate(weights, values, exact, tile) + torch.bmm(gate * pooled, value_nodes)


def shares(
    logits: Tensor, summaries: Tensor, gate: Tensor, exact: int, tile: int, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shares of the keys [X, G·Q, W] and, not yet times the gate, of the nodes [X, G·Q, M] in the softmax."""
    highest = summaries.amax(-1, keepdim=True) + gate.log()
    top = torch.maximum(logits.amax(-1, keepdim=True), highest)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    weights, pooled = (logits - top).exp(), (summaries - top).clamp(max=80.0).exp()
    total = weights[..., :exact].sum(-1, keepdim=True)
    for begin in range(exact, weights.shape[-1], tile):
        total = total + weights[..., begin : begin + tile].sum(-1, keepdim=True)
    total = total + gate * pooled.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    return weights / total, pooled / total
