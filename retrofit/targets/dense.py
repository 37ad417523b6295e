"""The identity target: canonical dense attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.kernels.dense import biased
from retrofit.kernels.dense.ops import dense_attention
from retrofit.targets.base import TargetAttention

if TYPE_CHECKING:
    from retrofit.attention_call import AttentionCall


class DenseAttention(TargetAttention):
    """Attends to every visible key."""

    @property
    def drops_weights(self) -> bool:
        """Always."""
        return True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See :meth:`TargetAttention.forward`."""
        return attend_densely(self, q, k, v, call)


def attend_densely(target: TargetAttention, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Dense attention with the shape, scale and mask of ``target``, whatever target that is.

    A site's teacher runs through here as well.
    """
    if call.layer is not None:
        k, v = call.layer.update(k, v)
    if target.observer is not None:
        target.observer(_counts(target, q, k, call))
    options: dict[str, Any] = {
        "scale": target.scale,
        "causal": target.causal,
        "sliding_window": target.sliding_window,
        "rules": target.rules(call),
        "dropout_p": call.dropout,
    }
    if call.bias is not None:
        return biased.dense_attention(q, k, v, call.start, call.length, call.bias, **options)
    return dense_attention(q, k, v, call.start, call.length, padded=call.padded, **options)


def _counts(target: TargetAttention, q: Tensor, k: Tensor, call: AttentionCall) -> dict[str, Tensor]:
    tokens, slots = q.shape[2], k.shape[2]
    index = torch.arange(slots - tokens, slots, device=q.device)
    position = index - call.start[:, None]
    valid = (position >= 0) & (position < call.length[:, None])
    keys = position + 1 if target.causal else call.length[:, None].expand_as(position)
    if target.sliding_window:
        keys = keys.clamp(max=target.sliding_window)
    keys = torch.where(valid, keys, 0)[:, None].expand(-1, target.kv_heads, -1)
    return {"keys": keys, "nodes": torch.zeros_like(keys), "valid": valid}
