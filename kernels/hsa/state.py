"""What a site of hierarchical sparse attention keeps besides keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.pyramid.blocked import crop_pyramid


@dataclass(frozen=True)
class HSAState:
    """The pyramid and the selection so far; every tensor has the batch first.

    Attributes:
        nodes: Pooled keys per level, [B, Hkv, M_level, D].
        spreads: How far keys lie from their node of level 0, [B, Hkv, M_0]; None where scores do without.
        value_nodes: Pooled values per level, [B, Hkv, M_level, Dv]; empty without summaries.
        spans: Kept spans of level 1 of each query block, int32 [B, Hkv, NB, beam].
        first: Row that first chose each leaf candidate, uint8 [B, Hkv, NB, C]; ``query_block`` for none.
        geometry: The sizes.
    """

    nodes: tuple[Tensor, ...]
    spreads: Tensor | None
    value_nodes: tuple[Tensor, ...]
    spans: Tensor
    first: Tensor
    geometry: Geometry

    def map(self, fn: Callable[[Tensor], Tensor]) -> HSAState:
        """Returns the state with ``fn`` applied to each tensor: reorder, select, repeat or move rows."""
        return replace(
            self,
            nodes=tuple(fn(level) for level in self.nodes),
            spreads=None if self.spreads is None else fn(self.spreads),
            value_nodes=tuple(fn(level) for level in self.value_nodes),
            spans=fn(self.spans),
            first=fn(self.first),
        )

    def crop(self, start: Tensor, tokens: int) -> HSAState:
        """Returns the state of the first ``tokens`` index slots, as if the rest had never been seen.

        Args:
            start: Index of each row's first real token, int64 [B].
            tokens: Index slots to keep.
        """
        g = self.geometry
        blocks = min(g.blocks(tokens), self.spans.shape[2])
        begin = torch.arange(blocks, device=start.device) * g.query_block
        rows = ((tokens - start)[:, None] - begin)[:, None, :, None]  # queries left in each block
        spans, first = self.spans[:, :, :blocks], self.first[:, :, :blocks]
        nodes = crop_pyramid(self.nodes, tokens, ratios=g.ratios, offset=g.sink)
        return replace(
            self,
            nodes=tuple(nodes),
            spreads=None if self.spreads is None else self.spreads[:, :, : nodes[0].shape[2]],
            value_nodes=tuple(crop_pyramid(self.value_nodes, tokens, ratios=g.ratios, offset=g.sink)),
            spans=torch.where(rows > 0, spans, -1),
            first=torch.where(first < rows, first, g.query_block),
        )
