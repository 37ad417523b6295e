"""Hierarchical sparse attention with memory linear in the length, on any device.

Positions before the dense end go through dense attention. The rest goes a few query blocks at a time:

    coarse_spans   the coarse steps of ``COARSE_TILE`` blocks at once
    leaf_step      each query chooses its leaves
    fetch, attend  sinks, window and the chosen leaves are fetched and attended to;
                   on CPU by ``attend_lists``, a few lists of leaves at a time

``block_step`` is the last three as one function of tensors: with ``tiles`` given, no shape in it depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense import blocked as dense
from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa import blocked_execute as execute
from retrofit.kernels.hsa import blocked_rows as tables
from retrofit.kernels.hsa import blocked_select as select
from retrofit.kernels.hsa import blocked_tile as executed
from retrofit.kernels.hsa.blocked_backward import hsa_attention_backward
from retrofit.kernels.hsa.blocked_call import Call, block_leaves
from retrofit.kernels.hsa.blocked_lists import attend_lists
from retrofit.kernels.hsa.blocked_rows import Rows
from retrofit.kernels.hsa.blocked_scratch import Scratch
from retrofit.kernels.hsa.blocked_tile import Sources
from retrofit.kernels.hsa.geometry import Geometry

__all__ = ["block_step", "hsa_attention", "hsa_attention_backward", "prefix_nodes"]


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    spreads: Tensor | None,
    value_nodes: Sequence[Tensor],
    gate: Tensor | None,
    past_spans: Tensor | None,
    past_choices: Tensor | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output [B, Hq, T, Dv] and the selection (spans, choices); arguments as in ``ops``."""
    call = Call.of(q, k, start, length, scale, causal, sliding_window, geometry)
    g = geometry
    spans, choices = g.selection(k, past_spans, past_choices)
    attend_densely = partial(
        dense.dense_attention, scale=scale, causal=causal, sliding_window=sliding_window, rules=rules
    )
    if call.is_dense and call.uniform:
        return attend_densely(q, k, v, start, length), spans, choices
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for rows, queries, keys, *at in call.dense_parts():
        out[rows, :, queries] = attend_densely(q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], *at)
    if call.is_dense:
        return out, spans, choices

    levels = list(nodes)[: call.highest_level + 1]
    by_span = [tables.complete_rows(level, g.nodes_in_span(i)) for i, level in enumerate(levels)]
    leaf_nodes = select.leaf_nodes(levels[0], spreads, g)
    _coarse(call, q, levels, by_span, spans, rules)
    sources = call.sources(k, v, nodes, value_nodes, gate)
    scratch = Scratch() if q.device.type == "cpu" else None
    by_list = scratch is not None and sources.gate is None
    size = call.list_chunk_size if by_list else call.chunk_size(sources.gate is not None)

    for block in call.chunks(call.sparse, size):
        part, chosen = block_step(
            call.queries(q, call.places(block)),
            leaf_nodes,
            sources,
            call.pick(spans, block),
            call.pick(choices, block),
            block,
            call.low,
            call.high,
            length,
            tiles=None if q.device.type == "cpu" else execute.max_tiles(choices, g),
            causal=causal,
            sliding_window=sliding_window,
            geometry=g,
            rules=rules,
            scratch=scratch,
        )
        call.put(choices, call.sparse, block, chosen)
        call.write(out, block, part)

    return out, spans, choices


def block_step(
    queries: Tensor,
    nodes: Rows,
    sources: Sources,
    spans: Tensor,
    choices: Tensor,
    block: Tensor,
    low: Tensor,
    high: Tensor,
    length: Tensor,
    *,
    tiles: int | None,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
    scratch: Scratch | None = None,
) -> tuple[Tensor, Tensor]:
    """Leaf step and execution of R query blocks of each row; a pure function of tensors.

    Args:
        queries: All places of the blocks, times the scale, zero where none is, [B, Hkv, R, G·query_block, D],
            in the dtype of the scores.
        nodes: Level 0 of the pyramid by leaf, as from ``blocked_select.leaf_nodes``.
        sources: Tables of keys and values by position and, with summaries, of pooled ones.
        spans: Kept spans of the blocks, [B, Hkv, R, beam].
        choices: Those of the queries before ``low``, int32 [B, Hkv, R, E].
        block: Number of each query block, int64 [B, R].
        low: First position of a new query in each row, int64 [B].
        high: End of the new queries in each row, int64 [B].
        length: Number of real tokens of each row, int64 [B].
        tiles: Tiles of the list of leaves to execute (``blocked_execute.max_tiles`` always suffices); None for as
            many as the longest list needs.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        rules: What else happens to the scores.
        scratch: Memory for working on a few lists of leaves at a time, to stay in the cache; shapes then depend
            on data. None for all at once.

    Returns:
        The output, [B, Hkv, R, G·query_block, Dv], meaningless where there is no new query; and ``choices``.
    """
    g = geometry
    leaves = block_leaves(spans, block, length, causal, g)
    position = block[..., None] * g.query_block + torch.arange(g.query_block, device=block.device)
    rules = executed.rules_by_query(rules, queries)
    exact = execute.exact_plan(
        block, length, causal=causal, sliding_window=sliding_window, geometry=g, dtype=queries.dtype
    )
    choices = select.leaf_step(
        queries,
        nodes,
        select.Exact(sources.keys, *exact),
        leaves,
        position,
        low,
        high,
        choices,
        causal=causal,
        sliding_window=sliding_window,
        geometry=g,
        rules=rules,
        scratch=scratch,
    )
    if scratch is not None and sources.gate is None:
        return attend_lists(
            queries,
            sources,
            exact,
            execute.listed(leaves, choices, g, queries.dtype),
            block,
            scratch,
            causal=causal,
            sliding_window=sliding_window,
            geometry=g,
            rules=rules,
        ), choices
    tile = executed.fetch(
        sources,
        exact,
        leaves,
        spans,
        choices,
        block,
        length,
        tiles=tiles,
        causal=causal,
        sliding_window=sliding_window,
        geometry=g,
    )
    return executed.attend(queries, tile, sources.gate, causal=causal, geometry=g, rules=rules), choices


def prefix_nodes(level: Tensor, geometry: Geometry) -> Tensor:
    """The nodes of the spans 0, 1, … that a coarse step shares if it is the first.

    Returns:
        The spans' first nodes, their second ones and so on, [B·Hkv, nodes_per_span, beam·fanout, D].
    """
    each, spans = geometry.nodes_per_span, geometry.beam * geometry.fanout
    nodes = F.pad(level[:, :, : spans * each], (0, 0, 0, spans * each))[:, :, : spans * each]
    return nodes.unflatten(2, (spans, each)).transpose(2, 3).flatten(0, 1).contiguous()


def _coarse(
    call: Call,
    q: Tensor,
    levels: list[Tensor],
    by_span: list[Rows],
    spans: Tensor,
    rules: ScoreRules,
) -> None:
    """Fills ``spans`` for the blocks whose first query is new."""
    g, size = call.geometry, select.COARSE_TILE
    rows = call.new_blocks
    if all(begin >= end for begin, end in rows):
        return
    prefixes = [prefix_nodes(level, g).to(call.dtype) for level in levels]

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
            rules=rules,
        )
        call.put(spans, rows, block, kept)
