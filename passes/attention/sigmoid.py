"""Names attention whose weights are sigmoids of the scores, which no target computes.

sigmoid(q·kᵀ + b)·v   →   a refusal
a = sigmoid(q·kᵀ), a + a·a + a·a·a   →   nothing: the powers of a relation have no values
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import is_call
from retrofit.passes.attention.axes import RESHAPES, SAME, permutation
from retrofit.passes.attention.operands import CASTS, constant_factor
from retrofit.passes.attention.products import PRODUCTS, Product, read_product
from retrofit.passes.attention.rule import Refusal, Reject, Rule, calls
from retrofit.passes.attention.scores import FILL, SUMS, WHERE, products_before

aten = torch.ops.aten


class SigmoidAttention(Rule[Node]):
    """Matches nothing; has the refusal say what there is."""

    name = "sigmoid"

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """The sigmoids of a product that are multiplied with values, all of tensors that the module computes."""
        return (node for node in calls(graph, aten.sigmoid.default) if _weighs(node))

    def pattern(self, anchor: Node) -> NoReturn:
        """Refuses."""
        raise Reject(anchor, "the attention weights are a sigmoid of the scores, not a softmax")

    def check(self, match: Node) -> Refusal | None:
        """Nothing gets here."""
        return None

    def rewrite(self, graph: Graph, match: Node) -> None:
        """Nothing gets here."""


def _weighs(sigmoid: Node) -> bool:
    before = [read_product(node) for node in products_before(sigmoid.args[0])]
    return any(map(_is_computed, before)) and _meets_values(sigmoid)


def _meets_values(sigmoid: Node) -> bool:
    """Whether a product multiplies what ``sigmoid`` gives with something else than itself."""
    weights = {sigmoid}
    for node in sigmoid.graph.nodes:
        if weights.isdisjoint(node.all_input_nodes):
            continue
        if is_call(node, *PRODUCTS):
            product = read_product(node)
            if product is None or not _is_computed(product):
                continue
            if weights.issuperset(product.operands):
                weights.add(node)
            elif not weights.isdisjoint(product.operands):
                return True
        elif _passes(node) or (is_call(node, *SUMS, aten.mul.Tensor) and weights.issuperset(node.args[:2])):
            weights.add(node)
    return False


def _passes(node: Node) -> bool:
    return (
        is_call(node, *CASTS, *SAME, *RESHAPES, *FILL, *WHERE, aten.dropout.default, aten.expand.default)
        or permutation(node) is not None
        or constant_factor(node) is not None
    )


def _is_computed(product: Product | None) -> bool:
    """Whether neither factor of ``product`` is a weight of the model."""
    if product is None:
        return False
    for node in product.operands:
        while permutation(node) is not None or is_call(node, *CASTS, *SAME, *RESHAPES, aten.expand.default):
            node = node.args[0]  # type: ignore[assignment]
        if node.op == "get_attr":
            return False
    return True
