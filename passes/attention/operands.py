"""Takes off an operand what only changes its layout, scales it, or repeats it.

reshape(expand(unsqueeze(k, 2), group)).transpose(2, 3) · 0.125   →   k, its axes, and the factor 0.125
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from retrofit.passes.attention.arguments import arguments, is_call, shape
from retrofit.passes.attention.axes import SAME, Axis, Mixed, backward, leaves, reshaped, size_of, sizes

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout, aten.to.device)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Operand:
    """A tensor that takes part in attention, what its dimensions stand for, and a factor on it."""

    node: Node
    axes: tuple[Axis, ...]
    factor: float = 1.0

    @property
    def atoms(self) -> tuple[Any, ...]:
        """All its atoms, in order."""
        return tuple(atom for axis in self.axes for atom in leaves(axis))


def peeled(operand: Operand, *, factors: bool, repeats: bool) -> Operand:
    """``operand`` without changes of layout that can be done again later.

    Args:
        operand: What a product takes.
        factors: Whether constant factors are taken off.
        repeats: Whether repetition along a fixed dimension is taken off.
    """
    while True:
        node, axes = operand.node, operand.axes
        number = constant_factor(node) if factors else None
        source = node.args[0] if node.args else None
        if number is not None and isinstance(source, Node):
            operand = replace(operand, node=source, factor=operand.factor * number)
            continue
        try:
            before = _unrepeated(node, axes) if repeats else None
            before = before or _before(node, axes)
        except Mixed:
            return operand
        if before is None:
            return operand
        assert isinstance(source, Node)
        operand = replace(operand, node=source, axes=tuple(before))


def constant_factor(node: Any) -> float | None:
    """The constant ``node`` multiplies its first argument with; None if it is no such node."""
    if is_call(node, *_PRODUCTS):
        return constant(node.args[1])
    if is_call(node, *_QUOTIENTS):
        number = constant(node.args[1])
        return None if number is None or number == 0 else 1.0 / number
    return None


def constant(value: Any) -> float | None:
    """The number ``value`` stands for: a literal, or a tensor made of one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if is_call(value, aten.full.default, aten.scalar_tensor.default, aten.full_like.default):
        number = value.args[0] if value.target is aten.scalar_tensor.default else value.args[1]
        return float(number) if isinstance(number, (int, float)) else None
    if is_call(value, *CASTS, *SAME):
        return constant(value.args[0])
    if is_call(value, aten.sqrt.default):
        number = constant(value.args[0])
        return None if number is None else number**0.5
    if is_call(value, aten.pow.Tensor_Scalar) and isinstance(value.args[1], (int, float)):
        number = constant(value.args[0])
        return None if number is None else number ** value.args[1]
    if isinstance(value, Node) and "constant" in value.meta:
        return float(value.meta["constant"])
    return None


def whole_slice(node: Any) -> bool:
    """Whether ``node`` is a slice that takes all of its dimension."""
    if not is_call(node, aten.slice.Tensor):
        return False
    given = arguments(node)
    return given["start"] in (0, None) and given["end"] in (None, sys.maxsize) and given["step"] == 1


def _before(node: Node, axes: Sequence[Axis]) -> list[Axis] | None:
    """Axes of the input, if ``node`` changes the layout in a way worth undoing."""
    if whole_slice(node):
        return list(axes)
    found = shape(node)
    if found is None or not node.args or not isinstance(node.args[0], Node):
        return None
    grown = len(found) - len(shape(node.args[0]) or ())
    if grown > 0 and not is_call(node, aten.unsqueeze.default):
        return None
    if grown == 0 and is_call(node, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return list(axes) if sizes(node) == sizes(node.args[0]) else None
    return backward(node, axes)


def _unrepeated(node: Node, axes: Sequence[Axis]) -> list[Axis] | None:
    """Axes of the input, if ``node`` repeats it along a dimension of fixed size."""
    if is_call(node, aten.expand.default):
        before, after = sizes(node.args[0]), sizes(node)
        if len(before) != len(after):
            return None
        new = [dim for dim, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        if any(not after[dim].is_number for dim in new):
            return None
        return [() if dim in new else axis for dim, axis in enumerate(axes)]
    if is_call(node, aten.repeat_interleave.self_int):
        given = arguments(node)
        source = sizes(node.args[0])
        if given["dim"] is None or not isinstance(given["repeats"], int):
            return None
        dim = given["dim"] % len(source)
        own, _ = reshaped([axes[dim]], [source[dim], size_of(given["repeats"])])
        return [own if place == dim else axis for place, axis in enumerate(axes)]
    return None
