"""Hierarchical sparse attention by Triton kernels.

    top_scores, refine, keep   per level, from the top down  →  spans
    vote                       spans                         →  votes for leaves, shift
    settle                     votes                         →  choices, and the list of what each block executes
    attend_listed, attend_run  list                          →  out, lse

On Hopper vote_by_roles takes the place of vote where it can, and attend_by_roles that of attend_listed, in the dense start
also that of attend_run.
Nothing is read back from the device, and every buffer's size follows from shapes: a call can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels.dense import fused as dense
from retrofit.kernels.hsa import hopper
from retrofit.kernels.hsa import triton_execute as execute
from retrofit.kernels.hsa import triton_select as select
from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.hsa.triton_backward import hsa_attention_backward
from retrofit.kernels.hsa.triton_call import CALLS, Call, padded, power
from retrofit.kernels.hsa.triton_choose import settle
from retrofit.kernels.hsa.triton_vote import vote
from retrofit.kernels.tuned import settings

__all__ = ["hsa_attention", "hsa_attention_backward", "unsupported"]

FUSED_FROM = 2048
"""Tokens of the dense start from which PyTorch's kernel is worth its launch and two copies, where warps have no roles."""
BLOCKS_AT_ONCE = 8192
"""Query blocks whose votes wait in memory, about."""
MOST_NODES = 128
"""Nodes of a product, for whose scores a tile of votes has room in registers."""
SETTLING = {"num_warps": 1, "maxnreg": 64}
"""How the kernel by which the queries of a block choose is compiled: as many programs to a multiprocessor as there may
be, for each waits for itself."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_SUM = {torch.float32: 2.0**100, torch.bfloat16: 2.0**100, torch.float16: 2.0**15}
"""Sum of a query's weights, shifted by the highest score among some of its keys, from which a row is done again."""


def unsupported(q: Tensor, v: Tensor, *, causal: bool, gate: Tensor | None, geometry: Geometry) -> str | None:
    """Returns what these kernels cannot do of a call, or None."""
    if not causal:
        return "attention that is not causal"
    if gate is not None:
        return "summaries"
    if q.dtype not in DTYPES:
        return f"{q.dtype}"
    for name, dim in (("head_dim", q.shape[3]), ("the values' head_dim", v.shape[3])):
        if dim > 256:
            return f"{name} above 256, got {dim}"
    if q.dtype == torch.float32 and q.shape[3] > 128 and (4, 256) not in settings(q.device).vote:
        return f"float32 heads of {q.shape[3]} dims on this GPU"
    return _unsupported_sizes(geometry)


