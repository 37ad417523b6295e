"""Where the rows of a call lie: new queries, dense parts, and chunks of query blocks, by position and by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels.hsa import blocked_rows as tables
from retrofit.kernels.hsa.blocked_rows import Rows
from retrofit.kernels.hsa.blocked_tile import Sources
from retrofit.kernels.hsa.geometry import Geometry

CHUNK_LISTS = 48
"""Blocks of one kv head whose indices and masks are made at once, where lists are worked on one by one."""

CHUNK_BYTES = 3 * 2**20
"""Scores of one chunk; a few times as much lives at once. Larger chunks leave the cache."""


def block_queries(
    q: Tensor, kv_heads: int, position: Tensor, offset: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """The queries at ``position`` [B, R, P] as [B, Hkv, R, G·P, D]; zeros where there is no new one.

    Args:
        q: [B, Hq, T, D].
        kv_heads: Number of key heads.
        position: int64 [B, R, P].
        offset: Index among the T queries of each row's position 0, int64 [B].
        low: First position of a new query in each row, int64 [B].
        high: End of the new queries in each row, int64 [B].
    """
    batch, blocks, places = position.shape
    position = position.flatten(1)
    index = (position + offset[:, None]).clamp(0, q.shape[2] - 1)
    found = q.transpose(1, 2)[torch.arange(batch, device=q.device)[:, None], index]
    there = (position >= low[:, None]) & (position < high[:, None])
    found = found.masked_fill(~there[..., None, None], 0)
    found = found.reshape(batch, blocks, places, kv_heads, -1, q.shape[3])
    return found.permute(0, 3, 1, 4, 2, 5).flatten(3, 4)


def block_leaves(spans: Tensor, block: Tensor, length: Tensor, causal: bool, geometry: Geometry) -> Tensor:
    """Leaf candidates [B, Hkv, R, C] of the query blocks [B, R]."""
    return geometry.block_leaf_ids(spans, block[:, None], None if causal else length[:, None, None])


@dataclass(frozen=True)
class Call:
    """Where the rows of a call lie, as tensors and as numbers.

    Attributes:
        offset: Index among the T queries of each row's position 0, int64 [B].
        low: First position of a new query in each row, int64 [B].
        high: End of the new queries in each row, int64 [B].
        length: Real tokens of each row, int64 [B].
    """

    kv_heads: int
    tokens: int
    slots: int
    start: Tensor
    length: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    lows: list[int]
    highs: list[int]
    starts: list[int]
    lengths: list[int]
    scale: float
    causal: bool
    sliding_window: int
    geometry: Geometry
    dtype: torch.dtype
    group: int

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        start: Tensor,
        length: Tensor,
        scale: float,
        causal: bool,
        sliding_window: int,
        geometry: Geometry,
    ) -> Call:
        """Reads the numbers of a call of the operator."""
        tokens, slots = q.shape[2], k.shape[2]
        offset = start - (slots - tokens)
        low, high = (-offset).clamp(min=0), length
        return Call(
            kv_heads=k.shape[1],
            tokens=tokens,
            slots=slots,
            start=start,
            length=length,
            offset=offset,
            low=low,
            high=high,
            lows=low.tolist(),
            highs=high.tolist(),
            starts=start.tolist(),
            lengths=length.tolist(),
            scale=scale,
            causal=causal,
            sliding_window=sliding_window,
            geometry=geometry,
            dtype=torch.promote_types(q.dtype, torch.float32),
            group=q.shape[1] // k.shape[1],
        )

    @property
    def rules(self) -> dict[str, Any]:
        """What every step needs to know."""
        return {"causal": self.causal, "sliding_window": self.sliding_window, "geometry": self.geometry}

    @property
    def sparse(self) -> list[tuple[int, int]]:
        """Per row, first and end of the query blocks with new queries that are not dense."""
        g = self.geometry
        ranges = []
        for low, high in zip(self.lows, self.highs, strict=True):
            if high <= low or (not self.causal and high <= g.dense_end):
                ranges.append((0, 0))
            else:
                begin = max(low, g.dense_end) if self.causal else low
                ranges.append((begin // g.query_block, max(g.blocks(high), begin // g.query_block)))
        return ranges

    @property
    def uniform(self) -> bool:
        """Whether nothing is padded."""
        return not any(self.starts) and min(self.lengths) == self.slots

    @property
    def is_dense(self) -> bool:
        """Whether no query block with new queries is sparse."""
        return all(begin == end for begin, end in self.sparse)

    @property
    def new_blocks(self) -> list[tuple[int, int]]:
        """``sparse`` without a block whose first query is not new."""
        size = self.geometry.query_block
        return [
            (begin + (begin * size < low), end)
            for (begin, end), low in zip(self.sparse, self.lows, strict=True)
        ]

    def top_level(self, block: int, row: int) -> int:
        """Level of the first coarse step of a query block."""
        g = self.geometry
        covered = g.covered(block * g.query_block) if self.causal else g.complete(self.lengths[row])
        return g.top_level(covered)

    def dense_parts(self) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
        """Yields (batch rows, queries, keys, start, length) of what is dense."""
        batch, g = len(self.lows), self.geometry
        rows = [slice(0, batch)] if self.uniform else [slice(b, b + 1) for b in range(batch)]
        for row in rows:
            b = row.start
            low, high = self.lows[b], self.highs[b]
            if self.causal:
                high = min(high, g.dense_end)
            elif high > g.dense_end:
                continue
            if low >= high:
                continue
            begin = self.starts[b]
            ahead = begin - (self.slots - self.tokens)
            zero = torch.zeros(row.stop - b, dtype=torch.int64, device=self.start.device)
            yield row, slice(low + ahead, high + ahead), slice(begin, begin + high), zero, zero + high

    def chunks(self, rows: list[tuple[int, int]], size: int) -> Iterator[Tensor]:
        """Yields the numbers of ``size`` consecutive blocks of every row, int64 [B, size]."""
        first = torch.tensor([begin for begin, _ in rows], device=self.start.device)[:, None]
        steps = torch.arange(size, device=self.start.device)
        for done in range(0, max(end - begin for begin, end in rows), size):
            yield first + done + steps

    def chunk_size(self, summaries: bool) -> int:
        """Query blocks to a chunk."""
        g = self.geometry
        nodes = g.leaf_width * g.nodes_in_span(0)
        if summaries:
            nodes += g.leaf_width * g.leaf_width // 4 + g.coarse_width * g.nodes_per_span * self.highest_level
        each = len(self.lows) * self.kv_heads * self.group * g.query_block * nodes * self.dtype.itemsize
        longest = max(end - begin for begin, end in self.sparse)
        return max(1, min(CHUNK_BYTES // each, longest))

    @property
    def list_chunk_size(self) -> int:
        """Query blocks to a chunk that is worked on one list at a time."""
        longest = max(end - begin for begin, end in self.sparse)
        return max(1, min(CHUNK_LISTS // (len(self.lows) * self.kv_heads), longest))

    @property
    def highest_level(self) -> int:
        """The highest of the blocks' top levels."""
        last = [(end - 1, b) for b, (begin, end) in enumerate(self.sparse) if begin < end]
        return max((self.top_level(block, b) for block, b in last), default=1)

    def queries(self, q: Tensor, position: Tensor) -> Tensor:
        """The queries at ``position`` [B, R, P] times the scale, [B, Hkv, R, G·P, D]."""
        return self.by_block(q, position).to(self.dtype) * self.scale

    def by_block(self, x: Tensor, position: Tensor) -> Tensor:
        """Rows of x [B, Hq, T, ·] at ``position`` [B, R, P], [B, Hkv, R, G·P, ·]; zeros where no query is."""
        return block_queries(x, self.kv_heads, position, self.offset, self.low, self.high)

    def places(self, block: Tensor) -> Tensor:
        """Positions of the blocks' queries, [B, R, query_block]."""
        size = self.geometry.query_block
        return block[..., None] * size + torch.arange(size, device=block.device)

    def sources(
        self,
        k: Tensor,
        v: Tensor,
        nodes: Sequence[Tensor],
        value_nodes: Sequence[Tensor],
        gate: Tensor | None,
        copy: bool = False,
    ) -> Sources:
        """The tables to execute from.

        Few queries fetch single tokens from where they lie; many pay for a copy by position. With ``copy``, no
        two rows of a table overlap, so that gradients can be summed in tables of the same shape.
        """
        g, few = self.geometry, self.tokens * 8 < self.slots and not copy

        def by_position(x: Tensor) -> Rows:
            if few:
                return tables.token_rows(x, self.start, self.length)
            if self.uniform and not self.slots % g.block and not copy:
                return tables.complete_rows(x, g.block)
            if self.uniform:
                return tables.padded_rows(x, g.block)
            return tables.aligned_rows(x, self.start, self.length, g.block, max(self.lengths))

        keys, values = by_position(k), by_position(v)
        if gate is None or not value_nodes:
            return Sources(keys, values)
        by_span = tables.padded_rows if copy else tables.complete_rows
        pooled, pooled_values = (
            tuple(
                by_span(x, g.nodes_in_span(level))
                for level, x in enumerate(list(x)[: self.highest_level + 1])
            )
            for x in (nodes, value_nodes)
        )
        return Sources(keys, values, pooled, pooled_values, gate.to(self.dtype))

    def pick(self, x: Tensor, block: Tensor) -> Tensor:
        """``spans`` or ``choices`` of the blocks, [B, Hkv, R, ·]."""
        index = block.clamp(max=x.shape[2] - 1)[:, None, :, None]
        return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

    def put(self, x: Tensor, rows: list[tuple[int, int]], block: Tensor, value: Tensor) -> None:
        """Writes ``spans`` or ``choices`` of the blocks that are in ``rows``."""
        for b, (begin, (_, end)) in enumerate(zip(block[:, 0].tolist(), rows, strict=True)):
            count = min(end - begin, block.shape[1])
            if count > 0:
                x[b, :, begin : begin + count] = value[b, :, :count]

    def parts(self, block: Tensor) -> Iterator[tuple[int, slice, slice]]:
        """Yields (batch row, queries by index, the same by place in the chunk)."""
        size = self.geometry.query_block
        ranges = zip(block[:, 0].tolist(), self.sparse, self.lows, self.highs, self.starts, strict=True)
        for b, (number, (_, end), low, high, start) in enumerate(ranges):
            begin = number * size
            first, last = max(low, begin), min(high, end * size, begin + block.shape[1] * size)
            ahead = start - (self.slots - self.tokens)
            if first < last:
                yield b, slice(first + ahead, last + ahead), slice(first - begin, last - begin)

    def write(self, out: Tensor, block: Tensor, part: Tensor) -> None:
        """Writes the output [B, Hkv, R, G·Q, ·] of the blocks to its place in index space."""
        by_place = self.by_place(part)
        for b, queries, places in self.parts(block):
            out[b, :, queries] = by_place[b, :, places]

    def by_place(self, part: Tensor) -> Tensor:
        """[B, Hkv, R, G·Q, ·] as [B, Hq, R·Q, ·]."""
        part = part.unflatten(3, (-1, self.geometry.query_block)).transpose(2, 3)
        return part.flatten(1, 2).flatten(2, 3)

    def add_by_index(self, x: Tensor, table: Tensor) -> None:
        """Adds rows by position, as ``sources`` made them with ``copy``, to x [B, Hkv, N, ·]."""
        by_position = table.reshape(*x.shape[:2], -1, x.shape[3])
        for b, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            x[b, :, start : start + length] += by_position[b, :, :length]
