"""Launches of Triton kernels that cost the host little.

At every launch Triton derives anew what to compile for: from each argument, each constant and its own settings. That
takes several times as long as the launch itself. A ``Kernel`` remembers what was compiled for arguments like these, and
hands over addresses, about which the driver has no questions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
INT32 = 2**31
"""Integers from here on are 64 bits wide."""


@dataclass(frozen=True)
class Launched:
    """A launch that has been made.

    Attributes:
        run: Does it again for a stream and all arguments, addresses in the place of tensors; None in the interpreter.
        arguments: What the kernel was given, in the order of its parameters.
        others: Its constants.
        plain: Whether there is no more to it than its grid and what it is given: no clusters, no grid that is resident as
            a whole, no launch before the last kernel has ended, and no memory from Triton's allocators.
    """

    run: Callable[[Any, list[Any]], None] | None
    arguments: tuple[Any, ...]
    others: tuple[Any, ...]
    plain: bool


class _Thread(threading.local):
    """Who is told of a thread's launches, and on which devices it has a context."""

    def __init__(self) -> None:
        self.listener: Callable[[Launched], None] | None = None
        self.devices: set[int] = set()


_thread = _Thread()


@contextmanager
def listening(listener: Callable[[Launched], None]) -> Iterator[None]:
    """Has a listener told of every launch of this thread."""
    before, _thread.listener = _thread.listener, listener
    try:
        yield
    finally:
        _thread.listener = before


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
        device, needed = current_device(), next(map(_device_of, arguments), None)
        if device is not None and needed is not None and needed != device:
            with torch.cuda.device(needed):
                self._launch(grid, arguments, constants)
            return
        kinds, values = _described(arguments)
        key = device, tuple(constants.items()), kinds
        found = self._compiled.get(key)
        grid = (*grid, 1, 1)[:3]
        if found is not None:
            compiled, others = found
            if has_hooks():
                compiled[grid](*arguments, *others)
            else:
                _run(compiled, grid, driver.active.get_current_stream(device), [*values, *others])
        else:
            compiled, others = self.function[grid](*arguments, **constants), ()
            if compiled is not None:  # the interpreter compiles nothing
                names = self.function.arg_names[len(arguments) :]
                others = tuple([constants[name] for name in names])
                self._compiled[key] = compiled, others
        if _thread.listener is not None:
            run = None if compiled is None else partial(_run, compiled, grid)
            _thread.listener(Launched(run, arguments, others, compiled is not None and _is_plain(compiled)))


def _run(compiled: Any, grid: tuple[int, ...], stream: Any, values: list[Any]) -> None:
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def _is_plain(compiled: Any) -> bool:
    about = compiled.metadata
    more = (
        about.launch_cooperative_grid,
        about.launch_pdl,
        about.global_scratch_size,
        about.profile_scratch_size,
    )
    return about.num_ctas == 1 and not any(more)


def current_stream() -> Any:
    """PyTorch's stream, as launches take it."""
    return driver.active.get_current_stream(current_device())


def _device_of(x: Any) -> int | None:
    """Number of the device of a tensor, or of one that is described; None for what has none."""
    x = x.base if isinstance(x, TensorDescriptor) else x
    return x.get_device() if isinstance(x, Tensor) else None


def current_device() -> int | None:
    """The current device, which has a context in this thread from then on; None as long as none is in use.

    A thread has none before it asks CUDA's runtime for something, and tensors are described by a function of the driver,
    which wants one. The first thing that autograd's thread does may be a launch.
    """
    if not torch.cuda.is_initialized():
        return None
    device = torch.cuda.current_device()
    if device not in _thread.devices:
        torch.cuda.Event().record()  # may be captured in a graph, other than most that the runtime can be asked for
        _thread.devices.add(device)
    return device


def kernel(**options: Any) -> Callable[[Any], Kernel]:
    """Makes a function a ``Kernel``; options are those of ``triton.jit``."""

    def decorate(function: Any) -> Kernel:
        return Kernel(triton.jit(**options)(function) if options else triton.jit(function))

    return decorate


def has_hooks() -> bool:
    """Whether a profiler wants to know of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _described(arguments: tuple[Any, ...]) -> tuple[Hashable, list[Any]]:
    """What a kernel is compiled for, and the arguments with addresses in place of tensors.

    It is compiled for a tensor's dtype and whether it is aligned, for the dtype and the blocks of a descriptor, whether an
    integer is 1, a multiple of 16, and of how many bits. Where a tensor is counts too, so that Triton itself refuses those
    of another device.
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
