"""Attention to tokens of another sequence, with the mask as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.targets.base import TargetAttention

if TYPE_CHECKING:
    from retrofit.attention_call import AttentionCall


class CrossAttention(TargetAttention):
    """Attends to every key that the mask shows."""

    @property
    def drops_weights(self) -> bool:
        """Always."""
        return True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """As :meth:`TargetAttention.forward`, to all N keys; nothing is cached here."""
        mask = _scores(call, q.dtype)
        if self.observer is not None:
            keys = torch.full((q.shape[0], self.kv_heads, q.shape[2]), k.shape[2], device=q.device)
            valid = torch.ones_like(keys[:, 0], dtype=torch.bool)
            self.observer({"keys": keys, "nodes": torch.zeros_like(keys), "valid": valid})
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            dropout_p=call.dropout,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def _scores(call: AttentionCall, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, or which of them count; None where all do."""
    mask, bias = call.mask, call.bias
    if bias is not None:
        hidden = torch.finfo(
            dtype
        ).min  # finite: a row that sees no key looks at all of them alike, as in SDPA
        if mask is None:
            mask = bias
        else:
            mask = torch.where(mask, bias, hidden) if mask.dtype == torch.bool else mask + bias
    return mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
