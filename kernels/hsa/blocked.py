"""Hierarchical sparse attention with memory linear in the length, on any device.

Positions before the dense end go through dense attention. The rest goes a few query blocks at a time:

    coarse_spans   the coarse steps of ``COARSE_TILE`` blocks at once
    leaf_step      each query chooses its leaves
    plan, attend   sinks, window and the chosen leaves are fetched and attended to

``block_step`` is the last three as one function of tensors: with ``tiles`` given, no shape in it depends on data.
The backward pass fetches and attends again, chunk by chunk; the selection has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense import blocked as dense
from retrofit.kernels.hsa import blocked_execute as execute
from retrofit.kernels.hsa import blocked_rows as tables
from retrofit.kernels.hsa import blocked_select as select
from retrofit.kernels.hsa.blocked_rows import Rows
from retrofit.kernels.hsa.geometry import Geometry

CHUNK_BYTES = 6 * 2**20
"""Scores of one chunk; a few times as much lives at once. Larger chunks leave the cache."""


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    value_nodes: Sequence[Tensor],
    gate: Tensor | None,
    past_spans: Tensor | None,
    past_first: Tensor | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output [B, Hq, T, Dv] and the selection (spans, first); arguments as in ``ops``."""
    call = _Call.of(q, k, start, length, scale, causal, sliding_window, geometry)
    g, (batch, kv_heads, tokens) = geometry, k.shape[:3]
    shape = (batch, kv_heads, g.blocks(tokens))
    spans = torch.full((*shape, g.beam), -1, dtype=torch.int32, device=q.device)
    first = torch.full((*shape, g.leaf_width), g.query_block, dtype=torch.uint8, device=q.device)
    if past_spans is not None and past_first is not None:
        spans[:, :, : past_spans.shape[2]] = past_spans
        first[:, :, : past_first.shape[2]] = past_first
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for rows, queries, keys, *at in call.dense_parts():
        out[rows, :, queries] = dense.dense_attention(
            q[rows, :, queries],
            k[rows, :, keys],
            v[rows, :, keys],
            *at,
            scale=scale,
            causal=causal,
            sliding_window=sliding_window,
        )
    sparse = call.sparse
    if not any(begin < end for begin, end in sparse):
        return out, spans, first

    _coarse(call, q, nodes, spans)
    by_leaf = tables.complete_rows(nodes[0], g.nodes_in_span(0))
    key_rows, value_rows = call.rows(k), call.rows(v)
    size = call.chunk_size(g.leaf_width * g.nodes_in_span(0), q.shape[1] // kv_heads)
    for block in call.chunks(sparse, size):
        part, chosen = block_step(
            call.queries(q, call.places(block)),
            by_leaf,
            key_rows,
            value_rows,
            call.pick(spans, block),
            call.pick(first, block),
            block,
            call.low,
            call.high,
            length,
            tiles=None if q.device.type == "cpu" else execute.max_tiles(g),
            **call.rules,
        )
        call.put(first, sparse, block, chosen)
        call.write(out, block, part)
    return out, spans, first


def block_step(
    queries: Tensor,
    nodes: Rows,
    keys: Rows,
    values: Rows,
    spans: Tensor,
    first: Tensor,
    block: Tensor,
    low: Tensor,
    high: Tensor,
    length: Tensor,
    *,
    tiles: int | None,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Leaf step and execution of R query blocks of each row; a pure function of tensors.

    For export, give ``tiles`` (``execute.max_tiles(geometry)`` always suffices) and make the tables with
    ``blocked_rows.padded_rows(nodes[0], …)`` and ``blocked_rows.aligned_rows(k, …)``.

    Args:
        queries: All places of the blocks, times the scale, zero where none is, [B, Hkv, R, G·query_block, D],
            in the dtype of the scores.
        nodes: Level 0 of the pyramid by leaf.
        keys: Keys by position, ``block`` tokens (or one) to a row.
        values: Values likewise.
        spans: Kept spans of the blocks, [B, Hkv, R, beam].
        first: Choices of the queries before ``low``, uint8 [B, Hkv, R, C].
        block: Number of each query block, int64 [B, R].
        low: First position of a new query in each row, int64 [B].
        high: End of the new queries in each row, int64 [B].
        length: Number of real tokens of each row, int64 [B].
        tiles: Tiles of the list of leaves to execute; None for as many as the longest list needs.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.

    Returns:
        The output, [B, Hkv, R, G·query_block, Dv], meaningless where there is no new query; and ``first``.
    """
    g = geometry
    leaves = block_leaves(spans, block, length, causal, g)
    position = block[..., None] * g.query_block + torch.arange(g.query_block, device=block.device)
    rules = dict[str, Any](causal=causal, sliding_window=sliding_window, geometry=g)
    first = select.leaf_step(queries, nodes, leaves, position, low, high, first, **rules)
    ordered, count = execute.listed(leaves, first, g)
    if tiles is None:
        tiles = -(-int(count.max()) // execute.list_tile(g))
    rows, bias = execute.plan(ordered, count, block, length, tiles, **rules, dtype=queries.dtype)
    out = execute.attend(
        queries.flatten(0, 2),
        bias.flatten(0, 2),
        fetch(keys, rows, g.block).to(queries.dtype),
        fetch(values, rows, g.block).to(queries.dtype),
        execute.exact_rows(g, causal) * g.block,
        execute.list_tile(g) * g.block,
    )
    return out.unflatten(0, queries.shape[:3]), first


def block_leaves(spans: Tensor, block: Tensor, length: Tensor, causal: bool, geometry: Geometry) -> Tensor:
    """Leaf candidates [B, Hkv, R, C] of the query blocks [B, R]."""
    return geometry.block_leaf_ids(spans, block[:, None], None if causal else length[:, None, None])


def fetch(table: Rows, rows: Tensor, block: int) -> Tensor:
    """Rows of ``block`` tokens, [B, Hkv, R, S], as [B·Hkv·R, S·block, D]."""
    if table.group == block:
        return table.take(rows)
    return table.take((rows[..., None] * block + torch.arange(block, device=rows.device)).flatten(-2))


def prefix_nodes(level: Tensor, geometry: Geometry) -> Tensor:
    """The nodes [B·Hkv, beam·fanout·nodes_per_span, D] that a coarse step shares if it is the first."""
    count = geometry.beam * geometry.fanout * geometry.nodes_per_span
    return F.pad(level, (0, 0, 0, count))[:, :, :count].flatten(0, 1)


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


def _coarse(call: _Call, q: Tensor, nodes: Sequence[Tensor], spans: Tensor) -> None:
    """Fills ``spans`` for the blocks whose first query is new."""
    g, size = call.geometry, select.COARSE_TILE
    rows = call.new_blocks
    if not any(begin < end for begin, end in rows):
        return
    highest = max(call.top_level(end - 1, b) for b, (begin, end) in enumerate(rows) if begin < end)
    by_span = [
        tables.complete_rows(level, g.nodes_in_span(i)) for i, level in enumerate(nodes[: highest + 1])
    ]
    prefixes = [prefix_nodes(level, g).to(call.dtype) for level in nodes[: highest + 1]]
    for block in call.chunks(rows, size):
        tops = [
            call.top_level(min(number, end - 1), b)
            for b, (begin, (_, end)) in enumerate(zip(block[:, 0].tolist(), rows, strict=True))
            for number in (begin, begin + size - 1)
            if begin < end
        ]
        kept = select.coarse_spans(
            call.queries(q, block[..., None] * g.query_block),
            by_span,
            prefixes,
            block,
            call.length,
            **call.rules,
            tops=(min(tops), max(tops)),
        )
        call.put(spans, rows, block, kept)


@dataclass(frozen=True)
class _Call:
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
    ) -> _Call:
        tokens, slots = q.shape[2], k.shape[2]
        offset = start - (slots - tokens)
        low, high = (-offset).clamp(min=0), length
        return _Call(
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
        )

    @property
    def rules(self) -> dict[str, Any]:
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
    def new_blocks(self) -> list[tuple[int, int]]:
        """``sparse`` without a block whose first query is not new."""
        size = self.geometry.query_block
        return [
            (begin + (begin * size < low), end)
            for (begin, end), low in zip(self.sparse, self.lows, strict=True)
        ]

    def top_level(self, block: int, row: int) -> int:
        g = self.geometry
        covered = g.covered(block * g.query_block) if self.causal else g.complete(self.lengths[row])
        return g.top_level(covered)

    def dense_parts(self) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
        """Yields (batch rows, queries, keys, start, length) of what is dense."""
        batch, g = len(self.lows), self.geometry
        uniform = all(
            start == 0 and length == self.slots
            for start, length in zip(self.starts, self.lengths, strict=True)
        )
        rows = [slice(0, batch)] if uniform else [slice(b, b + 1) for b in range(batch)]
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

    def chunk_size(self, width: int, group: int) -> int:
        """Query blocks to a chunk if each query scores ``width`` nodes with each head."""
        g = self.geometry
        each = len(self.lows) * self.kv_heads * group * g.query_block * width * self.dtype.itemsize
        longest = max(end - begin for begin, end in self.sparse)
        return max(1, min(CHUNK_BYTES // each, longest))

    def queries(self, q: Tensor, position: Tensor) -> Tensor:
        """The queries at ``position`` [B, R, P] times the scale, [B, Hkv, R, G·P, D]."""
        found = block_queries(q, self.kv_heads, position, self.offset, self.low, self.high)
        return found.to(self.dtype) * self.scale

    def places(self, block: Tensor) -> Tensor:
        """Positions of the blocks' queries, [B, R, query_block]."""
        size = self.geometry.query_block
        return block[..., None] * size + torch.arange(size, device=block.device)

    def rows(self, x: Tensor) -> Rows:
        """Rows of x, a key or value tensor, by position."""
        if self.tokens * 8 < self.slots:
            return tables.token_rows(x, self.start, self.length)
        return tables.aligned_rows(x, self.start, self.length, self.geometry.block, max(self.lengths))

    def pick(self, x: Tensor, block: Tensor) -> Tensor:
        """``spans`` or ``first`` of the blocks, [B, Hkv, R, ·]."""
        index = block.clamp(max=x.shape[2] - 1)[:, None, :, None]
        return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

    def put(self, x: Tensor, rows: list[tuple[int, int]], block: Tensor, value: Tensor) -> None:
        """Writes ``spans`` or ``first`` of the blocks that are in ``rows``."""
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
