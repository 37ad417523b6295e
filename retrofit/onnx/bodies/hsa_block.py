"""One query block of each row: its coarse spans, who chooses which leaf, and its output.

    coarse   leaders, pyramid         →  spans
    choose   queries, spans           →  choices
    sparse   spans, choices           →  output of the block's new queries
    near     for blocks that attend densely

The steps are those of ``retrofit.kernels.hsa``, for the P places of the new queries alone: a decoded token pays for
one. Everything is fetched from tables of single rows, so that no call copies what it does not execute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from retrofit.kernels.hsa import blocked_select as select
from retrofit.kernels.hsa import blocked_summaries as summaries
from retrofit.kernels.hsa.geometry import FADE, Geometry, Votes
from retrofit.onnx.bodies.listed import HIDDEN, attend_listed

_LAST = 2**40

Held = Mapping[str, Tensor]


class Rules(NamedTuple):
    """What every step knows: the mask's class, the sizes, and whether summaries take part."""

    causal: bool
    sliding_window: int
    geometry: Geometry
    summaries: bool


def coarse(held: Held, rules: Rules, levels: Sequence[int]) -> Tensor:
    """Spans of the last of ``levels`` kept for the blocks, int64 [B, Hkv, beam].

    Of ``held`` it reads the ``queries`` at places ``t``, ``block`` and ``length`` [B], the pyramid, and ``kept``
    [B, Hkv, beam], the spans kept above the first of the levels, if there are any.
    """
    g = rules.geometry
    leaders = held["queries"].unflatten(2, (-1, held["place"].shape[0]))[:, :, :, 0]
    kept = held["kept"] if "kept" in held else _none(leaders, g.beam)
    covered = covered_leaves(held["block"], held["length"], rules).expand(-1, kept.shape[1])
    t0 = held["block"] * g.query_block
    for level in levels:
        ids = g.coarse_ids(kept, covered, level)
        allowed = ids >= 0
        if rules.sliding_window:
            end = g.sink + (ids + 1) * g.span_size(level)
            allowed = allowed & (end - 1 > (t0 - rules.sliding_window)[:, None, None])
        scores = _best_nodes(leaders.flatten(0, 1), held, level, ids, g)
        votes = scores.unflatten(0, ids.shape[:2]).masked_fill(~allowed[:, :, None], -torch.inf).softmax(-1)
        chosen = select.best(votes.sum(2), allowed, g.beam)
        lowest = torch.where(chosen, ids, _LAST).topk(g.beam, largest=False, sorted=True).values
        kept = torch.where(lowest == _LAST, -1, lowest)
    return kept


def _none(leaders: Tensor, count: int) -> Tensor:
    return leaders.new_full((*leaders.shape[:2], count), -1, dtype=torch.int64)


def covered_leaves(block: Tensor, length: Tensor, rules: Rules) -> Tensor:
    """Leaves that the coarse steps of the blocks [B] cover, int64 [B, 1]."""
    g = rules.geometry
    covered: Tensor = g.covered(block * g.query_block) if rules.causal else g.complete(length)
    return covered[:, None]


