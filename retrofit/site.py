"""The module that takes an attention module's place, and what it hands to its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from retrofit.cache import RetrofitLayer


@dataclass(frozen=True)
class AttentionCall:
    """What a target needs besides q, k and v.

    Attributes:
        start: int64 [B], index of each row's first real token.
        length: int64 [B], number of real tokens of each row, the new ones included.
        layer: The cache layer of this site; None without a cache.
    """

    start: Tensor
    length: Tensor
    layer: RetrofitLayer | None = None
