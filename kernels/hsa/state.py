"""What a site of hierarchical sparse attention keeps besides keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrofit.kernels.hsa.geometry import UNUSED, Geometry
from retrofit.kernels.pyramid.blocked import crop_pyramid


@dataclass(frozen=True)
class HSAState:
    """The pyramid and the selection so far; every tensor has the batch first.

    Attributes:
        nodes: Pooled keys per level, [B, Hkv, M_level, D].
        spreads: How far keys lie from their node of level 0, [B, Hkv, M_0]; None where scores do without.
        value_nodes: Pooled values per level, [B, Hkv, M_level, Dv]; empty without summaries.
        spans: Kept spans of level 1 of each query block, int32 [B, Hkv, NB, beam].
        choices: What each query block attends to, and since which of its queries, int32 [B, Hkv, NB, E], as
            ``geometry`` says.
        geometry: The sizes.
    """

    nodes: tuple[Tensor, ...]
    spreads: Tensor | None
    value_nodes: tuple[Tensor, ...]
    spans: Tensor
    choices: Tensor
    geometry: Geometry

    def map(self, fn: Callable[[Tensor], Tensor]) -> HSAState:
        """Returns the state with ``fn`` applied to each tensor: reorder, select, repeat or move rows."""
        return replace(
            self,
            nodes=tuple(fn(level) for level in self.nodes),
            spreads=None if self.spreads is None else fn(self.spreads),
            value_nodes=tuple(fn(level) for level in self.value_nodes),
            spans=fn(self.spans),
            choices=fn(self.choices),
        )

    def has_room(self, slots: int) -> bool:
        """Whether there is room for so many index slots: all levels have it where the finest does."""
        g = self.geometry
        return self.spans.shape[2] >= g.blocks(slots) and self.nodes[0].shape[2] >= (slots - g.sink) // g.node

    def with_room(self, k: Tensor) -> HSAState:
        """Returns the state with room for at least all slots of the keys k [B, Hkv, N, D]; itself if it has that.

        Cells that no token has completed yet have no meaning.
        """
        g, slots = self.geometry, k.shape[2]
        if self.has_room(slots):
            return self
        sizes = [max(0, slots - g.sink) // size for size in g.node_sizes]
        spans, choices = g.selection(k, self.spans, self.choices)
        return replace(
            self,
            nodes=tuple(map(_roomier, self.nodes, sizes)),
            spreads=None if self.spreads is None else _roomier(self.spreads, sizes[0]),
            value_nodes=tuple(map(_roomier, self.value_nodes, sizes)),
            spans=spans,
            choices=choices,
        )

    def narrowed(self, tokens: int) -> HSAState:
        """Returns the state without room for more than ``tokens`` index slots, as views."""
        g = self.geometry
        nodes = crop_pyramid(self.nodes, tokens, ratios=g.ratios, offset=g.sink)
        return replace(
            self,
            nodes=tuple(nodes),
            spreads=None if self.spreads is None else self.spreads[:, :, : nodes[0].shape[2]],
            value_nodes=tuple(crop_pyramid(self.value_nodes, tokens, ratios=g.ratios, offset=g.sink)),
            spans=self.spans[:, :, : g.blocks(tokens)],
            choices=self.choices[:, :, : g.blocks(tokens)],
        )

    def crop(self, start: Tensor, tokens: int) -> HSAState:
        """Returns the state of the first ``tokens`` index slots, as if the rest had never been seen.

        Args:
            start: Index of each row's first real token, int64 [B].
            tokens: Index slots to keep.
        """
        g, kept = self.geometry, self.narrowed(tokens)
        begin = torch.arange(kept.spans.shape[2], device=start.device) * g.query_block
        rows = ((tokens - start)[:, None] - begin).clamp(max=g.query_block)[
            :, None, :, None
        ]  # queries left in each block
        return replace(
            kept,
            spans=torch.where(rows > 0, kept.spans, -1),
            choices=torch.where(kept.choices < g.before(rows), kept.choices, UNUSED),
        )


def _roomier(x: Tensor, count: int) -> Tensor:
    """x [B, Hkv, M, …] with room for ``count`` cells."""
    found = x.new_empty(*x.shape[:2], count, *x.shape[3:])
    found[:, :, : x.shape[2]] = x
    return found
