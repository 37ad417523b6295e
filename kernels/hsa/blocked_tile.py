"""Execution of a few query blocks, from the selection to the output; the forward and the backward pass share it.

sources  tables of keys, values and, with summaries, pooled keys and values
fetch    selection  →  tile: who sees what, and the members fetched from the sources
attend   queries, tile  →  [B, Hkv, R, G·query_block, Dv], differentiable in the queries and the members
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.hsa import blocked_execute as execute
from retrofit.kernels.hsa import blocked_summaries as summaries
from retrofit.kernels.hsa.blocked_rows import Rows
from retrofit.kernels.hsa.blocked_scratch import Scratch
from retrofit.kernels.hsa.geometry import Geometry


class Sources(NamedTuple):
    """What the executed rows are fetched from.

    Attributes:
        keys: Keys by position, ``block`` tokens (or one) to a row.
        values: Values likewise.
        nodes: Per level, nodes by span; empty without summaries.
        value_nodes: Likewise.
        gate: Weight of the summaries, [Hq]; None without.
    """

    keys: Rows
    values: Rows
    nodes: tuple[Rows, ...] = ()
    value_nodes: tuple[Rows, ...] = ()
    gate: Tensor | None = None

    @property
    def tables(self) -> list[Rows]:
        """All of them, in the order of ``Tile.members``."""
        return [self.keys, self.values, *self.nodes, *self.value_nodes]


class Tile(NamedTuple):
    """What R query blocks of each row execute; X = B·Hkv·R.

    Attributes:
        bias: [X, query_block, W].
        node_bias: [X, query_block, M]; None without summaries.
        rows: Per source, the rows of its table that were fetched.
        members: Per source, what was fetched, [X, ·, D].
    """

    bias: Tensor
    node_bias: Tensor | None
    rows: list[Tensor]
    members: list[Tensor]


def fetch(
    sources: Sources,
    leaves: Tensor,
    spans: Tensor,
    first: Tensor,
    block: Tensor,
    length: Tensor,
    *,
    tiles: int | None,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tile:
    """Looks up what the selection executes.

    Args:
        sources: The tables.
        leaves: Leaf candidates of the blocks, int64 [B, Hkv, R, C].
        spans: Kept spans of the blocks, [B, Hkv, R, beam].
        first: Row that first chose each leaf candidate, uint8 [B, Hkv, R, C].
        block: Number of each query block, int64 [B, R].
        length: Number of real tokens of each row, int64 [B].
        tiles: Tiles of the list of leaves to execute; None for as many as the longest list needs.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        dtype: Of the scores.
    """
    g = geometry
    ordered, count = execute.listed(leaves, first, g)
    if tiles is None:
        tiles = -(-int(count.max()) // execute.list_tile(g))
    rows, bias = execute.plan(
        ordered,
        count,
        block,
        length,
        tiles,
        causal=causal,
        sliding_window=sliding_window,
        geometry=g,
        dtype=dtype,
    )
    wanted, node_bias = [(sources.keys, rows), (sources.values, rows)], None
    if sources.gate is not None:
        levels = summaries.cover(
            leaves,
            spans,
            first,
            block,
            length,
            len(sources.nodes) - 1,
            causal=causal,
            sliding_window=sliding_window,
            geometry=g,
        )
        node_bias = summaries.cover_bias(levels, g, dtype)
        for tables in (sources.nodes, sources.value_nodes):
            wanted += [(table, ids) for table, (ids, _) in zip(tables, levels, strict=True)]
    found = [_take(table, index, g.block) for table, index in wanted]
    return Tile(bias.flatten(0, 2), node_bias, [at for at, _ in found], [x.to(dtype) for _, x in found])


def _take(table: Rows, index: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rows of the table, and what is in them, for numbers of rows [B, Hkv, R, S]."""
    return table.take(_tokens(index, block) if table.group == 1 != block else index)


def _places(table: Rows, index: Tensor, block: int) -> Tensor:
    """Rows of the table for numbers of rows [B, Hkv, R, S], flat."""
    return table.flat(_tokens(index, block) if table.group == 1 != block else index)


def _tokens(index: Tensor, block: int) -> Tensor:
    return (index[..., None] * block + torch.arange(block, device=index.device)).flatten(-2)


def attend(queries: Tensor, tile: Tile, gate: Tensor | None, *, causal: bool, geometry: Geometry) -> Tensor:
    """One softmax over the members of the tile.

    Args:
        queries: Times the scale, [B, Hkv, R, G·query_block, D].
        tile: From ``fetch``.
        gate: [Hq] in the dtype of the scores; None without summaries.
        causal: Whether a query sees only itself and what lies before it.
        geometry: The sizes.

    Returns:
        [B, Hkv, R, G·query_block, Dv].
    """
    keys, values = tile.members[:2]
    parts = (queries.flatten(0, 2), tile.bias, keys, values, *execute.widths(geometry, causal))
    if gate is None or tile.node_bias is None:
        return execute.attend(*parts).unflatten(0, queries.shape[:3])
    levels = len(tile.members) // 2
    nodes, value_nodes = torch.cat(tile.members[2 : levels + 1], 1), torch.cat(tile.members[levels + 1 :], 1)
    weights = opened(gate, queries)
    out = summaries.attend_with_cover(*parts, tile.node_bias, nodes, value_nodes, weights)
    return out.unflatten(0, queries.shape[:3])


