"""Launches the kernel whose warps have roles, on the GPUs and for the calls that it is for."""

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

ALIGNED = 16
"""Bytes that copies of blocks need strides and addresses to be multiples of."""
GROUPS = 2
"""Groups of warps that attend, each to its rows of a tile."""


def can_attend(call: Call, *inputs: Tensor) -> bool:
    """Whether ``attend_by_roles`` can do this call, for these queries, keys and values."""
    if call.roles is None or INTERPRETED.value:
        return False
    addresses = [n for x in inputs for n in (x.data_ptr(), *(step * call.bytes for step in x.stride()[:3]))]
    return not any(n % ALIGNED for n in addresses)


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
    """Writes ``out`` and ``lse`` of all sparse tiles; arguments are those of the kernel."""
    g, constants = call.geometry, _constants(call)
    blocks, parts = call.tiles
    tiles = blocks * parts
    attend_by_roles[(min(tiles, _processors(q.device)),)](
        _blocks_of(q, constants["HEADS"], g.query_block), _blocks_of(k, 1, g.block), _blocks_of(v, 1, g.block),
        sinks, ordered, counts, shift, todo, out, lse, *call.extent, tiles, scale, limit, **constants,
    )  # fmt: skip


def _blocks_of(x: Tensor, heads: int, tokens: int) -> TensorDescriptor:
    """Describes [B, H, N, D] by blocks of so many heads and tokens."""
    shape = [1, heads, tokens, SLAB.value]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, _swizzled())


@cache
def _swizzled() -> NVMMASharedLayout:
    """How a block lies in shared memory."""
    return NVMMASharedLayout(128, 16, 4)


@lru_cache(CALLS)
def _constants(call: Call) -> dict[str, Any]:
    assert call.roles is not None
    shared = {name: value for name, value in call.shared.items() if name != "LAYOUT"}
    return {
        **shared,
        "GROUP": call.group,
        "HEADS": call.heads_per_tile(call.roles.rows),
        "DIM": call.dim,
        "LIST": call.list_width,
        "KEYS": call.roles.keys,
        "STAGES": call.roles.stages,
        "num_warps": call.roles.warps,
    }


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, each of which has one program; 1 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
