"""Execution of one list of leaves at a time: what a list needs stays in the cache, in memory used again.

ordered, count  →  per list: gather keys, product, mask, softmax, gather values, product  →  [B, Hkv, R, G·Q, Dv]

As ``blocked_tile.fetch`` and ``attend`` without summaries, for a CPU. A list is as long as its own leaves need.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.hsa import blocked_execute as execute
from retrofit.kernels.hsa.blocked_scratch import Scratch
from retrofit.kernels.hsa.blocked_tile import Sources
from retrofit.kernels.hsa.geometry import Geometry


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
    """Attends to sinks, window and the chosen leaves: [B, Hkv, R, G·query_block, Dv].

    Args:
        queries: Times the scale, [B, Hkv, R, G·query_block, D].
        sources: Tables of keys and values.
        ordered: The lists of leaves, as from ``execute.listed``.
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
    slots = max(tiles) * tile
    by_leaf = causal and not sliding_window  # a query sees whole leaves, the first ones of the list
    rows, bias = execute.plan(
        ordered,
        count,
        block,
        length,
        0 if by_leaf else max(tiles),
        causal=causal,
        sliding_window=sliding_window,
        geometry=g,
        dtype=dtype,
    )
    flat, bias, count = queries.flatten(0, 2), bias.flatten(0, 2), count.flatten(0, 2)
    if by_leaf:
        listed = F.pad(ordered[..., :slots], (0, max(0, slots - ordered.shape[-1])))
        rows = torch.cat([rows, listed + g.sink // g.block], dim=-1)
        hidden = torch.arange(slots) >= count[..., None]
        late = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, execute.HIDDEN)
        seen_by_all = count[:, 0].tolist()
    tables = (sources.keys, sources.values)
    places = [x.flat(x.numbers(rows, g.block)).reshape(len(flat), -1) for x in tables]
    each = places[0].shape[1] // rows.shape[-1]  # rows of the table in ``block`` tokens
    room = [
        scratch.empty(name, (places[0].shape[1], x.table.shape[1]), x.table)
        for name, x in zip(("keys", "values"), tables, strict=True)
    ]
    score_room = scratch.empty("scores", (flat.shape[1] * rows.shape[-1] * g.block,), flat)
    out = flat.new_zeros(*flat.shape[:2], sources.values.table.shape[1] // sources.values.group)
    for i, (query, part) in enumerate(zip(flat, out, strict=True)):
        end = exact + tiles[i] * tile
        keys, values = (
            torch.index_select(x.table, 0, at[i, : end * each], out=found[: end * each])
            .view(end * g.block, -1)
            .to(dtype)
            for x, at, found in zip(tables, places, room, strict=True)
        )
        weights = score_room[: len(query) * len(keys)].view(len(query), len(keys))
        torch.mm(query, keys.t(), out=weights)
        by_head = weights.view(-1, g.query_block, end, g.block)
        by_head.flatten(-2)[..., : bias.shape[-1]] += bias[i, :, : len(keys)]
        if by_leaf:
            by_head[..., exact + seen_by_all[i] :, :] += late[i, :, seen_by_all[i] : end - exact, None]
        torch.softmax(weights, -1, out=weights)
        # Tile by tile: the sums of the earlier queries do not depend on how long the list gets.
        sizes = [(exact + tile) * g.block, *[tile * g.block] * (tiles[i] - 1)]
        for weight, value in zip(weights.split(sizes, 1), values.split(sizes), strict=True):
            part.addmm_(weight, value)
    return out.unflatten(0, queries.shape[:3])