def attend_lists(
    queries: Tensor,
    sources: Sources,
    ordered: Tensor,
    count: Tensor,
    block: Tensor,
    length: Tensor,
    scratch: Scratch,
    *,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
) -> Tensor:
    """As ``fetch`` and ``attend`` without summaries, one list at a time: what a list needs stays in the cache.

    Args:
        queries: Times the scale, [B, Hkv, R, G·query_block, D].
        sources: The tables.
        ordered: The list of leaves, as from ``execute.listed``.
        count: How many of them each query may see, as from ``execute.listed``.
        block: Number of each query block, int64 [B, R].
        length: Number of real tokens of each row, int64 [B].
        scratch: Memory to work in.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
    """
    g, dtype = geometry, queries.dtype
    tile, exact = execute.list_tile(g), execute.exact_rows(g, causal)
    tiles = (-(-count.amax(-1).flatten() // tile)).clamp(min=1).tolist()
    most = max(tiles) * tile
    prefixes = causal and not sliding_window  # a query sees the first places of the list
    rows, bias = execute.plan(
        ordered,
        count,
        block,
        length,
        0 if prefixes else max(tiles),
        causal=causal,
        sliding_window=sliding_window,
        geometry=g,
        dtype=dtype,
    )
    if prefixes:
        listed = ordered[..., :most] + g.sink // g.block
        rows = torch.cat([rows, F.pad(listed, (0, most - listed.shape[-1]))], dim=-1)
    flat, bias, count = queries.flatten(0, 2), bias.flatten(0, 2), count.flatten(0, 2)
    key_rows, value_rows = (
        _places(table, rows, g.block).reshape(len(flat), -1) for table in (sources.keys, sources.values)
    )
    each = key_rows.shape[1] // rows.shape[-1]
    late = torch.where(torch.arange(most, device=count.device) < count[..., None], 0.0, execute.HIDDEN).to(
        dtype
    )
    seen_by_all = count[:, 0].tolist()
    room = (exact + most) * each
    key_room, value_room = (
        scratch.empty(name, (room, rows.table.shape[1]), rows.table)
        for name, rows in (("keys", sources.keys), ("values", sources.values))
    )
    score_room = scratch.empty("scores", (flat.shape[1] * (exact + most) * g.block,), flat)
    out = flat.new_zeros(*flat.shape[:2], sources.values.table.shape[1] // sources.values.group)
    for i, (query, part) in enumerate(zip(flat.unbind(), out.unbind(), strict=True)):
        slots = exact + tiles[i] * tile
        width = slots * g.block
        keys, values = (
            torch.index_select(rows.table, 0, at[i, : slots * each], out=found[: slots * each])
            .view(width, -1)
            .to(dtype)
            for rows, at, found in (
                (sources.keys, key_rows, key_room),
                (sources.values, value_rows, value_room),
            )
        )
        weights = score_room[: len(query) * width].view(len(query), width)
        torch.mm(query, keys.t(), out=weights)
        by_head = weights.view(-1, g.query_block, width)
        by_head[..., : bias.shape[-1]] += bias[i, :, :width]
        if prefixes:
            by_leaf = by_head.view(-1, g.query_block, slots, g.block)
            by_leaf[..., exact + seen_by_all[i] :, :] += late[i, :, seen_by_all[i] : slots - exact, None]
        torch.softmax(weights, -1, out=weights)
        tiled = [(exact + tile) * g.block] + [tile * g.block] * (tiles[i] - 1)
        for weight, value in zip(weights.split(tiled, 1), values.split(tiled), strict=True):
            part.addmm_(weight, value)
    return out.unflatten(0, queries.shape[:3])


@overload
def opened(gate: Tensor, queries: Tensor) -> Tensor: ...


@overload
def opened(gate: None, queries: Tensor) -> None: ...


def opened(gate: Tensor | None, queries: Tensor) -> Tensor | None:
    """The gate [Hq] clamped at 0, for each of the queries [B, Hkv, R, G·Q, D]: [X, G·Q, 1]."""
    if gate is None:
        return None
    batch, heads, blocks, places = queries.shape[:4]
    by_head = gate.clamp(min=0).reshape(1, heads, 1, -1, 1)
    by_head = by_head.expand(batch, -1, blocks, -1, places // by_head.shape[3])
    return by_head.reshape(-1, places, 1)
