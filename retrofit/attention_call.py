"""What a target needs besides queries, keys and values, read from the mask and the cache of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.masks import check_continued, to_start_length
from retrofit.passes.attention.masks import MaskClass, visible_keys

if TYPE_CHECKING:
    from retrofit.cache import RetrofitLayer


@dataclass(frozen=True)
class AttentionCall:
    """What a target needs besides q, k and v.

    Attributes:
        start: int64 [B], index of each row's first real token.
        length: int64 [B], number of real tokens of each row, the new ones included.
        layer: The cache layer of this site; None without a cache.
        padded: Whether some row may have padding; False where every row is known to have all index slots.
        sinks: One more logit of each query head [Hq], which takes part in the softmax and has no value.
        dropout: Probability with which each attention weight is dropped.
        mask: Of cross-attention, bool or added to the scores [B or 1, Hq or 1, T or 1, N].
        bias: What else is added to the scores, broadcast to [B, Hq, T, N].
    """

    start: Tensor
    length: Tensor
    layer: RetrofitLayer | None = None
    padded: bool = True
    sinks: Tensor | None = None
    dropout: float = 0.0
    mask: Tensor | None = None
    bias: Tensor | None = None


def unpadded(k: Tensor, layer: RetrofitLayer | None = None) -> AttentionCall:
    """A call in which every row of the keys k [B, Hkv, N, D], the cached ones included, has all N slots."""
    start, length = to_start_length(None, k.shape[0], k.shape[2], k.shape[2], k.device)
    return AttentionCall(start, length, layer, padded=False)


def call_of(
    of_site: MaskClass, q: Tensor, k: Tensor, layer: RetrofitLayer | None, mask: Tensor | None
) -> AttentionCall:
    """Returns where the tokens of each row are, and keeps it in the cache.

    Args:
        of_site: What the site was verified for.
        q: Queries [B, Hq, T, D].
        k: New keys [B, Hkv, T, D].
        layer: The cache layer of the site; None without a cache.
        mask: Nonzero at real tokens [B, N], or a mask [B, 1, T, N] that says the same; None where nothing is padded.

    Raises:
        MaskError: If the mask is not of the site's class.
    """
    past = layer.get_seq_length() if layer is not None else 0
    slots = past + k.shape[2]
    if mask is None and (layer is None or not layer.padded):
        if layer is not None and layer.start is not None:
            return AttentionCall(layer.start, torch.full_like(layer.start, slots), layer, padded=False)
        start, length = to_start_length(None, q.shape[0], slots, q.shape[2], q.device)
        if layer is not None:
            layer.start = start
        return AttentionCall(start, length, layer, padded=False)
    if mask is not None and mask.dim() == 4 and mask.shape[2] == 1 < q.shape[2]:
        mask = _as_padding(mask, q.shape[0])
    if mask is not None and mask.dim() != 2:
        mask = _of_rank_four(mask, q.shape[2])
    start, length = to_start_length(
        mask,
        q.shape[0],
        slots,
        q.shape[2],
        q.device,
        causal=of_site.causal,
        sliding_window=of_site.sliding_window,
    )
    if layer is not None:
        # A row of nothing but padding starts behind it; what comes later says where.
        end = torch.where(length > 0, start + length, slots)
        start = torch.where(length > 0, start, slots)
        if layer.start is not None:
            if mask is not None and not of_site.sliding_window:
                check_continued(layer.start, start, past)
            start = torch.where(layer.start < past, layer.start, start.clamp(min=past))
        length = end - start
        layer.start = start
        layer.padded = layer.padded or mask is not None
    return AttentionCall(start, length, layer, padded=mask is not None if layer is None else layer.padded)


def over_holes(mask: Tensor, bias: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Has a bias hide the keys that a mask hides from all queries between the first and the last key of a row.

    A model that puts prompts of its own before a text has the text's padding behind them.

    Args:
        mask: Of a bidirectional site, true where visible or added to the scores, [B or 1, 1, T, N] or [B or 1, T, N].
        bias: What is added to the scores, broadcast to [B, Hq, T, N].
        tokens: T.

    Returns:
        The mask, in which padding is at the ends of rows, and the bias.
    """
    whole = _of_rank_four(mask, tokens)
    visible = visible_keys(whole if whole.is_floating_point() else whole != 0)
    if isinstance(visible, str) or visible.shape[1] != 1 or visible.shape[3] != bias.shape[3]:
        return mask, bias
    seen = visible[:, 0].any(dim=1)
    inside = seen.cumsum(-1).bool() & seen.flip(-1).cumsum(-1).bool().flip(-1)
    holes = inside & ~seen
    filled = torch.where(holes[:, -tokens:, None], inside[:, None], visible[:, 0] | holes[:, None])
    hidden = torch.finfo(bias.dtype).min
    return filled[:, None], torch.where(holes[:, None, None], hidden, bias)


def _as_padding(mask: Tensor, rows: int) -> Tensor:
    """A mask [B or 1, 1, 1, N] that hides the same keys from every query as bool [B, N]; any other as it is."""
    visible = visible_keys(mask)
    if isinstance(visible, str) or visible.shape[1] != 1:
        return mask
    return visible[:, 0, 0].expand(rows, -1)


def _of_rank_four(mask: Tensor, tokens: int) -> Tensor:
    """[…, T or 1, N] → [B or 1, 1, T, N]."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask.unsqueeze(1)
    return mask.expand(-1, -1, tokens, -1) if mask.shape[2] == 1 else mask
