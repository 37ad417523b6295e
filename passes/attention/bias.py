"""Reads a bias that grows with the distance from a mask: ALiBi.

mask [B, H, T, N] = slope[h]·(j − i) where visible, −∞ elsewhere   →   visible, bool [B, H, T, N], and slopes [H]

A constant in a row changes no softmax, so that slope·j says the same: what counts is that the bias of a row is linear
in the key's index, with the same slope in all rows of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from retrofit.passes.attention.masks import MaskSample

HIDDEN = -1e30  # a bias may well be a large negative number; what hides is near the end of the range
ROUNDED = "the mask adds a bias to the scores, in proportion to the distance but rounded to"
_ROUNDING = 4.0  # times the dtype's eps, relative to the largest bias


def without_bias(samples: Sequence[MaskSample]) -> tuple[list[MaskSample], tuple[float, ...]] | str:
    """Returns the samples with masks that only hide, and the slope of each head; or why there is none.

    The slopes are empty where no mask has a bias.
    """
    found: list[MaskSample] = []
    slopes: Tensor | None = None
    for sample in samples:
        mask = sample.mask
        if mask is None or not has_bias(mask):
            found.append(sample)
            continue
        visible = mask.detach().cpu() > HIDDEN
        own = _slopes(mask.detach().cpu(), visible, sample)
        if isinstance(own, str):
            return own
        if slopes is not None and not torch.allclose(slopes, own, rtol=1e-5, atol=0.0):
            return "the mask adds a bias to the scores, whose slope depends on the input"
        slopes = own if slopes is None else slopes
        found.append(replace(sample, mask=visible))
    if slopes is not None and any(
        sample.mask is None or sample.mask is kept.mask for sample, kept in zip(samples, found, strict=True)
    ):
        return "the mask adds a bias to the scores for some inputs alone"
    return found, () if slopes is None else tuple(slopes.tolist())


def has_bias(mask: Tensor) -> bool:
    """Whether an additive mask does anything but hide."""
    if not mask.is_floating_point() or mask.dim() != 4:
        return False
    return adds(mask)


def adds(mask: Tensor) -> bool:
    """The same of a mask that is floating-point, of any rank."""
    return bool(((mask != 0) & ~hidden_by(mask) & ~(mask <= -1e4)).any())


def hidden_by(mask: Tensor) -> Tensor:
    """What an additive mask hides for certain, whatever bias it adds, bool."""
    return mask <= max(torch.finfo(mask.dtype).min / 2, HIDDEN)


def _slopes(mask: Tensor, visible: Tensor, sample: MaskSample) -> Tensor | str:
    """The slope of each head, float64 [H]; a reason if the bias is not linear in the distance."""
    queries, keys = mask.shape[-2:]
    if queries not in (1, keys) or keys != sample.length:
        return "the mask adds a bias to the scores, of an unknown kind"
    keep = sample.keep if sample.keep is not None else torch.ones(sample.batch, keys, dtype=torch.bool)
    real = visible & keep[:, None, None, :]
    if queries == keys:
        real = real & keep[:, None, :, None]
    bias, index = mask.double(), torch.arange(keys, dtype=torch.float64)
    bias, real = torch.broadcast_tensors(bias, real)
    start, at_start, span, rise = first_to_last(bias, real)
    span, rise = (x.transpose(0, 1).flatten(1) for x in (span, rise))
    longest = span.argmax(dim=1, keepdim=True)
    slopes = (rise.gather(1, longest) / span.gather(1, longest))[:, 0]
    line = at_start[..., None] + slopes[:, None, None] * (index - start[..., None])
    error = torch.where(real, (bias - line).abs(), 0.0).amax()
    size = torch.where(real, bias.abs(), 0.0).amax()
    if not float(error) <= _ROUNDING * torch.finfo(mask.dtype).eps * float(size):
        return f"the mask adds a bias to the scores, {kind_of_bias(mask, ~visible)}"
    if mask.dtype not in (torch.float32, torch.float64):
        return f"{ROUNDED} {mask.dtype}; convert the model in float32 and cast it afterwards"
    return slopes


def first_to_last(bias: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the first to the last real key of each row of ``bias`` [..., N]: the place of the first, the bias there, how
    far it is to the last, and by how much the bias rises on the way. Where no key is real, the way is less than 0.

    Args:
        bias: What is added to the scores, float64.
        real: bool, of the same shape.
    """
    keys = bias.shape[-1]
    index = torch.arange(keys, dtype=torch.float64, device=bias.device)
    first, last = (torch.where(real, index, fill) for fill in (float(keys), -1.0))
    start, end = first.amin(-1), last.amax(-1)
    at_start, at_end = (
        bias.gather(-1, place.clamp(0, keys - 1).long()[..., None])[..., 0] for place in (start, end)
    )
    return start, at_start, end - start, at_end - at_start


def kind_of_bias(mask: Tensor, hidden: Tensor) -> str:
    """What the bias in a mask […, T, N] depends on, as far as a softmax over the keys can tell."""
    queries, keys = mask.shape[-2:]
    if queries != keys:
        return "the same for every query" if queries == 1 else "of an unknown kind"
    # A constant in a row changes no softmax.
    bias = (mask - mask.diagonal(dim1=-2, dim2=-1)[..., None]).masked_fill(hidden, float("nan"))
    by_distance = all(
        bool((line - line[..., :1]).abs().nan_to_num().max() <= 1e-4 * line.abs().nan_to_num().max() + 1e-6)
        for offset in range(-queries + 1, queries)
        for line in [bias.diagonal(offset, dim1=-2, dim2=-1)]
    )
    return "by distance, but not in proportion to it" if by_distance else "not by distance alone"
