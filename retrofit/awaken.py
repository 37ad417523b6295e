"""Gives parameters that are zero throughout random numbers for a while.

A module whose last layer starts at zero, as in adaLN-zero or ControlNet, gives zero whatever its attention does, so
that nothing can be compared with it.

o.weight = 0   →   o.weight = seeded random numbers, while something is compared   →   o.weight = 0
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SEED = 0


def says_nothing(module: nn.Module, output: Tensor) -> bool:
    """Whether ``output`` [B, N, …] of ``module`` may hide what it does: zero, alike for all tokens, or weights of zero."""
    if any(parameter.dim() > 1 and _is_zero(parameter) for parameter in module.parameters()):
        return True
    return is_zero(output) or (
        output.dim() > 2 and output.shape[1] > 1 and torch.equal(output, output[:, :1].expand_as(output))
    )


def is_zero(output: Tensor) -> bool:
    """Whether ``output`` is zero throughout."""
    return not bool(output.any())


@contextmanager
def awakened(module: nn.Module) -> Iterator[int]:
    """Has random numbers in the parameters of ``module`` that are zero throughout; yields how many these are.

    They are the same numbers every time, and the parameters get back what they had, bit by bit.

    Args:
        module: The module; what shares its parameters has them as well.
    """
    asleep = [parameter for parameter in module.parameters() if _is_zero(parameter)]
    before = [parameter.detach().clone() for parameter in asleep]
    generator = torch.Generator().manual_seed(SEED)
    try:
        for parameter in asleep:
            width = parameter[0].numel() if parameter.dim() > 1 else 4
            numbers = torch.randn(parameter.shape, generator=generator) * width**-0.5
            parameter.data.copy_(numbers)
        yield len(asleep)
    finally:
        for parameter, value in zip(asleep, before, strict=True):
            parameter.data.copy_(value)


def _is_zero(parameter: Tensor) -> bool:
    if not parameter.is_floating_point() or not parameter.numel():
        return False
    own = parameter.detach()
    return not bool(own[(0,) * own.dim()].any()) and not bool(own.any())  # most are not, as one number shows
