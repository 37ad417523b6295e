"""Reads every way to multiply two tensors as one form: operands and result with a label for each dimension.

matmul [b, h, t, d] @ [b, h, d, s]     →  (b h t d), (b h d s) → (b h t s)
einsum "bthd,bshd->bhts", bmm, mv, …   →  likewise
baddbmm(m, x, y, beta, alpha)          →  x·y with alpha as factor, beta·m added
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from retrofit.passes.attention.arguments import arguments, is_call, shape

aten = torch.ops.aten
EINSUM = aten.einsum.default
BADDBMM = aten.baddbmm.default
MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default, BADDBMM)
PRODUCTS = (*MATMULS, EINSUM)

Labels = tuple[str | None, ...]


@dataclass(frozen=True)
class Product:
    """A product of two tensors, summed over the labels that the result lacks.

    Attributes:
        operands: The two factors.
        labels: Of each operand's dimensions; None where it is broadcast.
        result: Labels of the result's dimensions.
        factor: On the product.
        added: What is added to it, and the factor on that.
    """

    node: Node
    operands: tuple[Node, Node]
    labels: tuple[Labels, Labels]
    result: tuple[str, ...]
    factor: float = 1.0
    added: tuple[Node, float] | None = None

    def side(self, node: Node) -> int | None:
        """Which operand ``node`` is; None if it is neither or both."""
        sides = [side for side in (0, 1) if self.operands[side] is node]
        return sides[0] if len(sides) == 1 else None


def read_product(node: Any) -> Product | None:
    """The product that ``node`` is; None if it is none."""
    if is_call(node, EINSUM):
        return _einsum(node)
    if not is_call(node, *MATMULS):
        return None
    given = arguments(node)
    factor, added = 1.0, None
    if is_call(node, BADDBMM):
        left, right = given["batch1"], given["batch2"]
        factor, beta = float(given["alpha"]), float(given["beta"])
        added = (given["self"], beta) if beta != 0 else None
    else:
        left, right = list(given.values())[:2]
    left_shape, right_shape = shape(left), shape(right)
    if left_shape is None or right_shape is None or len(left_shape) < 2 or len(right_shape) < 2:
        return None
    rank = max(len(left_shape), len(right_shape))
    batch = [f"b{dim}" for dim in range(rank - 2)]
    left_labels = (*_broadcast(left_shape, right_shape, batch), "m", "c")
    right_labels = (*_broadcast(right_shape, left_shape, batch), "c", "n")
    return Product(node, (left, right), (left_labels, right_labels), (*batch, "m", "n"), factor, added)


def _broadcast(own: tuple[Any, ...], other: tuple[Any, ...], batch: list[str]) -> Labels:
    """Labels of the leading dimensions: None where a size of 1 meets another."""
    labels: list[str | None] = []
    for dim in range(2 - len(own), 0):
        place = dim - 2
        elsewhere = other[place] if -place <= len(other) else 1
        alone = isinstance(own[place], int) and own[place] == 1
        same = isinstance(elsewhere, int) and elsewhere == 1
        labels.append(None if alone and not same else batch[dim])
    return tuple(labels)


def _einsum(node: Node) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    left, right = operands
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    if not arrow:
        counted = sorted(letter for letter in set(given) if letter.isalpha() and given.count(letter) == 1)
        result = ("..." if "..." in given else "") + "".join(counted)
    ranks = [len(shape(operand) or ()) for operand in (left, right)]
    extra = [rank - len(term.replace("...", "")) for rank, term in zip(ranks, terms, strict=True)]
    most = max((count for count, term in zip(extra, terms, strict=True) if "..." in term), default=0)
    ellipsis = [f".{number}" for number in range(most)]
    labels = [
        _letters(term, ellipsis[most - count :] if "..." in term else [])
        for term, count in zip(terms, extra, strict=True)
    ]
    out = _letters(result, ellipsis)
    for own in labels:
        if len(set(own)) != len(own):
            return None  # a diagonal
    shapes = [
        dict(zip(own, shape(op) or (), strict=True)) for own, op in zip(labels, (left, right), strict=True)
    ]
    summed = [label for own in labels for label in own if label not in out]
    if any(label not in labels[0] or label not in labels[1] for label in summed):
        return None  # a sum over one operand alone
    final: list[Labels] = []
    for side in (0, 1):
        other = shapes[1 - side]
        final.append(
            tuple(
                None if shapes[side][label] == 1 and label in other and other[label] != 1 else label
                for label in labels[side]
            )
        )
    return Product(node, (left, right), (final[0], final[1]), tuple(out))


def _letters(term: str, ellipsis: list[str]) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *(ellipsis if dots else []), *after]
