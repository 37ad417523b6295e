"""What the Triton kernels of a call have in common: shapes, constants, and the list of leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels.hsa import triton_select as select
from retrofit.kernels.hsa.geometry import Geometry


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def padded(dim: int) -> int:
    """Dims of a tile."""
    return max(16, power(dim))


@dataclass(frozen=True)
class Call:
    """The sizes of one call."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    slots: int
    dim: int
    value_dim: int
    bytes: int
    geometry: Geometry

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Call:
        """Reads the sizes of the inputs."""
        batch, heads, tokens, dim = q.shape
        return Call(batch, heads, k.shape[1], tokens, k.shape[2], dim, v.shape[3], q.element_size(), geometry)

    @property
    def group(self) -> int:
        """Query heads to a kv head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Batch rows times kv heads."""
        return self.batch * self.kv_heads

    @property
    def blocks(self) -> int:
        """Query blocks that the new queries of a row can reach into."""
        size = self.geometry.query_block
        return (self.tokens + 2 * size - 2) // size

    @property
    def total_blocks(self) -> int:
        """Query blocks of all slots."""
        return self.geometry.blocks(self.slots)

    @property
    def extent(self) -> tuple[int, int, int]:
        """What every kernel is told of the lengths."""
        return self.slots, self.tokens, self.blocks

    @property
    def shared(self) -> dict[str, Any]:
        """Constants of every kernel."""
        g = self.geometry
        return {
            "KV_HEADS": self.kv_heads,
            "WINDOW": g.window,
            "SINK": g.sink,
            "BLOCK": g.block,
            "QUERY_BLOCK": g.query_block,
            "DENSE_END": g.dense_end,
        }

    @property
    def leaves(self) -> dict[str, Any]:
        """Constants of the kernels that meet leaf candidates."""
        g = self.geometry
        return {
            "FANOUT": g.fanout,
            "BEAM": g.beam,
            "WIDTH": g.leaf_width,
            "WIDTH_PAD": power(g.leaf_width),
        }

    @property
    def product(self) -> dict[str, Any]:
        """Constants of products with queries."""
        precision = "ieee" if self.bytes == 4 else "tf32"
        return {"DIM": self.dim, "DIM_PAD": padded(self.dim), "PRECISION": precision}

    @property
    def values(self) -> dict[str, Any]:
        """Constants of products with values."""
        return {"VALUE_DIM": self.value_dim, "VALUE_PAD": padded(self.value_dim)}

    def heads_per_tile(self, rows: int) -> int:
        """Heads of a group in a tile of about so many rows."""
        return max(1, min(power(self.group), rows // self.geometry.query_block))

    def list_leaves(
        self, start: Tensor, length: Tensor, spans: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The leaves of each block by who chose them first, [B·Hkv, blocks, leaf_width], and how many of them
        each query sees, [B·Hkv, blocks, query_block]."""
        g = self.geometry
        ordered, counts = (
            torch.empty(self.rows, self.blocks, width, dtype=torch.int32, device=first.device)
            for width in (g.leaf_width, g.query_block)
        )
        select.list_leaves[(self.blocks, self.rows)](
            start, length, spans, first, ordered, counts, *self.extent, self.total_blocks,
            **self.shared, **self.leaves, num_warps=1,
        )  # fmt: skip
        return ordered, counts
