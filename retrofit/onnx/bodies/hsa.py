"""Hierarchical sparse attention, a few query blocks at a time.

Selection and execution of the blocks are those of ``retrofit.kernels.hsa.blocked``. Blocks are counted from the
one that each row's first new query is in; each chunk takes a fixed number of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels.hsa import blocked_execute as execute
from retrofit.kernels.hsa import blocked_rows as tables
from retrofit.kernels.hsa import blocked_select as select
from retrofit.kernels.hsa.blocked import block_step, prefix_nodes
from retrofit.kernels.hsa.blocked_call import block_queries
from retrofit.kernels.hsa.blocked_tile import Sources
from retrofit.kernels.hsa.geometry import Geometry
from retrofit.onnx.bodies.chunks import run_if, scan_chunks

BLOCKS = 1
"""Query blocks in a chunk: a decoded token pays for all of them."""


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: list[Tensor],
    value_nodes: list[Tensor],
    gate: Tensor | None,
    past_spans: Tensor | None,
    past_first: Tensor | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    window: int,
    sink: int,
    budget: int,
    block: int,
    node: int,
    fanout: int,
    nodes_per_span: int,
    beam: int,
    query_block: int,
    dense_until: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch.ops.retrofit.hsa_attention``, exportable."""
    g = Geometry(
        window=window,
        sink=sink,
        budget=budget,
        block=block,
        node=node,
        fanout=fanout,
        nodes_per_span=nodes_per_span,
        beam=beam,
        query_block=query_block,
        dense_until=dense_until,
    )
    rules: dict[str, Any] = {"causal": causal, "sliding_window": sliding_window, "geometry": g}
    (batch, _, tokens, _), (kv_heads, slots) = q.shape, k.shape[1:3]
    offset = start - (slots - tokens)  # index among the new queries of each row's position 0
    low = (-offset).clamp(min=0)
    begin = low // query_block

    blocks = (tokens + 2 * query_block - 2) // query_block
    chunks = (blocks + BLOCKS - 1) // BLOCKS
    numbers = torch.arange(chunks * BLOCKS, device=q.device).unflatten(0, (-1, BLOCKS))

    room = slots + execute.window_rows(g, causal) * block
    fetched = {
        "keys": tables.aligned_rows(k, start, length, block, room),
        "values": tables.aligned_rows(v, start, length, block, room),
        **{f"nodes{i}": tables.padded_rows(level, g.nodes_in_span(i)) for i, level in enumerate(nodes)},
    }
    if gate is not None:
        for i, level in enumerate(value_nodes):
            fetched[f"value_nodes{i}"] = tables.padded_rows(level, g.nodes_in_span(i))
    early = start[:, None] + torch.arange(torch.sym_min(slots, g.dense_end), device=q.device)
    early = early.clamp(max=slots - 1)[:, None, :, None].expand(-1, kv_heads, -1, -1)
    if past_spans is None or past_first is None:
        past_spans = torch.full((1, kv_heads, 0, beam), -1, dtype=torch.int32).expand(batch, -1, -1, -1)
        past_first = torch.full((1, kv_heads, 0, g.leaf_width), query_block, dtype=torch.uint8)
        past_first = past_first.expand(batch, -1, -1, -1)
    # One more place, for blocks that have no past.
    past_spans = pad(past_spans, (0, 0, 0, 1), value=-1)
    past_first = pad(past_first, (0, 0, 0, 1), value=query_block)

    def sparse(held: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The query blocks ``block`` by selection: their output, spans and leaves."""
        table = {name: _replaced(rows, name, held) for name, rows in fetched.items()}
        by_level = [table[f"nodes{i}"] for i in range(g.levels)]
        block, length, low = held["block"], held["length"], held["low"]
        first_place = block[..., None] * g.query_block
        leaders = block_queries(held["q"], kv_heads, first_place, held["offset"], low, length).float() * scale
        spans = select.coarse_spans(
            leaders,
            by_level,
            [held[f"prefix{i}"] for i in range(g.levels)],
            block,
            length,
            **rules,
            tops=(1, g.levels - 1),
        )
        began = (first_place < low[:, None, None])[:, None]
        spans = torch.where(began, _pick(held["past_spans"], block), spans)
        first = torch.where(began, _pick(held["past_first"], block), g.query_block).to(torch.uint8)
        sources = Sources(table["keys"], table["values"])
        if gate is not None:
            values_by_level = tuple(table[f"value_nodes{i}"] for i in range(g.levels))
            sources = sources._replace(
                nodes=tuple(by_level), value_nodes=values_by_level, gate=held["gate"].float()
            )
        out, first = block_step(
            held["queries"],
            by_level[0],
            sources,
            spans,
            first,
            block,
            low,
            length,
            length,
            tiles=execute.max_tiles(g),
            **rules,
        )
        return [out, spans.to(torch.int32), first.to(torch.uint8)]

    def near(held: Mapping[str, Tensor]) -> Sequence[Tensor]:
        places = held["block"][..., None] * g.query_block + torch.arange(g.query_block, device=q.device)
        return [
            _dense(
                held["queries"],
                held["near_keys"],
                held["near_values"],
                places,
                held["length"],
                causal,
                sliding_window,
            )
        ]

    def step(number: Tensor, held: Mapping[str, Tensor]) -> Sequence[Tensor]:
        length = held["length"]
        numbered = held["begin"][:, None] + number
        block = torch.minimum(numbered, ((length - 1).clamp(min=0) // g.query_block)[:, None])
        places = block[..., None] * g.query_block + torch.arange(g.query_block, device=block.device)
        queries = block_queries(held["q"], kv_heads, places, held["offset"], held["low"], length).float()
        queries = queries * scale
        held = {**held, "block": block, "queries": queries}
        is_dense = places[..., 0] < g.dense_end if causal else (length <= g.dense_end)[:, None]
        is_dense = is_dense.expand(block.shape)[:, None, :, None]
        nothing = queries.new_zeros(*queries.shape[:4], held["near_values"].shape[3])
        unchosen = queries.new_full((*queries.shape[:3], g.beam), -1, dtype=torch.int32)
        unseen = queries.new_full((*queries.shape[:3], g.leaf_width), g.query_block, dtype=torch.uint8)
        out, spans, first = run_if((~is_dense).any(), sparse, [nothing, unchosen, unseen], held)
        (dense,) = run_if(is_dense.any(), near, [nothing], held)
        out = torch.where(is_dense[..., None], dense, out)
        chosen = (numbered == block)[:, None, :, None] & ~is_dense
        return [
            out.to(held["near_values"].dtype),
            torch.where(chosen, spans, -1).to(torch.int32),
            torch.where(chosen, first, g.query_block).to(torch.uint8),
        ]

    held = {
        "q": q,
        "length": length,
        "low": low,
        "begin": begin,
        "offset": offset,
        "past_spans": past_spans,
        "past_first": past_first,
        "near_keys": k.gather(2, early.expand(-1, -1, -1, k.shape[3])),
        "near_values": v.gather(2, early.expand(-1, -1, -1, v.shape[3])),
        **{
            f"{name}.{field}": value
            for name, rows in fetched.items()
            for field, value in _tensors(rows).items()
        },
        **{f"prefix{i}": prefix_nodes(level, g).float() for i, level in enumerate(nodes)},
    }
    if gate is not None:
        held["gate"] = gate
    parts, spans, first = scan_chunks(step, [numbers], held)

    # [chunks, B, Hkv, R, G·Q, ·] → [B, Hq, chunks·R·Q, ·]
    by_block = parts.unflatten(4, (-1, query_block)).permute(1, 2, 4, 0, 3, 5, 6)
    by_place = by_block.flatten(3, 5).flatten(1, 2)
    position = torch.arange(tokens, device=q.device) - offset[:, None]
    place = (position - begin[:, None] * query_block).clamp(min=0)[:, None, :, None]
    out = by_place.gather(2, place.expand(-1, q.shape[1], -1, v.shape[3]))
    valid = (position >= 0) & (position < length[:, None])
    out = out.masked_fill(~valid[:, None, :, None], 0)
    total = torch.arange(g.blocks(slots), device=q.device).expand(batch, -1)
    return out, _merge(past_spans, spans, total, begin), _merge(past_first, first, total, begin)


def _dense(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    length: Tensor,
    causal: bool,
    sliding_window: int,
) -> Tensor:
    """Attention of the blocks to all of the first keys, by position: [B, Hkv, R, G·Q, Dv]."""
    key, t = torch.arange(keys.shape[2], device=keys.device), places[..., None]
    seen = key < length[:, None, None, None]
    if causal:
        seen = seen & (key <= t)
    if sliding_window:
        seen = seen & (key > t - sliding_window)
    bias = torch.where(seen, 0.0, execute.HIDDEN).to(queries.dtype)[:, None, :, None]
    scores = queries @ keys[:, :, None].to(queries.dtype).transpose(-1, -2)
    scores = scores.unflatten(3, (-1, places.shape[2])) + bias
    return scores.softmax(-1).flatten(3, 4) @ values[:, :, None].to(queries.dtype)


def _tensors(rows: tables.Rows) -> dict[str, Tensor]:
    return {name: value for name, value in rows._asdict().items() if isinstance(value, Tensor)}


def _replaced(rows: tables.Rows, name: str, held: Mapping[str, Tensor]) -> tables.Rows:
    tensors: dict[str, Any] = {field: held[f"{name}.{field}"] for field in _tensors(rows)}
    return rows._replace(**tensors)


def _pick(x: Tensor, block: Tensor) -> Tensor:
    """Rows [B, Hkv, R, ·] of the blocks [B, R]; the last for those behind it."""
    index = block.clamp(max=x.shape[2] - 1)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def _merge(past: Tensor, new: Tensor, block: Tensor, begin: Tensor) -> Tensor:
    """The blocks ``block`` [B, NB]: those from ``begin`` on from the chunks ``new``, all others from ``past``."""
    new = new.permute(1, 2, 0, 3, 4).flatten(2, 3)
    place = block - begin[:, None]
    is_new = ((place >= 0) & (place < new.shape[2]))[:, None, :, None]
    return torch.where(is_new, _pick(new, place.clamp(min=0)), _pick(past, block))
