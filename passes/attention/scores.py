"""Follows the scores from the product of queries and keys to the softmax, and the weights on to the values.

baddbmm → view → ·scale → +mask → masked_fill → float32 → softmax → dropout → view → bmm
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from retrofit.passes.attention.arguments import SIZE_ONLY, arguments, is_call
from retrofit.passes.attention.axes import RESHAPES, SAME, permutation
from retrofit.passes.attention.operands import CASTS, constant, constant_factor
from retrofit.passes.attention.products import PRODUCTS, Product, read_product
from retrofit.passes.attention.rule import Reject

aten = torch.ops.aten
HIDDEN = -1e4  # a score of at most this is hidden
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_SCALING = (aten.mul.Tensor, aten.div.Tensor)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_FLOOR = (aten.clamp.default, aten.clamp_min.default, aten.maximum.default, aten.max.other)
_NAMED = {
    aten.tanh.default: "a logit softcap (tanh)",
    aten.cat.default: "learned extra logits (attention sinks)",
    aten.sigmoid.default: "a sigmoid of the scores",
    aten.relu.default: "a relu of the scores",
    aten.topk.default: "a selection of the largest scores",
    aten.scatter.src: "scattered scores",
    aten.scatter.value: "scattered scores",
    aten.convolution.default: "a convolution over the scores",
    aten.conv2d.default: "a convolution over the scores (talking heads)",
    aten.linear.default: "a linear layer over the scores (talking heads)",
}


class Named(Reject):
    """The rejection of a feature that has a name, which says more than where the pattern ended."""


@dataclass(frozen=True)
class Step:
    """One node between the product and the softmax.

    Attributes:
        node: The node.
        source: Which of its arguments the scores are.
        role: ``layout``, ``scale``, ``row`` (a factor that is a tensor), ``mask``, ``same``, or ``neutral``
            for what changes no softmax.
    """

    node: Node
    source: Node
    role: str


def depends_on(node: Any, other: Node) -> bool:
    """Whether the values of ``node``, not only its shape, are computed from those of ``other``."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current is other:
            return True
        if isinstance(current, Node) and current not in seen and current.target not in SIZE_ONLY:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False


def follow_scores(softmax: Node) -> tuple[Product, list[Step]]:
    """Walks from the softmax up; returns the product and the steps after it, in their order.

    Raises:
        Reject: If something on the way is no part of standard attention.
    """
    steps: list[Step] = []
    current: Any = softmax.args[0]
    while True:
        product = read_product(current)
        if product is not None:
            for step in steps:
                others = [item for item in step.node.all_input_nodes if item is not step.source]
                if step.role in ("mask", "row") and any(depends_on(item, product.node) for item in others):
                    what = "mask" if step.role == "mask" else "factor on the scores"
                    raise Reject(step.node, f"the {what} depends on the scores")
            _only_for(softmax, product, steps)
            return product, steps[::-1]
        if is_call(current, *PRODUCTS):
            raise Reject(current, "the scores are an einsum that is no plain product of two")
        step = _step(softmax, current)
        steps.append(step)
        current = step.source


def _only_for(softmax: Node, product: Product, steps: Sequence[Step]) -> None:
    """Checks that nothing the module returns is made from the scores but by way of the softmax."""
    path = {product.node, softmax, *(step.node for step in steps)}
    for node in path - {softmax}:
        for user in node.users:
            if (
                user in path
                or user.target in SIZE_ONLY
                or all(_is_neutral(item, steps) for item in user.users)
            ):
                continue
            if is_call(user, aten.type_as.default) and user.args[0] is not node:
                continue  # only for its dtype
            if user.op == "output" or _results([user]):
                raise Named(user, f"the scores are used elsewhere, by {user.name}")


def _is_neutral(node: Node, steps: Sequence[Step]) -> bool:
    return any(step.node is node and step.role == "neutral" for step in steps)


def _step(softmax: Node, node: Any) -> Step:
    if not isinstance(node, Node) or node.op != "call_function":
        name = node.target if isinstance(node, Node) else node
        raise Reject(softmax, f"the scores come from {name}, not from a product of queries and keys")
    first = node.args[0]
    if constant_factor(node) is not None and isinstance(first, Node):
        number = constant_factor(node)
        assert number is not None
        if number <= 0:
            raise Reject(node, f"the scores are multiplied with {number:g}, not with a positive number")
        return Step(node, first, "scale")
    if is_call(node, *CASTS, *SAME) and isinstance(first, Node):
        return Step(node, first, "same")
    if (permutation(node) is not None or is_call(node, *RESHAPES)) and isinstance(first, Node):
        return Step(node, first, "layout")
    if is_call(node, *_SUMS):
        return _sum(node)
    if is_call(node, *_SCALING):
        return _row_factor(softmax, node)
    if is_call(node, *_FILL, *_WHERE):
        return _hiding(node)
    if is_call(node, *_FLOOR):
        bounds = [constant(value) for value in node.args[1:] if value is not None]
        if len(bounds) == 1 and bounds[0] is not None and bounds[0] <= HIDDEN and isinstance(first, Node):
            return Step(node, first, "same")
        raise Reject(node, "the scores are clamped")
    found = _NAMED.get(node.target)  # type: ignore[call-overload]
    if found is not None and any(leads_to_product(item) for item in node.all_input_nodes):
        raise Named(node, f"{found} stands between the product and the softmax")
    raise Reject(softmax, f"the scores come from {node.target}, not from a product of queries and keys")


