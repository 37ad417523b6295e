"""Selection for a few query blocks at a time: the coarse spans, and who chooses which leaf.

    coarse_spans   [B, Hkv, R, G, D] first queries of R blocks  →  spans  int32 [B, Hkv, R, beam]
    leaf_step      [B, Hkv, R, G·query_block, D] queries        →  choices int32 [B, Hkv, R, E]

A span's score is that of its best node. In the coarse steps its votes are the softmax of the scores over the
candidates, summed over the group's heads; in the leaf step its vote says how much it weighs against sinks and window,
and by how much that is above the cut, how far the leaf fades in.
Both are pure functions of tensors whose shapes depend on the geometry and on R alone. The matrix
products have one shape however many tokens a call brings, so that prefill, chunks and single tokens see the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa.blocked_rows import Rows, complete_rows
from retrofit.kernels.hsa.blocked_scratch import Scratch
from retrofit.kernels.hsa.geometry import FADE, UNUSED, Geometry, Votes

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


class Exact(NamedTuple):
    """What the queries of R blocks attend to besides leaves.

    Attributes:
        keys: Keys by position.
        rows: Rows of ``block`` tokens, int64 [B, R, E], as from ``blocked_execute.exact_plan``.
        bias: Who sees them, [B, R, query_block, E·block].
    """

    keys: Rows
    rows: Tensor
    bias: Tensor


def leaf_nodes(level: Tensor, spreads: Tensor | None, geometry: Geometry) -> Rows:
    """The leaves' nodes by leaf, each with its spread, if there is one, as one dim more."""
    if spreads is not None:
        level = torch.cat([level, spreads.unsqueeze(-1)], -1)
    return complete_rows(level, geometry.nodes_in_span(0))


def leaf_step(
    queries: Tensor,
    nodes: Rows,
    exact: Exact,
    leaves: Tensor,
    position: Tensor,
    low: Tensor,
    high: Tensor,
    choices: Tensor,
    *,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
    scratch: Scratch | None = None,
) -> Tensor:
    """Returns ``choices`` with those of the new queries: int32 [B, Hkv, R, E].

    Args:
        queries: All places of the blocks, times the scale, [B, Hkv, R, G·query_block, D]; finite.
        nodes: The leaves' nodes by leaf, as from ``leaf_nodes``.
        exact: What the queries attend to besides leaves.
        leaves: Leaf candidates of the blocks, int64 [B, Hkv, R, C].
        position: Of each place, int64 [B, R, query_block].
        low: First position of a new query in each row, int64 [B].
        high: End of the new queries in each row, int64 [B].
        choices: Those of the queries before ``low``, int32 [B, Hkv, R, E].
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        rules: What else happens to the scores; the sinks by query, [B·Hkv·R, G·query_block, 1].
        scratch: Memory for scoring the leaves of a few lists at a time, to stay in the cache; None for all at once,
            without a look at the data.
    """
    g = geometry
    allowed = leaf_candidates(leaves, position, causal=causal, sliding_window=sliding_window, geometry=g)
    votes = _weights(queries, nodes, exact, leaves, g, rules, scratch).reshape(allowed.shape)
    new = (position >= low[:, None, None]) & (position < high[:, None, None])
    place = torch.arange(g.query_block, device=queries.device)
    return add_choices(
        choices, wanted(votes, allowed, Votes.of(exact.keys.table.dtype), g), new[:, None], place, g
    )


def wanted(votes: Tensor, allowed: Tensor, counted: Votes, geometry: Geometry) -> Tensor:
    """How far the queries want each leaf to have faded in, whole numbers 0 … FADE, by their votes [..., Q, C]."""
    cut = _cut(votes, allowed, geometry.leaves_per_query, geometry.least_vote(counted))
    return (votes - cut).mul_(counted.parts).clamp_(0, FADE).mul_(allowed)


def _cut(votes: Tensor, allowed: Tensor, room: int, least: int) -> Tensor | int:
    """What votes must be above: the highest one, of at least ``least``, for which there is no room; [..., Q, 1]."""
    if room >= votes.shape[-1]:
        return least
    counted = torch.where(allowed, votes, -torch.inf)
    if _runs_on_cpu(votes):
        cut = votes.new_full((*votes.shape[:-1], 1), least)
        crowded = (counted > least).sum(-1, dtype=torch.int32) > room
        if bool(crowded.any()):
            cut[crowded] = _highest(counted[crowded], room + 1)
        return cut
    return _highest(counted, room + 1).clamp(min=least)


