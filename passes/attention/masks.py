"""Classifies what a mask lets a query see, from the masks a module really got or built.

masks on probes (lengths, padding, positions)  →  none | key padding | causal | … within a window  |  refused
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrofit.passes.attention.bias import adds, hidden_by, kind_of_bias, without_bias


@dataclass(frozen=True)
class MaskClass:
    """What a site's mask lets a query see, besides hiding the row's padding.

    Attributes:
        causal: Keys after the query are hidden.
        sliding_window: Keys this far back and further are hidden; 0 means none.
        padding: Whether a mask for padding was seen to work.
        slopes: What is added to the scores of each head for every position of the key, as ALiBi does; one for all
            heads, or empty.
        given: Whether the site takes any mask as it comes, as cross-attention does.
        biased: Whether something else is added to the scores, as learned relative positions are.
    """

    causal: bool
    sliding_window: int = 0
    padding: bool = False
    slopes: tuple[float, ...] = ()
    given: bool = False
    biased: bool = False

    def __str__(self) -> str:
        parts = ["as given"] if self.given else []
        if self.sliding_window:
            parts.append(f"sliding window({self.sliding_window})")
        elif self.causal:
            parts.append("causal")
        if self.padding:
            parts.append("padding" if self.causal else "key padding")
        if self.slopes:
            parts.append("ALiBi")
        if self.biased:
            parts.append("position bias")
        return "+".join(parts) or "none"

    def expected(self, keep: Tensor) -> Tensor:
        """What the class shows: bool [B, N, N] for rows whose real tokens are ``keep`` [B, N]."""
        n = keep.shape[1]
        index = torch.arange(n, device=keep.device)
        seen = keep[:, None, :].expand(-1, n, -1)
        if self.causal:
            seen = seen & (index <= index[:, None])
        if self.sliding_window:
            seen = seen & (index > index[:, None] - self.sliding_window)
        return seen


@dataclass(frozen=True)
class MaskSample:
    """A mask as one probe had it.

    Attributes:
        mask: [B or 1, H or 1, T or 1, N], bool or additive; None if the probe had none.
        is_causal: Whether the attention itself hid later keys.
        batch: Rows of the probe.
        length: Tokens of the probe.
        keep: bool [B, N], the real tokens; None if the probe does not say.
    """

    mask: Tensor | None
    is_causal: bool
    batch: int
    length: int
    keep: Tensor | None


def classify(samples: Sequence[MaskSample]) -> MaskClass | str:
    """Returns the one class all samples belong to, or the reason why there is none."""
    if not samples:
        return "no mask was observed"
    unbiased = without_bias(samples)
    if isinstance(unbiased, str):
        return unbiased
    samples, slopes = unbiased
    seen: list[tuple[Tensor, Tensor]] = []
    for sample in samples:
        shown = _shown(sample)
        if isinstance(shown, str):
            return shown
        keep = sample.keep if sample.keep is not None else _real_tokens(shown)
        if keep is None:
            return "the mask hides keys in the middle of a row, which is no padding"
        seen.append((shown, keep))
    padding = any(not bool(keep.all()) for _, keep in seen)
    windows = {_window(shown, keep) for shown, keep in seen} - {0}
    candidates = [MaskClass(False, 0, padding), MaskClass(True, 0, padding)]
    candidates += [MaskClass(True, window, padding) for window in sorted(windows)]
    for candidate in candidates:
        if all(_agrees(candidate, shown, keep) for shown, keep in seen):
            return replace(candidate, slopes=slopes)
    chunk = _chunk(seen)
    if chunk:
        return f"the mask is chunked: a token sees the earlier ones of its own chunk of {chunk} tokens alone"
    known = _seen_padding(seen) or _window_on_both_sides(seen) or _prefix(seen)
    return known or "the mask is none of none, causal, key padding or sliding window" + _example(seen)


def real_tokens(sample: MaskSample) -> Tensor | None:
    """The real tokens of a probe, bool [B, N]: as it says, or as its mask shows; None if it hides a middle."""
    if sample.keep is not None:
        return sample.keep
    unbiased = without_bias([sample])
    shown = unbiased if isinstance(unbiased, str) else _shown(unbiased[0][0])
    return None if isinstance(shown, str) else _real_tokens(shown)


def _shown(sample: MaskSample) -> Tensor | str:
    """Which keys each query sees: bool [B, T, N]."""
    n = sample.length
    if sample.mask is None:
        shown = torch.ones(sample.batch, n, n, dtype=torch.bool)
    else:
        mask = sample.mask.detach().cpu()
        if mask.dim() > 4:
            return f"a mask of rank {mask.dim()}"
        mask = mask[(None,) * (4 - mask.dim())]
        visible = visible_keys(mask)
        if isinstance(visible, str):
            return visible
        if visible.shape[1] > 1 and not bool((visible == visible[:, :1]).all()):
            return "the mask differs between heads"
        try:
            shown = visible[:, 0].expand(sample.batch, n, n)
        except RuntimeError:
            return f"a mask of shape {list(mask.shape)} for {n} tokens"
    if sample.is_causal:
        shown = shown & torch.ones(n, n, dtype=torch.bool).tril()
    return shown


def visible_keys(mask: Tensor) -> Tensor | str:
    """Turns a bool or additive mask into bool, True where visible; a reason if it is neither."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return f"a mask of dtype {mask.dtype}"
    if adds(mask):
        return f"the mask adds a bias to the scores, {kind_of_bias(mask, hidden_by(mask))}"
    return mask == 0


