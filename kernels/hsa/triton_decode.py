"""Hierarchical sparse attention of the last few tokens of each row by Triton kernels, in place.

    k, v  →  nodes, spreads of what the tokens complete, spans  →  votes  →  choices, lists  →  out

The work on one token is spread over many programs. Its votes are those of ``triton.hsa_attention`` to the bit: rows of a
product do not depend on how many there are.

Nothing is read back from the device. Where tokens end is read there as well, if the call says ``ending``: it can be
captured in a CUDA graph and replayed after new tokens have been written and ``length`` has been raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.hsa.triton import (
    choosing,
    coarse_levels,
    coarse_scores,
    coarse_tiles,
    scoring,
    spread_strides,
    strides,
)
from retrofit.kernels.hsa.triton_advance import advance
from retrofit.kernels.hsa.triton_call import CALLS, Call, padded, power
from retrofit.kernels.hsa.triton_choose import settle
from retrofit.kernels.hsa.triton_parts import attend_parts, join_parts
from retrofit.kernels.hsa.triton_select import WHOLE
from retrofit.kernels.hsa.triton_vote import vote_parts
from retrofit.kernels.pyramid.triton import growing

FEWEST_ROWS = 64
"""Queries times heads in a product, at least."""
VOTERS = 2
"""Programs that vote for few queries where there is room for one with a tile of all rows."""
FEWEST_KEYS = 128
"""Keys in a part of what a query sees, at least, unless it is the rest of that."""
ITEMS_AT_ONCE, PARTS_AT_ONCE = 256, 16
"""Items whose steps are added up at a time, and parts of an item that are joined at a time."""


def hsa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    spreads: Tensor | None,
    spans: Tensor,
    choices: Tensor,
    sinks: Tensor | None,
    weights: Sequence[Tensor | None],
    *,
    scale: float,
    pooling: str,
    sliding_window: int,
    padded: bool,
    ending: bool,
    geometry: Geometry,
) -> Tensor:
    """Returns the output [B, Hq, T, Dv], and brings nodes, spreads, spans and choices up to date.

    Arguments are as in ``ops.hsa_decode``.
    """
    g = geometry
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sinks = None if sinks is None else sinks.contiguous()
    call = Call.of(
        *(q, k, v, g),
        sliding_window=sliding_window,
        padded=padded,
        ending=ending,
        total_blocks=spans.shape[2],
    )
    completes = _may_complete(call, g.node, g.sink)
    # The token behind a block begins the next one.
    begins = not call.is_dense and _may_complete(call, g.query_block, 1)
    if completes or begins:
        _advance(call, q, k, nodes, spreads, start, length, spans, scale, pooling, weights, begins=begins)
    if call.is_dense:
        lists = call.empty_lists(q.device)  # which nobody reads
    else:
        lists = _choose(call, q, k, nodes[0], spreads, sinks, start, length, spans, choices, scale)
    return _attend(call, q, k, v, sinks, start, length, lists, scale)


def _advance(
    call: Call,
    q: Tensor,
    k: Tensor,
    nodes: Sequence[Tensor],
    spreads: Tensor | None,
    start: Tensor,
    length: Tensor,
    spans: Tensor,
    scale: float,
    pooling: str,
    weights: Sequence[Tensor | None],
    *,
    begins: bool,
) -> None:
    """Brings nodes and spreads up to date, and ``spans`` if a new token may begin a query block."""
    taps = tuple(None if weight is None else weight.contiguous() for weight in weights)
    scores = coarse_scores(call, q.device) if begins else spans  # which nobody reads
    advance[(call.rows,)](
        q, k, tuple(nodes), taps, spreads, start, length, spans, scores, *strides(q, k), *call.extent,
        call.total_blocks, tuple(level.shape[2] for level in nodes), scale,
        COARSE=coarse_levels(call) if begins else 0, POOLING=pooling, **_advancing(call, q.device),
    )  # fmt: skip


def _choose(
    call: Call,
    q: Tensor,
    k: Tensor,
    nodes: Tensor,
    spreads: Tensor | None,
    sinks: Tensor | None,
    start: Tensor,
    length: Tensor,
    spans: Tensor,
    choices: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leaf step: adds to ``choices``, and returns the lists as ``Call.list_blocks`` does."""
    g, tiles = call.geometry, call.blocks * call.rows
    pairs = -(-g.leaf_width // (2 * g.fanout))
    votes, lists = call.empty_votes(tiles, q.device), call.empty_lists(q.device)
    constants = _scoring(call)
    reached = call.reached(constants["PLACES"])
    parts = max(1, min(pairs, VOTERS * call.programs(q.device) // (reached * call.rows)))
    each = -(-pairs // parts)
    vote_parts[(reached, call.rows, -(-pairs // each))](
        q, k, nodes, spreads, sinks, start, length, spans, votes, *strides(q, k), *nodes.stride()[:2],
        *spread_strides(spreads), *call.extent, call.total_blocks, nodes.shape[2] // g.nodes_in_span(0), each,
        scale, g.spread, **constants,
    )  # fmt: skip
    settle[(tiles,)](
        start, length, spans, choices, votes, *lists, *call.extent, call.total_blocks, 0, g.least_vote(call.votes),
        FRESH=False, **choosing(call), **call.listing, num_warps=4,
    )  # fmt: skip
    return lists


def _attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    start: Tensor,
    length: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> Tensor:
    """Attends to what is listed, by parts of it."""
    constants = _attending(call)
    items, programs = call.tokens * call.rows, call.programs(q.device)
    parts = torch.empty(items, 2, dtype=torch.int32, device=q.device)
    sums = torch.empty(programs + items, call.group, call.value_dim, dtype=torch.float32, device=q.device)
    totals, tops = torch.empty(2, *sums.shape[:-1], dtype=torch.float32, device=q.device).unbind()
    attend_parts[(programs,)](
        q, k, v, start, length, *lists, sums, totals, tops, parts, *strides(q, k, v), *call.extent[:2], call.rows,
        call.blocks, scale, **constants,
    )  # fmt: skip
    out = torch.empty(*q.shape[:3], call.value_dim, dtype=q.dtype, device=q.device)
    join_parts[(items, call.group)](
        sinks, start, length, sums, totals, tops, parts, out, *call.extent[:2], call.rows, KV_HEADS=call.kv_heads,
        GROUP=call.group, AT_ONCE=PARTS_AT_ONCE, LAYOUT=call.layout, **call.values, num_warps=4,
    )  # fmt: skip
    return out


@lru_cache(CALLS)
def _advancing(call: Call, device: torch.device) -> dict[str, Any]:
    """Constants of the kernel that grows the pyramid and keeps spans."""
    tiles = coarse_tiles(call)
    return {
        "RATIOS": tuple(call.geometry.ratios),
        "WIDTH_PAD": power(tiles["WIDTH"]),
        **growing(call.dim, device),
        **tiles,
        **call.reach,
        "num_stages": 2,  # of its loops' tiles more would not fit
        "enable_fp_fusion": False,  # cells are those of other kernels to the bit
    }


@lru_cache(CALLS)
def _scoring(call: Call) -> dict[str, Any]:
    """Constants of the kernel that votes, for tiles of fewer places than a query block has."""
    constants = dict(scoring(call))
    places = min(constants["PLACES"], max(8, FEWEST_ROWS // constants["HEADS"]))
    tile = call.settings.vote[call.bytes, padded(call.dim)]
    return {**constants, "PLACES": places, **tile.options(constants["HEADS"] * places)}


@lru_cache(CALLS)
def _attending(call: Call) -> dict[str, Any]:
    """Constants of the kernel that attends to a part."""
    tile = call.tile(call.settings.attend_parts)
    rows, keys = max(tile.rows, power(call.group)), max(tile.keys, call.geometry.block)
    return {
        "LIST": call.list_width,
        "GROUP": call.group,
        "ROWS": rows,
        "KEYS": keys,
        "LEAST": max(1, FEWEST_KEYS // keys),
        "AT_ONCE": min(ITEMS_AT_ONCE, power(call.tokens * call.rows)),
        **call.product,
        **call.values,
        **call.shared,
        **call.reach,
        **tile.options(rows),
    }


def _may_complete(call: Call, size: int, offset: int) -> bool:
    """Whether the new tokens may complete a group of ``size`` tokens, counted from position ``offset``.

    The host knows that where rows have all slots.
    """
    if call.layout != WHOLE.value:
        return True
    return (call.slots - offset) // size > (call.slots - call.tokens - offset) // size
