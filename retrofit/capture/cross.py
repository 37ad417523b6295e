"""What can be carried over of attention whose keys come from elsewhere than its queries: all but a few features."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from retrofit.capture.record import OwnerCall
from retrofit.passes.attention.arguments import arguments
from retrofit.passes.attention.masks import MaskClass, MaskSample, visible_keys


def cross_mask(
    attention: Node, samples: Sequence[MaskSample], every: Sequence[OwnerCall], *, biased: bool
) -> MaskClass | str:
    """The class of the masks of cross-attention, or why it keeps its own attention.

    Args:
        attention: Its canonical node.
        samples: Its masks.
        every: All its calls.
        biased: Whether the graph hands over a bias besides, which is no part of the masks.
    """
    given = arguments(attention)
    reason = next(
        (
            what
            for what, there in (
                ("hides keys by their number alone", any(sample.is_causal for sample in samples)),
                ("has a softcap of the scores", bool(given["softcap"])),
                ("has attention sinks", given["sinks"] is not None),
                ("keeps its keys among those of the tokens it decodes", any(call.written for call in every)),
            )
            if there
        ),
        None,
    )
    if reason is not None:
        return f"cross-attention that {reason} keeps its own attention"
    masks = [sample.mask for sample in samples if sample.mask is not None]
    visible = [visible_keys(mask) for mask in masks]
    if any(isinstance(shown, str) or bool((shown != shown[..., :1, :]).any()) for shown in visible):
        return MaskClass(False, given=True, biased=biased)
    padding = any(not bool(shown.all()) for shown in visible if not isinstance(shown, str))
    return MaskClass(False, padding=padding, biased=biased)
