"""Selection for a few query blocks at a time: the coarse spans, and who chooses which leaf first.

    coarse_spans   [B, Hkv, R, G, D] first queries of R blocks  →  spans  int32 [B, Hkv, R, beam]
    leaf_step      [B, Hkv, R, G·query_block, D] queries        →  first  uint8 [B, Hkv, R, C]

A span's score is that of its best node: its votes are the softmax of the scores over the candidates, summed over
the group's heads. Both are pure functions of tensors whose shapes depend on the geometry and on R alone. The matrix products have
one shape however many tokens a call brings, so that prefill, chunks and single tokens see the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa.blocked_rows import Rows
from retrofit.kernels.hsa.blocked_scratch import Scratch
from retrofit.kernels.hsa.geometry import Geometry

COARSE_TILE = 8
"""Query blocks whose first queries meet the top level's nodes in one product."""


def coarse_spans(
    queries: Tensor,
    nodes: Sequence[Rows],
    prefixes: Sequence[Tensor],
    block: Tensor,
    length: Tensor,
    *,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    tops: tuple[int, int],
    rules: ScoreRules = PLAIN,
) -> Tensor:
    """Returns the level-1 spans kept for ``COARSE_TILE`` query blocks: int32 [B, Hkv, R, beam].

    Args:
        queries: First query of each block, times the scale, [B, Hkv, R, G, D] with R = COARSE_TILE.
        nodes: Spans of nodes by number, per level; those of level 0 are not read.
        prefixes: Per level, the nodes of the first beam·fanout spans, [B·Hkv, nodes_per_span, ·, D]; level 0 is
            not read.
        block: Number of each query block, int64 [B, R].
        length: Number of real tokens of each row, int64 [B].
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        tops: Bounds, both included, on the top levels of these blocks.
        rules: What else happens to the scores.
    """
    g, (batch, heads, blocks) = geometry, queries.shape[:3]
    t0 = block * g.query_block
    covered = g.covered(t0) if causal else g.complete(length)[:, None].expand(-1, blocks)
    covered = covered[:, None].expand(-1, heads, -1)
    top = g.top_level(covered)
    kept = torch.full((batch, heads, blocks, g.beam), -1, device=queries.device)
    for level in range(tops[1], 0, -1):
        ids = g.coarse_ids(kept, covered, level)
        allowed = ids >= 0
        if sliding_window:
            end = g.sink + (ids + 1) * g.span_size(level)
            allowed = allowed & (end - 1 > (t0 - sliding_window)[:, None, :, None])
        if level >= tops[0]:
            votes = _prefix_votes(queries, prefixes[level], allowed, rules)
            if level < tops[1]:
                votes = torch.where(
                    (top == level)[..., None],
                    votes,
                    _span_votes(queries, nodes[level], ids, allowed, rules),
                )
        else:
            votes = _span_votes(queries, nodes[level], ids, allowed, rules)
        chosen = best(votes, allowed, g.beam)
        kept = torch.where(chosen, ids, _LAST).sort(dim=-1).values[..., : g.beam]
        kept = torch.where(kept == _LAST, -1, kept)
    return kept.to(torch.int32)


_LAST = 2**40


def leaf_step(
    queries: Tensor,
    nodes: Rows,
    leaves: Tensor,
    position: Tensor,
    low: Tensor,
    high: Tensor,
    first: Tensor,
    *,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
    scratch: Scratch | None = None,
) -> Tensor:
    """Returns ``first`` with what the new queries choose: uint8 [B, Hkv, R, C].

    Args:
        queries: All places of the blocks, times the scale, [B, Hkv, R, G·query_block, D]; finite.
        nodes: The leaves' nodes by leaf.
        leaves: Leaf candidates of the blocks, int64 [B, Hkv, R, C].
        position: Of each place, int64 [B, R, query_block].
        low: First position of a new query in each row, int64 [B].
        high: End of the new queries in each row, int64 [B].
        first: Choices of the queries before ``low``, uint8 [B, Hkv, R, C].
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        rules: What else happens to the scores.
        scratch: Memory for scoring the leaves of a few lists at a time, to stay in the cache; None for all at once,
            without a look at the data.
    """
    g, (batch, heads, blocks, width) = geometry, leaves.shape
    rows = g.query_block
    allowed = leaf_candidates(leaves, position, causal=causal, sliding_window=sliding_window, geometry=g)
    if scratch is not None:
        # Children of kept spans are candidates for the whole block: only the right edge differs by query.
        same = causal and not sliding_window and bool((leaves[..., : g.beam * g.fanout] >= 0).all())
        begin = g.beam * g.fanout if same else 0
        bias = torch.where(allowed.flatten(0, 2)[..., begin:], 0.0, -torch.inf).to(queries.dtype)
        at = nodes.flat(leaves).reshape(-1, width)
        votes = _list_votes(queries.flatten(0, 2), nodes, at, bias, begin, rules, scratch)
    else:
        votes = _votes(queries, nodes, leaves, allowed, rules)
    votes = votes.reshape(batch, heads, blocks, rows, width)
    chosen = best(votes, allowed, g.leaves_per_query)
    chosen = (
        chosen & ((position >= low[:, None, None]) & (position < high[:, None, None]))[:, None, ..., None]
    )
    place = torch.arange(rows, dtype=torch.uint8, device=queries.device)[:, None]
    when = torch.where(chosen, place, torch.full_like(place[:1], rows)).amin(-2)
    return torch.minimum(first, when)


