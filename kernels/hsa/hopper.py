"""Launches the kernels whose warps have roles, on the GPUs and for the calls that they are for."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from retrofit.kernels.hsa.triton_call import CALLS, Call
from retrofit.kernels.hsa.triton_execute import INTERPRETED
from retrofit.kernels.hsa.triton_roles import SLAB, attend_by_roles
from retrofit.kernels.hsa.triton_roles_gradients import query_gradients_by_roles
from retrofit.kernels.tuned import Tile

ALIGNED = 16
"""Bytes that copies of blocks need strides and addresses to be multiples of."""
GROUPS = 2
"""Groups of warps that attend, each to its rows of a tile."""


def can_attend(call: Call, *inputs: Tensor) -> bool:
    """Whether these kernels can do this call, for these queries, keys and values, and the gradients of outputs."""
    if call.roles is None or INTERPRETED.value:
        return False
    steps = [step * call.bytes for x in inputs for step in x.stride()[:3]]
    return min(steps) > 0 and not any(n % ALIGNED for n in (*steps, *(x.data_ptr() for x in inputs)))


def attend_listed(
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
    """Writes ``out`` and ``lse`` of all sparse tiles; arguments are those of ``attend_by_roles``."""
    tiles, constants = _tiles(call), _constants(call, _tile(call.settings.attend_by_roles))
    attend_by_roles[(min(tiles, _processors(q.device)),)](
        *_of_queries(call, q), *_of_keys(call, k, v),
        sinks, ordered, counts, shift, todo, out, lse, *call.extent, tiles, scale, limit, **constants,
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
    """Writes ``grad_q`` and ``delta`` of all sparse tiles; arguments are those of ``query_gradients_by_roles``."""
    tiles, constants = _tiles(call), _constants(call, _tile(call.settings.query_gradients_by_roles))
    query_gradients_by_roles[(min(tiles, _processors(q.device)),)](
        *_of_queries(call, q, grad), *_of_keys(call, k, v), ordered, counts, lse, out, delta, grad_q,
        *out.stride()[:3], *grad_q.stride()[:3], *call.extent, tiles, scale, **constants,
    )  # fmt: skip


def _tiles(call: Call) -> int:
    assert call.roles is not None
    return call.blocks * call.rows * -(-call.group // call.heads_per_tile(call.roles.rows))


def _tile(tile: Tile | None) -> Tile:
    assert tile is not None
    return tile


def _of_queries(call: Call, *inputs: Tensor) -> list[TensorDescriptor]:
    """Describes [B, Hq, T, D] by tiles."""
    assert call.roles is not None
    return [_blocks_of(x, call.heads_per_tile(call.roles.rows), call.geometry.query_block) for x in inputs]


def _of_keys(call: Call, *inputs: Tensor) -> list[TensorDescriptor]:
    """Describes [B, Hkv, N, D] by blocks."""
    return [_blocks_of(x, 1, call.geometry.block) for x in inputs]


def _blocks_of(x: Tensor, heads: int, tokens: int) -> TensorDescriptor:
    shape = [1, heads, tokens, SLAB.value]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, _swizzled())


@cache
def _swizzled() -> NVMMASharedLayout:
    """How a block lies in shared memory."""
    return NVMMASharedLayout(128, 16, 4)


@lru_cache(CALLS)
def _constants(call: Call, tile: Tile) -> dict[str, Any]:
    shared = {name: value for name, value in call.shared.items() if name != "LAYOUT"}
    return {
        **shared,
        "GROUP": call.group,
        "HEADS": call.heads_per_tile(tile.rows),
        "DIM": call.dim,
        "LIST": call.list_width,
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, each of which has one program; 1 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
