"""Checks that an additive mask does in a call what the one of the example did.

mask that only hid   →   the same mask, or MaskError: it adds a bias
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.errors import MaskError
from retrofit.passes.attention.bias import HIDDEN, adds, first_to_last


def only_hides(mask: Tensor) -> Tensor:
    """``mask``, which is added to scores, if it does nothing but hide; not looked at while a program is compiled.

    Raises:
        MaskError: If it adds something to visible scores.
    """
    if not torch.compiler.is_compiling() and adds(mask):
        raise MaskError(
            "attention mask adds a bias to the scores, which this site was not captured with; convert with an example "
            "that has such a mask, or leave the site out with where=…"
        )
    return mask


def same_slopes(mask: Tensor, slopes: tuple[float, ...]) -> Tensor:
    """``mask`` [B, Hq, T, N], which is added to scores, if what it adds rises by ``slopes`` from key to key; not looked
    at while a program is compiled, and then for the last query alone.

    Raises:
        MaskError: If it rises otherwise.
    """
    if torch.compiler.is_compiling() or mask.dim() != 4 or mask.shape[1] not in (1, len(slopes)):
        return mask
    row = mask[:, :, -1].detach().double()
    known = row > HIDDEN
    _, _, span, rise = first_to_last(row, known)
    expected = span * row.new_tensor(slopes)[: mask.shape[1]]
    rounding = 8 * torch.finfo(mask.dtype).eps * row.masked_fill(~known, 0).abs().amax()
    if bool(((span > 0) & ((rise - expected).abs() > rounding + 1e-4 * expected.abs())).any()):
        raise MaskError(
            "attention mask adds a position bias of other slopes than this site was captured with; convert again"
        )
    return mask
