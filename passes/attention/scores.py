"""Follows the scores from the product of queries and keys to the softmax.

baddbmm → view → ·scale → tanh → +mask → masked_fill → float32 → softmax   →   the product, and the steps after it
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from retrofit.passes.attention.arguments import SIZE_ONLY, arguments, is_call, shape
from retrofit.passes.attention.axes import RESHAPES, SAME, permutation
from retrofit.passes.attention.operands import CASTS, constant, constant_factor
from retrofit.passes.attention.products import PRODUCTS, Product, read_product
from retrofit.passes.attention.rule import Reject

aten = torch.ops.aten
HIDDEN = -1e4  # a score of at most this is hidden
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
_SCALING = (aten.mul.Tensor, aten.div.Tensor)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_FLOOR = (aten.clamp.default, aten.clamp_min.default, aten.maximum.default, aten.max.other)
_ASSIGNMENT = aten.index_put.default
PASSED = (*CASTS, *SAME, *RESHAPES, *FILL, _ASSIGNMENT, *_FLOOR, aten.tanh.default)
_NAMED = {
    aten.tanh.default: "a tanh of the scores",
    aten.cat.default: "learned extra logits (attention sinks)",
    aten.sigmoid.default: "a sigmoid of the scores",
    aten.relu.default: "a relu of the scores",
    aten.randn_like.default: "random numbers",
    aten.rand_like.default: "random numbers",
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
        role: ``layout``, ``scale``, ``row`` (a factor that is a tensor), ``mask``, ``same``, ``cap`` (tanh), ``sink``
            (one more logit for each head), or ``neutral`` for what changes no softmax.
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


def _way(node: Node, scores: Node) -> str:
    """What feature makes ``node`` depend on ``scores``; empty if it has no name."""
    pending, seen = [node], {scores}
    while pending:
        current = pending.pop()
        if current in seen or not depends_on(current, scores):
            continue
        if current.op == "call_module":
            return f"its child {current.target} ({current.meta['module_class'].__name__})"
        if current.target in _NAMED:
            return _NAMED[current.target]
        seen.add(current)
        pending.extend(current.all_input_nodes)
    return ""


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
                dependent = next((item for item in others if depends_on(item, product.node)), None)
                if step.role in ("mask", "row") and dependent is not None:
                    what = "mask" if step.role == "mask" else "factor on the scores"
                    way = _way(dependent, product.node)
                    raise Reject(step.node, f"the {what} depends on the scores{way and f', through {way}'}")
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
            if user in path or user.target in SIZE_ONLY or _is_for_neutral(user, steps):
                continue
            if _for_its_dtype(user, node):
                continue
            if user.op == "output" or results_of([user]):
                raise Named(user, f"the scores are used elsewhere, by {user.name}")


def _is_for_neutral(node: Node, steps: Sequence[Step]) -> bool:
    """Whether ``node`` serves nothing but steps that change no softmax, as a maximum that is subtracted does."""
    return all(
        _is_neutral(user, steps) or (is_call(user, operator.getitem) and _is_for_neutral(user, steps))
        for user in node.users
    )


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
    if is_call(node, *SUMS):
        return _sum(node)
    if is_call(node, *_SCALING):
        return _row_factor(softmax, node)
    if is_call(node, *FILL, *WHERE) or assigns(node):
        return _hiding(node)
    if is_call(node, *_FLOOR):
        bounds = [constant(value) for value in node.args[1:] if value is not None]
        if len(bounds) == 1 and bounds[0] is not None and bounds[0] <= HIDDEN and isinstance(first, Node):
            return Step(node, first, "same")
        raise Reject(node, "the scores are clamped")
    if is_call(node, aten.tanh.default) and isinstance(first, Node) and leads_to_product(first):
        return Step(node, first, "cap")
    if _adds_a_column(node):
        return Step(node, node.args[0][0], "sink")  # type: ignore[index,arg-type]
    if is_call(node, aten.cat.default):
        products = sum(map(leads_to_product, node.args[0]))  # type: ignore[arg-type]
        if products > 1:
            raise Named(node, f"the scores of {products} products of queries and keys stand side by side")
    found = _NAMED.get(node.target)  # type: ignore[call-overload]
    if found is not None and any(leads_to_product(item) for item in node.all_input_nodes):
        raise Named(node, f"{found} stands between the product and the softmax")
    raise Reject(softmax, f"the scores come from {node.target}, not from a product of queries and keys")


def _adds_a_column(node: Node) -> bool:
    """Whether ``node`` has one more logit behind the scores than there are keys."""
    if not is_call(node, aten.cat.default):
        return False
    parts, rank = node.args[0], len(shape(node) or ())
    dim = arguments(node)["dim"]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim % rank != rank - 1:
        return False
    column = shape(parts[1])
    return column is not None and column[-1] == 1 and leads_to_product(parts[0])


def _sum(node: Node) -> Step:
    left, right = node.args[0], node.args[1]
    if not isinstance(left, Node) or not isinstance(right, Node) or shape(right) is None:
        if isinstance(left, Node):
            return Step(node, left, "neutral")  # a constant changes no softmax
        raise Reject(node, "a constant is added to the scores")
    if is_call(node, aten.sub.Tensor):
        if is_maximum(right):
            return Step(node, left, "neutral")
        return Step(node, left, "mask")
    swapped = leads_to_product(right) and not leads_to_product(left)
    if swapped and node.kwargs.get("alpha", 1) != 1:
        raise Reject(node, "the scores are added with a factor")
    return Step(node, right if swapped else left, "mask")


def is_maximum(node: Node) -> bool:
    """Whether ``node`` is a maximum, which is subtracted before a softmax for the sake of its range."""
    if is_call(node, operator.getitem) and isinstance(node.args[0], Node):
        node = node.args[0]
    return is_call(node, aten.amax.default, aten.max.dim)


def _row_factor(softmax: Node, node: Node) -> Step:
    left, right = node.args[0], node.args[1]
    if not isinstance(left, Node) or not isinstance(right, Node):
        raise Reject(node, "the scores are divided by or multiplied with something unknown")
    if shape(right) is None:
        what = "divided by" if is_call(node, aten.div.Tensor) else "multiplied with"
        raise Named(node, f"the scores are {what} a number that depends on the sizes of the inputs")
    swapped = leads_to_product(right) and not leads_to_product(left)
    if swapped and is_call(node, aten.div.Tensor):
        raise Reject(node, "something is divided by the scores")
    if not leads_to_product(right) and not leads_to_product(left):
        raise Reject(softmax, f"the scores come from {node.target}, not from a product of queries and keys")
    return Step(node, right if swapped else left, "row")


def _hiding(node: Node) -> Step:
    if is_call(node, *FILL, _ASSIGNMENT):
        scores, value = node.args[0], node.args[2]
    else:
        scores, value = node.args[1], node.args[2]
        if constant(scores) is not None or (leads_to_product(value) and not leads_to_product(scores)):
            scores, value = value, scores
    number = fill_of(value)
    if number is None or number > HIDDEN:
        raise Reject(node, f"masked scores are set to {value}, not to at most {HIDDEN:g}")
    if not isinstance(scores, Node):
        raise Reject(node, "a constant is masked")
    return Step(node, scores, "mask")


def fill_of(value: Any) -> float | None:
    """The number that scores are set to by ``value``: a constant, or a buffer that holds one; None if it is neither."""
    held = value.meta.get("held") if isinstance(value, Node) else None
    return constant(value) if held is None else float(held)


def assigns(node: Node) -> bool:
    """Whether ``node`` sets what a mask selects to something: ``scores[..., mask] = value``."""
    if not is_call(node, _ASSIGNMENT):
        return False
    given = arguments(node)
    indices = [index for index in given["indices"] if index is not None]
    return not given["accumulate"] and len(indices) == 1 and indices[0].meta["val"].dtype == torch.bool


def leads_to_product(node: Any) -> bool:
    """Whether ``node`` is a product of two tensors after nothing but steps of scores."""
    return next(products_before(node), None) is not None


def products_before(node: Any) -> Iterator[Node]:
    """The products of two tensors that lead to ``node`` by nothing but steps of scores."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if not isinstance(current, Node) or current in seen:
            continue
        seen.add(current)
        if is_call(current, *PRODUCTS):
            yield current
        elif is_call(current, *SUMS, *_SCALING, *WHERE):
            pending.extend(current.args)
        elif is_call(current, aten.cat.default):
            pending.extend(current.args[0])  # type: ignore[arg-type]
        elif is_call(current, *PASSED) or permutation(current) is not None:
            pending.append(current.args[0])


def results_of(nodes: Sequence[Node]) -> list[Node]:
    """The results of the module that depend on ``nodes``."""
    pending, seen, found = list(nodes), set(), []
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if any(user.op == "output" for user in node.users):
            found.append(node)
        pending.extend(
            user
            for user in node.users
            if user.op != "output" and user.target not in SIZE_ONLY and not _for_its_dtype(user, node)
        )
    return found


def _for_its_dtype(user: Node, node: Node) -> bool:
    return is_call(user, aten.type_as.default) and user.args[0] is not node
