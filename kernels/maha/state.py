"""What a site keeps besides K and V, so that the next token costs what it should.

The inputs of the dilated branch are the last values, which the cache has anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from retrofit.kernels.pyramid.blocked import crop_pyramid


@dataclass(frozen=True)
class MAHAState:
    """The cells of a site's scales.

    Attributes:
        keys: Scale l+1's pooled keys [B, Hkv, ⌊N/ratio**(l+1)⌋, D] for each l.
        values: The same of the values.
        ratio: Ratio of the cells of neighbouring scales.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    ratio: int

    def map(self, fn: Callable[[Tensor], Tensor]) -> MAHAState:
        """Returns the state with ``fn`` applied to every tensor, all of which have the batch first."""
        return MAHAState(tuple(map(fn, self.keys)), tuple(map(fn, self.values)), self.ratio)

    def crop(self, start: Tensor, tokens: int) -> MAHAState:
        """Returns the state after the first ``tokens`` index slots; ``start`` [B] is not needed for it."""
        ratios = [self.ratio] * len(self.keys)
        return MAHAState(
            tuple(crop_pyramid(self.keys, tokens, ratios=ratios, offset=0)),
            tuple(crop_pyramid(self.values, tokens, ratios=ratios, offset=0)),
            self.ratio,
        )
