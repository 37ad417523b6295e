"""Reads the arguments of an ATen node by the names of its schema, however they were passed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


def arguments(node: Node) -> dict[str, Any]:
    """Returns every argument of ``node`` by name, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    values: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values


def shape(node: Any) -> tuple[Any, ...] | None:
    """Returns the shape of the tensor ``node`` stands for, with symbols; None if it is not known."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def is_call(node: Any, *targets: object) -> bool:
    """Whether ``node`` calls one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


aten = torch.ops.aten
SIZE_ONLY = (
    aten.sym_size.int,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
)
"""What takes nothing but the size of its tensor arguments."""
