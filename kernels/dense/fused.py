"""Causal dense attention by the fastest fused kernel of PyTorch that takes the inputs, with its log-sum-exp.

q, k, v without padding, as many queries as keys  →  cuDNN, or else FlashAttention-2  →  out, lse
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def attend_with_gradients(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Returns the output [B, Hq, T, Dv]; differentiable by PyTorch itself. Causal only with as many queries as keys."""
    options: dict[str, Any] = {
        "is_causal": causal,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(_by_speed(q.device), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options)


@cache
def _by_speed(device: torch.device) -> list[SDPBackend]:
    """PyTorch's kernels in the order of their speed on a GPU."""
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if _prefers_cudnn(device):
        fused.reverse()
    return [*fused, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@cache
def _prefers_cudnn(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


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
    if _prefers_cudnn(device) and can_use_cudnn_attention(params):
        return "cudnn"
    return "flash" if can_use_flash_attention(params) else None