def _sum(node: Node) -> Step:
    left, right = node.args[0], node.args[1]
    if not isinstance(left, Node) or not isinstance(right, Node):
        if isinstance(left, Node):
            return Step(node, left, "neutral")  # a constant changes no softmax
        raise Reject(node, "a constant is added to the scores")
    if is_call(node, aten.sub.Tensor):
        if _is_maximum(right):
            return Step(node, left, "neutral")
        return Step(node, left, "mask")
    swapped = leads_to_product(right) and not leads_to_product(left)
    if swapped and node.kwargs.get("alpha", 1) != 1:
        raise Reject(node, "the scores are added with a factor")
    return Step(node, right if swapped else left, "mask")


def _is_maximum(node: Node) -> bool:
    """Whether ``node`` is a maximum, which is subtracted before a softmax for the sake of its range."""
    if is_call(node, operator.getitem) and isinstance(node.args[0], Node):
        node = node.args[0]
    return is_call(node, aten.amax.default, aten.max.dim)


def _row_factor(softmax: Node, node: Node) -> Step:
    left, right = node.args[0], node.args[1]
    if not isinstance(left, Node) or not isinstance(right, Node):
        raise Reject(node, "the scores are divided by or multiplied with something unknown")
    swapped = leads_to_product(right) and not leads_to_product(left)
    if swapped and is_call(node, aten.div.Tensor):
        raise Reject(node, "something is divided by the scores")
    if not leads_to_product(right) and not leads_to_product(left):
        raise Reject(softmax, f"the scores come from {node.target}, not from a product of queries and keys")
    return Step(node, right if swapped else left, "row")


def _hiding(node: Node) -> Step:
    if is_call(node, *_FILL):
        scores, value = node.args[0], node.args[2]
    else:
        scores, value = node.args[1], node.args[2]
        if constant(scores) is not None or (leads_to_product(value) and not leads_to_product(scores)):
            scores, value = value, scores
    number = constant(value)
    if number is None or number > HIDDEN:
        raise Reject(node, f"masked scores are set to {value}, not to at most {HIDDEN:g}")
    if not isinstance(scores, Node):
        raise Reject(node, "a constant is masked")
    return Step(node, scores, "mask")


def leads_to_product(node: Any) -> bool:
    """Whether ``node`` is a product of two tensors after nothing but steps of scores."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if not isinstance(current, Node) or current in seen:
            continue
        seen.add(current)
        if is_call(current, *PRODUCTS):
            return True
        if is_call(current, *_SUMS, *_SCALING, *_WHERE):
            pending.extend(current.args)
        elif is_call(current, *CASTS, *SAME, *RESHAPES, *_FILL, *_FLOOR) or permutation(current) is not None:
            pending.append(current.args[0])
    return False


# From the softmax to the values.


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
        if is_call(user, aten.dropout.default):
            given = arguments(user)
            dropout_p = float(given["p"]) if given["train"] else 0.0
        elif is_call(user, *_FILL, *_WHERE) and not _same_mask(user, hiding):
            raise Reject(user, "the weights are masked after the softmax, other than the scores were")
        path.append(user)
        current = user
    results = _results(side)
    after = _results([product.node])
    both = [node for node in results if node in after]
    if both or any(node.op == "output" for node in path):
        raise Reject(softmax, f"the attention weights are used elsewhere, by {side[0].name}")
    output = next(node for node in softmax.graph.nodes if node.op == "output")
    returned = set(_flat(output))
    leaving = [node for node in (*path, *results) if node in returned]
    return Weights(tuple(path), product, dropout_p, tuple(leaving))


def _passes(node: Node) -> bool:
    """Whether the values of weights go through ``node`` unchanged."""
    if node.op == "call_module":
        return issubclass(node.meta.get("module_class", object), nn.Dropout)
    return (
        is_call(node, *CASTS, *SAME, *RESHAPES, aten.dropout.default, aten.nan_to_num.default)
        or is_call(node, *_FILL, *_WHERE)
        or permutation(node) is not None
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


def _results(nodes: Sequence[Node]) -> list[Node]:
    """The results of the module that depend on ``nodes``."""
    pending, seen, found = list(nodes), set(), []
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if any(user.op == "output" for user in node.users):
            found.append(node)
        pending.extend(user for user in node.users if user.op != "output")
    return found


def _flat(output: Node) -> list[Any]:
    (values,) = output.args
    assert isinstance(values, (tuple, list))
    return list(values)


def _same_mask(node: Node, hiding: Sequence[Step]) -> bool:
    """Whether ``node`` sets to 0 what the scores' mask hides anyway."""
    if constant(node.args[2]) != 0.0:
        return False
    place = 1 if is_call(node, *_FILL) else 0
    return any(
        is_call(step.node, *_FILL) == is_call(node, *_FILL)
        and constant(step.node.args[2]) is not None
        and _equal(node.args[place], step.node.args[place])
        for step in hiding
        if step.role == "mask" and is_call(step.node, *_FILL, *_WHERE)
    )


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are computed in the same way from the same."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and a == b
    if a is b:
        return True
    if isinstance(a.meta.get("val"), torch.SymInt) and isinstance(b.meta.get("val"), torch.SymInt):
        return str(a.meta["val"]) == str(b.meta["val"])
    same = a.op == b.op == "call_function" and a.target == b.target and a.kwargs == b.kwargs
    return same and _equal(a.args, b.args)