def _real_tokens(shown: Tensor) -> Tensor | None:
    """The keys the last query of each row sees that has any, if they are one run up to a window."""
    keep = shown.any(dim=1)
    runs = (keep[:, 1:] & ~keep[:, :-1]).sum(dim=1) + keep[:, 0].to(torch.int64)
    return keep if bool((runs == 1).all()) else None


def _window(shown: Tensor, keep: Tensor) -> int:
    """Keys the last real query of the first whole row sees."""
    row = int(keep.sum(dim=1).argmax())
    last = int(keep[row].nonzero().max())
    count = int(shown[row, last].sum())
    return count if count < int(keep[row].sum()) else 0


def _chunk(seen: Sequence[tuple[Tensor, Tensor]]) -> int:
    """The size of the chunks within which tokens see one another; 0 if there are none."""
    for shown, keep in seen:
        if not bool(keep.all()):
            continue
        size = int(shown[0, :, 0].sum())
        index = torch.arange(keep.shape[1])
        if 0 < size < keep.shape[1]:
            within = (index[:, None] // size == index // size) & (index <= index[:, None])
            if bool((shown == within).all()):
                return size
    return 0


def _seen_padding(seen: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """What is to be said of a mask by which real tokens see padding."""
    for shown, keep in seen:
        found = (shown & ~keep[:, None, :] & keep[:, :, None]).nonzero()
        if len(found):
            _, query, key = found[0].tolist()
            return (
                f"the mask does not hide padding: in a probe of {keep.shape[1]} tokens key {key}, which is padding, "
                f"is visible to query {query}"
            )
    return None


def _window_on_both_sides(seen: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """What is to be said of a mask that shows as far before a token as after it, or somewhat further."""
    widest = [(shown, keep) for shown, keep in seen if bool(keep.all())]
    if not widest:
        return None
    shown = widest[0][0]
    n = shown.shape[1]
    after, before = int(shown[0, 0].sum()) - 1, int(shown[0, :, 0].sum()) - 1
    distance = torch.arange(n) - torch.arange(n)[:, None]
    window = (distance <= after) & (distance >= -before)
    if not 0 < after < n - 1 or not 0 < before < n - 1:
        return None
    if not all(_shows(window[: len(keep[0]), : len(keep[0])], shown, keep) for shown, keep in seen):
        return None
    return f"the mask is a sliding window on both sides of a token, which sees {before} before it and {after} after it"


def _prefix(seen: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """What is to be said of a mask by which the first tokens see one another, and the others what is before them."""
    for shown, keep in seen:
        if not bool(keep.all()):
            continue
        n = shown.shape[1]
        length = int(shown[0, 0].sum())
        index = torch.arange(n)
        pattern = (index <= index[:, None]) | (index < length)
        if 1 < length < n and _shows(pattern, shown, keep):
            return (
                f"the mask is that of a prefix: the first {length} tokens see one another, later ones see those "
                "before them"
            )
    return None


def _shows(pattern: Tensor, shown: Tensor, keep: Tensor) -> bool:
    """Whether real tokens see what ``pattern`` [N, N] shows of the real ones."""
    if pattern.shape != shown.shape[1:]:
        return False
    different = ((pattern & keep[:, None, :]) != shown) & keep[:, :, None]
    return not bool(different.any())


def _agrees(candidate: MaskClass, shown: Tensor, keep: Tensor) -> bool:
    different = (candidate.expected(keep) != shown) & keep[:, :, None]
    return not bool(different.any())


def _example(seen: Sequence[tuple[Tensor, Tensor]]) -> str:
    """Where a probe differs from what comes nearest to it."""
    counts = {}
    for causal in (True, False):
        differing = [
            ((MaskClass(causal).expected(keep) != shown) & keep[:, :, None]).nonzero() for shown, keep in seen
        ]
        counts[causal] = sum(map(len, differing)), differing
    causal = counts[True][0] <= counts[False][0]
    for (shown, keep), different in zip(seen, counts[causal][1], strict=True):
        if len(different):
            row, query, key = different[0].tolist()
            state = "visible to" if shown[row, query, key] else "hidden from"
            nearest = "causal" if causal else "one that hides padding alone"
            return (
                f": it is nearest to {nearest}, but in a probe of {keep.shape[1]} tokens key {key} is {state} "
                f"query {query}"
            )
    return ""
