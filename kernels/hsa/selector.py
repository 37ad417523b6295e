"""How far the search is from what dense attention would have it find.

    candidates of one step  ─▶  votes / heads         the selector: from pooled nodes, learns
                            ─▶  their true mass       the dense model's own: from the keys themselves

The loss of a step is KL(true ‖ votes). True mass is normalised over the step's candidates and averaged over the
group's heads, as votes are. Steps are taken as the operator takes them: coarse ones by the first query of a
query block among what the step before kept, the leaf step by the sampled query itself. Training the pooling by
the dense model's block mass is what SeerAttention does (Gao et al. 2024, arXiv:2410.13276).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from retrofit.kernels.hsa.geometry import Geometry


def sample_positions(
    samples: int,
    start: Tensor,
    length: Tensor,
    *,
    queries: int,
    tokens: int,
    causal: bool,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Draws positions of sparse queries, evenly spread with a random shift, from torch's own generator.

    Returns:
        Positions int64 [B, samples] and which of them are real, bool [B, samples]: a row without sparse queries
        has none.
    """
    g = geometry
    first = (tokens - queries - start).clamp(min=g.dense_end if causal else 0)
    first = g.blocks(first) * g.query_block
    room = length - first if causal else torch.where(length > g.dense_end, length - first, 0)
    shift = torch.rand(len(start), 1).to(start.device)
    spread = (torch.arange(samples, device=start.device) + shift) / samples
    at = first[:, None] + (spread * room.clamp(min=0)[:, None]).long()
    real = (room > 0)[:, None].expand_as(at)
    return torch.where(real, torch.minimum(at, length[:, None] - 1), 0), real


def selector_loss(
    q: Tensor,
    k: Tensor,
    nodes: Sequence[Tensor],
    spreads: Tensor | None,
    start: Tensor,
    length: Tensor,
    at: Tensor,
    real: Tensor,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    softcap: float = 0.0,
) -> Tensor:
    """Mean divergence of the leaf step and of the coarse steps, added; a scalar, differentiable in ``nodes``.

    Memory grows with the number of samples times the length.

    Args:
        q: Queries, the last T of the N index slots, [B, Hq, T, D], finite.
        k: Keys, [B, Hkv, N, D], finite.
        nodes: Pooled keys per level, [B, Hkv, M_level, D].
        spreads: How far keys lie from their node of level 0, [B, Hkv, M_0]; None where ``geometry.spread`` is 0.
        start: Index of each row's first real token, int64 [B].
        length: Number of real tokens of each row, int64 [B].
        at: Positions of the queries to look at, int64 [B, S]; the first of their block must be among ``q``.
        real: Which of them count, bool [B, S].
        scale: Factor on the scores.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        softcap: Bound c of the scores, which become c·tanh(score / c); 0 for none.
    """
    g, (batch, heads, tokens) = geometry, k.shape[:3]
    leaves = nodes[0].shape[2] // g.nodes_in_span(0)
    if not leaves or not bool(real.any()):
        return q.new_zeros(())
    index = start[:, None] + g.sink + torch.arange(leaves * g.block, device=k.device)
    keys = _rows(k, index.clamp(max=tokens - 1))
    queries = q.reshape(batch, heads, -1, *q.shape[2:])

    def pick(position: Tensor) -> Tensor:  # [B, Hkv, G, S, D]
        slot = (position + start[:, None] - (tokens - q.shape[2])).clamp(min=0)
        slot = slot[:, None, None, :, None].expand(*queries.shape[:3], -1, q.shape[3])
        return queries.gather(3, slot)

    block = at // g.query_block
    step = _Step(scale, softcap, sliding_window, g, real[:, None].expand(-1, heads, -1))
    t0 = block * g.query_block
    covered = (g.covered(t0) if causal else g.complete(length)[:, None].expand_as(t0))[:, None]
    covered = covered.expand(-1, heads, -1)
    first = pick(t0)
    true = step.leaf_mass(first, keys, t0)
    kept = torch.full((*covered.shape, g.beam), -1, device=k.device)
    coarse, steps = q.new_zeros(()), q.new_zeros(())
    for level in range(g.levels - 1, 0, -1):
        spans = nodes[level].shape[2] // g.nodes_per_span
        if not spans:
            continue
        ids = g.coarse_ids(kept, covered, level)
        end = g.sink + (ids + 1) * g.span_size(level)
        allowed = (ids >= 0) & (ids < spans) & step.within(end, t0[:, None, :, None])
        scores = step.span_scores(first, nodes[level], g.nodes_per_span)
        mass = true[..., : spans * g.fanout**level].unfold(-1, g.fanout**level, g.fanout**level).logsumexp(-1)
        divergence, votes, count = step.divergence(scores, mass, ids, allowed)
        coarse, steps = coarse + divergence, steps + count
        kept = _best(votes, ids, allowed, g.beam)

    ids = g.block_leaf_ids(
        kept, block[:, None].expand(-1, heads, -1), None if causal else length[:, None, None]
    )
    begin, t = g.sink + ids * g.block, at[:, None, :, None]
    outside = begin < g.window_start(t)
    if not causal:
        outside = outside | (begin >= g.window_end(t))
    allowed = (ids >= 0) & (ids < leaves) & outside & step.within(begin + g.block, t)
    here = pick(at)
    scores = step.span_scores(here, nodes[0], g.nodes_in_span(0), spreads)
    leaf, _, count = step.divergence(scores, step.leaf_mass(here, keys, at), ids, allowed)
    return leaf / count.clamp(min=1) + coarse / steps.clamp(min=1)