def sparse(held: Held, rules: Rules) -> tuple[Tensor, Tensor]:
    """The blocks' output [B, Hkv, G·P, Dv] and their choices, int32 [B, Hkv, E].

    Of ``held`` it reads ``queries`` [B, Hkv, G·P, D], positions ``t`` and which of them are ``new`` [B, P], ``spans``
    [B, Hkv, beam] and ``choices``, and the tables.
    """
    g, length, t, queries = rules.geometry, held["length"], held["t"], held["queries"]
    leaves = g.block_leaf_ids(
        held["spans"], held["block"][:, None], None if rules.causal else length[:, None]
    )
    row = (t - held["block"][:, None] * g.query_block)[:, None]  # [B, 1, P]
    base, last = held["key_base"], held["keys"].shape[0] - 1
    exact, exact_seen = _exact(held, rules)
    exact = (base[..., None] + exact[:, None]).clamp(max=last)
    choices = _choose(held, rules, leaves, row, exact, exact_seen)

    when, candidate, rise = g.unpacked(choices.to(torch.int64))
    leaf = leaves.gather(-1, candidate).clamp(min=0)
    used = (when < g.query_block).sum(-1).amax((0, 1)).clamp(min=1)
    tt = t[:, None, :, None]
    if rules.causal:
        seen = when[:, :, None] <= row[..., None]
    else:
        begin = (g.sink + leaf * g.block)[:, :, None]
        outside = (begin < g.window_start(tt)) | (begin >= g.window_end(tt))
        seen = (when < g.query_block)[:, :, None] & outside
    share = (rise.clamp(min=1).to(queries.dtype) / FADE).log()
    bias = torch.where(seen, share[:, :, None], HIDDEN).to(queries.dtype)
    beyond = (base[..., None] + (t - rules.sliding_window)[:, None]).flatten(0, 1)
    out = attend_listed(
        queries.flatten(0, 1),
        held["keys"],
        held["values"],
        exact.flatten(0, 1),
        exact_seen[:, None].expand(-1, base.shape[1], -1, -1).flatten(0, 1),
        (base[..., None] + g.sink + leaf * g.block).flatten(0, 1),
        bias.flatten(0, 1),
        used,
        beyond if rules.sliding_window else None,
        *(_cover(held, rules, leaves, choices, row) if rules.summaries else (None, None, None)),
        block=g.block,
    )
    return out.unflatten(0, queries.shape[:2]), choices


def near(held: Held, rules: Rules) -> Tensor:
    """Attention of the blocks to all of the first keys, by position: [B, Hkv, G·P, Dv]."""
    queries, t = held["queries"], held["t"][..., None]
    key = held["early"]
    seen = key < held["length"][:, None, None]
    if rules.causal:
        seen = seen & (key <= t)
    if rules.sliding_window:
        seen = seen & (key > t - rules.sliding_window)
    at = (held["key_base"][..., None] + key).clamp(max=held["keys"].shape[0] - 1)
    keys, values = (_rows(held[name], at).to(queries.dtype) for name in ("keys", "values"))
    bias = torch.where(seen, 0.0, HIDDEN).to(queries.dtype)[:, None, None]
    scores = (queries @ keys.transpose(-1, -2)).unflatten(2, (-1, t.shape[1])) + bias
    return scores.softmax(-1).flatten(2, 3) @ values


def _choose(
    held: Held, rules: Rules, leaves: Tensor, row: Tensor, exact: Tensor, exact_seen: Tensor
) -> Tensor:
    """``choices`` with those of the new queries; ``exact`` [B, Hkv, E] are rows of keys, who sees them [B, P, E]."""
    g, t = rules.geometry, held["t"]
    allowed = select.leaf_candidates(
        leaves[:, :, None],
        t[:, None],
        causal=rules.causal,
        sliding_window=rules.sliding_window,
        geometry=g,
    )[:, :, 0]
    queries = held["queries"]
    scores = _best_nodes(queries.flatten(0, 1), held, 0, leaves, g)
    by_head = scores.unflatten(1, (-1, t.shape[1])).unflatten(0, leaves.shape[:2])
    near = queries @ _rows(held["keys"], exact).to(queries.dtype).transpose(-1, -2)
    bias = torch.where(exact_seen, 0.0, HIDDEN).to(queries.dtype)[:, None, None]
    total = (near.unflatten(2, (-1, t.shape[1])) + bias).logsumexp(-1, keepdim=True)
    counted = Votes.of(held["keys"].dtype)
    votes = select.in_steps((by_head - total).amax(2), counted)
    levels, new = select.wanted(votes, allowed, counted, g), held["new"][:, None]
    return select.add_choices(held["choices"], levels, new, row, g)


def _best_nodes(queries: Tensor, held: Held, level: int, ids: Tensor, geometry: Geometry) -> Tensor:
    """Scores [B·Hkv, M, W] of queries [B·Hkv, M, D] for spans [B, Hkv, W]: those of their best nodes."""
    each = geometry.nodes_in_span(level)
    members = _rows(held[f"nodes{level}"], _members(held, level, ids, each)).flatten(0, 1)
    scores = queries @ members.to(queries.dtype).transpose(1, 2)
    if level == 0 and "spreads" in held:
        at = _members(held, level, ids, each)
        spreads = held["spreads"].index_select(0, at.flatten()).unflatten(0, at.shape).flatten(0, 1)
        norms = (geometry.spread / 2) * queries.square().sum(-1, keepdim=True)
        scores = scores + norms * spreads[:, None].to(queries.dtype)
    return scores.unflatten(2, (-1, each)).amax(-1)


