"""Follows the attention weights from the softmax to the product with values.

softmax → to bfloat16 → dropout → view → bmm(·, v)   →   the way there, and what else is made from the weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from retrofit.passes.attention.arguments import arguments, is_call, shape
from retrofit.passes.attention.axes import RESHAPES, SAME, permutation
from retrofit.passes.attention.operands import CASTS, constant
from retrofit.passes.attention.products import Product, read_product
from retrofit.passes.attention.rule import Reject
from retrofit.passes.attention.scores import FILL, WHERE, Step, results_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Weights:
    """The way from the softmax to the product with values.

    Attributes:
        path: The nodes from the softmax to what the product takes, both included.
        product: The product with values.
        dropout_p: Dropout on the weights.
        leaving: Results of the module that are made from the weights alone; they become None.
    """

    path: tuple[Node, ...]
    product: Product
    dropout_p: float
    leaving: tuple[Node, ...]


def follow_weights(softmax: Node, hiding: Sequence[Step]) -> Weights:
    """Walks from the softmax down to the product with values.

    Raises:
        Reject: If there is none, or the weights have another use inside the module.
    """
    path, dropout_p, current = [softmax], 0.0, softmax
    side: list[Node] = []
    while True:
        users = list(current.users)
        onward = [user for user in users if _leads_to_values(user, current)]
        if not onward:
            raise Reject(*_dead_end(current))
        if len(onward) > 1:
            raise Reject(current, f"the attention weights are used elsewhere, by {onward[1].name}")
        side += [user for user in users if user is not onward[0] and user.op != "output"]
        (user,) = onward
        product = read_product(user)
        if product is not None and product.side(current) is not None:
            break
        if dropped := _dropped(user):
            if dropout_p:
                raise Reject(user, "the weights are dropped out twice")
            dropout_p = dropped
        elif is_call(user, *FILL, *WHERE) and not _same_mask(user, hiding):
            raise Reject(user, "the weights are masked after the softmax, other than the scores were")
        path.append(user)
        current = user
    results = results_of(side)
    after = results_of([product.node])
    both = [node for node in results if node in after]
    if both or any(node.op == "output" for node in path):
        raise Reject(softmax, f"the attention weights are used elsewhere, by {side[0].name}")
    output = next(node for node in softmax.graph.nodes if node.op == "output")
    returned = set(_flat(output))
    leaving = [node for node in (*path, *results) if node in returned]
    return Weights(tuple(path), product, dropout_p, tuple(leaving))


def _dropped(node: Node) -> float:
    """The probability with which ``node`` drops weights; a child's is known where it was captured in training."""
    if is_call(node, aten.dropout.default):
        given = arguments(node)
        return float(given["p"]) if given["train"] else 0.0
    return float(node.meta.get("dropout_p", 0.0)) if node.op == "call_module" else 0.0


def _passes(node: Node) -> bool:
    """Whether the values of weights go through ``node`` unchanged."""
    if node.op == "call_module":
        return issubclass(node.meta.get("module_class", object), nn.Dropout)
    return (
        is_call(node, *CASTS, *SAME, *RESHAPES, aten.dropout.default, aten.nan_to_num.default)
        or is_call(node, *FILL, *WHERE)
        or permutation(node) is not None
        or drops_last(node)
    )


def drops_last(node: Node) -> bool:
    """Whether ``node`` leaves out the last column, which has been a sink's."""
    if not is_call(node, aten.slice.Tensor):
        return False
    given, rank = arguments(node), len(shape(node) or ())
    return (
        given["dim"] % rank == rank - 1
        and given["start"] in (0, None)
        and given["end"] == -1
        and given["step"] == 1
    )


def _leads_to_values(node: Node, source: Node) -> bool:
    product = read_product(node)
    if product is not None:
        return product.side(source) is not None
    return _passes(node) and any(_leads_to_values(user, node) for user in node.users)


def _dead_end(current: Node) -> tuple[Node, str]:
    while True:
        onward = [user for user in current.users if user.op != "output"]
        if not onward:
            return current, "a softmax whose result is not multiplied with values"
        if not _passes(onward[0]):
            user = onward[0]
            what = user.target if user.op != "call_module" else f"module {user.target}"
            return user, f"a softmax whose result goes into {what}, not into a product with values"
        current = onward[0]


def _flat(output: Node) -> list[Any]:
    (values,) = output.args
    assert isinstance(values, (tuple, list))
    return list(values)


def _same_mask(node: Node, hiding: Sequence[Step]) -> bool:
    """Whether ``node`` sets to 0 what the scores' mask hides anyway."""
    if constant(node.args[2]) != 0.0:
        return False
    place = 1 if is_call(node, *FILL) else 0
    return any(
        is_call(step.node, *FILL) == is_call(node, *FILL)
        and constant(step.node.args[2]) is not None
        and same_computation(node.args[place], step.node.args[place])
        for step in hiding
        if step.role == "mask" and is_call(step.node, *FILL, *WHERE)
    )


def same_computation(a: Any, b: Any) -> bool:
    """Whether two arguments are computed in the same way from the same."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_computation(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and a == b
    if a is b:
        return True
    if a.op == b.op == "get_attr" and "constant" in a.meta and "constant" in b.meta:
        return bool(a.meta["constant"] == b.meta["constant"])
    if isinstance(a.meta.get("val"), torch.SymInt) and isinstance(b.meta.get("val"), torch.SymInt):
        return str(a.meta["val"]) == str(b.meta["val"])
    same = a.op == b.op == "call_function" and a.target == b.target and a.kwargs == b.kwargs
    return same and same_computation(a.args, b.args)