def add_choices(choices: Tensor, levels: Tensor, new: Tensor, row: Tensor, geometry: Geometry) -> Tensor:
    """``choices`` with those of new queries.

    Args:
        choices: Those of the queries before, int32 [..., E].
        levels: How far each query wants the leaves, [..., P, C].
        new: Which of the P places hold a new query, bool, broadcastable to [..., P].
        row: Their rows in the block, likewise.
        geometry: The sizes.
    """
    g = geometry
    past = g.risen(choices).to(levels.dtype).unsqueeze(-2)
    reached = _running_max(torch.cat([past, levels * new[..., None]], -2))
    rises = (reached[..., 1:, :] - reached[..., :-1, :]).flatten(-2)
    count = (choices < UNUSED).sum(-1)
    row = row.expand(levels.shape[:-1])
    if _runs_on_cpu(levels):
        found = choices.flatten(0, -2).clone()
        of, at = rises.flatten(0, -2).nonzero(as_tuple=True)
        each = of.bincount(minlength=len(found))
        to = (count.flatten() - each.cumsum(0) + each)[of] + torch.arange(len(of), device=of.device)
        of, at, to = (x[to < found.shape[1]] for x in (of, at, to))
        place, candidate = at // g.leaf_width, at % g.leaf_width
        packed = g.packed(
            row.flatten(0, -2)[of, place].int(), candidate.int(), rises.flatten(0, -2)[of, at].int()
        )
        found[of, to] = packed
        return found.view_as(choices)
    to = count[..., None] + (rises > 0).to(torch.int64).cumsum(-1) - 1
    most = choices.shape[-1]
    to = torch.where(rises > 0, to, most).clamp(max=most)
    candidate = torch.arange(g.leaf_width, device=levels.device)
    packed = g.packed(row[..., None].to(torch.int64), candidate, 0).flatten(-2) + rises.to(torch.int64)
    return F.pad(choices, (0, 1)).scatter(-1, to, packed.to(torch.int32))[..., :-1].contiguous()


def _running_max(x: Tensor) -> Tensor:
    """The highest of x [..., Q, C] so far, along Q; x itself becomes it where it need not be exported."""
    count = x.shape[-2]
    if torch.compiler.is_exporting():
        for i in range((count - 1).bit_length()):
            x = torch.maximum(x, F.pad(x, (0, 0, 1 << i, 0))[..., :count, :])
        return x
    rows = x.unbind(-2)
    for before, row in pairwise(rows):
        torch.maximum(before, row, out=row)
    return x


def _weights(
    queries: Tensor,
    nodes: Rows,
    exact: Exact,
    leaves: Tensor,
    geometry: Geometry,
    rules: ScoreRules,
    scratch: Scratch | None,
) -> Tensor:
    """Votes [X, Q, C]: what a token of each leaf weighs against sinks and window, for the best head, in steps.

    A few lists at a time, if there is scratch memory: what they need stays in the cache.
    """
    g, heads = geometry, leaves.shape[1]
    scorer = _Scorer(nodes, exact.keys, g.query_block, rules.softcap)
    flat = queries.flatten(0, 2)
    extra = _with_norm(flat, g.spread) if g.spread else flat
    at_nodes = nodes.flat(leaves).reshape(len(flat), -1)
    by_head = exact.rows[:, None].expand(-1, heads, -1, -1)
    at_keys = exact.keys.flat(exact.keys.numbers(by_head, g.block)).reshape(len(flat), -1)
    seen = exact.bias[:, None].expand(-1, heads, -1, -1, -1).flatten(0, 2)
    if scratch is None:
        return scorer.votes(flat, extra, at_nodes, at_keys, seen, rules.sinks)
    votes = flat.new_empty(len(flat), g.query_block, leaves.shape[-1])
    for few in scratch.few(len(flat)):
        sinks = None if rules.sinks is None else rules.sinks[few]
        votes[few] = scorer.votes(
            flat[few], extra[few], at_nodes[few], at_keys[few], seen[few], sinks, scratch
        )
    return votes


def _with_norm(queries: Tensor, spread: float) -> Tensor:
    """Queries, times the scale, with half their squared norm as one dim more, which meets the nodes' spreads."""
    return torch.cat([queries, (0.5 * spread) * queries.square().sum(-1, keepdim=True)], -1)


