"""Definition of hierarchical sparse attention: selection by explicit loops, attention by explicit masks.

For each row and each query block, in positions:

    coarse steps   by the block's first query, from the top level down: score the candidates, keep ``beam``
    leaf step      by each query for itself: score the leaf candidates, choose those that matter
    execution      one softmax over sinks, window and the leaves chosen so far in the block, plus, gated, the
                   nodes of the cover of what is not executed (``geometry`` defines candidates and cover)

A span's score is the highest scale·q·k among its nodes. In a coarse step its vote is Σ over the group's heads of the
softmax of the scores over the candidates. In the leaf step a node's score has a second-order term,

    scale·q·k + spread · ½·(scale·‖q‖)²·r²         r²: mean squared distance of its keys from it, by dim

what the logarithm of a mean of exponentials gains when keys lie that far apart in every direction, and a vote says
how much a leaf weighs against what the query attends to anyway: max over the group's heads of score − z, z the
log-sum-exp of the scores of the keys in sinks and window. Leaves count whose vote is above log ``threshold`` and above
that of the best leaf for which ``budget`` has no room: by as many parts of ``FADE`` as ``Votes`` says,
at most whole. So nothing jumps when rounding moves a vote across the cut. A query sees a leaf as much as itself or an
earlier query of its block wants it to: the weights of its keys are multiplied by that.

Score computations run in float32, or float64 for float64 inputs, and in shapes that depend on the geometry
alone, so that prefill, chunks and single tokens see the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa.geometry import FADE, UNUSED, Geometry, Votes


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    spreads: Tensor | None,
    value_nodes: Sequence[Tensor],
    gate: Tensor | None,
    past_spans: Tensor | None,
    past_choices: Tensor | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output and the selection that the next call continues from.

    Args:
        q: Queries, the last T of the N index slots, [B, Hq, T, D].
        k: Keys, [B, Hkv, N, D].
        v: Values, [B, Hkv, N, Dv].
        start: Index of each row's first real token, int64 [B].
        length: Number of real tokens of each row, int64 [B].
        nodes: Pooled keys per level, [B, Hkv, M_level, D].
        spreads: Of the nodes of level 0, [B, Hkv, M_0]; None where ``geometry.spread`` is 0.
        value_nodes: Pooled values per level, [B, Hkv, M_level, Dv]; empty without summaries.
        gate: Weight of the summaries, [Hq], clamped at 0 with a straight-through gradient; None without.
        past_spans: ``spans`` of the call before, [B, Hkv, NB, beam], or None.
        past_choices: ``choices`` of the call before, [B, Hkv, NB, E], or None.
        scale: Factor on the scores.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        rules: What else happens to the scores: a softcap, of nodes as of keys, and sinks, which take their share.

    Returns:
        The output [B, Hq, T, Dv], zero for padding; per query block the kept spans of level 1, int32
        [B, Hkv, NB, beam], ascending, −1 in the unused places; and its choices, int32 [B, Hkv, NB, E], as
        ``geometry`` says.
    """
    batch, kv_heads, tokens = k.shape[:3]
    queries, g = q.shape[2], geometry
    spans, choices = g.selection(k, past_spans, past_choices)
    out = q.new_zeros(batch, q.shape[1], queries, v.shape[3])
    dtype = torch.promote_types(q.dtype, torch.float32)
    for b in range(batch):
        begin, count = int(start[b]), int(length[b])
        offset = begin - (tokens - queries)  # index among the queries of position 0
        row = _Row(
            q=q[b].reshape(kv_heads, -1, queries, q.shape[3]).to(dtype),
            k=k[b, :, begin : begin + count].to(dtype),
            v=v[b, :, begin : begin + count].to(dtype),
            nodes=[level[b].to(dtype) for level in nodes],
            spreads=None if spreads is None else spreads[b].to(dtype),
            value_nodes=[level[b].to(dtype) for level in value_nodes],
            gate=None if gate is None else _straight_through(gate.to(dtype)).view(kv_heads, -1, 1, 1),
            scale=scale,
            softcap=rules.softcap,
            sinks=None if rules.sinks is None else rules.sinks.to(dtype).view(kv_heads, -1, 1, 1),
            causal=causal,
            sliding_window=sliding_window,
            geometry=g,
            counted=Votes.of(q.dtype),
        )
        for block in range(max(-offset, 0) // g.query_block, g.blocks(count)):
            low = max(block * g.query_block, -offset)
            high = min((block + 1) * g.query_block, count)
            t = torch.arange(low, high, device=q.device)
            picked = row.q[:, :, low + offset : high + offset]
            cover: list[Tensor] = []
            if row.is_dense(block):
                keys = row.visible(t).expand(kv_heads, -1, -1).to(dtype)
            else:
                if low == block * g.query_block:
                    spans[b, :, block] = row.coarse_steps(picked[:, :, 0], block)
                leaves = row.leaf_ids(spans[b, :, block], block)
                choices[b, :, block] = row.leaf_step(picked, t, block, leaves, choices[b, :, block])
                keys, cover = row.shares(t, block, leaves, choices[b, :, block])
            part = row.attend(picked, keys, cover).flatten(0, 1)
            out[b, :, low + offset : high + offset] = part.to(out.dtype)
    return out, spans, choices


@dataclass(frozen=True)
class _Row:
    """One row of the batch in positions; q [Hkv, G, T, D], k and v [Hkv, n, ·]."""

    q: Tensor
    k: Tensor
    v: Tensor
    nodes: list[Tensor]
    spreads: Tensor | None
    value_nodes: list[Tensor]
    gate: Tensor | None
    scale: float
    softcap: float
    sinks: Tensor | None
    causal: bool
    sliding_window: int
    geometry: Geometry
    counted: Votes

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    def is_dense(self, block: int) -> bool:
        at = (block + 1) * self.geometry.query_block if self.causal else self.tokens
        return at <= self.geometry.dense_end

    def covered(self, block: int) -> int:
        """Leaves covered by the block's coarse steps."""
        g = self.geometry
        return g.covered(block * g.query_block) if self.causal else g.complete(self.tokens)

    def leaf_ids(self, spans: Tensor, block: int) -> Tensor:
        length = None if self.causal else torch.tensor(self.tokens, device=spans.device)
        return self.geometry.block_leaf_ids(spans, torch.tensor(block, device=spans.device), length)

    def visible(self, t: Tensor) -> Tensor:
        """What dense attention sees: bool [R, n]."""
        j, t = torch.arange(self.tokens, device=t.device), t[:, None]
        seen = j <= t if self.causal else torch.ones_like(j + t, dtype=torch.bool)
        if self.sliding_window:
            seen = seen & (j > t - self.sliding_window)
        return seen

    def in_reach(self, ids: Tensor, size: int, t: Tensor) -> Tensor:
        """Whether spans of ``size`` tokens are not wholly before the sliding windows of the queries ``t``."""
        end = self.geometry.sink + (ids + 1) * size
        if not self.sliding_window:
            return torch.ones_like(end + t, dtype=torch.bool)
        return end - 1 > t - self.sliding_window

    def in_window(self, leaves: Tensor, t: Tensor) -> Tensor:
        """Whether leaves belong to the window of the queries ``t``, or lie behind it where causal."""
        g = self.geometry
        begin = g.sink + leaves * g.block
        inside = begin >= g.window_start(t)
        return inside if self.causal else inside & (begin < g.window_end(t))

    def coarse_steps(self, q0: Tensor, block: int) -> Tensor:
        """Spans of level 1 that the block's first query keeps, [Hkv, beam]; q0 [Hkv, G, D]."""
        g, heads = self.geometry, q0.shape[0]
        t0 = torch.tensor(block * g.query_block, device=q0.device)
        covered = torch.full((heads,), self.covered(block), device=q0.device)
        kept = torch.full((heads, g.beam), -1, device=q0.device)
        for level in range(g.top_level(self.covered(block)), 0, -1):
            ids = g.coarse_ids(kept, covered, level)
            valid = (ids >= 0) & self.in_reach(ids, g.span_size(level), t0)
            votes = self.votes(q0[:, :, None], level, ids, valid[:, None])[:, 0]
            order = votes.masked_fill(~valid, -1.0).sort(dim=-1, descending=True, stable=True).indices
            order = order[:, : g.beam]
            best = ids.gather(-1, order).masked_fill(~valid.gather(-1, order), 2**30)
            kept = best.sort(dim=-1).values
            kept = kept.masked_fill(kept == 2**30, -1)
        return kept

    def leaf_step(self, q: Tensor, t: Tensor, block: int, leaves: Tensor, choices: Tensor) -> Tensor:
        """``choices`` [Hkv, E] with those of the queries q [Hkv, G, R, D] at ``t``."""
        g = self.geometry
        padded = q.new_zeros(*q.shape[:2], g.query_block, q.shape[3])
        rows = t - block * g.query_block
        padded[:, :, rows] = q.detach()
        places = block * g.query_block + torch.arange(g.query_block, device=q.device)
        votes = in_steps(self.weights(padded, places, leaves), self.counted)
        votes = votes.masked_fill(~self.candidates(leaves, places), -2.0 * self.counted.most - FADE)
        found = choices.clone()
        for head in range(len(found)):
            risen = g.risen(found[head])
            made = [choice for choice in found[head].tolist() if choice != UNUSED]
            for row in rows.tolist():
                vote, room = votes[head, row], g.leaves_per_query
                best = vote.sort(descending=True).values
                least = g.least_vote(self.counted)
                cut = max(least, int(best[room])) if room < len(best) else least
                rise = (((vote - cut) * self.counted.parts).clamp(max=FADE).long() - risen).clamp(min=0)
                risen += rise
                candidate = rise.nonzero().flatten()
                made += g.packed(row, candidate, rise[candidate]).tolist()
            made = made[: found.shape[1]]
            found[head, : len(made)] = torch.tensor(made, dtype=found.dtype, device=found.device)
        return found

    def candidates(self, leaves: Tensor, t: Tensor) -> Tensor:
        """Which leaves [Hkv, C] the queries ``t`` may choose: bool [Hkv, R, C]."""
        leaves, t = leaves[:, None], t[:, None]
        reach = self.in_reach(leaves, self.geometry.block, t)
        return (leaves >= 0) & ~self.in_window(leaves, t) & reach

    @torch.no_grad()
    def votes(self, q: Tensor, level: int, ids: Tensor, valid: Tensor) -> Tensor:
        """Votes [Hkv, R, W] of q [Hkv, G, R, D] for the spans ``ids`` [Hkv, W], if ``valid`` [Hkv, R, W]."""
        if not valid.any():
            return torch.zeros_like(valid, dtype=q.dtype)
        scores = self.scores(q, self.members(self.nodes[level], level, ids)[:, None])
        best = scores.unflatten(-1, (-1, self.geometry.nodes_in_span(level))).amax(-1)
        return best.masked_fill(~valid[:, None], -torch.inf).softmax(-1).nan_to_num(0.0).sum(1)

    @torch.no_grad()
    def weights(self, q: Tensor, t: Tensor, leaves: Tensor) -> Tensor:
        """What ``leaves`` [Hkv, C] weigh for q [Hkv, G, R, D] at ``t``: logarithms [Hkv, R, C]."""
        if not self.nodes[0].shape[1]:
            return q.new_zeros(*q.shape[:1], q.shape[2], leaves.shape[1])
        g = self.geometry
        extra: Tensor | float = 0.0
        if self.spreads is not None:
            spread = self.members(self.spreads[..., None], 0, leaves)[:, None, :, 0]
            extra = g.spread * 0.5 * (self.scale * q).square().sum(-1)[..., None] * spread[..., None, :]
        scores = self.scores(q, self.members(self.nodes[0], 0, leaves)[:, None], extra)
        scores = scores.unflatten(-1, (-1, g.nodes_in_span(0))).amax(-1)
        near = self.scores(q, self.k[:, None]).masked_fill(~self.exact(t), -torch.inf)
        total = near.logsumexp(-1, keepdim=True)
        if self.sinks is not None:
            total = torch.logaddexp(total, self.sinks)
        return (scores - total).amax(1)

    def members(self, nodes: Tensor, level: int, ids: Tensor) -> Tensor:
        """The nodes [Hkv, W·nodes of a span, ·] of the spans ``ids`` [Hkv, W] of a level."""
        each = self.geometry.nodes_in_span(level)
        at = ids.clamp(min=0)[..., None] * each + torch.arange(each, device=ids.device)
        at = at.flatten(-2).clamp(max=nodes.shape[1] - 1)
        return nodes.gather(1, at[..., None].expand(-1, -1, nodes.shape[2]))

    def exact(self, t: Tensor) -> Tensor:
        """What the queries ``t`` see besides leaves: sinks, window and the incomplete leaf; bool [R, n]."""
        g, j = self.geometry, torch.arange(self.tokens, device=t.device)
        behind = j >= g.sink + g.complete(self.tokens) * g.block
        near = (j < g.sink) | behind | self.in_window((j - g.sink) // g.block, t[:, None])
        return near & self.visible(t)

    def shares(self, t: Tensor, block: int, leaves: Tensor, choices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """How much the queries ``t`` of ``block`` count keys, [Hkv, R, n], and per level spans of the cover, bool."""
        g, heads = self.geometry, leaves.shape[0]
        rows = t - block * g.query_block if self.causal else torch.full_like(t, g.query_block - 1)
        whole = g.complete(self.tokens)
        seen = choices[:, None] < g.before(rows[:, None] + 1)
        risen = g.risen(torch.where(seen, choices[:, None], UNUSED))
        share = torch.zeros(heads, len(t), whole + 1, dtype=self.k.dtype, device=t.device)
        complete = (leaves >= 0) & (leaves < whole)
        at = torch.where(complete, leaves, whole)[:, None].expand_as(risen)
        share = share.scatter(-1, at, risen.to(share.dtype) / FADE)[..., :whole]
        executed = share > 0

        keys = self.exact(t).repeat(heads, 1, 1).to(share.dtype)
        behind = slice(g.sink, g.sink + whole * g.block)
        chosen = share.repeat_interleave(g.block, dim=-1) * self.visible(t)[:, behind]
        keys[..., behind] = torch.where(keys[..., behind] > 0, keys[..., behind], chosen)
        if self.gate is None:
            return keys, []

        leaf = torch.arange(whole, device=t.device)
        free = ~executed & ~self.in_window(leaf, t[:, None])
        free &= self.visible(t)[:, behind].reshape(len(t), whole, g.block).all(-1)
        covered = self.covered(block)
        frees = [free]
        for level in range(1, g.top_level(covered) + 1):
            complete = covered // g.fanout**level
            children = frees[-1][..., : complete * g.fanout]
            frees.append(children.reshape(heads, len(t), complete, g.fanout).all(-1))
        cover = [frees[-1]]
        for free, parent in zip(frees[-2::-1], frees[:0:-1], strict=True):
            inside = parent.repeat_interleave(g.fanout, dim=-1)
            outside = free.clone()
            outside[..., : inside.shape[-1]] &= ~inside
            cover.insert(0, outside)
        return keys, cover

    def scores(self, q: Tensor, k: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        """Scores [..., R, W] of q [..., R, D] and k [..., W, D], of which ``extra`` is a part."""
        scores = self.scale * (q @ k.transpose(-1, -2)) + extra
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def attend(self, q: Tensor, keys: Tensor, cover: list[Tensor]) -> Tensor:
        """One softmax over the keys, by their shares, and the nodes of the cover; q [Hkv, G, R, D] → [Hkv, G, R, Dv]."""
        logits = self.scores(q, self.k[:, None]) + keys[:, None].log()
        values = self.v
        top = logits.amax(-1, keepdim=True).detach()
        if self.sinks is not None:
            top = torch.maximum(top, self.sinks.detach())
        sink = 0.0 if self.sinks is None else (self.sinks - top).exp()
        if not cover or self.gate is None:
            weights = (logits - top).exp()
            return (weights @ values[:, None]) / (weights.sum(-1, keepdim=True) + sink)
        scores, summarised = [], []
        for level, spans in enumerate(cover):
            each = self.geometry.nodes_in_span(level)
            count = spans.shape[-1] * each
            score = self.scores(q, self.nodes[level][:, None, :count])
            score = score + log(self.geometry.node_size(level))
            scores.append(score.masked_fill(~spans.repeat_interleave(each, dim=-1)[:, None], -torch.inf))
            summarised.append(self.value_nodes[level][:, :count])
        score, value = torch.cat(scores, -1), torch.cat(summarised, 1)
        opened = score.detach().amax(-1, keepdim=True) + self.gate.detach().log() if score.shape[-1] else top
        top = torch.maximum(top, opened)
        sink = 0.0 if self.sinks is None else (self.sinks - top).exp()
        weights, pooled = (logits - top).exp(), self.gate * (score - top).clamp(max=80.0).exp()
        total = weights.sum(-1, keepdim=True) + pooled.sum(-1, keepdim=True) + sink
        return (weights @ values[:, None] + pooled @ value[:, None]) / total


def in_steps(weights: Tensor, votes: Votes) -> Tensor:
    """Votes for leaves by the logarithms of what they weigh."""
    return (weights * (votes.steps / log(2))).round().clamp(-votes.most, votes.most)


def _straight_through(gate: Tensor) -> Tensor:
    return gate + (gate.clamp(min=0) - gate).detach()
