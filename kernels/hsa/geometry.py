"""The grids of hierarchical sparse attention: which span lies where, and who is a candidate.

Positions count from a row's first real token; the grid starts behind the sinks:

    0 … sink │ leaf 0 │ leaf 1 │ … │ leaf n−1 │ window start … t          n = covered(t)
             └ node ┘ …
    span i of level j = [sink + i·s_j, sink + (i+1)·s_j),  s_j = block·fanout^j,  leaves are level 0

A leaf is scored by ``block / node`` nodes, a span of a coarser level by ``nodes_per_span``. Nodes of level j
are row i·(nodes per span) and following of pyramid level j.

Everything here is integer arithmetic. Methods that take positions or counts take plain ints or integer
tensors, so that the same line serves a Python driver and an exported graph.

**The order of candidates** is what ``leaf_ids`` returns, ascending with −1 in the unused places.

**Choices.** How much of a leaf a query block attends to only rises from one of its queries to the next. A choice is
one such rise, ((row · C + candidate) · 2^RISE_BITS + rise), int32: by how many of ``FADE`` parts the leaf rises for
the query in place ``row`` of the block and those after it. The list of a block's choices is ascending, UNUSED
in the places behind; so those of the queries before any row are a prefix of it.

**Summaries** of a query t with first query t0 of its block: a span is *free* if it is complete and lies wholly
in what the query may see, behind the sinks and outside its window, and no leaf in it is executed for t.
The cover consists of the free spans whose parent is not free, among the levels 0 … top_level(covered(t0)),
where spans of levels ≥ 1 must lie in the first covered(t0) leaves (not causal: in the complete leaves of the
row). So the cover is a function of the executed leaves alone, and each leaf is in at most one span of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from math import ceil, log2
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

MAX_POSITIONS = 2**21
"""The longest row: it fixes the number of levels, so that they do not depend on the length at hand."""

FADE = 2**12
"""Parts in which a leaf fades in."""
RISE_BITS = 13
"""Bits of a rise, which is 1 … FADE."""
MOST_PLACES = 2 ** (31 - RISE_BITS) - 1
"""Rows of a block times leaf candidates, at most: what a choice has bits for."""
UNUSED = 2**31 - 1
"""In the places of a list of choices that hold none."""

Count = TypeVar("Count", int, Tensor)


class Votes(NamedTuple):
    """How finely votes for leaves are counted.

    In float32 a leaf fades in while it weighs up to 2^(1/16) times what it must, so that nothing jumps where
    rounding moves a vote across the cut. In half precision rounding moves votes by more than that: leaves are whole.

    Attributes:
        steps: Of a vote to a power of two of the leaf's weight.
        parts: Of ``FADE``, by which a leaf counts for each step that its vote is above the cut.
    """

    steps: int
    parts: int

    @property
    def most(self) -> int:
        """Votes are at most this: weights beyond 2^±31 are all alike."""
        return 31 * self.steps

    @property
    def dtype(self) -> torch.dtype:
        """The integers that hold votes."""
        return torch.int16 if self.most < 2**15 else torch.int32

    @staticmethod
    def of(dtype: torch.dtype) -> Votes:
        """For queries and keys of ``dtype``."""
        return Votes(2**8, FADE) if dtype in (torch.float16, torch.bfloat16) else Votes(2**16, 1)


@dataclass(frozen=True)
class Geometry:
    """The sizes of one site, all in tokens unless said, and what decides who is chosen.

    Attributes:
        window: The most recent tokens, attended to exactly; a multiple of ``block``.
        sink: The first tokens, attended to exactly; a multiple of ``block``.
        budget: Tokens each query selects for itself, at most; a multiple of ``block``.
        block: Size of a leaf.
        node: Size of the nodes by which leaves are scored; divides ``block``.
        fanout: Children of a span.
        nodes_per_span: Nodes by which a span of level 1 or higher is scored.
        beam: Spans kept at each coarse step.
        query_block: Consecutive queries that share the coarse steps and the executed leaves.
        dense_until: Queries at positions before it attend densely; a multiple of ``query_block``.
        threshold: How much a leaf must weigh against sinks and window for a query to select it.
        spread: Weight of the second-order term in the score of a leaf's node.
    """

    window: int
    sink: int
    budget: int
    block: int
    node: int
    fanout: int
    nodes_per_span: int
    beam: int
    query_block: int
    dense_until: int
    threshold: float = 0.0
    spread: float = 0.0

    @staticmethod
    def schema() -> str:
        """The sizes as an operator's schema has them."""
        return ", ".join(
            f"{field.type} {option}" for field, option in zip(fields(Geometry), OPTIONS, strict=True)
        )

    @property
    def options(self) -> dict[str, int | float]:
        """The sizes as an operator takes them."""
        return dict(zip(OPTIONS, vars(self).values(), strict=True))

    @staticmethod
    def of_options(options: Mapping[str, Any]) -> Geometry:
        """The geometry with the sizes among the options of an operator."""
        return _geometry(*(options[option] for option in OPTIONS))

    @property
    def dense_end(self) -> int:
        """Queries before this position attend densely (not causal: rows of at most this length do)."""
        return max(self.dense_until, self.fitting_end)

    @property
    def fitting_end(self) -> int:
        """End of the query blocks that lie before sink + window + budget: the budget holds all there is to choose from."""
        return (self.sink + self.window + self.budget) // self.query_block * self.query_block

    @property
    def places(self) -> int:
        """Rows of a block times leaf candidates, for which choices must have bits."""
        return self.query_block * self.leaf_width

    @property
    def levels(self) -> int:
        """Levels of spans, leaves included, and so of the pyramid of nodes."""
        level, spans = 1, MAX_POSITIONS // self.span_size(1)
        while spans > self.beam * self.fanout:
            level, spans = level + 1, spans // self.fanout
        return level + 1

    @property
    def ratios(self) -> tuple[int, ...]:
        """Per pyramid level, how many members of the level below a node pools."""
        sizes = (1, *self.node_sizes)
        return tuple(size // below for below, size in pairwise(sizes))

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Tokens in a node, per level."""
        return tuple(self.node_size(level) for level in range(self.levels))

    @property
    def coarse_width(self) -> int:
        """Candidates of a coarse step: children of the kept spans, and the cover's own spans."""
        return self.beam * self.fanout + self.fanout - 1

    @property
    def leaf_width(self) -> int:
        """Leaf candidates C of a query block; ``leaf_ids`` says which they are."""
        leaving = -((1 - self.query_block) // self.block)
        return self.coarse_width + leaving

    @property
    def leaves_per_query(self) -> int:
        """Leaves that each query chooses for itself, at most."""
        return min(self.budget // self.block, self.leaf_width)

    def choices(self, votes: Votes) -> int:
        """Choices E of a query block, at most: each query may have chosen as many leaves as it can, if they fade in, and
        whole ones are chosen once."""
        most = self.query_block * self.leaves_per_query
        return most if votes.parts < FADE else min(most, self.leaf_width)

    def least_vote(self, votes: Votes) -> int:
        """The vote above which a leaf counts."""
        if not self.threshold:
            return -votes.most - FADE
        return max(-votes.most, min(ceil(votes.steps * log2(self.threshold)), votes.most))

    def span_size(self, level: int) -> int:
        """Tokens in a span of ``level``; leaves are level 0."""
        return cast(int, self.block * self.fanout**level)

    def node_size(self, level: int) -> int:
        """Tokens in a node of ``level``."""
        return self.node if level == 0 else self.span_size(level) // self.nodes_per_span

    def nodes_in_span(self, level: int) -> int:
        """Nodes by which a span of ``level`` is scored."""
        return self.block // self.node if level == 0 else self.nodes_per_span

    def blocks(self, tokens: Count) -> Count:
        """Query blocks that ``tokens`` positions reach into."""
        return (tokens + self.query_block - 1) // self.query_block

    def window_start(self, t: Count) -> Count:
        """First position of the window of the query at ``t``, a multiple of ``block``."""
        return _at_least_0(t + 1 - self.window) // self.block * self.block

    def window_end(self, t: Count) -> Count:
        """End (exclusive) of the window of the query at ``t`` where attention is not causal."""
        return (t + self.window + self.block - 1) // self.block * self.block

    def covered(self, t: Count) -> Count:
        """Leaves between sinks and window of the query at ``t``: the candidates, with an unlimited beam."""
        return _at_least_0(self.window_start(t) - self.sink) // self.block

    def complete(self, length: Count) -> Count:
        """Complete leaves in a row of ``length`` tokens: the candidates where attention is not causal."""
        return _at_least_0(length - self.sink) // self.block

    def top_level(self, covered: Count) -> Count:
        """Level of the first coarse step over ``covered`` leaves: at most beam·fanout spans, at least 1."""
        limit = self.beam * self.fanout
        level = covered * 0 + 1
        for below in range(1, self.levels - 1):
            level = level + (covered // self.fanout**below > limit) * 1
        return level

    def coarse_ids(self, kept: Tensor, covered: Tensor, level: int) -> Tensor:
        """Candidates of the coarse step at ``level`` over the canonical cover of the first leaves.

        Args:
            kept: Spans kept at ``level + 1``, [..., beam], ascending, −1 in the unused places; all −1 at the
                top level and above it.
            covered: Leaves to cover, int64 [...].
            level: At least 1.

        Returns:
            Spans of ``level``, int64 [..., coarse_width], ascending, −1 in the unused places. Above the top
            level there are none.
        """
        slots = torch.arange(self.coarse_width, device=kept.device)
        top = self.top_level(covered).unsqueeze(-1)
        count = (covered // self.fanout**level).unsqueeze(-1)
        first = torch.where(slots < count, slots, -1)
        below = torch.cat(
            [
                self._children(kept),
                self._right_edge(covered // self.fanout ** (level + 1), count, self.fanout - 1),
            ],
            dim=-1,
        )
        return torch.where(top == level, first, torch.where(top > level, below, -1))

    def leaf_ids(self, spans: Tensor, covered: Tensor, last: Tensor) -> Tensor:
        """Leaf candidates of query blocks: children of the kept spans, then the right edge of the cover.

        A candidate counts for a query only where it lies outside that query's window.

        Args:
            spans: Spans kept at level 1, [..., beam], ascending, −1 in the unused places.
            covered: ``covered`` of the block's first query, int64 [...]; not causal: ``complete``.
            last: ``covered`` of the block's last place, int64 [...]; not causal: ``complete``.

        Returns:
            Leaves, int64 [..., leaf_width], ascending, −1 in the unused places.
        """
        width = self.leaf_width - self.beam * self.fanout
        edge = self._right_edge(covered // self.fanout, last.unsqueeze(-1), width)
        return torch.cat([self._children(spans), edge], dim=-1)

    def block_leaf_ids(self, spans: Tensor, block: Tensor, length: Tensor | None = None) -> Tensor:
        """``leaf_ids`` of the query blocks number ``block``.

        Args:
            spans: Spans kept at level 1, [..., beam].
            block: Number of the query block, int64, broadcastable to [...].
            length: Tokens of the row, int64, broadcastable to [...]; given where attention is not causal.

        Returns:
            Leaves, int64 [..., leaf_width].
        """
        if length is None:
            t0 = block * self.query_block
            covered, last = self.covered(t0), self.covered(t0 + self.query_block - 1)
        else:
            covered = last = self.complete(length)
        shape = spans.shape[:-1]
        return self.leaf_ids(spans, covered.expand(shape), last.expand(shape))

    def selection(
        self, k: Tensor, past_spans: Tensor | None, past_choices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The selection of a call over the keys k [B, Hkv, N, D]: the past one, and nothing chosen behind it.

        Returns:
            ``spans``, int32 [B, Hkv, NB, beam], and ``choices``, int32 [B, Hkv, NB, E].
        """
        shape = (*k.shape[:2], self.blocks(k.shape[2]))
        spans = torch.full((*shape, self.beam), -1, dtype=torch.int32, device=k.device)
        choices = torch.full(
            (*shape, self.choices(Votes.of(k.dtype))), UNUSED, dtype=torch.int32, device=k.device
        )
        if past_spans is not None and past_choices is not None:
            spans[:, :, : past_spans.shape[2]] = past_spans
            choices[:, :, : past_choices.shape[2]] = past_choices
        return spans, choices

    def unpacked(self, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row, candidate, rise) of ``choices``; where there is none, (``query_block``, 0, 0)."""
        used, place = choices < UNUSED, choices >> RISE_BITS
        row = torch.where(used, place // self.leaf_width, self.query_block)
        candidate = torch.where(used, place % self.leaf_width, 0)
        return row, candidate, torch.where(used, choices & (2**RISE_BITS - 1), 0)

    def packed(self, row: Tensor | int, candidate: Tensor, rise: Tensor | int) -> Tensor:
        """The choices that these are."""
        return ((row * self.leaf_width + candidate) << RISE_BITS) + rise

    def before(self, row: Tensor) -> Tensor:
        """The least number of a choice that the queries before ``row`` have not made."""
        return (row * self.leaf_width) << RISE_BITS

    def risen(self, choices: Tensor) -> Tensor:
        """How far each candidate has risen by all of ``choices`` [..., E]: int64 [..., C], at most ``FADE``."""
        _, candidate, rise = self.unpacked(choices.to(torch.int64))
        none = torch.zeros(*choices.shape[:-1], self.leaf_width, dtype=torch.int64, device=choices.device)
        return none.scatter_add(-1, candidate, rise)

    def first_rows(self, choices: Tensor) -> Tensor:
        """The row that first chose each candidate, int64 [..., C]; ``query_block`` where none did."""
        row, candidate, _ = self.unpacked(choices.to(torch.int64))
        shape = (*choices.shape[:-1], self.leaf_width)
        never = torch.full(shape, self.query_block, dtype=torch.int64, device=choices.device)
        return never.scatter_reduce(-1, candidate, row, "amin")

    def _children(self, spans: Tensor) -> Tensor:
        spans = spans.to(torch.int64).unsqueeze(-1)
        ids = spans * self.fanout + torch.arange(self.fanout, device=spans.device)
        return torch.where(spans >= 0, ids, -1).flatten(-2)

    def _right_edge(self, parents: Tensor, end: Tensor, width: int) -> Tensor:
        """The ``width`` spans behind the last complete parent, as far as they lie before ``end``."""
        ids = parents.unsqueeze(-1) * self.fanout + torch.arange(width, device=parents.device)
        return torch.where(ids < end, ids, -1)


OPTIONS = tuple({"node": "node_size"}.get(field.name, field.name) for field in fields(Geometry))
"""Names of the sizes among an operator's options: Inductor hands these on beside a parameter of its own, ``node``."""
_geometry = lru_cache(Geometry)


def _at_least_0(count: Count) -> Count:
    return count.clamp(min=0) if isinstance(count, Tensor) else max(0, count)