@lru_cache(CALLS)
def _unsupported_sizes(geometry: Geometry) -> str | None:
    if geometry.query_block % 8:
        return f"a query_block that is no multiple of 8, got {geometry.query_block}"
    for name in ("block", "fanout", "query_block"):
        if (size := getattr(geometry, name)) & (size - 1):
            return f"a {name} that is no power of two, got {size}"
    for name, size in (
        ("block / node", geometry.nodes_in_span(0)),
        ("nodes_per_span", geometry.nodes_per_span),
    ):
        if size & (size - 1):
            return f"{name} that is no power of two, got {size}"
    if 2 * geometry.fanout * geometry.nodes_in_span(0) < 16 or geometry.fanout * geometry.nodes_per_span < 16:
        return "fewer than 16 nodes to a product"
    if geometry.dense_end < geometry.sink + geometry.block:
        return f"a dense start that ends before the first leaf does, got {geometry.dense_end} tokens"
    return None


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
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    padded: bool,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output [B, Hq, T, Dv], whose heads lie together token by token; the selection (spans, choices); and
    the log-sum-exp of each query's scores.

    Arguments are as in ``ops``; the last output is float32 [B, Hq, T].
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sinks = None if sinks is None else sinks.contiguous()
    call = Call.of(q, k, v, geometry, sliding_window=sliding_window, padded=padded)
    fresh = past_spans is None and call.tokens == call.slots and not call.is_dense
    spans, choices = call.empty_selection(k) if fresh else geometry.selection(k, past_spans, past_choices)
    by_roles = not call.is_dense and hopper.can_run(call.attend_by_roles, q, k, v)
    alike = min(call.slots, geometry.dense_end)
    fused = (
        call.is_whole
        and not by_roles
        and dense.can_attend(q, k, v)
        and (call.is_dense or alike >= FUSED_FROM)
        and (not sliding_window or alike <= sliding_window)
    )
    if call.is_dense and fused:
        out, lse = _with_sinks(*dense.attend(q, k, v, scale), sinks)
        return out.transpose(1, 2).contiguous().transpose(1, 2), spans, choices, lse
    make = torch.zeros if padded else torch.empty
    shape = call.batch, call.tokens, call.heads, call.value_dim
    out = make(shape, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = make(q.shape[:3], dtype=torch.float32, device=q.device)
    lists = start, start, length  # not read where nothing is sparse
    tiles = call.tiles[0] * call.tiles[1]
    room = execute.LISTED.value + hopper.GROUPS * tiles
    todo = (torch.zeros if call.is_dense else torch.empty)(room, dtype=torch.int32, device=q.device)
    if not call.is_dense:
        nodes = [x.contiguous() for x in nodes]
        _keep_spans(call, q, nodes, start, length, spans, scale, fresh=fresh)
        shift, lists = _choose_leaves(
            call, q, k, nodes[0], spreads, sinks, start, length, spans, choices, todo, scale, fresh=fresh
        )
        limit = LARGEST_SUM[q.dtype]
        if by_roles:
            ordered, _shares, counts = lists
            hopper.attend(call, q, k, v, sinks, ordered, counts, shift, todo, out, lse, scale, limit)
        else:
            execute.attend_listed[call.tiles](
                q, k, v, sinks, start, length, *lists, shift, todo, out, lse, *strides(q, k, v), *call.extent,
                scale, limit, **_execution(call),
            )  # fmt: skip
    if fused:
        end = geometry.dense_end
        before = dense.attend(q[:, :, :end], k[:, :, :end], v[:, :, :end], scale)
        out[:, :, :end], lse[:, :, :end] = _with_sinks(*before, sinks)
    execute.attend_run[(min(tiles, call.programs(q.device)),)](
        q, k, v, sinks, start, length, *lists, todo, out, lse, *strides(q, k, v), *call.extent, call.batch,
        0 if fused or by_roles else min(call.blocks, geometry.dense_end // geometry.query_block), scale,
        **_execution(call),
    )  # fmt: skip
    return out, spans, choices, lse


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the keys alone → those after the heads' sinks have taken their share."""
    if sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return (out * (lse - whole).exp()[..., None]).to(out.dtype), whole


def _keep_spans(
    call: Call,
    q: Tensor,
    nodes: Sequence[Tensor],
    start: Tensor,
    length: Tensor,
    spans: Tensor,
    scale: float,
    *,
    fresh: bool,
) -> None:
    """The coarse steps: fills ``spans`` where a new query is the first of its block, all of it if it is fresh."""
    scores, tiles = coarse_scores(call, q.device), coarse_tiles(call)
    per_tile = tiles["TILE"] // tiles["GROUP_PAD"]
    highest = coarse_levels(call)
    for level in range(highest, 0, -1):
        at_nodes = (nodes[level].stride(0), nodes[level].stride(1))
        count = nodes[level].shape[2]
        first = call.first_block(level)
        select.top_scores[(-(-(call.blocks - first) // per_tile), call.rows)](
            q, nodes[level], start, length, scores, *strides(q), *at_nodes, *call.extent, first, count,
            LEVEL=level, **tiles,
        )  # fmt: skip
        if level < highest:
            deeper = call.first_block(level + 1)
            select.refine[(-(-(call.blocks - deeper) // per_tile), call.rows)](
                q, nodes[level], start, length, spans, scores, *strides(q), *at_nodes,
                *call.extent, deeper, call.total_blocks, count,
                LEVEL=level, **tiles,
            )  # fmt: skip
        select.keep[(call.blocks - first, call.rows)](
            start, length, spans, scores, *call.extent, first, call.total_blocks, scale,
            LEVEL=level, WIDTH_PAD=power(tiles["WIDTH"]), FRESH=fresh, **_coarse(call), **call.reach, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip


def _choose_leaves(
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
    todo: Tensor,
    scale: float,
    *,
    fresh: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The leaf step: adds to ``choices``, and returns the shift of each query's scores, [B, Hq, T], and the lists of
    ``Call.list_blocks``.

    Makes ``todo`` an empty list, and fills all of ``choices`` if it is fresh.
    """
    g, tiles = call.geometry, call.blocks * call.rows
    leaves = nodes.shape[2] // g.nodes_in_span(0)
    programs = call.programs(q.device)
    at_once = _at_once(tiles, programs)
    votes = call.empty_votes(at_once, q.device)
    shift = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lists = call.empty_lists(q.device)
    by_roles = hopper.can_run(call.vote_by_roles, q, k, nodes)
    for first in range(0, tiles, at_once):
        end = min(first + at_once, tiles)
        if by_roles and spreads is not None:
            hopper.vote(call, q, k, nodes, spreads, sinks, spans, votes, shift, todo, first, end, scale)
        else:
            vote[(min(end - first, programs),)](
                q, k, nodes, spreads, sinks, start, length, spans, votes, shift, todo, *strides(q, k), *nodes.stride()[:2],
                *spread_strides(spreads), *call.extent, call.total_blocks, leaves, first, end, scale, g.spread,
                **scoring(call),
            )  # fmt: skip
        settle[(end - first,)](
            start, length, spans, choices, votes, *lists, *call.extent, call.total_blocks, first,
            g.least_vote(call.votes), FRESH=fresh, **choosing(call), **call.listing, **SETTLING,
        )  # fmt: skip
    return shift, lists


def _at_once(tiles: int, programs: int) -> int:
    """How many of so many query blocks vote at a time: about ``BLOCKS_AT_ONCE``, the same in each turn, and the same
    for each program."""
    turns = -(-tiles // BLOCKS_AT_ONCE)
    return min(tiles, -(-tiles // (turns * programs)) * programs)


def coarse_levels(call: Call) -> int:
    """Levels of the coarse steps, at most."""
    return call.geometry.top_level(call.geometry.covered(call.slots - 1))


def coarse_scores(call: Call, device: torch.device) -> Tensor:
    """Scores of spans, as ``triton_select`` says, to be filled."""
    shape = (call.rows, call.blocks, call.group, _coarse(call)["WIDTH"])
    return torch.empty(shape, dtype=torch.float32, device=device)


@lru_cache(CALLS)
def _coarse(call: Call) -> dict[str, Any]:
    """Constants of the kernels of the coarse steps."""
    g = call.geometry
    return {
        **call.shared,
        "LEVELS": g.levels,
        "GROUP": call.group,
        "FANOUT": g.fanout,
        "BEAM": g.beam,
        "WIDTH": g.beam * g.fanout + g.fanout,
    }


@lru_cache(CALLS)
def coarse_tiles(call: Call) -> dict[str, Any]:
    """Constants of those of them that score."""
    tile = call.settings.coarse[call.bytes, padded(call.dim)]
    group = power(call.group)
    return {
        "GROUP_PAD": group,
        "PER_SPAN": call.geometry.nodes_per_span,
        "TILE": max(group, tile.rows),
        **call.product,
        **_coarse(call),
        **tile.options(tile.rows),
    }


@lru_cache(CALLS)
def _execution(call: Call) -> dict[str, Any]:
    """Constants of the kernels that attend."""
    tile = call.tile(call.settings.attend)
    return {
        "LIST": call.list_width,
        "GROUP": call.group,
        "HEADS": call.heads_per_tile(tile.rows),
        "QUERIES": call.queries_per_tile(tile.rows),
        "KEYS": max(call.geometry.block, tile.keys),
        **call.product,
        **call.values,
        **call.shared,
        **call.reach,
        **call.options(tile),
    }


@lru_cache(CALLS)
def scoring(call: Call) -> dict[str, Any]:
    """Constants of the kernels that vote for leaves."""
    tile, per_leaf = call.settings.vote[call.bytes, padded(call.dim)], call.geometry.nodes_in_span(0)
    # Two spans meet a tile in one product: of many nodes, fewer rows have room for their scores.
    rows = tile.rows * MOST_NODES // max(2 * call.geometry.fanout * per_leaf, MOST_NODES)
    heads, places = call.heads_per_tile(rows), call.queries_per_tile(rows)
    return {
        "PER_LEAF": per_leaf,
        "GROUP": call.group,
        "HEADS": heads,
        "PLACES": places,
        "KEYS": tile.keys,
        "STEPS": call.votes.steps,
        "MOST": call.votes.most,
        **call.product,
        **call.shared,
        **call.reach,
        **call.candidates,
        **tile.options(heads * places),
    }


@lru_cache(CALLS)
def choosing(call: Call) -> dict[str, Any]:
    """Constants of the kernel that chooses leaves by their votes."""
    g, votes = call.geometry, call.votes
    highest = votes.most - g.least_vote(votes)
    return {
        "ROOM": g.leaves_per_query,
        "PARTS": votes.parts,
        "BITS": highest.bit_length(),
        **call.reach,
    }


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of all dims but the last."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def spread_strides(spreads: Tensor | None) -> tuple[int, int]:
    """Strides of batch and heads."""
    return (0, 0) if spreads is None else (spreads.stride(0), spreads.stride(1))
