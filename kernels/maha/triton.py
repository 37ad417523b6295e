"""MAHA by Triton kernels: all scales and their aggregation in one launch, and two for the gradients.

Nothing is read back from the device, and every size follows from shapes: a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels.maha import hopper
from retrofit.kernels.maha import triton_backward as backward
from retrofit.kernels.maha import triton_execute as execute
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.tuned import settings

FEW_ROWS = 16
"""Queries times heads in a tile where there are no more queries than that."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNBOUNDED = 2**30
"""Tokens back to an edge that no position reaches."""


def unsupported(q: Tensor, v: Tensor, *, aggregation: str, regularizer: str) -> str | None:
    """Returns what these kernels cannot do of a call, or None."""
    if aggregation != "convex":
        return f"aggregation={aggregation!r}"
    if regularizer != "entropy":
        return f"regularizer={regularizer!r}"
    if q.dtype not in DTYPES:
        return f"{q.dtype}"
    for name, dim in (("head_dim", q.shape[3]), ("the values' head_dim", v.shape[3])):
        if dim > 256:
            return f"{name} above 256, got {dim}"
    return None


def maha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    *,
    scale: float,
    bands: Bands,
    aggregation: str,
    regularizer: str,
) -> Tensor:
    """Returns the output [B, Hq, T, Dv] of a call that is not ``unsupported``; arguments as in ``ops``."""
    call = _Call(q, k, v, start, length, keys, values, offsets, scale=scale, bands=bands)
    return call.attend()[0]


