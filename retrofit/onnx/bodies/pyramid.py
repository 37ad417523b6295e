"""The pyramid: what ``retrofit.kernels.pyramid.blocked`` does, as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from retrofit.kernels.pyramid import blocked


def extend_pyramid(
    x: Tensor,
    recent: Tensor,
    start: Tensor,
    levels: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
) -> list[Tensor]:
    """As ``torch.ops.retrofit.extend_pyramid``, exportable."""
    return blocked.extend_pyramid(
        x,
        levels or None,
        start,
        new=recent.shape[2],
        ratios=ratios,
        offset=offset,
        pooling=pooling,
        weights=list(weights) or [None] * len(ratios),
    )
