"""Launches of Triton kernels that cost the host little.

At every launch Triton derives anew what to compile for: from each argument, each constant and its own settings. That
takes several times as long as the launch itself. A ``Kernel`` remembers what was compiled for arguments like these, and
hands over addresses, about which the driver has no questions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

INT32 = 2**31
"""Integers from here on are 64 bits wide."""


class Kernel:
    """A Triton function that is launched as ``kernel[grid](*arguments, **constants)``.

    Arguments stand in the order of the function's parameters, and all before its constants.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self._launch(grid, arguments, constants)

        return launch

    def _launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        kinds, values = _described(arguments)
        key = device, tuple(constants.values()), kinds
        found = self._compiled.get(key)
        if found is not None:
            compiled, others = found
            grid = (*grid, 1, 1)[:3]
            if _has_hooks():
                compiled[grid](*arguments, *others)
                return
            stream = driver.active.get_current_stream(device)
            compiled.run(
                *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *others
            )
            return
        compiled = self.function[grid](*arguments, **constants)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.function.arg_names[len(arguments) :]
            self._compiled[key] = compiled, tuple([constants[name] for name in names])


def kernel(**options: Any) -> Callable[[Any], Kernel]:
    """Makes a function a ``Kernel``; options are those of ``triton.jit``."""

    def decorate(function: Any) -> Kernel:
        return Kernel(triton.jit(**options)(function) if options else triton.jit(function))

    return decorate


def _has_hooks() -> bool:
    """Whether a profiler wants to know of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _described(arguments: tuple[Any, ...]) -> tuple[Hashable, list[Any]]:
    """What a kernel is compiled for, and the arguments with addresses in place of tensors.

    It is compiled for a tensor's dtype and whether it is aligned, for the dtype and the blocks of a descriptor, whether an
    integer is 1, a multiple of 16, and of how many bits. Where a tensor is counts too, so that Triton itself refuses those of another device.
    """
    kinds: list[Hashable] = []
    values: list[Any] = []
    for x in arguments:  # hundreds of times in a call
        kind = type(x)
        if kind is int:
            kinds.append(1 if x == 1 else 2 + (x & 15 == 0) + (0 if -INT32 <= x < INT32 else 2))
            values.append(x)
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            kinds.append(x.dtype)
            kinds.append(2 * x.get_device() + (address & 15 == 0))
            values.append(address)
        else:
            own: Any = _described(x)[0] if kind is tuple else kind
            kinds.append(own)
            if kind is TensorDescriptor:
                kinds.append((x.base.dtype, *x.block_shape))
            values.append(x)
    return tuple(kinds), values
