"""The canonical node every spelling of attention is rewritten to.

``retrofit::attention(q, k, v, mask, is_causal, scale, dropout_p, softcap, sinks)`` has grouped heads unrepeated, its
scale explicit and its mask as the module wrote it, so that a normalised graph still runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("retrofit::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of q [B, Hq, T, D] to k, v [B, Hkv, N, …]: [B, Hq, T, Dv].

    ``mask`` is bool (True is visible) or added to the scores; ``is_causal`` aligns the upper left corners. With a
    softcap c > 0 the scores s become c·tanh(s / c) before the mask; ``sinks`` [Hq] are logits of no value.
    """
    if softcap or sinks is not None:
        return _step_by_step(q, k, v, mask, is_causal, scale, dropout_p, softcap, sinks)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).clone()


def _step_by_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., : k.shape[2]], dropout_p)
    return weights @ v.repeat_interleave(group, 1)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


ATTENTION = torch.ops.retrofit.attention.default