def _votes(queries: Tensor, nodes: Rows, leaves: Tensor, allowed: Tensor, rules: ScoreRules) -> Tensor:
    """Votes [B·Hkv·R, Q, C] of all blocks at once."""
    width, each, rows = leaves.shape[-1], nodes.group, allowed.shape[-2]
    scores = torch.bmm(queries.flatten(0, 2), _members(nodes, leaves, queries.dtype))
    scores = rules.capped_(scores.unflatten(-1, (width, each)).unflatten(1, (-1, rows)).amax(-1))
    return scores.masked_fill(~allowed.flatten(0, 2)[:, None], -torch.inf).softmax(-1).sum(1)


def _list_votes(
    queries: Tensor,
    nodes: Rows,
    at: Tensor,
    bias: Tensor,
    begin: int,
    rules: ScoreRules,
    scratch: Scratch,
) -> Tensor:
    """Votes [X, Q, C] of queries [X, G·Q, D] for the leaves in rows ``at`` [X, C] of the table of nodes.

    A few lists at a time: what they need stays in the cache. ``bias`` [X, Q, ·] says who does not see what from
    leaf ``begin`` on.
    """
    width, each, rows = at.shape[1], nodes.group, queries.shape[1]
    votes = queries.new_empty(len(at), bias.shape[1], width)
    for few in scratch.few(len(at)):
        query, vote, count = queries[few], votes[few], len(at[few])
        found = scratch.empty("nodes", (count * width, nodes.table.shape[1]), nodes.table)
        torch.index_select(nodes.table, 0, at[few].flatten(), out=found)
        scores = scratch.empty("node scores", (count, width * each, rows), queries)
        torch.bmm(found.view(count, width * each, -1).to(queries.dtype), query.transpose(1, 2), out=scores)
        best_nodes = scratch.empty("best nodes", (count, width, rows), queries)
        torch.amax(scores.view(count, width, each, rows), 2, out=best_nodes)
        weights = scratch.empty("leaf scores", (count, rows, width), queries).copy_(
            best_nodes.transpose(1, 2)
        )
        by_head = rules.capped_(weights).view(count, -1, *votes.shape[1:])
        by_head[..., begin:].add_(bias[few, None])
        torch.softmax(weights, -1, out=weights)
        torch.sum(by_head, 1, out=vote)
    return votes


def leaf_candidates(
    leaves: Tensor, position: Tensor, *, causal: bool, sliding_window: int, geometry: Geometry
) -> Tensor:
    """Which leaves [B, Hkv, R, C] the queries at ``position`` [B, R, Q] may choose: bool [B, Hkv, R, Q, C]."""
    g = geometry
    at, t = leaves.to(torch.int32)[..., None, :], position[:, None].to(torch.int32)[..., None]
    allowed = (at >= 0) & (at < g.covered(t))
    begin = g.sink + at * g.block
    if not causal:
        allowed = (at >= 0) & ((begin < g.window_start(t)) | (begin >= g.window_end(t)))
    if sliding_window:
        allowed = allowed & (begin + g.block - 1 > t - sliding_window)
    return allowed


def best(votes: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The ``count`` highest votes among the allowed, ties to the lower index: bool [..., W]."""
    if count >= votes.shape[-1]:
        return allowed
    votes = torch.where(allowed, votes, -1.0)
    if votes.device.type == "cpu" and not torch.compiler.is_exporting():
        place = votes.shape[-1] - count  # NumPy selects with vector instructions, PyTorch without
        least = torch.from_numpy(np.partition(votes.detach().numpy(), place, axis=-1)[..., place, None])
        chosen = votes >= least
        if int(chosen.sum()) == count * least.numel():  # no ties
            return chosen & allowed
    else:
        least = votes.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = votes > least, votes == least
    room = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return (above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))) & allowed


def _members(nodes: Rows, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Nodes of the spans [B, Hkv, R, W] as [B·Hkv·R, D, W·group]."""
    return nodes.take(ids)[1].to(dtype).transpose(1, 2)


def _span_votes(queries: Tensor, nodes: Rows, ids: Tensor, allowed: Tensor, rules: ScoreRules) -> Tensor:
    """Votes [B, Hkv, R, W] of the first queries for spans of their own."""
    scores = torch.bmm(queries.flatten(0, 2), _members(nodes, ids, queries.dtype))
    scores = scores.reshape(*ids.shape[:3], -1, ids.shape[3], nodes.group)
    best_nodes = rules.capped_(scores.amax(-1))
    return best_nodes.masked_fill(~allowed[..., None, :], -torch.inf).softmax(-1).sum(-2)


def _prefix_votes(queries: Tensor, prefix: Tensor, allowed: Tensor, rules: ScoreRules) -> Tensor:
    """Votes [B, Hkv, R, W] of the first queries for spans 0, 1, …, which all blocks share."""
    batch, heads, blocks, group, width = queries.shape
    each, spans = prefix.shape[1:3]
    shared = queries.reshape(batch * heads, 1, blocks * group, width).expand(-1, each, -1, -1)
    scores = torch.bmm(shared.flatten(0, 1), prefix.flatten(0, 1).transpose(1, 2))
    scores = rules.capped_(scores.reshape(batch, heads, each, blocks, group, spans).amax(2))
    votes = scores.masked_fill(~allowed[..., None, :spans], -torch.inf).softmax(-1).sum(-2)
    return F.pad(votes, (0, allowed.shape[-1] - spans))