class _Scorer(NamedTuple):
    """Scores leaves against exact keys, for X lists of leaves."""

    nodes: Rows
    keys: Rows
    places: int
    softcap: float

    def votes(
        self,
        queries: Tensor,
        extra: Tensor,
        at_nodes: Tensor,
        at_keys: Tensor,
        seen: Tensor,
        sinks: Tensor | None,
        scratch: Scratch | None = None,
    ) -> Tensor:
        """Votes [X, Q, C].

        Args:
            queries: [X, G·Q, D].
            extra: The same, with what meets the nodes' spreads.
            at_nodes: Rows of the nodes of the C leaves, [X, C].
            at_keys: Rows of the exact keys, [X, E].
            seen: Bias of the exact keys, [X, Q, E].
            sinks: [X, G·Q, 1].
            scratch: Memory to work in.
        """
        new = _fresh if scratch is None else scratch.empty
        count, width = at_nodes.shape
        each, rows, exact = self.nodes.group, queries.shape[1], seen.shape[-1]
        nodes = new("nodes", (count * width, self.nodes.table.shape[1]), self.nodes.table)
        torch.index_select(self.nodes.table, 0, at_nodes.flatten(), out=nodes)
        by_node = new("node scores", (count, width * each, rows), queries)
        torch.bmm(nodes.view(count, width * each, -1).to(queries.dtype), extra.transpose(1, 2), out=by_node)
        by_leaf = new("best nodes", (count, width, rows), queries)
        torch.amax(by_node.view(count, width, each, rows), 2, out=by_leaf)

        keys = new("exact keys", (at_keys.numel(), self.keys.table.shape[1]), self.keys.table)
        torch.index_select(self.keys.table, 0, at_keys.flatten(), out=keys)
        by_key = new("exact scores", (count, rows, exact), queries)
        torch.bmm(queries, keys.view(count, exact, -1).to(queries.dtype).transpose(1, 2), out=by_key)
        rules = ScoreRules(self.softcap)
        near = rules.capped_(by_key).view(count, -1, self.places, exact).add_(seen[:, None]).flatten(1, 2)
        total = near.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks)
        by_head = rules.capped_(by_leaf).sub_(total.transpose(1, 2)).unflatten(2, (-1, self.places))
        return in_steps(by_head.amax(2).transpose(1, 2), Votes.of(self.keys.table.dtype))


def in_steps(weights: Tensor, votes: Votes) -> Tensor:
    """Votes for leaves by the logarithms of what they weigh."""
    return (weights * (votes.steps / log(2))).round().clamp(-votes.most, votes.most)


def _fresh(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty(shape)


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
    if _runs_on_cpu(votes):
        crowded = allowed.sum(-1, dtype=torch.int32) > count
        if bool(crowded.any()):
            allowed = allowed.clone()
            allowed[crowded] = _best_on_cpu(votes[crowded], allowed[crowded], count)
        return allowed
    votes = torch.where(allowed, votes, -torch.inf)
    return _at_least(votes, _highest(votes, count), count) & allowed


def _best_on_cpu(votes: Tensor, allowed: Tensor, count: int) -> Tensor:
    votes = torch.where(allowed, votes, -torch.inf)
    least = _highest(votes, count)
    chosen = votes >= least
    if int(chosen.sum()) == count * least.numel():  # no ties
        return chosen
    return _at_least(votes, least, count)


def _highest(votes: Tensor, count: int) -> Tensor:
    """The ``count``-th highest of votes [..., W]: [..., 1]."""
    if not _runs_on_cpu(votes):
        return votes.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    place = votes.shape[-1] - count  # NumPy selects with vector instructions, PyTorch without
    return torch.from_numpy(np.partition(votes.detach().numpy(), place, axis=-1)[..., place, None])


def _runs_on_cpu(x: Tensor) -> bool:
    """Whether a look at the data costs nothing, and nothing is exported."""
    return x.device.type == "cpu" and not torch.compiler.is_exporting()


def _at_least(votes: Tensor, least: Tensor, count: int) -> Tensor:
    """Votes above ``least``, the ``count``-th highest, and of those equal to it the first, ``count`` in all."""
    above, level = votes > least, votes == least
    room = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))


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
