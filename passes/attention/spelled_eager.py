"""Attention written out, as transformers' eager functions and hand-written modules do.

matmul(q·a, transpose(k·b)) ·c /d  (+ mask | masked_fill | where)  → softmax → to → dropout → matmul(·, v)
    →   retrofit::attention(q, k, v, mask, False, a·b·c/d, p)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import arguments, is_call, shape
from retrofit.passes.attention.heads import unrepeated
from retrofit.passes.attention.rule import Refusal, Reject, Rule, calls
from retrofit.passes.attention.spelled_sdpa import AttentionMatch, check_attention, insert_attention

aten = torch.ops.aten
HIDDEN = -1e4  # a masked_fill with at most this hides a key
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_MATMUL = (aten.matmul.default, aten.bmm.default)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout)
_SAME = (
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
_DROPOUT = aten.dropout.default


@dataclass(frozen=True, kw_only=True)
class EagerMatch(AttentionMatch):
    """An attention written out.

    Attributes:
        masks: The nodes that add to or hide scores, outermost first, each with the factor applied after it.
    """

    masks: tuple[tuple[Node, float], ...] = ()


class EagerSpelling(Rule[EagerMatch]):
    """Rewrites matmul → softmax → matmul."""

    name = "eager"

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """The softmax calls."""
        return calls(graph, *_SOFTMAX)

    def pattern(self, anchor: Node) -> EagerMatch:
        """Follows the softmax up to q·kᵀ and down to the product with v."""
        rank = len(shape(anchor) or ())
        if anchor.args[1] not in (-1, rank - 1):
            raise Reject(anchor, f"the softmax is over dimension {anchor.args[1]}, not over the keys")
        weights, dropout_p, output = _follow_weights(anchor)
        scores = anchor.args[0]
        assert isinstance(scores, Node)
        product, factor, masks = _follow_scores(anchor, scores)
        q, q_factor = _unscaled(product.args[0])
        repeated, outer_factor = _unscaled(_transposed(product, product.args[1]))
        k, inner_factor = _unscaled(unrepeated(repeated))
        v = output.args[1]
        assert isinstance(v, Node)
        return EagerMatch(
            rule=self.name,
            output=output,
            q=q,
            k=k,
            v=unrepeated(v),
            mask=None,
            masks=masks,
            is_causal=False,
            scale=factor * q_factor * outer_factor * inner_factor,
            dropout_p=dropout_p,
            weights=weights,
        )

    def check(self, match: EagerMatch) -> Refusal | None:
        """Checks the shapes and that the weights stay inside."""
        return check_attention(match)

    def rewrite(self, graph: Graph, match: EagerMatch) -> None:
        """Puts the canonical node in, and the mask in a form SDPA takes."""
        insert_attention(graph, replace(match, mask=_mask_node(graph, match)))


def _mask_node(graph: Graph, match: EagerMatch) -> Node | None:
    """One mask for all of ``match.masks``, in a form SDPA takes: bool if all hide, else additive."""
    result: Node | None = None
    additive: Node | None = None
    with graph.inserting_before(match.output):
        for mask, factor in match.masks:
            if not is_call(mask, *_HIDING):
                term = mask if factor == 1.0 else graph.call_function(aten.mul.Tensor, (mask, factor))
                term.meta = {**mask.meta, **term.meta}
                additive = (
                    term if additive is None else graph.call_function(aten.add.Tensor, (additive, term))
                )
                continue
            shown = condition = mask.args[0] if is_call(mask, *_WHERE) else mask.args[1]
            assert isinstance(condition, Node)
            if not is_call(mask, *_WHERE):
                shown = graph.call_function(aten.logical_not.default, (condition,))
            assert isinstance(shown, Node)
            shown.meta = {**condition.meta, **shown.meta}
            result = (
                shown if result is None else graph.call_function(aten.logical_and.default, (result, shown))
            )
        if result is not None and additive is not None:
            return graph.call_function(aten.where.ScalarOther, (result, additive, float("-inf")))
    return result if additive is None else additive


def _follow_weights(softmax: Node) -> tuple[tuple[Node, ...], float, Node]:
    """Walks from the softmax to the product with v: the nodes on the way, the dropout, the product."""
    weights, dropout_p, current = [softmax], 0.0, softmax
    while True:
        users = [user for user in current.users if user.op != "output"]
        if not users:
            raise Reject(current, "a softmax whose result is not multiplied with values")
        products = [user for user in users if is_call(user, *_MATMUL) and user.args[0] is current]
        if products:
            if len(users) > 1:
                other = next(user for user in users if user is not products[0])
                raise Reject(current, f"the attention weights are used elsewhere, by {other.name}")
            return tuple(weights), dropout_p, products[0]
        if len(users) > 1:
            raise Reject(current, f"the attention weights are used elsewhere, by {users[1].name}")
        (user,) = users
        if is_call(user, _DROPOUT):
            given = arguments(user)
            dropout_p = float(given["p"]) if given["train"] else 0.0
        elif user.op == "call_module" and issubclass(user.meta.get("module_class", object), nn.Dropout):
            dropout_p = 0.0
        elif not is_call(user, *_CASTS, *_SAME):
            what = user.target if user.op != "call_module" else f"module {user.target}"
            raise Reject(user, f"a softmax whose result goes into {what}, not into a product with values")
        weights.append(user)
        current = user


def _follow_scores(softmax: Node, scores: Node) -> tuple[Node, float, tuple[tuple[Node, float], ...]]:
    """Walks from the softmax's input up to q·kᵀ: that product, its factor, and the masks on the way."""
    factor = 1.0
    masks: list[tuple[Node, float]] = []
    current: Any = scores
    while True:
        if is_call(current, *_MATMUL):
            return current, factor, tuple(masks)
        number = _factor(current)
        if number is not None:
            if number <= 0:
                raise Reject(
                    current, f"the scores are multiplied with {number:g}, not with a positive number"
                )
            factor *= number
            current = current.args[0]
        elif is_call(current, *_CASTS, *_SAME):
            current = current.args[0]
        elif is_call(current, aten.add.Tensor):
            if current.kwargs.get("alpha", 1) != 1:
                raise Reject(current, "a mask is added with a factor")
            left, right = current.args[0], current.args[1]
            if not isinstance(right, Node) or not isinstance(left, Node):
                raise Reject(current, "a constant is added to the scores")
            swapped = _leads_to_product(right) and not _leads_to_product(left)
            mask, current = (left, right) if swapped else (right, left)
            masks.append((mask, factor))
        elif is_call(current, *_HIDING):
            masks.append((current, factor))
            current = _masked_scores(current)
        else:
            name = current.target if isinstance(current, Node) else current
            raise Reject(softmax, f"the scores come from {name}, not from a product of queries and keys")