def maha_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    *,
    scale: float,
    bands: Bands,
    aggregation: str,
    regularizer: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Returns the gradients of q, of [k, *keys], of [v, *values] and of the offsets."""
    call = _Call(q, k, v, start, length, keys, values, offsets, scale=scale, bands=bands)
    return call.backward(grad.contiguous())


class _Call:
    """The tensors of a call as the kernels take them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        length: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        offsets: Tensor,
        *,
        scale: float,
        bands: Bands,
    ) -> None:
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.keys, self.values = (tuple(map(_by_rows, cells)) for cells in (keys, values))
        self.offsets = offsets.contiguous()
        self.inputs = (self.q, self.k, self.v, start, length, self.keys, self.values, self.offsets)
        self.strides = (
            *self.q.stride()[:3],
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            tuple(x.stride()[:2] for x in self.keys),
            tuple(x.stride()[:2] for x in self.values),
        )
        self.slots, self.tokens, self.scale, self.scales = k.shape[2], q.shape[2], scale, bands.scales
        self.group = q.shape[1] // k.shape[1]
        self.settings = settings(q.device)
        self.kind = q.element_size(), _padded(max(q.shape[3], v.shape[3]))
        self.sizes = {
            "KV_HEADS": k.shape[1],
            "GROUP": self.group,
            "DIM": q.shape[3],
            "DIM_PAD": _padded(q.shape[3]),
            "VALUE_DIM": v.shape[3],
            "VALUE_PAD": _padded(v.shape[3]),
            "SCALES": bands.scales,
            "RATIO": bands.ratio,
            "LOG": _log(bands.ratio),
            "LOG_RATIO": log2(bands.ratio),
            "SINK": bands.sink,
            "REACHES": (0, *bands.reaches, *([UNBOUNDED] if bands.last_width is None else [])),
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        }

    def attend(self) -> tuple[Tensor, Tensor]:
        """Returns the output and the logarithm to base 2 of each query's mass, −∞ for padding."""
        out = self.q.new_empty(*self.q.shape[:3], self.v.shape[3])
        lse = self.q.new_empty(self.q.shape[:3], dtype=torch.float32)
        few = self.tokens * self.group <= FEW_ROWS
        by_roles = (self.settings.maha_attend_by_roles or {}).get(self.kind)
        options: dict[str, Any] = {"scale": self.scale, "sizes": self.sizes}
        operands = (self.q, self.k, self.v, self.keys, self.values)
        if by_roles is not None and not few and hopper.can_run(*operands, width=by_roles.keys, **options):
            heads, query_block, blocks, programs = self._tiles(by_roles.rows)
            hopper.attend(
                by_roles, *self.inputs, out, lse,
                heads=heads, query_block=query_block, blocks=blocks, programs=programs, **options,
            )  # fmt: skip
            return out, lse
        tile = self.settings.maha_attend[self.kind]
        rows = FEW_ROWS if few else tile.rows
        heads, query_block, blocks, programs = self._tiles(rows)
        execute.attend[(blocks, programs)](
            *self.inputs, out, lse, *self.strides, self.slots, self.tokens, blocks, self.scale,
            HEADS=heads, QUERY_BLOCK=query_block, KEYS=tile.keys, **self.sizes, **tile.options(rows),
        )  # fmt: skip
        return out, lse

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Returns the gradients of q, of [k, *keys], of [v, *values] and of the offsets."""
        out, lse = self.attend()
        tile = self.settings.maha_query_gradients[self.kind]
        heads, query_block, blocks, programs = self._tiles(tile.rows)
        grad_q = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        delta = torch.empty_like(lse)
        backward.query_gradients[(blocks, programs)](
            *self.inputs, out, lse, grad, grad_q, delta, *self.strides, self.slots, self.tokens, self.scale,
            HEADS=heads, QUERY_BLOCK=query_block, KEYS=tile.keys, **self.sizes, **tile.options(tile.rows),
        )  # fmt: skip
        grad_keys = [self.k.new_zeros(x.shape) for x in (self.k, *self.keys)]
        grad_values = [self.v.new_zeros(x.shape) for x in (self.v, *self.values)]
        cells = tuple(x.shape[2] for x in grad_keys)
        tile = self.settings.maha_key_gradients[self.kind]
        heads, query_block, _, _ = self._tiles(tile.rows)
        counts = tuple(-(-count // tile.keys) for count in cells)
        rows = self.k.shape[0] * self.k.shape[1]
        parts = -(-self.group // heads)
        parted = torch.zeros(sum(counts), rows, parts * heads, device=self.q.device)
        backward.key_gradients[(sum(counts), rows)](
            *self.inputs, lse, grad, delta, tuple(grad_keys), tuple(grad_values), parted, *self.strides,
            cells, counts, self.slots, self.tokens, self.scale,
            HEADS=heads, QUERY_BLOCK=query_block, KEYS=tile.keys, **self.sizes, **tile.options(tile.rows),
        )  # fmt: skip
        # The first tile of scale 0, those of the coarsest scale, …, and the others of scale 0.
        order = [1, *reversed(counts[1:]), counts[0] - 1]
        sums = [part.sum(0) for part in parted.split(order)]
        by_scale = torch.stack([sums[0] + sums[-1], *reversed(sums[1:-1])], -1)[:, : self.group]
        by_scale = by_scale.reshape(self.k.shape[0], -1, self.scales).sum(0)
        return grad_q, grad_keys, grad_values, by_scale.to(self.offsets.dtype)

    def _tiles(self, rows: int) -> tuple[int, int, int, int]:
        """Heads and queries of a tile of so many rows, query blocks, and tiles of a block over the batch."""
        heads = min(_power(self.group), rows)
        query_block = rows // heads
        blocks = (self.tokens + 2 * query_block - 2) // query_block
        return heads, query_block, blocks, -(-self.group // heads) * self.k.shape[0] * self.k.shape[1]


def _by_rows(x: Tensor) -> Tensor:
    """``x`` [B, H, M, D] with its rows one after another."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _log(n: int) -> int:
    """The logarithm of a power of two; 0 of what is none."""
    return 0 if n & (n - 1) else n.bit_length() - 1


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _padded(dim: int) -> int:
    return max(16, _power(dim))
