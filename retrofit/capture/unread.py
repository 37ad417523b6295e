"""Which parameters a function never reads: what is passed for them cannot change what it does."""

from __future__ import annotations

import dis
import inspect
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn


def unread_parameters(module: nn.Module) -> frozenset[str]:
    """The named parameters of ``module.forward`` that its code never reads.

    Where that cannot be told, because forward is wrapped or looks at its own variables, there are none.
    """
    forward = type(module).forward
    if "forward" in vars(module) or not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return frozenset()
    return _unread(forward)


@cache
def _unread(function: FunctionType) -> frozenset[str]:
    code = function.__code__
    if {"locals", "vars", "eval", "exec", "sys", "inspect"} & set(code.co_names):
        return frozenset()
    # What an inner function reads is held in a cell.
    read: set[Any] = set(code.co_cellvars)
    for instruction in dis.get_instructions(code):
        if "LOAD" in instruction.opname:
            names = instruction.argval
            read |= set(names) if isinstance(names, tuple) else {names}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind in kinds) - read
