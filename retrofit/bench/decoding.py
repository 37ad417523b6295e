"""Times of one decoded token, selection included, against dense attention to the same keys, inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retrofit.attention_call import unpadded
from retrofit.bench.inputs import Inputs
from retrofit.bench.measure import executed_keys, graph_ms
from retrofit.bench.rivals import dense_runs
from retrofit.cache import RetrofitLayer
from retrofit.errors import BenchmarkError
from retrofit.kernels.hsa.decode import can_decode, hsa_decode
from retrofit.kernels.hsa.state import HSAState
from retrofit.targets.hsa import HSAAttention

SHIFT = 997
"""Tokens by which each row of a batch is the one before, turned around."""
TOLERANCE = 3e-2
"""Relative difference from the same token in one call, of bfloat16."""


@dataclass(frozen=True)
class Decoding:
    """Times of one token in a batch, in microseconds.

    Attributes:
        batch: Rows.
        length: Tokens of each row before it.
        dense_us: The fastest dense backend.
        dense_backends_us: All of them.
        target_us: The converted attention, mean over the tokens of a query block: those after the first cost what the
            one in its middle does.
        first_us: The first token of a query block, with which its coarse steps are done.
        keys: Keys executed per query and kv head, mean over the tokens of the query block.
        error: Relative difference from what one call over all tokens gives.
    """

    batch: int
    length: int
    dense_us: float
    dense_backends_us: Mapping[str, float]
    target_us: float
    first_us: float
    keys: float
    error: float

    @property
    def speedup(self) -> float:
        """Dense time over converted time."""
        return self.dense_us / self.target_us


@torch.no_grad()
def decoding(target: HSAAttention, inputs: Inputs, batch: int) -> Decoding:
    """Times one token behind all but the last query block of ``inputs``.

    Args:
        target: A causal HSA target.
        inputs: Of one row, on CUDA.
        batch: Rows to make of it: the same tokens, turned around by ``SHIFT`` more for each.

    Raises:
        BenchmarkError: If its kernels do not take the inputs, or the result differs from one call over all tokens.
    """
    g = target.geometry
    length = inputs.q.shape[2] // g.query_block * g.query_block - g.query_block
    q, k, v = (_rows(x, batch) for x in (inputs.q, inputs.k, inputs.v))
    zero = torch.zeros(batch, dtype=torch.int64, device=q.device)
    kinds: dict[str, Any] = {"causal": True, "gate": target.gate}
    if not can_decode(q[:, :, :1], v, geometry=g, **kinds) or length <= g.dense_end:
        raise BenchmarkError(
            f"decoding is timed on CUDA and behind the dense start of {g.dense_end} tokens, got {q.device.type} and "
            f"{length} tokens"
        )
    layer = RetrofitLayer()
    past = tuple(x[:, :, :length] for x in (q, k, v))
    target(*past, unpadded(past[1], layer))
    assert isinstance(layer.state, HSAState)

    def step(state: HSAState, at: int) -> Callable[[], Tensor]:
        token, ends = q[:, :, at : at + 1].contiguous(), zero + at + 1
        return partial(
            hsa_decode,
            *(token, k, v, state),
            start=zero,
            length=ends,
            scale=target.scale,
            sliding_window=target.sliding_window,
            ending=True,
        )

    error, executed = _compared(target, partial(step, layer.state.with_room(k)), (q, k, v), length)
    state, middle = layer.state.with_room(k), length + g.query_block // 2
    first = 1e3 * graph_ms(step(state, length))
    for at in range(length, middle):
        step(state, at)()
    later = 1e3 * graph_ms(step(state, middle))
    token, keys, values = (
        x[:, :, :end].contiguous() for x, end in ((q, 1), (k, length + 1), (v, length + 1))
    )
    runs = dense_runs(Inputs(token, keys, values, inputs.scale), causal=False)
    dense = {name: 1e3 * graph_ms(run.forward) for name, run in runs.items()}
    return Decoding(
        batch,
        length,
        min(dense.values()),
        dense,
        (first + (g.query_block - 1) * later) / g.query_block,
        first,
        executed,
        error,
    )


def _rows(x: Tensor, batch: int) -> Tensor:
    return torch.cat([x.roll(SHIFT * row, 2) for row in range(batch)])


def _compared(
    target: HSAAttention,
    step: Callable[[int], Callable[[], Tensor]],
    tensors: tuple[Tensor, Tensor, Tensor],
    length: int,
) -> tuple[float, float]:
    """Decodes the last query block, and compares it with one call over all tokens: the relative difference, and the keys
    that this executes for the block."""
    size = target.geometry.query_block
    end = length + size
    found = torch.cat([step(at)() for at in range(length, end)], 2).double()
    q, k, v = (x[:, :, :end] for x in tensors)
    with executed_keys(target) as keys:
        expected = target(q, k, v, unpadded(k))[:, :, length:].double()
    error = float((found - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise BenchmarkError(
            f"decoded tokens differ from one call by {error:.2e}, at most {TOLERANCE:.0e} is allowed; nothing was timed"
        )
    return error, keys[0][..., length:].mean().item()
