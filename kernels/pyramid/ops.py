"""``retrofit::extend_pyramid`` and ``retrofit::extend_spreads``: the pyramid as nodes of an exported program.

While a model is exported each pyramid is one call of an operator, however many levels it has; on a GPU it is a
kernel where that can do it; otherwise it is plain differentiable PyTorch. So are the spreads of its cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from retrofit.kernels.pyramid import blocked
from retrofit.kernels.repeat import has_triton, repeated_call


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
    result: list[Tensor]
    if not torch.compiler.is_exporting():
        kernels = _implementation(x, pooling, weights, differentiable=levels is None)
        result = kernels.extend_pyramid(
            x, levels, start, new=new, ratios=ratios, offset=offset, pooling=pooling, weights=weights
        )
        return result
    result = _extend_pyramid(
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


def extend_spreads(
    x: Tensor, cells: Tensor, spreads: Tensor | None, start: Tensor, *, new: int, ratio: int, offset: int
) -> Tensor:
    """As :func:`retrofit.kernels.pyramid.blocked.extend_spreads`."""
    options = {"ratio": ratio, "offset": offset}
    found: Tensor
    if torch.compiler.is_exporting():
        found = _extend_spreads(x, x[:, :, x.shape[2] - new :], cells, spreads, start, **options)
        return found
    found = _implementation(x, "mean", [cells]).extend_spreads(x, cells, spreads, start, new=new, **options)
    return found


def build_with_spreads(
    x: Tensor,
    start: Tensor,
    *,
    ratios: Sequence[int],
    offset: int,
    pooling: str,
    weights: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor] | None:
    """The pyramid of ``x`` from nothing and the spreads of its first level, in one pass over ``x``.

    Returns:
        What ``extend_pyramid`` and ``extend_spreads`` do; None where only these two can do it.
    """
    kernels = _implementation(x, pooling, weights, differentiable=False)
    if torch.compiler.is_exporting() or kernels is blocked:
        return None
    options = {"ratios": tuple(ratios), "offset": offset, "pooling": pooling}
    built: tuple[list[Tensor], Tensor] = repeated_call(
        kernels.build_with_spreads, (x, start, weights), options
    )
    return built


def _implementation(
    x: Tensor, pooling: str, weights: Sequence[Tensor | None], *, differentiable: bool = True
) -> ModuleType:
    """The module that pools ``x`` so: that of the kernels where they can do it, and else ``blocked``."""
    if _on_gpu(x):
        from retrofit.kernels.pyramid import triton as kernels

        if kernels.unsupported(x, pooling, weights, differentiable=differentiable) is None:
            return kernels
    return blocked


def _apart(x: Tensor) -> Tensor:
    """``x`` in rows and no part of another tensor, which an operator must not return."""
    whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x.contiguous() if whole else x.clone(memory_format=torch.contiguous_format)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and has_triton()


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
    taps: list[Tensor | None] = [*weights] or [None] * len(ratios)
    found = _implementation(x, pooling, taps).extend_pyramid(
        x,
        levels or None,
        start,
        new=recent.shape[2],
        ratios=ratios,
        offset=offset,
        pooling=pooling,
        weights=taps,
    )
    return [_apart(level) for level in found]


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


@torch.library.custom_op("retrofit::extend_spreads", mutates_args=())
def _extend_spreads(
    x: Tensor,
    recent: Tensor,
    cells: Tensor,
    spreads: Tensor | None,
    start: Tensor,
    *,
    ratio: int,
    offset: int,
) -> Tensor:
    """The spreads of ``cells``, of which ``recent`` [B, H, new, D] are the last tokens."""
    new, kernels = recent.shape[2], _implementation(x, "mean", [cells])
    found: Tensor = kernels.extend_spreads(x, cells, spreads, start, new=new, ratio=ratio, offset=offset)
    return found.contiguous()


@_extend_spreads.register_fake
def _(
    x: Tensor,
    recent: Tensor,
    cells: Tensor,
    spreads: Tensor | None,
    start: Tensor,
    *,
    ratio: int,
    offset: int,
) -> Tensor:
    return cells.new_empty(cells.shape[:3], dtype=torch.promote_types(cells.dtype, torch.float32))
