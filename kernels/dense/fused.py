"""Causal dense attention by the fastest fused kernel of PyTorch that takes the inputs, with its log-sum-exp.

q, k, v without padding, as many queries as keys  →  cuDNN, or else FlashAttention-2  →  out, lse
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is a fused kernel for inputs like these."""
    return _kernel(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3]) is not None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the output [B, Hq, T, Dv] and the log-sum-exp of each query's scores, float32 [B, Hq, T].

    Args:
        q: Queries, [B, Hq, T, D].
        k: Keys, [B, Hkv, T, D].
        v: Values, [B, Hkv, T, Dv].
        scale: Factor on the scores.
    """
    kernel = _kernel(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if kernel == "cudnn":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=scale
        )
        return out, lse.squeeze(-1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse


@cache
def _kernel(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, value_dim: int
) -> str | None:
    """Name of the fastest kernel that takes such inputs; None if there is none."""
    if device.type != "cuda":
        return None
    q, k, v = (
        torch.empty(1, count, 64, width, dtype=dtype, device=device)
        for count, width in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    )
    params = SDPAParams(q, k, v, None, 0.0, True, heads != kv_heads)
    if torch.cuda.get_device_capability(device) >= (9, 0) and can_use_cudnn_attention(params):
        return "cudnn"
    return "flash" if can_use_flash_attention(params) else None
