"""The canonical node every spelling of attention is rewritten to.

``retrofit::attention(q, k, v, mask, is_causal, scale, dropout_p)`` has grouped heads unrepeated, its scale
explicit and its mask as the module wrote it, so that a normalised graph still runs.
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
) -> Tensor:
    """Scaled dot-product attention of q [B, Hq, T, D] to k, v [B, Hkv, N, …]: [B, Hq, T, Dv].

    ``mask`` is bool (True is visible) or added to the scores; ``is_causal`` aligns the upper left corners.
    """
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).clone()


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


ATTENTION = torch.ops.retrofit.attention.default
