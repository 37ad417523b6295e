"""One attention of a module that has several, as a module of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attend(nn.Module):
    """Attention to queries, keys and values that it is handed.

    Args:
        scale: Factor on the scores.
        is_causal: Whether later keys are hidden.
        softcap: Bound c of the scores, which become c·tanh(score / c); 0 for none.
        alone: Whether queries and keys are the same tokens.
        trace: The lines of the model's code that it was made from.
    """

    def __init__(self, scale: float, is_causal: bool, softcap: float, alone: bool, trace: str | None) -> None:
        super().__init__()
        self.scale, self.is_causal, self.softcap = scale, is_causal, softcap
        self.alone, self.trace = alone, trace

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attends from query [B, Hq, T, D] to key, value [B, Hkv, N, …] as the canonical node does."""
        group = query.shape[1] // key.shape[1]
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        if not self.softcap and sinks is None:
            return F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=self.is_causal, scale=self.scale, enable_gqa=group > 1
            )
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if self.is_causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if sinks is None:
            # As SDPA, it gives nothing where all keys are hidden.
            return torch.ops.aten._safe_softmax(scores, -1) @ value.repeat_interleave(group, 1)
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        return weights @ value.repeat_interleave(group, 1)
