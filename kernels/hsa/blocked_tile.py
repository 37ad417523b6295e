"""Execution of a few query blocks, from the selection to the output; the forward and the backward pass share it.

sources  tables of keys, values and, with summaries, pooled keys and values
fetch    selection  →  tile: who sees what, and the members fetched from the sources
attend   queries, tile  →  [B, Hkv, R, G·query_block, Dv], differentiable in the queries and the members
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa import blocked_execute as execute
from retrofit.kernels.hsa import blocked_summaries as summaries
from retrofit.kernels.hsa.blocked_rows import Rows
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
    exact: tuple[Tensor, Tensor],
    leaves: Tensor,
    spans: Tensor,
    choices: Tensor,
    block: Tensor,
    length: Tensor,
    *,
    tiles: int | None,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
) -> Tile:
    """Looks up what the selection executes.

    Args:
        sources: The tables.
        exact: Sinks and window, as from ``execute.exact_plan``, in the dtype of the scores.
        leaves: Leaf candidates of the blocks, int64 [B, Hkv, R, C].
        spans: Kept spans of the blocks, [B, Hkv, R, beam].
        choices: Of the blocks, int32 [B, Hkv, R, E].
        block: Number of each query block, int64 [B, R].
        length: Number of real tokens of each row, int64 [B].
        tiles: Tiles of the list of leaves to execute; None for as many as the longest list needs.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
    """
    g, dtype = geometry, exact[1].dtype
    chosen = execute.listed(leaves, choices, g, dtype)
    if tiles is None:
        tiles = -(-int(chosen.seen.max()) // execute.list_tile(g))
    rows, bias = execute.plan(
        exact,
        chosen,
        block,
        tiles,
        causal=causal,
        sliding_window=sliding_window,
        geometry=g,
    )
    wanted = [(table, table.numbers(rows, g.block)) for table in (sources.keys, sources.values)]
    node_bias = None
    if sources.gate is not None:
        levels = summaries.cover(
            leaves,
            spans,
            choices,
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
    found = [table.take(index) for table, index in wanted]
    return Tile(bias.flatten(0, 2), node_bias, [at for at, _ in found], [x.to(dtype) for _, x in found])


def attend(
    queries: Tensor,
    tile: Tile,
    gate: Tensor | None,
    *,
    causal: bool,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
) -> Tensor:
    """One softmax over the members of the tile.

    Args:
        queries: Times the scale, [B, Hkv, R, G·query_block, D].
        tile: From ``fetch``.
        gate: [Hq] in the dtype of the scores; None without summaries.
        causal: Whether a query sees only itself and what lies before it.
        geometry: The sizes.
        rules: What else happens to the scores; the sinks by query, as from ``rules_by_query``.

    Returns:
        [B, Hkv, R, G·query_block, Dv].
    """
    keys, values = tile.members[:2]
    parts = (queries.flatten(0, 2), tile.bias, keys, values, *execute.widths(geometry, causal))
    if gate is None or tile.node_bias is None:
        return execute.attend(*parts, rules).unflatten(0, queries.shape[:3])
    levels = len(tile.members) // 2
    nodes, value_nodes = torch.cat(tile.members[2 : levels + 1], 1), torch.cat(tile.members[levels + 1 :], 1)
    weights = opened(gate, queries)
    out = summaries.attend_with_cover(*parts, tile.node_bias, nodes, value_nodes, weights, rules)
    return out.unflatten(0, queries.shape[:3])


@overload
def opened(gate: Tensor, queries: Tensor) -> Tensor: ...


@overload
def opened(gate: None, queries: Tensor) -> None: ...


def opened(gate: Tensor | None, queries: Tensor) -> Tensor | None:
    """The gate [Hq] clamped at 0, for each of the queries [B, Hkv, R, G·Q, D]: [X, G·Q, 1]."""
    if gate is None:
        return None
    return by_query(gate.clamp(min=0), queries)


def rules_by_query(rules: ScoreRules, queries: Tensor) -> ScoreRules:
    """The rules with the sinks for each of the queries [B, Hkv, R, G·Q, D]: [X, G·Q, 1]."""
    if rules.sinks is None:
        return rules
    return rules._replace(sinks=by_query(rules.sinks.to(queries.dtype), queries))


def by_query(x: Tensor, queries: Tensor) -> Tensor:
    """What is one number a head, x [Hq], for each of the queries [B, Hkv, R, G·Q, D]: [X, G·Q, 1]."""
    batch, heads, blocks, places = queries.shape[:4]
    by_head = x.reshape(1, heads, 1, -1, 1)
    by_head = by_head.expand(batch, -1, blocks, -1, places // by_head.shape[3])
    return by_head.reshape(-1, places, 1)
