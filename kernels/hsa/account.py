"""What hierarchical sparse attention costs: keys executed and nodes scored, counted for each query."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retrofit.kernels.hsa.geometry import Geometry


def count(
    spans: Tensor,
    choices: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    queries: int,
    tokens: int,
    causal: bool,
    sliding_window: int,
    summaries: bool,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Returns keys executed and nodes scored per query and kv head, float [B, Hkv, queries] each.

    A dense query executes every key it sees and scores no nodes. Elsewhere nodes are the leaf candidates' for
    the query itself, the keys of sinks and window, which are scored with them, a ``query_block``-th of those of the
    block's coarse steps (before a sliding window's limit), and with ``summaries`` those of the cover. Padding
    counts nothing.

    Args:
        spans: As the operator returns them, [B, Hkv, NB, beam].
        choices: As the operator returns them, [B, Hkv, NB, E]; a leaf that rises twice is executed twice.
        start: Index of each row's first real token, int64 [B].
        length: Number of real tokens of each row, int64 [B].
        queries: Number of queries T, the last of the ``tokens`` index slots.
        tokens: Number of index slots N.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        summaries: Whether the cover of what is not executed takes part.
        geometry: The sizes.
    """
    position = torch.arange(tokens - queries, tokens, device=start.device) - start[:, None]
    valid = (position >= 0) & (position < length[:, None])
    skip = max(0, int(position.min())) // geometry.query_block  # blocks that no query lies in
    blocks = _Blocks(
        block=torch.arange(skip, spans.shape[2], device=spans.device),
        spans=spans[:, :, skip:],
        choices=choices[:, :, skip:],
        length=length[:, None, None],
        causal=causal,
        sliding_window=sliding_window,
        geometry=geometry,
    )
    rows = [blocks.row(row, summaries) for row in range(geometry.query_block)]
    keys, nodes = (torch.stack(counts, dim=-1).flatten(2) for counts in zip(*rows, strict=True))
    at = (position - skip * geometry.query_block).clamp(0, keys.shape[2] - 1)
    at = at[:, None].expand(-1, keys.shape[1], -1)
    return tuple((x.gather(2, at) * valid[:, None]).float() for x in (keys, nodes))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Blocks:
    """Many query blocks at once; counts are [B, Hkv, NB] for one row of each."""

    block: Tensor  # [NB], their numbers
    spans: Tensor
    choices: Tensor
    length: Tensor  # [B, 1, 1]
    causal: bool
    sliding_window: int
    geometry: Geometry

    @cached_property
    def leaves(self) -> Tensor:
        """Leaf candidates, [B, Hkv, NB, C]."""
        return self.geometry.block_leaf_ids(self.spans, self.block, None if self.causal else self.length)

    @cached_property
    def listed(self) -> Tensor:
        """The leaves that are chosen, [B, Hkv, NB, E]."""
        return self.leaves.gather(-1, self.geometry.unpacked(self.choices.to(torch.int64))[1])

    @cached_property
    def when(self) -> Tensor:
        """The rows that choose them, [B, Hkv, NB, E]; ``query_block`` for none."""
        return self.geometry.unpacked(self.choices)[0]

    def row(self, row: int, summaries: bool) -> tuple[Tensor, Tensor]:
        """Keys and nodes of the queries in place ``row`` of their blocks."""
        g = self.geometry
        t0, t = self.block * g.query_block, self.block * g.query_block + row
        leaves, listed, when = self.leaves, self.listed, self.when
        whole = g.complete(self.length)
        covered, reach = (g.covered(t0), g.covered(t)) if self.causal else (whole, whole)
        end = t + 1 if self.causal else self.length
        begin = g.sink + leaves * g.block
        outside = (leaves >= 0) & self.outside_window(begin, t[:, None])
        from_ = g.sink + listed * g.block
        executed = self.outside_window(from_, t[:, None]) & (
            when <= (row if self.causal else g.query_block - 1)
        )

        whole_end = g.sink + whole * g.block
        window_end = end if self.causal else torch.minimum(g.window_end(t), whole_end)
        tail = 0 if self.causal else self.seen(whole_end, end, t)
        exact = self.seen(0, end.clamp(max=g.sink), t) + tail
        exact = exact + self.seen(g.window_start(t).clamp(min=g.sink), window_end, t)
        chosen = (self.seen(from_, from_ + g.block, t[:, None]) * executed).sum(-1)

        scored = outside & (self.seen(begin, begin + g.block, t[:, None]) > 0)
        nodes = scored.sum(-1) * g.nodes_in_span(0) + exact + self.coarse_nodes(covered) / g.query_block
        if summaries:
            nodes = nodes + self.cover_nodes(torch.where(executed, listed, -1), t, covered, reach)
        dense = (t if self.causal else self.length - 1) < g.dense_end
        keys = torch.where(dense, self.seen(0, end, t), exact + chosen)
        return keys, torch.where(dense, 0.0, nodes)

    def seen(self, begin: Tensor | int, end: Tensor, t: Tensor) -> Tensor:
        """Keys in [begin, end) that dense attention would see."""
        if self.sliding_window:
            begin = torch.maximum(torch.as_tensor(begin, device=t.device), t - self.sliding_window + 1)
        return (end - begin).clamp(min=0)

    def outside_window(self, begin: Tensor, t: Tensor) -> Tensor:
        before = begin < self.geometry.window_start(t)
        return before if self.causal else before | (begin >= self.geometry.window_end(t))

    def coarse_nodes(self, covered: Tensor) -> Tensor:
        g = self.geometry
        top = g.top_level(covered)
        total = kept = torch.zeros_like(covered)
        for level in range(g.levels - 1, 0, -1):
            own = covered // g.fanout**level - covered // g.fanout ** (level + 1) * g.fanout
            candidates = torch.where(level < top, kept * g.fanout + own, covered // g.fanout**level)
            candidates = torch.where(level > top, 0, candidates)
            kept = candidates.clamp(max=g.beam)
            total = total + candidates * g.nodes_per_span
        return total

    def cover_nodes(self, leaves: Tensor, t: Tensor, covered: Tensor, reach: Tensor) -> Tensor:
        """Nodes of the cover of what is not executed among the first ``reach`` leaves; −1 is no executed one."""
        g = self.geometry
        leaves = leaves.sort(-1).values
        executed = leaves >= 0
        top = g.top_level(covered)
        limits = torch.zeros_like(t)
        if self.sliding_window:
            limits = (t - self.sliding_window + 1 - g.sink).clamp(min=0)
        first = ((g.window_start(t) - g.sink).clamp(min=0)) // g.block
        last = (g.window_end(t) - g.sink).clamp(min=0) // g.block
        free = []
        for level in range(g.levels):
            size, spans = g.span_size(level), g.fanout**level
            complete = reach if level == 0 else covered // spans
            low = (limits + size - 1) // size  # spans wholly within the sliding window
            ids = torch.where(executed, leaves // spans, -1)
            touched = executed & (ids >= low[:, None]) & (ids < complete[..., None])
            blocked = torch.zeros_like(reach)
            if not self.causal:
                left = torch.maximum(first // spans, low)
                right = torch.minimum(torch.where(last > first, (last - 1) // spans + 1, 0), complete)
                blocked = (right - left).clamp(min=0)
                touched &= (ids < left[..., None]) | (ids >= right[..., None])
            ids = torch.where(touched, ids, -1)
            before = torch.cat([torch.full_like(ids[..., :1], -1), ids.cummax(-1).values[..., :-1]], -1)
            distinct = (ids > before).sum(-1)
            count = (complete - low).clamp(min=0) - blocked - distinct
            free.append(torch.where(level <= top, count, 0))
        total = torch.zeros_like(free[0])
        for level, count in enumerate(free):
            inside = free[level + 1] * g.fanout if level + 1 < len(free) else 0
            total = total + (count - inside) * g.nodes_in_span(level)
        return total
