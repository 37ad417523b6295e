"""Launches the kernels whose warps have roles, on the GPUs and for the calls that they are for."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from retrofit.kernels.descriptors import can_describe, described
from retrofit.kernels.hsa.triton_call import CALLS, Call
from retrofit.kernels.hsa.triton_roles import attend_by_roles
from retrofit.kernels.hsa.triton_roles_gradients import query_gradients_by_roles
from retrofit.kernels.hsa.triton_roles_keys import key_gradients_by_roles
from retrofit.kernels.hsa.triton_roles_vote import vote_by_roles
from retrofit.kernels.launch import INTERPRETED
from retrofit.kernels.roles import SLAB
from retrofit.kernels.tuned import Tile, processors

GROUPS = 2
"""Groups of warps that attend, each to its rows of a tile."""


def can_run(tile: Tile | None, *inputs: Tensor) -> bool:
    """Whether a kernel whose warps have roles can do a call on these inputs, if that is its tile."""
    return tile is not None and not INTERPRETED.value and can_describe(*inputs)


def attend(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ordered: Tensor,
    counts: Tensor,
    shift: Tensor,
    todo: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    limit: float,
) -> None:
    """Writes ``out`` and ``lse``; arguments are those of ``attend_by_roles``."""
    tile, queries = _known(call.attend_by_roles), call.geometry.query_block
    tiles = prod(call.tiles)
    attend_by_roles[(min(tiles, processors(q.device)),)](
        *_of_queries(call, tile, queries, q), *_of_keys(call, k, v),
        sinks, ordered, counts, shift, todo, out, lse, *call.extent, tiles, scale, limit,
        LIST=call.list_width, KEYS=tile.keys, **_constants(call, tile, queries),
    )  # fmt: skip


def query_gradients(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    lse: Tensor,
    ordered: Tensor,
    counts: Tensor,
    grad_q: Tensor,
    delta: Tensor,
    scale: float,
) -> None:
    """Writes ``grad_q`` and ``delta``; arguments are those of ``query_gradients_by_roles``."""
    tile, queries = _known(call.query_gradients_by_roles), call.geometry.query_block
    tiles = prod(call.tiles)
    query_gradients_by_roles[(min(tiles, processors(q.device)),)](
        *_of_queries(call, tile, queries, q, grad), *_of_keys(call, k, v), ordered, counts,
        torch.zeros(1, dtype=torch.int32, device=q.device), lse, out, delta, grad_q,
        *out.stride()[:3], *grad_q.stride()[:3], *call.extent, tiles, scale,
        LIST=call.list_width, KEYS=tile.keys, **_constants(call, tile, queries),
    )  # fmt: skip


def key_gradients(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    lists: tuple[Tensor, ...],
    grad_k: Tensor,
    grad_v: Tensor,
    held: Tensor,
    tiles: int,
    chunks: int,
    scale: float,
) -> None:
    """Writes ``grad_k`` and ``grad_v``, or parts of them; arguments are those of ``key_gradients_by_roles``, ``lists`` its
    entries and all about them."""
    tile, queries = _known(call.key_gradients_by_roles), call.queries_of_entry
    all_tiles, all_parts = call.rows * tiles, held.shape[0]
    key_gradients_by_roles[(all_parts + all_tiles,)](
        *_of_queries(call, tile, queries, q, grad), *_of_keys(call, k, v), lse, delta, *lists, grad_k, grad_v, held,
        *grad_k.stride()[:3], *grad_v.stride()[:3], call.slots, call.tokens, tiles, chunks, all_tiles, all_parts, scale,
        TWICE=tile.registers is not None, **_constants(call, tile, queries),
    )  # fmt: skip


def vote(
    call: Call,
    q: Tensor,
    k: Tensor,
    nodes: Tensor,
    spreads: Tensor,
    sinks: Tensor | None,
    spans: Tensor,
    votes: Tensor,
    shift: Tensor,
    todo: Tensor,
    first: int,
    end: int,
    scale: float,
) -> None:
    """Writes the votes of the query blocks ``first`` … ``end``; arguments are those of ``vote_by_roles``."""
    g, tile = call.geometry, _known(call.vote_by_roles)
    size = g.nodes_in_span(0)
    leaves = nodes.shape[2] // size
    by_leaf = nodes[:, :, : leaves * size].view(call.rows, leaves, size, call.dim).transpose(1, 2)
    block = [1, size, g.fanout, SLAB.value]
    vote_by_roles[(min(end - first, call.programs(q.device)),)](
        _blocks_of(q, call.heads_per_tile(tile.rows), g.query_block // 2), *_of_keys(call, k), described(by_leaf, block),
        spreads, sinks, spans, votes, shift, todo, *spreads.stride()[:2],
        *call.extent, call.total_blocks, leaves, first, end, scale, g.spread,
        KEYS=tile.keys, **_constants(call, tile, g.query_block), **_voting(call),
    )  # fmt: skip


@lru_cache(CALLS)
def _voting(call: Call) -> dict[str, Any]:
    """Constants of ``vote_by_roles`` alone."""
    per_leaf = call.geometry.nodes_in_span(0)
    return {**call.candidates, "PER_LEAF": per_leaf, "STEPS": call.votes.steps, "MOST": call.votes.most}


def _known(tile: Tile | None) -> Tile:
    """The tile, which ``can_run`` has seen."""
    assert tile is not None
    return tile


def _of_queries(call: Call, tile: Tile, queries: int, *inputs: Tensor) -> list[TensorDescriptor]:
    """Describes [B, Hq, T, D] by tiles of so many queries."""
    return [_blocks_of(x, call.heads_per_tile(tile.rows, queries), queries) for x in inputs]


def _of_keys(call: Call, *inputs: Tensor) -> list[TensorDescriptor]:
    """Describes [B, Hkv, N, D] by blocks."""
    return [_blocks_of(x, 1, call.geometry.block) for x in inputs]


def _blocks_of(x: Tensor, heads: int, tokens: int) -> TensorDescriptor:
    return described(x, [1, heads, tokens, SLAB.value])


@lru_cache(CALLS)
def _constants(call: Call, tile: Tile, queries: int) -> dict[str, Any]:
    """Constants of all these kernels, of tiles of so many queries."""
    shared = {name: value for name, value in call.shared.items() if name != "LAYOUT"}
    return {
        **shared,
        "GROUP": call.group,
        "HEADS": call.heads_per_tile(tile.rows, queries),
        "QUERY_BLOCK": queries,
        "DIM": call.dim,
        "STAGES": tile.stages,
        **{name: value for name, value in tile.options(tile.rows).items() if name != "num_stages"},
    }
