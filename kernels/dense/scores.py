"""What some models do to the scores between the product of queries and keys and the mask.

scale·q·k  →  cap·tanh(scale·q·k / cap)  →  softmax over the keys and, of no value, the head's sink
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreRules(NamedTuple):
    """What happens to the scores of a site.

    Attributes:
        softcap: Bound c of the scores, which become c·tanh(score / c); 0 for none.
        sinks: Logit of each head [Hq] that takes part in the softmax and has no value; None for none.
    """

    softcap: float = 0.0
    sinks: Tensor | None = None

    def capped_(self, scores: Tensor) -> Tensor:
        """The scores under the softcap, in place."""
        return scores.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else scores

    def slope(self, capped: Tensor) -> Tensor:
        """Derivative of the scores under a softcap by those before it; 0 for hidden ones."""
        return (1.0 - (capped / self.softcap).square()).clamp_(min=0.0)

    @property
    def plain(self) -> bool:
        """Whether the scores stay as they are."""
        return not self.softcap and self.sinks is None


PLAIN = ScoreRules()
"""Scores as they are."""


def share_of_keys(top: Tensor, peak: Tensor, sink: Tensor) -> Tensor:
    """Share of the softmax that the keys keep from the sink.

    It takes no sum over the keys, whose order, and so its last bit, would depend on how many there are.

    Args:
        top: The highest score of each query, finite where a key is visible, [..., 1].
        peak: The share of that key in the softmax without the sink, [..., 1].
        sink: The sink's logit, broadcastable.
    """
    return torch.sigmoid(top - peak.log() - sink)
