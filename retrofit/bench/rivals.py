"""What converted attention is timed against.

dense_runs     scaled_dot_product_attention by every backend that takes the shape
flex_run       FlexAttention on the very blocks that HSA selected; the selection is not in its time
nsa_run        fla's native sparse attention, its own selection included
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from retrofit.bench.inputs import Inputs
from retrofit.errors import BenchmarkError
from retrofit.kernels.hsa.blocked_execute import listed
from retrofit.kernels.hsa.geometry import Geometry


@dataclass(frozen=True)
class Run:
    """Something to time: a function and its arguments, which get gradients in the backward pass."""

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    def forward(self) -> None:
        """The forward pass alone."""
        with torch.no_grad():
            self.call(*self.inputs)

    def both(self) -> None:
        """The forward pass and the backward pass of all inputs."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        out = self.call(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NSA_BLOCKS, NSA_BLOCK = 16, 64


def dense_runs(inputs: Inputs, causal: bool) -> dict[str, Run]:
    """Dense attention by each backend that takes these inputs; on CPU there is one.

    Raises:
        BenchmarkError: If none does.
    """
    tensors = (inputs.q, inputs.k, inputs.v)
    if inputs.q.device.type == "cpu":
        return {"sdpa": Run(partial(_sdpa, inputs.scale, causal, None), tensors)}
    runs = {}
    for name, backend in BACKENDS.items():
        run = Run(partial(_sdpa, inputs.scale, causal, backend), tensors)
        try:
            Run(run.call, tuple(x[:, :, :256] for x in tensors)).forward()
        except RuntimeError:  # it says so of every shape and dtype it does not take
            continue
        runs[name] = run
    if not runs:
        raise BenchmarkError(f"no fused dense attention takes {inputs.q.dtype} with {inputs.q.shape[3]} dims")
    return runs


def _sdpa(scale: float, causal: bool, backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    if backend is SDPBackend.EFFICIENT_ATTENTION and group > 1:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        group = 1
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=group > 1)
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=group > 1)


def flex_run(inputs: Inputs, spans: Tensor, choices: Tensor, geometry: Geometry) -> Run:
    """FlexAttention on the blocks of a causal HSA call; arguments as of ``flex_mask``."""
    options: Any = {"BLOCK_M": geometry.query_block, "BLOCK_N": geometry.block}
    call = partial(
        torch.compile(flex_attention, dynamic=False),
        block_mask=flex_mask(inputs, spans, choices, geometry),
        scale=inputs.scale,
        enable_gqa=inputs.q.shape[1] != inputs.k.shape[1],
        kernel_options=options,
    )
    return Run(call, (inputs.q, inputs.k, inputs.v))


def flex_mask(inputs: Inputs, spans: Tensor, choices: Tensor, geometry: Geometry) -> BlockMask:
    """What a causal HSA call without padding attended to: lists of whole and of partly visible blocks.

    Args:
        inputs: What was attended to; of a whole number of query blocks.
        spans: As the operator returned them, [1, Hkv, NB, beam].
        choices: As the operator returned them, [1, Hkv, NB, E]; a leaf is whole once it has been chosen at all.
        geometry: The sizes; ``sink`` and ``query_block`` must be multiples of ``block``.

    Raises:
        BenchmarkError: If the sizes do not divide.
    """
    g, tokens = geometry, inputs.q.shape[2]
    if g.sink % g.block or g.query_block % g.block or tokens % g.query_block:
        raise BenchmarkError("FlexAttention on the same blocks needs a grid that starts on a block")
    device, blocks = choices.device, choices.shape[2]
    number = torch.arange(blocks, device=device)
    leaves = g.block_leaf_ids(spans, number)
    # [1, Hkv, NB, E], and [1, Hkv, NB, query_block]
    ordered, _, count = listed(leaves, choices, g, torch.float32)
    key_blocks = tokens // g.block
    rank = torch.full((*choices.shape[:3], key_blocks + 1), 2**14, dtype=torch.int16, device=device)
    place = torch.arange(ordered.shape[-1], device=device, dtype=torch.int16).expand(ordered.shape)
    at = torch.where(place < count[..., -1:], ordered + g.sink // g.block, key_blocks)
    rank = rank.scatter_reduce(3, at, place, "amin")[..., :key_blocks]
    t0 = number[:, None] * g.query_block
    begin = torch.arange(key_blocks, device=device) * g.block
    dense = t0 + g.query_block <= g.dense_end
    before = begin < t0 + g.query_block
    near = (begin < g.sink) | (begin >= g.window_start(t0)) | dense
    reached = before & (near | (rank < 2**14))
    within = begin + g.block <= t0 + 1  # every row sees all of it
    whole = (begin < g.sink) | (begin >= g.window_start(t0 + g.query_block - 1)) | dense
    full = reached & within & (whole | (rank < count[..., :1]))
    group = inputs.q.shape[1] // inputs.k.shape[1]
    seen_by = count.flatten(2)

    def visible(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        near = (j < g.sink) | (j >= (t + 1 - g.window).clamp(min=0) // g.block * g.block)
        near = near | (t // g.query_block * g.query_block + g.query_block <= g.dense_end)
        kv = h // group
        chosen = rank[b, kv, t // g.query_block, j // g.block] < seen_by[b, kv, t]
        return (j <= t) & (near | chosen)

    def lists(which: Tensor) -> tuple[Tensor, Tensor]:
        which = which.repeat_interleave(group, 1)
        order = which.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return which.sum(-1, dtype=torch.int32), order

    return BlockMask.from_kv_blocks(
        *lists(reached & ~full),
        *lists(full),
        BLOCK_SIZE=(g.query_block, g.block),
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )


def nsa_run(inputs: Inputs) -> Run:
    """fla's native sparse attention: compression, selection of 16 blocks of 64 and attention to them.

    Raises:
        BenchmarkError: If fla is not installed, or does not take the shape.
    """
    group = inputs.q.shape[1] // inputs.k.shape[1]
    if group < 16 or group & (group - 1):
        raise BenchmarkError(f"fla's NSA takes groups of 16, 32, … heads, got {group}")
    if importlib.util.find_spec("fla") is None:
        raise BenchmarkError("fla is not installed; pip install fla-core")
    parallel_nsa = importlib.import_module("fla.ops.nsa").parallel_nsa
    by_token = tuple(x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    gate = torch.ones_like(by_token[0][..., 0])
    options = {"block_counts": NSA_BLOCKS, "block_size": NSA_BLOCK, "scale": inputs.scale}
    return Run(partial(parallel_nsa, g_cmp=gate, g_slc=gate, **options), by_token)
