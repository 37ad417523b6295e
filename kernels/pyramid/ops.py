"""``retrofit::extend_pyramid``: the pyramid as one node of an exported program.

While a model is exported each pyramid is one call of the operator, however many levels it has; on a GPU it is a
kernel where that can do it; otherwise it is plain differentiable PyTorch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from retrofit.kernels.pyramid import blocked


def extend_pyramid(
    x: Tensor,
    levels: Sequence[Tensor] | None,
    start: Tensor,
    *,
    new: int,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
    weights: Sequence[Tensor | None],
) -> list[Tensor]:
    """As :func:`retrofit.kernels.pyramid.blocked.extend_pyramid`."""
    if not torch.compiler.is_exporting():
        if x.is_cuda and not torch.compiler.is_compiling() and _has_triton():
            from retrofit.kernels.pyramid import triton as kernels

            if kernels.unsupported(x, pooling, weights) is None:
                return kernels.extend_pyramid(
                    x,
                    levels,
                    start,
                    new=new,
                    ratios=ratios,
                    offset=offset,
                    pooling=pooling,
                    weights=weights,
                )
        return blocked.extend_pyramid(
            x, levels, start, new=new, ratios=ratios, offset=offset, pooling=pooling, weights=weights
        )
    result: list[Tensor] = _extend_pyramid(
        x,
        x[:, :, x.shape[2] - new :],
        start,
        list(levels or ()),
        [weight for weight in weights if weight is not None],
        ratios=list(ratios),
        offset=offset,
        pooling=pooling,
    )
    return result


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.library.custom_op("retrofit::extend_pyramid", mutates_args=())
def _extend_pyramid(
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
    """The levels of ``x``, of which ``recent`` [B, H, new, D] are the last tokens; empty lists stand for None."""
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


@_extend_pyramid.register_fake
def _(
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
    room = torch.sym_max(x.shape[2] - offset, 0)
    return [
        x.new_empty(x.shape[0], x.shape[1], room // prod(ratios[: level + 1]), x.shape[3])
        for level in range(len(ratios))
    ]
