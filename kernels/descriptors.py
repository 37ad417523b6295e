"""Tensors as the copies of Hopper's kernels read them, block by block."""

from __future__ import annotations

from functools import cache

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ALIGNED = 16
"""Bytes that addresses are multiples of where blocks can be copied."""
STEP = 32
"""Bytes that strides are multiples of: 16 for copies, and 16 elements for Triton to read them as Gluon is told to."""


def can_describe(*tensors: Tensor) -> bool:
    """Whether blocks of tensors [B, H, N, D], whose last dims lie in rows, can be copied."""
    steps = [step * x.element_size() for x in tensors for step in x.stride()[:3]]
    aligned = not any(x.data_ptr() % ALIGNED for x in tensors)
    return aligned and min(steps) > 0 and not any(step % STEP for step in steps)


def described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """``TensorDescriptor(x, …)`` without its checks, which take longer than a launch: ``can_describe`` has made them."""
    found = object.__new__(TensorDescriptor)
    found.base, found.shape, found.strides = x, list(x.shape), list(x.stride())
    found.block_shape, found.layout = block, _swizzled()
    return found


@cache
def _swizzled() -> NVMMASharedLayout:
    """How a block lies in shared memory."""
    return NVMMASharedLayout(128, 16, 4)
