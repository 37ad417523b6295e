"""A softmax that is written out: rewritten to the one that is a call.

e = exp(s − max);  e / e.sum(−1)   |   exp(log_softmax(s))   |   exp(s − logsumexp(s))   →   softmax(s)
e·visible / (e·visible).sum(−1)    →   softmax(s + log(visible))
(e @ v) / e.sum(−1)                →   softmax(s) @ v
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import arguments, is_call, shape
from retrofit.passes.attention.axes import SAME, sizes
from retrofit.passes.attention.layout import Editor
from retrofit.passes.attention.operands import CASTS, constant, constant_factor
from retrofit.passes.attention.rule import Refusal, Reject, Rule, calls
from retrofit.passes.attention.scores import FILL, WHERE, is_maximum, leads_to_product
from retrofit.passes.attention.weights import same_computation

aten = torch.ops.aten
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)
_NEGLIGIBLE = 1e-7  # of a sum of exponentials the largest of which is one


@dataclass(frozen=True)
class SoftmaxMatch:
    """A softmax in parts.

    Attributes:
        scores: What the softmax is of.
        dim: What it is over.
        output: The node whose value is the softmax, or is made from it by ``product``.
        masks: What sets some of the exponentials to 0, in order.
        product: Of the exponentials and values, where these are divided by the sum only then.
        exponentials: What ``product`` takes.
    """

    scores: Node
    dim: int
    output: Node
    masks: tuple[Node, ...] = ()
    product: Node | None = None
    exponentials: Node | None = None


class SpelledSoftmax(Rule[SoftmaxMatch]):
    """Puts a call of softmax in the place of exponentials that are divided by their sum."""

    name = "softmax in parts"

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """The last node of each."""
        ends = (aten.div.Tensor, aten.mul.Tensor, aten.exp.default)
        return (node for node in calls(graph, *ends) if _read(node) is not None)

    def pattern(self, anchor: Node) -> SoftmaxMatch:
        """Finds the scores."""
        match = _read(anchor)
        assert match is not None
        if anchor.target is not aten.exp.default:
            _check_sum(anchor, attention=leads_to_product(match.scores))
        return match

    def check(self, match: SoftmaxMatch) -> Refusal | None:
        """Nothing more is needed."""
        return None

    def rewrite(self, graph: Graph, match: SoftmaxMatch) -> None:
        """Puts the softmax in."""
        last = match.product or match.output
        editor, scores = Editor(graph, last), match.scores
        for mask in match.masks:
            scores = _masked(editor, scores, mask)
        softmax = editor.call(aten.softmax.int, scores, match.dim)
        softmax.meta = {**match.output.meta, "val": softmax.meta["val"]}
        replaced = match.exponentials or match.output
        dtype = replaced.meta["val"].dtype
        weights = softmax if scores.meta["val"].dtype == dtype else editor.call(aten.to.dtype, softmax, dtype)
        if match.product is None:
            match.output.replace_all_uses_with(weights)
        else:
            match.product.replace_input_with(replaced, weights)
            match.output.replace_all_uses_with(match.product)


def _read(node: Node) -> SoftmaxMatch | None:
    """The softmax that ends at ``node``; None if there is none."""
    if is_call(node, aten.exp.default):
        return _of_logarithms(node)
    quotient = _quotient(node)
    found = None if quotient is None else _summed(quotient[1])
    if quotient is None or found is None:
        return None
    exponentials, _, own = quotient
    of_sum, dim = found
    expected = tuple(1 if place == dim else size for place, size in enumerate(sizes(of_sum)))
    if own != expected or expected == sizes(of_sum):
        return None
    parts = _exponentials(exponentials)
    if parts is not None and _alike(exponentials, of_sum):
        return SoftmaxMatch(parts[0], dim, node, parts[1])
    return _of_product(node, _behind(exponentials), of_sum, dim)


def _of_product(node: Node, product: Any, of_sum: Node, dim: int) -> SoftmaxMatch | None:
    """Exponentials that are divided by their sum only after the product with values."""
    if not is_call(product, aten.matmul.default, aten.bmm.default) or len(product.users) != 1:
        return None
    exponentials = product.args[0]
    parts = _exponentials(exponentials)
    if parts is None or not _alike(exponentials, of_sum) or dim != len(sizes(of_sum)) - 1:
        return None
    if sizes(node)[:-1] != sizes(of_sum)[:-1]:
        return None
    return SoftmaxMatch(parts[0], dim, node, parts[1], product, exponentials)


def _of_logarithms(node: Node) -> SoftmaxMatch | None:
    """The exponential of logarithms of a softmax."""
    logarithms = _behind(node.args[0])
    if is_call(logarithms, *_LOG_SOFTMAX):
        scores, dim = logarithms.args[:2]
        return SoftmaxMatch(scores, dim % len(sizes(scores)), node)
    if not is_call(logarithms, aten.sub.Tensor) or logarithms.kwargs:
        return None
    scores, total = logarithms.args
    of_all = _unsqueezed(total)
    if not isinstance(scores, Node) or not is_call(of_all, aten.logsumexp.default):
        return None
    dims, rank = arguments(of_all)["dim"], len(sizes(scores))
    if not _alike(scores, of_all.args[0]) or len(dims) != 1:
        return None
    dim = dims[0] % rank
    expected = tuple(1 if place == dim else size for place, size in enumerate(sizes(scores)))
    return SoftmaxMatch(scores, dim, node) if sizes(total) == expected else None


def _quotient(node: Node) -> tuple[Any, Node, tuple[Any, ...]] | None:
    """What ``node`` divides, by what, and of which sizes that is at last."""
    left, right = node.args[:2]
    if is_call(node, aten.div.Tensor):
        known = isinstance(right, Node) and shape(right) is not None
        return (left, right, sizes(right)) if known else None  # type: ignore[return-value]
    for total, other in ((right, left), (left, right)):
        inverse = _unsqueezed(total)
        if is_call(inverse, aten.reciprocal.default):
            return other, inverse.args[0], sizes(total)
    return None


def _summed(total: Any) -> tuple[Node, int] | None:
    """What ``total`` is the sum of, and over which dimension."""
    while (current := _unsqueezed(total)) is not total or _more(current) is not None:
        total = current if _more(current) is None else current.args[0]
    if not is_call(total, aten.sum.dim_IntList):
        return None
    given = arguments(total)
    summed = given["self"]
    if given["dim"] is None or len(given["dim"]) != 1 or _exponentials(summed) is None:
        return None
    return summed, given["dim"][0] % len(sizes(summed))


def _more(total: Any) -> float | None:
    """The constant that ``total`` adds to a sum, or that it is at least."""
    if is_call(total, aten.add.Tensor, aten.clamp.default, aten.clamp_min.default) and len(total.args) == 2:
        return constant(total.args[1])
    return None


def _check_sum(anchor: Node, *, attention: bool) -> None:
    """Checks that nothing is added to the sum that the result shows."""
    quotient = _quotient(anchor)
    assert quotient is not None
    exponentials, total, own = quotient
    holds_one = _holds_one(exponentials, own)
    while (current := _unsqueezed(total)) is not total or _more(current) is not None:
        more = _more(current)
        if more and (abs(more) > _NEGLIGIBLE or not holds_one):
            what = "is added to" if is_call(current, aten.add.Tensor) else "bounds"
            why = "" if abs(more) > _NEGLIGIBLE else ", which may all be small"
            raise Reject(
                current,
                f"{more:g} {what} the sum of the exponentials{why}, so that they are no softmax",
                attention=attention,
            )
        total = current if more is None else current.args[0]


def _holds_one(node: Any, rows: tuple[Any, ...]) -> bool:
    """Whether the maximum of each row was taken from the scores, and nothing is set to 0 after that."""
    node = _behind(node)
    if is_call(node, aten.matmul.default, aten.bmm.default):
        node = _behind(node.args[0])
    shifted: Any = _behind(node.args[0]) if is_call(node, aten.exp.default) else None
    if not is_call(shifted, aten.sub.Tensor):
        return False
    largest = shifted.args[1]
    return is_maximum(largest) and sizes(largest) == rows


def _exponentials(node: Any) -> tuple[Node, tuple[Node, ...]] | None:
    """The scores that ``node`` has the exponentials of, and what sets some of these to 0."""
    masks: list[Node] = []
    while True:
        node = _behind(node)
        if is_call(node, aten.exp.default):
            scores = node.args[0]
            return (scores, tuple(reversed(masks))) if isinstance(scores, Node) else None
        if is_call(node, *FILL) and constant(node.args[2]) == 0.0:
            masks.append(node)
            node = node.args[0]
        elif is_call(node, *WHERE) and constant(node.args[2]) == 0.0:
            masks.append(node)
            node = node.args[1]
        elif is_call(node, aten.mul.Tensor) and isinstance(node.args[1], Node):
            if not is_call(_behind(node.args[0]), aten.exp.default):
                return None
            masks.append(node)
            node = node.args[0]
        else:
            return None


def _masked(editor: Editor, scores: Node, mask: Node) -> Node:
    """``scores`` that are hidden where ``mask`` sets their exponentials to 0."""
    if is_call(mask, *FILL):
        return editor.call(aten.masked_fill.Scalar, scores, mask.args[1], float("-inf"))
    if is_call(mask, *WHERE):
        return editor.call(aten.where.ScalarOther, mask.args[0], scores, float("-inf"))
    factor = mask.args[1]
    assert isinstance(factor, Node)
    value = factor.meta["val"]
    if value.dtype == torch.bool:
        return editor.call(aten.where.ScalarOther, factor, scores, float("-inf"))
    return editor.call(aten.add.Tensor, scores, editor.call(aten.log.default, factor))


def _behind(node: Any) -> Any:
    """``node`` without casts and copies."""
    while is_call(node, *CASTS, *SAME):
        node = node.args[0]
    return node


def _unsqueezed(node: Any) -> Any:
    """``node`` without casts, copies, factors of one and dimensions of one that were put in."""
    while is_call(node, *CASTS, *SAME, aten.unsqueeze.default, aten.expand.default) or (
        constant_factor(node) == 1.0
    ):
        node = node.args[0]
    return node


def _alike(a: Any, b: Any) -> bool:
    """Whether two nodes are the same, made twice perhaps, but for casts."""
    a, b = _behind(a), _behind(b)
    if is_call(a, aten.exp.default) and is_call(b, aten.exp.default):
        return _alike(a.args[0], b.args[0])
    return same_computation(a, b)
