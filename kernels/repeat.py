"""Functions that do on a GPU what they have done before, and what there is to do it with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

PYTHON: dict[Any, Callable[..., Any]] = {}
"""Operators of ours that are Python functions, within which notes can be taken."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def repeated(function: Callable[..., Any], tensors: Sequence[Tensor | None], about: Hashable) -> Any:
    """Returns ``function(*tensors)``: tensors and None, in tuples and lists.

    On a GPU, where nobody asks for gradients, ``tape`` does it from the third time on.

    Args:
        function: Allocates, launches kernels and calls operators; reads nothing back and keeps nothing.
        tensors: All tensors that it reads, the first one not None.
        about: What else it goes by.
    """
    first = tensors[0]
    assert first is not None
    if not first.is_cuda or torch.compiler.is_compiling() or not has_triton():
        return function(*tensors)
    from retrofit.kernels import tape  # not at import time: Triton is optional and slow to import

    return tape.repeated(function, tensors, about)


def repeated_call(function: Callable[..., Any], tensors: Sequence[Any], options: dict[str, Any]) -> Any:
    """``function(*tensors, **options)`` of tensors, None, and lists of them, as ``repeated`` does it."""
    listed = [x if isinstance(x, list | tuple) else [x] for x in tensors]
    about = function.__name__, *map(len, listed), *options.values()
    return repeated(lambda *_: function(*tensors, **options), [y for x in listed for y in x], about)