def _members(held: Held, level: int, ids: Tensor, each: int) -> Tensor:
    """Rows [B, Hkv, W·each] of a level's table for spans [B, Hkv, W]."""
    begin = held[f"base{level}"][..., None] + ids.clamp(min=0) * each
    rows = (begin[..., None] + torch.arange(each, device=ids.device)).flatten(2)
    return rows.clamp(max=held[f"nodes{level}"].shape[0] - 1)


def _rows(table: Tensor, at: Tensor) -> Tensor:
    """Rows of a table [M, D] at [B, Hkv, W]: [B, Hkv, W, D]."""
    return table.index_select(0, at.flatten()).unflatten(0, at.shape)


def _exact(held: Held, rules: Rules) -> tuple[Tensor, Tensor]:
    """Positions of sinks and window, [B, E], and which places see them, [B, P, E]."""
    g, t, length = rules.geometry, held["t"], held["length"][:, None, None]
    sinks = torch.arange(g.sink, device=t.device).expand(t.shape[0], -1)
    window = g.window_start(t[:, :1]) + held["around"]
    tt = t[..., None]
    from_window = window[:, None] >= g.window_start(tt).clamp(min=g.sink)
    from_sinks = torch.ones_like(tt, dtype=torch.bool).expand(-1, -1, g.sink)
    if rules.causal:
        exact, seen = torch.cat([sinks, window], 1), torch.cat([from_sinks, from_window], 2)
        seen = seen & (exact[:, None] <= tt)
    else:
        # The incomplete leaf at the end is nobody's candidate: it is exact too.
        whole = g.sink + g.complete(held["length"])[:, None] * g.block
        tail = whole + torch.arange(g.block, device=t.device)
        from_window = from_window & (window[:, None] < torch.minimum(g.window_end(tt), whole[:, None]))
        exact = torch.cat([sinks, window, tail], 1)
        all_tail = torch.ones_like(tt, dtype=torch.bool).expand(-1, -1, g.block)
        seen = torch.cat([from_sinks, from_window, all_tail], 2) & (exact[:, None] < length)
    if rules.sliding_window:
        seen = seen & (exact[:, None] > tt - rules.sliding_window)
    return exact, seen


def _cover(
    held: Held, rules: Rules, leaves: Tensor, choices: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes of the cover of what is not executed: keys, values, and what is added to their scores."""
    g, dtype = rules.geometry, held["queries"].dtype
    levels = summaries.cover(
        leaves[:, :, None],
        held["spans"][:, :, None],
        choices[:, :, None],
        held["block"][:, None],
        held["length"],
        g.levels - 1,
        causal=rules.causal,
        sliding_window=rules.sliding_window,
        geometry=g,
    )
    keys, values, bias = [], [], []
    for level, (ids, mask) in enumerate(levels):
        each = g.nodes_in_span(level)
        at = _members(held, level, ids[:, :, 0], each)
        keys.append(_rows(held[f"nodes{level}"], at))
        values.append(_rows(held[f"value_nodes{level}"], at))
        places = row.clamp(max=g.query_block - 1)[..., None].expand(-1, mask.shape[1], -1, mask.shape[4])
        size = torch.full((), log(g.node_size(level)), dtype=dtype)
        seen = torch.where(mask[:, :, 0].gather(2, places), size, HIDDEN)
        bias.append(seen.repeat_interleave(each, dim=-1))
    opened = held["gate"].to(dtype).clamp(min=0).log().clamp(min=HIDDEN).unflatten(0, (leaves.shape[1], -1))
    by_head = torch.cat(bias, -1)[:, :, None] + opened[..., None, None]
    found, contents = (torch.cat(parts, 2).to(dtype).flatten(0, 1) for parts in (keys, values))
    return found, contents, by_head.flatten(2, 3).flatten(0, 1)
