"""MAHA by one Triton kernel: all scales and their aggregation in one launch.

Nothing is read back from the device, and every size follows from shapes: a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

import torch
from torch import Tensor

from retrofit.kernels.maha import triton_execute as execute
from retrofit.kernels.maha.bands import Bands

TILE_ROWS = 128
"""Queries times heads in a tile of 128 dims or fewer."""
FEW_ROWS = 16
"""The same where there are no more queries than that."""
KEYS = 64
"""Keys of one step of the softmax, for rows of at most 256 bytes."""
ATTEND = {"num_warps": 8, "num_stages": 2, "maxnreg": 128}
"""Two programs fit into a multiprocessor of an H200 for 128 dims in bfloat16."""
SMALL = {"num_warps": 4, "num_stages": 2}
"""For tiles of fewer rows."""
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
    (batch, heads, tokens, dim), (_, kv_heads, slots, value_dim) = q.shape, v.shape
    group = heads // kv_heads
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    keys, values = ([_by_rows(x) for x in cells] for cells in (keys, values))
    rows = TILE_ROWS if max(dim, value_dim) <= 128 else TILE_ROWS // 2
    if tokens * group <= FEW_ROWS:
        rows = FEW_ROWS
    per_tile = min(_power(group), rows)
    query_block = rows // per_tile
    blocks = (tokens + 2 * query_block - 2) // query_block
    out = torch.empty(batch, heads, tokens, value_dim, dtype=q.dtype, device=q.device)
    execute.attend[(blocks, -(-group // per_tile) * batch * kv_heads)](
        q, k, v, start, length, tuple(keys), tuple(values), offsets.contiguous(), out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        tuple(x.stride()[:2] for x in keys), tuple(x.stride()[:2] for x in values),
        slots, tokens, blocks, scale,
        KV_HEADS=kv_heads, GROUP=group, HEADS=per_tile, QUERY_BLOCK=query_block,
        DIM=dim, DIM_PAD=_padded(dim), VALUE_DIM=value_dim, VALUE_PAD=_padded(value_dim),
        SCALES=bands.scales, RATIO=bands.ratio, LOG=_log(bands.ratio), LOG_RATIO=log2(bands.ratio), SINK=bands.sink,
        REACHES=(0, *bands.reaches, *([UNBOUNDED] if bands.last_width is None else [])),
        KEYS=KEYS if max(dim, value_dim) * q.element_size() <= 256 else KEYS // 2,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **(ATTEND if rows == TILE_ROWS else SMALL),
    )  # fmt: skip
    return out


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
