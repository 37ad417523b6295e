"""Execution of a few lists of leaves at a time: what they need stays in the cache, in memory used again.

choices  →  per few lists: gather keys, product, mask, softmax, gather values, product  →  [B, Hkv, R, G·Q, Dv]

As ``blocked_tile.fetch`` and ``attend`` without summaries, for a CPU. A list is as long as its few need.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules, share_of_keys
from retrofit.kernels.hsa import blocked_execute as execute
from retrofit.kernels.hsa.blocked_scratch import Scratch
from retrofit.kernels.hsa.blocked_tile import Sources
from retrofit.kernels.hsa.geometry import Geometry


def attend_lists(
    queries: Tensor,
    sources: Sources,
    exact: tuple[Tensor, Tensor],
    chosen: execute.Listed,
    block: Tensor,
    scratch: Scratch,
    *,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
) -> Tensor:
    """Attends to sinks, window and the chosen leaves: [B, Hkv, R, G·query_block, Dv].

    Args:
        queries: Times the scale, [B, Hkv, R, G·query_block, D].
        sources: Tables of keys and values.
        exact: Sinks and window, as from ``execute.exact_plan``.
        ordered: The lists of leaves, as from ``execute.listed``.
        count: How many of them each query may see, as from ``execute.listed``.
        block: Number of each query block, int64 [B, R].
        scratch: Memory to work in.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        rules: What else happens to the scores; the sinks by query, [B·Hkv·R, G·query_block, 1].
    """
    g, dtype = geometry, queries.dtype
    tile, near = execute.list_tile(g), execute.exact_rows(g, causal)
    tiles = (-(-chosen.seen.amax(-1).flatten() // tile)).clamp(min=1)
    slots = int(tiles.max()) * tile
    by_leaf = causal and not sliding_window  # a query sees whole leaves, the first ones of the list
    rows, bias = execute.plan(
        exact,
        chosen,
        block,
        0 if by_leaf else slots // tile,
        causal=causal,
        sliding_window=sliding_window,
        geometry=g,
    )
    if by_leaf:
        missing = max(0, slots - chosen.leaves.shape[-1])
        listed, share = (F.pad(x[..., :slots], (0, missing)) for x in (chosen.leaves, chosen.share))
        rows = torch.cat([rows, listed + g.sink // g.block], dim=-1)
    tiles, order = tiles.sort()  # lists of much the same length meet
    flat, bias, count = (x.flatten(0, 2)[order] for x in (queries, bias, chosen.seen))
    sinks = None if rules.sinks is None else rules.sinks[order]
    if by_leaf:
        share = share.flatten(0, 2)[order].to(dtype)
        hidden = torch.arange(slots) >= count[..., None]
        late = share[:, None].expand_as(hidden).masked_fill(hidden, execute.HIDDEN)
        alike = torch.minimum(count[:, 0], (share == 0).to(torch.int8).cumprod(-1).sum(-1))
    tables = (sources.keys, sources.values)
    places = [x.flat(x.numbers(rows, g.block)).reshape(len(flat), -1)[order] for x in tables]
    each = places[0].shape[1] // rows.shape[-1]  # rows of the table in ``block`` tokens
    out = flat.new_empty(*flat.shape[:2], sources.values.table.shape[1] // sources.values.group)
    for few in scratch.few(len(flat)):
        query, part = flat[few], out[few]
        most = int(tiles[few][-1])
        end = near + most * tile
        keys, values = (
            torch.index_select(
                x.table,
                0,
                at[few, : end * each].flatten(),
                out=scratch.empty(name, (len(query) * end * each, x.table.shape[1]), x.table),
            )
            .view(len(query), end * g.block, -1)
            .to(dtype)
            for name, x, at in zip(("keys", "values"), tables, places, strict=True)
        )
        weights = scratch.empty("scores", (*query.shape[:2], end * g.block), flat)
        rules.capped_(torch.bmm(query, keys.transpose(1, 2), out=weights))
        by_head = weights.view(len(query), -1, g.query_block, end, g.block)
        by_head.flatten(-2)[..., : bias.shape[-1]].add_(bias[few, None, :, : end * g.block])
        if by_leaf:
            whole = int(alike[few].min())  # leaves that every query sees whole
            by_head[..., near + whole :, :].add_(late[few, None, :, whole : end - near, None])
        top = None if sinks is None else weights.amax(-1, keepdim=True)
        torch.softmax(weights, -1, out=weights)
        # Tile by tile: the sums of the earlier queries do not depend on how long the list gets.
        sizes = [(near + tile) * g.block, *[tile * g.block] * (most - 1)]
        first, *others = zip(weights.split(sizes, -1), values.split(sizes, 1), strict=True)
        torch.bmm(*first, out=part)
        for weight, value in others:
            part.baddbmm_(weight, value)
        if sinks is not None and top is not None:
            part *= share_of_keys(top, weights.amax(-1, keepdim=True), sinks[few])
    unsorted = torch.empty_like(out)
    unsorted[order] = out
    return unsorted.unflatten(0, queries.shape[:3])
