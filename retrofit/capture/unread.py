"""Which parameters cannot change what a module does, because its code never reads them or makes nothing of them."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Mapping
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


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


def takes_any_positions(module: nn.Module, values: Mapping[str, Any]) -> bool:
    """Whether a call gives the same, to the bit, for any ``position_ids`` as without.

    Attention that hands them on to a kernel that reads them only where sequences are packed is an example.

    Args:
        module: The module.
        values: The arguments of a call of it that leaves them out, by name and without a cache.
    """
    states = next(
        (value for value in values.values() if isinstance(value, Tensor) and value.dim() == 3), None
    )
    if states is None or values.get("position_ids", states) is not None:
        return False
    rows, tokens = states.shape[:2]
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(tokens, (rows, tokens), generator=generator).to(states.device)
    try:
        with torch.no_grad():
            plain, given = (
                pytree.tree_leaves(module(**{**values, "position_ids": ids})) for ids in (None, positions)
            )
    except Exception:  # whatever it is that it makes of them, it is not nothing
        return False
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in zip(plain, given, strict=True)
    )