_WHERE = (aten.where.self, aten.where.ScalarOther)
_HIDING = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, *_WHERE)


def _masked_scores(node: Node) -> Any:
    if is_call(node, *_WHERE):
        scores, value = node.args[1], node.args[2]
    else:
        scores, value = node.args[0], node.args[2]
    number = _constant(value)
    if number is None or number > HIDDEN:
        raise Reject(node, f"masked scores are set to {value}, not to at most {HIDDEN:g}")
    return scores


def _leads_to_product(node: Any) -> bool:
    while isinstance(node, Node):
        if is_call(node, *_MATMUL):
            return True
        if is_call(node, aten.add.Tensor):
            return any(_leads_to_product(side) for side in node.args[:2])
        if _factor(node) is None and not is_call(node, *_CASTS, *_SAME, *_HIDING):
            return False
        node = node.args[1] if is_call(node, *_WHERE) else node.args[0]
    return False


def _unscaled(node: Any) -> tuple[Node, float]:
    """Takes constant factors off ``node``."""
    factor = 1.0
    while (number := _factor(node)) is not None:
        factor *= number
        node = node.args[0]
    assert isinstance(node, Node)
    return node, factor


def _factor(node: Any) -> float | None:
    """The constant ``node`` multiplies its first argument with; None if it is no such node."""
    if is_call(node, *_PRODUCTS):
        return _constant(node.args[1])
    if is_call(node, *_QUOTIENTS):
        number = _constant(node.args[1])
        return None if number is None else 1.0 / number
    return None


def _constant(value: Any) -> float | None:
    """The number ``value`` stands for: a literal, or a tensor made of one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if is_call(value, aten.full.default, aten.scalar_tensor.default, aten.full_like.default):
        number = value.args[0] if value.target is aten.scalar_tensor.default else value.args[1]
        return float(number) if isinstance(number, (int, float)) else None
    if is_call(value, *_CASTS, *_SAME, aten.lift_fresh_copy.default):
        return _constant(value.args[0])
    if isinstance(value, Node) and "constant" in value.meta:
        return float(value.meta["constant"])
    return None


def _transposed(product: Node, node: Any) -> Node:
    """Returns the keys whose transpose ``node`` is."""
    while is_call(node, *_SAME):
        node = node.args[0]
    number = _factor(node)
    if number is not None and is_call(node.args[0], aten.transpose.int, aten.permute.default):
        raise Reject(product, "the transposed keys are scaled; scale the keys or the scores")
    rank = len(shape(node) or ())
    if is_call(node, aten.transpose.int):
        dims = {dim % rank for dim in node.args[1:]}
        if dims == {rank - 1, rank - 2}:
            return node.args[0]
    if is_call(node, aten.permute.default, aten.mT.default):
        order = [dim % rank for dim in node.args[1]]
        if order == [*range(rank - 2), rank - 1, rank - 2]:
            return node.args[0]
    raise Reject(product, "the scores are a product with something other than transposed keys")
