"""What the mask in a call of a module says by itself, held against what the module makes of it.

attention_mask of the probes, the keys that they leave visible   →   MaskArgument
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.capture.call import LeafPath, Signature, lookup
from retrofit.capture.observe import ProbedCall
from retrofit.passes.attention.masks import MaskClass, MaskSample, visible_keys


@dataclass(frozen=True)
class MaskArgument:
    """Where the mask of a site is found in a call, and how it is read.

    Attributes:
        path: Its place.
        truth: Whether it is no bool, and yet what is not 0 is visible, in place of being added to the scores.
        unordered: Whether it shows later keys, which the module hides itself.
        inverted: Whether it is a bool for each key that is true where the key is hidden.
    """

    path: LeafPath
    truth: bool = False
    unordered: bool = False
    inverted: bool = False

    def read(self, mask: Tensor | None) -> Tensor | None:
        """``mask`` with these set right."""
        if self.inverted and mask is not None and mask.dtype == torch.bool and mask.dim() == 2:
            return ~mask
        if mask is None or not (self.truth or (self.unordered and mask.dim() == 2)):
            return mask
        return mask != 0


def is_mask_of(
    path: LeafPath, calls: Sequence[ProbedCall], samples: Sequence[MaskSample], signature: Signature
) -> bool:
    """Whether the argument at ``path`` says by itself what the module makes of it, so that it can go around the graph.

    ``nn.MultiheadAttention`` hides where its mask is true, and takes one for each row and head in one dimension.
    """
    for probed, sample in zip(calls, samples, strict=True):
        given = lookup(signature.bind(probed.call.args, probed.call.kwargs), path)
        if not isinstance(given, Tensor) or sample.mask is None:
            continue
        shown = visible_keys(sample.mask)
        truth = not isinstance(shown, str) and _same(given != 0, shown)
        if not truth and not _same(given, sample.mask) and _hides(given, shown) is not True:
            return False
    return True


def _hides(given: Tensor, shown: Tensor | str) -> bool | None:
    """Whether a mask of keys is true where they are hidden; None if it is none."""
    if isinstance(shown, str) or given.dtype != torch.bool or given.dim() != 2 or shown.dim() != 4:
        return None
    return _same(given, ~shown.any(dim=2).any(dim=1))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two masks are the same once they are broadcast."""
    try:
        return a.dtype == b.dtype and torch.equal(*torch.broadcast_tensors(a, b))
    except RuntimeError:
        return False


def mask_argument(
    path: LeafPath,
    calls: Sequence[ProbedCall],
    samples: Sequence[MaskSample],
    signature: Signature,
    of_site: MaskClass,
) -> MaskArgument:
    """What the argument at ``path`` says.

    Args:
        path: Its place.
        calls: Calls on the probes.
        samples: The masks that the module had in them.
        signature: The module's parameters.
        of_site: What the module was seen to hide.
    """
    truth, unordered, hides = [], [], []
    for probed, sample in zip(calls, samples, strict=True):
        given = lookup(signature.bind(probed.call.args, probed.call.kwargs), path)
        shown = visible_keys(sample.mask) if sample.mask is not None else "no mask"
        if isinstance(given, Tensor) and (inverted := _hides(given, shown)) is not None:
            hides.append(inverted)
        if not isinstance(given, Tensor) or given.dim() != 4 or isinstance(shown, str):
            continue
        nonzero = (given != 0).cpu()
        truth.append(
            given.dtype != torch.bool and bool(nonzero.any()) and not bool((shown.cpu() & ~nonzero).any())
        )
        if of_site.causal:
            read = nonzero if truth[-1] or given.dtype == torch.bool else ~nonzero
            later = torch.ones(sample.length, sample.length, dtype=torch.bool).triu(1)
            if sample.keep is not None:
                later = later & sample.keep[:, None, None, :] & sample.keep[:, None, :, None]
            unordered.append(bool((read & later).any()))
    return MaskArgument(path, bool(truth) and all(truth), any(unordered), bool(hides) and all(hides))
