"""Hierarchical sparse attention, a query block of each row at a time.

Blocks are counted from the one that each row's first new query is in. A block's step has a place for each new query
that it may hold: ``query_block`` of them at prefill, one for a decoded token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels.hsa.geometry import UNUSED, Geometry, Votes
from retrofit.onnx.bodies.chunks import run_if, scan_chunks
from retrofit.onnx.bodies.hsa_block import Rules, coarse, covered_leaves, near, sparse


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: list[Tensor],
    spreads: Tensor | None,
    value_nodes: list[Tensor],
    gate: Tensor | None,
    past_spans: Tensor | None,
    past_choices: Tensor | None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool,
    sliding_window: int,
    padded: bool,
    implementation: str,
    **sizes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch.ops.retrofit.hsa_attention``, exportable. ``export_onnx`` refuses sinks and a softcap."""
    g = Geometry.of_options(sizes)
    rules = Rules(causal, sliding_window, g, gate is not None)
    (batch, _, tokens, _), (kv_heads, slots) = q.shape, k.shape[1:3]
    offset = start - (slots - tokens)  # index among the new queries of each row's position 0
    low = (-offset).clamp(min=0)
    begin = low // g.query_block
    query_block, beam = g.query_block, g.beam
    blocks = (tokens + 2 * query_block - 2) // query_block
    place = torch.arange(torch.sym_min(tokens, query_block), device=q.device)
    reach = g.window + g.block if causal else 2 * (g.window + g.block)
    by_head = torch.arange(batch * kv_heads, device=q.device).unflatten(0, (batch, kv_heads))
    by_row = torch.arange(batch, device=q.device)
    no_spans = torch.full((1, kv_heads, 1, beam), -1, dtype=torch.int32).expand(batch, -1, -1, -1)
    no_choices = torch.full((1, kv_heads, 1, g.choices(Votes.of(q.dtype))), UNUSED, dtype=torch.int32)
    no_choices = no_choices.expand(batch, -1, -1, -1)
    # One more place, for blocks that have no past.
    past_spans = no_spans if past_spans is None else torch.cat([past_spans, no_spans], 2)
    past_choices = no_choices if past_choices is None else torch.cat([past_choices, no_choices], 2)
    held = {
        "q": q.transpose(1, 2).flatten(0, 1).flatten(1),
        "q_base": by_row * tokens + offset,
        "keys": k.flatten(0, 2),
        "values": v.flatten(0, 2),
        "key_base": by_head * slots + start[:, None],
        "length": length,
        "low": low,
        "begin": begin,
        "place": place,
        "around": torch.arange(place.shape[0] + reach, device=q.device),
        "early": torch.arange(torch.sym_min(slots, g.dense_end), device=q.device),
        "past_spans": past_spans,
        "past_choices": past_choices,
    }
    for i, level in enumerate(nodes):
        # Coarse levels may be empty; a fetch of nothing takes their last row.
        held[f"base{i}"] = by_head * (level.shape[2] + 1)
        held[f"nodes{i}"] = pad(level, (0, 0, 0, 1)).flatten(0, 2)
        if gate is not None:
            held[f"value_nodes{i}"] = pad(value_nodes[i], (0, 0, 0, 1)).flatten(0, 2)
    if spreads is not None:
        held["spreads"] = pad(spreads, (0, 1)).flatten()
    if gate is not None:
        held["gate"] = gate

    def step(number: Tensor, held: Mapping[str, Tensor]) -> Sequence[Tensor]:
        length = held["length"]
        numbered = held["begin"] + number
        block = torch.minimum(numbered, (length - 1).clamp(min=0) // g.query_block)
        t = torch.maximum(block * g.query_block, held["low"])[:, None] + held["place"]
        new = (t < length[:, None]) & (t < ((block + 1) * g.query_block)[:, None])
        at = (held["q_base"][:, None] + t).clamp(0, held["q"].shape[0] - 1)
        rows = held["q"].index_select(0, at.flatten()).unflatten(0, t.shape)
        by_head = rows.unflatten(2, (kv_heads, -1, k.shape[3])).permute(0, 2, 3, 1, 4).flatten(2, 3)
        queries = by_head.float() * scale
        is_dense = t[:, 0] < g.dense_end if causal else length <= g.dense_end
        past_spans = _pick(held["past_spans"], block).to(torch.int64)
        past_choices = _pick(held["past_choices"], block)
        nothing = queries.new_zeros(*queries.shape[:3], held["values"].shape[1])
        unchosen, unmade = torch.full_like(past_spans, -1), torch.full_like(past_choices, UNUSED)
        held = {**held, "block": block, "t": t, "new": new, "queries": queries}

        fresh = ~is_dense & (block * g.query_block >= held["low"])
        kept = torch.full_like(unchosen, -1)
        if g.levels > 2:
            top = g.top_level(covered_leaves(block, length, rules)[:, 0])
            high = range(g.levels - 1, 1, -1)
            (kept,) = run_if(
                (fresh & (top > 1)).any(),
                lambda held: [coarse(held, rules, high)],
                [kept],
                held,
            )
        (spans,) = run_if(
            fresh.any(), lambda held: [coarse(held, rules, [1])], [unchosen], {**held, "kept": kept}
        )
        held["spans"] = torch.where(fresh[:, None, None], spans, past_spans)
        held["choices"] = torch.where(fresh[:, None, None], UNUSED, past_choices)
        out, choices = run_if((~is_dense).any(), lambda held: sparse(held, rules), [nothing, unmade], held)
        (dense,) = run_if(is_dense.any(), lambda held: [near(held, rules)], [nothing], held)
        out = torch.where(is_dense[:, None, None, None], dense, out)
        chosen = ((numbered == block) & ~is_dense)[:, None, None]
        return [
            out.to(held["values"].dtype),
            torch.where(chosen, held["spans"], -1).to(torch.int32),
            torch.where(chosen, choices, UNUSED),
        ]

    parts, spans, choices = scan_chunks(step, [torch.arange(blocks, device=q.device)], held)

    # [blocks, B, Hkv, G·P, ·] → [B, Hq, blocks·P, ·]
    by_place = parts.unflatten(3, (-1, place.shape[0])).permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)
    position = torch.arange(tokens, device=q.device) - offset[:, None]
    own = position // query_block
    found = (
        (own - begin[:, None]) * place.shape[0] + position - torch.maximum(own * query_block, low[:, None])
    )
    found = found.clamp(min=0)[:, None, :, None]
    out = by_place.gather(2, found.expand(-1, q.shape[1], -1, v.shape[3]))
    valid = (position >= 0) & (position < length[:, None])
    out = out.masked_fill(~valid[:, None, :, None], 0)
    total = torch.arange(g.blocks(slots), device=q.device).expand(batch, -1)
    return out, _merge(past_spans, spans, total, begin), _merge(past_choices, choices, total, begin)


def _pick(x: Tensor, block: Tensor) -> Tensor:
    """Rows [B, Hkv, ·] of the blocks [B]; the last for those behind it."""
    return _pick_all(x, block[:, None])[:, :, 0]


def _pick_all(x: Tensor, block: Tensor) -> Tensor:
    """Rows [B, Hkv, R, ·] of the blocks [B, R]; the last for those behind it."""
    index = block.clamp(max=x.shape[2] - 1)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def _merge(past: Tensor, new: Tensor, block: Tensor, begin: Tensor) -> Tensor:
    """The blocks ``block`` [B, NB]: those from ``begin`` on from the steps ``new``, all others from ``past``."""
    new = new.permute(1, 2, 0, 3)
    place = block - begin[:, None]
    is_new = ((place >= 0) & (place < new.shape[2]))[:, None, :, None]
    return torch.where(is_new, _pick_all(new, place.clamp(min=0)), _pick_all(past, block))
