"""Dense attention with a bias that is added to the scores, as learned relative positions are.

out[t] = Σ_j softmax_j(scale · q[t]·k[j] + bias[t, j]) v[j] over the keys j visible to t, as in ``reference``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.reference import attention_weights, visible
from retrofit.kernels.dense.scores import PLAIN, ScoreRules


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    bias: Tensor,
    *,
    scale: float,
    causal: bool,
    sliding_window: int = 0,
    rules: ScoreRules = PLAIN,
    dropout_p: float = 0.0,
) -> Tensor:
    """Dense attention of q [B, Hq, T, D] to k [B, Hkv, N, D], v [B, Hkv, N, Dv]: [B, Hq, T, Dv].

    ``bias`` is broadcast to [B, Hq, T, N]; rows that are padding are zero. Differentiable by PyTorch itself, with
    memory quadratic in the length, as the bias is.
    """
    pattern: dict[str, Any] = {"causal": causal, "sliding_window": sliding_window}
    if not rules.plain:
        dtype = torch.promote_types(q.dtype, torch.float32)
        options: dict[str, Any] = {"scale": scale, "rules": rules, "bias": bias, **pattern}
        weights = attention_weights(q.to(dtype), k.to(dtype), start, length, **options)
        return F.dropout(weights.to(v.dtype), dropout_p) @ v.repeat_interleave(
            q.shape[1] // k.shape[1], dim=1
        )
    seen = visible(q.shape[2], k.shape[2], start, length, **pattern)[:, None]
    padding = ~seen.any(dim=-1, keepdim=True)  # a row that saw nothing would have no gradients but NaN
    mask = bias.to(q.dtype).masked_fill(~(seen | padding), float("-inf"))
    out = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.masked_fill(padding, 0.0)
