"""Dense attention with dropout on its weights, as in training.

out = dropout(softmax(scale·q·kᵀ), p) · v: by PyTorch's fused kernel where nothing is padded, else by the formula,
with memory quadratic in the length as the models' own attention has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.reference import attention_weights
from retrofit.kernels.dense.scores import ScoreRules


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    p: float,
    scale: float,
    causal: bool,
    sliding_window: int,
    padded: bool,
    rules: ScoreRules,
) -> Tensor:
    """Dense attention of q [B, Hq, T, D] to k [B, Hkv, N, D], v [B, Hkv, N, Dv]: [B, Hq, T, Dv].

    Each weight is 0 with probability ``p``, and the others are divided by 1 − p; differentiable by PyTorch itself.
    """
    whole = not padded and not sliding_window and (not causal or q.shape[2] == k.shape[2])
    if whole and rules.plain:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=p, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = attention_weights(
        q.to(dtype),
        k.to(dtype),
        start,
        length,
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        rules=rules,
    )
    return F.dropout(weights.to(v.dtype), p) @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