@dataclass(frozen=True)
class _Step:
    """What all steps share. Scores and masses are logarithms, [B, Hkv, G, S, spans]."""

    scale: float
    softcap: float
    sliding_window: int
    geometry: Geometry
    real: Tensor  # [B, Hkv, S]

    def within(self, end: Tensor, t: Tensor) -> Tensor:
        if not self.sliding_window:
            return torch.ones_like(end + t, dtype=torch.bool)
        return end - 1 > t - self.sliding_window

    def scores(self, q: Tensor, k: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        scores = self.scale * (q @ k.transpose(-1, -2)) + extra
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def span_scores(self, q: Tensor, nodes: Tensor, each: int, spreads: Tensor | None = None) -> Tensor:
        spans = nodes.shape[2] // each
        extra: Tensor | float = 0.0
        if spreads is not None:
            size = self.geometry.spread * 0.5 * (self.scale * q).square().sum(-1, keepdim=True)
            extra = size * spreads[:, :, None, None, : spans * each]
        scores = self.scores(q, nodes[:, :, None, : spans * each], extra)
        return scores.reshape(*scores.shape[:-1], spans, each).amax(-1)

    @torch.no_grad()
    def leaf_mass(self, q: Tensor, keys: Tensor, t: Tensor) -> Tensor:
        scores = self.scores(q, keys[:, :, None])
        if self.sliding_window:
            position = self.geometry.sink + torch.arange(keys.shape[2], device=keys.device)
            hidden = position <= t[:, None, None, :, None] - self.sliding_window
            scores = scores.masked_fill(hidden, _lowest(scores))
        return scores.reshape(*scores.shape[:-1], -1, self.geometry.block).logsumexp(-1)

    def divergence(
        self, scores: Tensor, mass: Tensor, ids: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of KL(true ‖ votes) over the samples, the votes [B, Hkv, S, W], and the number of samples."""
        group = scores.shape[2]

        def over_candidates(x: Tensor) -> Tensor:
            at = ids.clamp(0, x.shape[-1] - 1)[:, :, None].expand(-1, -1, group, -1, -1)
            picked = x.gather(-1, at).masked_fill(~allowed[:, :, None], _lowest(x))
            return picked.log_softmax(-1).logsumexp(2) - log(group)

        votes, true = over_candidates(scores), over_candidates(mass.detach())
        terms = (true.exp() * (true - votes)).masked_fill(~allowed, 0.0)
        counts = self.real & allowed.any(-1)
        return (terms.sum(-1) * counts).sum(), votes.detach(), counts.sum()


def _best(votes: Tensor, ids: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The ``count`` spans of most votes, ascending, −1 in the unused places."""
    order = votes.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    order = order[..., :count]
    unused = torch.iinfo(ids.dtype).max
    best = ids.gather(-1, order).masked_fill(~allowed.gather(-1, order), unused).sort(dim=-1).values
    return best.masked_fill(best == unused, -1)


def _lowest(x: Tensor) -> float:
    """Stands for no mass at all; finite, so that what is masked out has a gradient of 0 and not of NaN."""
    return torch.finfo(x.dtype).min / 8


def _rows(x: Tensor, index: Tensor) -> Tensor:
    # x [B, H, N, D], index [B, M]  →  [B, H, M, D]
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
