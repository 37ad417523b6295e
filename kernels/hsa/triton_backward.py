"""The backward pass of hierarchical sparse attention by Triton kernels.

    list_blocks, query_gradients                 →  grad_q; on Hopper query_gradients_by_roles where it can
    count_entries, write_entries, count_steps    →  which query blocks see each tile of keys
    split_tiles, own_parts                       →  parts of the tiles that many see
    key_gradients, join_gradients                →  grad_k, grad_v; on Hopper key_gradients_by_roles where it can

As in the forward pass nothing is read back from the device and every buffer's size follows from shapes. A tile
that many blocks see is split into parts; the parts are as long as it takes for their sums to fit into a buffer
of a fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.kernels.hsa import hopper
from retrofit.kernels.hsa import triton_gradients as gradients
from retrofit.kernels.hsa import triton_inverse as inverse
from retrofit.kernels.hsa.geometry import FADE, Geometry
from retrofit.kernels.hsa.triton_call import Call

SHORTEST_PART = 64
"""Steps below which a tile is not split."""
FEWEST_PARTS = 1024
"""Parts that there is always room for; for long inputs there is room for a quarter of the tiles."""
CHUNKS = 64
"""Chunks of query blocks whose entries are written side by side."""


def hsa_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    value_nodes: Sequence[Tensor],
    spans: Tensor,
    choices: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    sliding_window: int,
    padded: bool,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """Returns the gradients of q, k, v, nodes, value_nodes and sinks; the selection itself has none.

    Args:
        grad: Gradient of the output, [B, Hq, T, Dv].
        q: As in the forward pass, and so all that follow.
        k: Keys.
        v: Values.
        start: Index of each row's first real token.
        length: Number of real tokens of each row.
        nodes: Pooled keys per level; they only select, so their gradients are zero. Left out where nobody needs these.
        value_nodes: The same of pooled values; not used without summaries.
        spans: As the forward pass returned it, and so all that follow.
        choices: Who chose which leaf.
        out: The output.
        lse: Log-sum-exp of the scores of each query, its head's sink included.
        sinks: Logit of each head that takes part in the softmax and has no value, or None.
        scale: Factor on the scores.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        padded: Whether ``start`` and ``length`` may say anything but that every row has all index slots.
        geometry: The sizes.
    """
    call = Call.of(q, k, v, geometry, sliding_window=sliding_window, padded=padded)
    # Not all is written where not all is new.
    make = torch.empty_like if call.is_whole else torch.zeros_like
    grads = [make(x) for x in (q, k, v)]
    grad_q, grad_k, grad_v = (_in_rows(x) for x in grads)
    q, k, v, grad = (_in_rows(x) for x in (q, k, v, grad))
    delta = make(lse)
    lists = call.list_blocks(start, length, spans, choices)
    if not call.is_dense and hopper.can_run(call.query_gradients_by_roles, q, k, v, grad):
        ordered, _shares, counts = lists
        hopper.query_gradients(call, q, k, v, out, grad, lse, ordered, counts, grad_q, delta, scale)
    else:
        tile = call.tile(call.settings.query_gradients)
        gradients.query_gradients[call.grid(tile.rows, call.blocks)](
            q, k, v, out, grad, lse, start, length, *lists, grad_q, delta,
            *_strides(q, k, v, out, grad, grad_q), *call.extent, scale,
            LIST=call.list_width, GROUP=call.group, HEADS=call.heads_per_tile(tile.rows), QUERIES=call.queries_per_tile(tile.rows),
            KEYS=max(geometry.block, tile.keys), **call.product, **call.values, **call.shared, **call.reach,
            **call.options(tile),
        )  # fmt: skip

    can_run = hopper.can_run(call.key_gradients_by_roles, q, k, v, grad)
    by_roles = call.key_gradients_by_roles if can_run else None
    tile = by_roles or call.tile(call.settings.key_gradients)
    leaves, queries = min(4, geometry.fanout), call.queries_of_entry  # an entry has bits for 4 leaves
    keys = max(geometry.block, min(tile.keys, leaves * geometry.block))
    whole = call.votes.parts == FADE
    tiles = -(-geometry.sink // keys) + -(-max(0, call.slots - geometry.sink) // keys)
    entries, ends, steps = _entries(call, keys, tiles, start, length, spans, choices, whole=whole)
    parts, part_ends, owners, size = _parts(steps, 4 * call.blocks * call.entries_per_block)
    inverted = (entries, ends, steps, parts, part_ends, owners, size)
    held = torch.empty(owners.shape[0], keys, call.dim + call.value_dim, dtype=torch.float32, device=q.device)
    if by_roles:
        hopper.key_gradients(
            call, q, k, v, grad, lse, delta, inverted, grad_k, grad_v, held, tiles, CHUNKS, scale
        )  # fmt: skip
    else:
        gradients.key_gradients[(owners.shape[0] + steps.shape[0],)](
            q, k, v, grad, lse, delta, start, length, *inverted, grad_k, grad_v, held,
            *_strides(q, k, v, grad, grad_k, grad_v), *call.extent, tiles, CHUNKS, steps.shape[0], owners.shape[0], scale,
            GROUP=call.group, HEADS=call.heads_per_tile(tile.rows, queries), KEYS=keys, WHOLE_LEAVES=whole,
            **call.product, **call.values, **call.by_entries, **call.reach,
            **call.options(tile, queries),
        )  # fmt: skip
    gradients.join_gradients[(steps.shape[0],)](
        held, start, length, parts, part_ends, grad_k, grad_v, *_strides(grad_k, grad_v), tiles,
        KV_HEADS=call.kv_heads, SINK=geometry.sink, KEYS=keys, DIM=call.dim, DIM_PAD=call.product["DIM_PAD"],
        **call.values, num_warps=4,
    )  # fmt: skip
    for x, found in zip(grads, (grad_q, grad_k, grad_v), strict=True):
        if found is not x:
            x.copy_(found)
    grad_nodes, grad_value_nodes = ([torch.zeros_like(x) for x in levels] for levels in (nodes, value_nodes))
    grad_sinks = None
    if sinks is not None:
        share = (sinks.to(lse.dtype)[:, None] - lse).clamp(max=0).exp()  # what is no token has no lse
        grad_sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return grads[0], grads[1], grads[2], grad_nodes, grad_value_nodes, grad_sinks


def _entries(
    call: Call,
    keys: int,
    tiles: int,
    start: Tensor,
    length: Tensor,
    spans: Tensor,
    choices: Tensor,
    *,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries, their running sum by (tile, chunk), and the steps of each tile; see ``triton_inverse``."""
    g, device = call.geometry, choices.device
    leaves = keys // g.block
    per_chunk = -(-call.blocks // CHUNKS)
    of_leaves = {"LEAVES": leaves, "WHOLE_LEAVES": whole, "QUERIES": call.queries_of_entry}
    constants = {**call.shared, **call.leaves, **of_leaves}
    extent = (*call.extent, call.total_blocks, tiles, CHUNKS, per_chunk)
    counts = torch.zeros(call.rows, tiles, CHUNKS, dtype=torch.int32, device=device)
    room = (call.rows, call.blocks, constants["WIDTH_PAD"]) if whole else (0,)
    choosers = torch.empty(room, dtype=torch.int16, device=device)
    inverse.count_entries[(call.blocks, call.rows)](
        start, length, spans, choices, choosers, counts, *extent, **constants, num_warps=1
    )
    ends = counts.flatten().cumsum(0)
    most = call.entries_per_block * (
        min(call.choices, constants["WIDTH_PAD"] // leaves) if whole else call.choices
    )
    entries = torch.empty(call.rows * call.blocks * most, dtype=torch.int64, device=device)
    inverse.write_entries[(CHUNKS, call.rows)](
        start, length, spans, choices, choosers, counts, ends, entries, *extent, **constants, num_warps=1
    )
    steps = torch.empty(call.rows * tiles, dtype=torch.int32, device=device)
    inverse.count_steps[(-(-tiles // 128), call.rows)](
        start,
        length,
        ends,
        steps,
        *call.extent,
        tiles,
        CHUNKS,
        **call.by_entries,
        KEYS=keys,
        TILE=128,
        num_warps=4,
    )
    return entries, ends, steps


def _parts(steps: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How the tiles are split, of at most so many steps each.

    Returns:
        The parts of each tile; the running sum of those of tiles that have several; the tile that each of
        these belongs to, the number of tiles for places that are not used; and the steps of a part, [1].
    """
    tiles = steps.shape[0]
    room = min(max(FEWEST_PARTS, tiles // 4), -(-most // SHORTEST_PART) * tiles)
    parts, part_ends, size = torch.empty_like(steps), torch.empty_like(steps), steps.new_empty(1)
    inverse.split_tiles[(1,)](
        steps, parts, part_ends, size, tiles, room, SHORTEST=SHORTEST_PART, SIZES=16, TILE=512, num_warps=8
    )  # fmt: skip
    owners = steps.new_empty(room)
    inverse.own_parts[(-(-room // 128),)](part_ends, owners, tiles, room, TILE=128, num_warps=4)
    return parts, part_ends, owners, size


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])
