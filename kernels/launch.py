"""Launches of Triton kernels that cost the host little.

At every launch Triton derives anew what to compile for: from each argument, each constant and its own settings. That
takes several times as long as the launch itself. A ``Kernel`` remembers what was compiled for arguments like these.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from torch import Tensor

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
        key = device, tuple(constants.values()), _kinds(arguments)
        found = self._compiled.get(key)
        if found is not None:
            compiled, others = found
            compiled[(*grid, 1, 1)[:3]](*arguments, *others)
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


def _kinds(arguments: tuple[Any, ...]) -> Hashable:
    """What a kernel is compiled for: of a tensor its dtype and whether it is aligned, of an integer whether it is 1,
    a multiple of 16, and of how many bits."""
    return tuple(
        [
            (1 if x == 1 else 2 + (x & 15 == 0) + 2 * (not -INT32 <= x < INT32))
            if type(x) is int
            else _kind(x)
            for x in arguments
        ]
    )


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype if x.data_ptr() & 15 == 0 else (x.dtype,)
    return _kinds(x) if type(x) is tuple else type(x)
