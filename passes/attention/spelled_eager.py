"""Attention written out, as transformers' eager functions and hand-written modules do.

product of q and k, in any layout ·c (·b tanh) (+ mask | masked_fill | where) (cat sinks) → softmax (slice) → dropout
    → product with v   →   retrofit::attention(q, k, v, mask, False, c, p, b, sinks)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import is_call, shape
from retrofit.passes.attention.axes import Atom, Axis, Mixed, forward, fresh, leaves, sizes
from retrofit.passes.attention.layout import Editor
from retrofit.passes.attention.match import (
    AttentionMatch,
    RowFactor,
    broadcast_axes,
    check_attention,
    insert_attention,
)
from retrofit.passes.attention.operands import Operand, constant_factor, peeled
from retrofit.passes.attention.products import Product
from retrofit.passes.attention.roles import Roles, assign
from retrofit.passes.attention.rule import STAGES, Refusal, Reject, Rule, calls
from retrofit.passes.attention.scores import SOFTMAX, Named, Step, assigns, follow_scores
from retrofit.passes.attention.sinks import check_sinks, sinks_maker
from retrofit.passes.attention.weights import Weights, drops_last, follow_weights

aten = torch.ops.aten


class EagerSpelling(Rule[AttentionMatch]):
    """Rewrites product → softmax → product."""

    name = "eager"

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """The softmax calls."""
        return calls(graph, *SOFTMAX)

    def pattern(self, anchor: Node) -> AttentionMatch:
        """Follows the softmax up to q·kᵀ and down to the product with v, with the axes of each step."""
        above: Reject | None = None
        steps: list[Step] = []
        try:
            product, steps = follow_scores(anchor)
        except Reject as reject:
            reject.stage = STAGES[1]
            above = reject
        try:
            weights = follow_weights(anchor, steps)
        except Reject as below:
            if isinstance(above, Named):
                raise above from None
            below.attention = above is None
            below.stage = STAGES[0]
            raise
        if above is not None:
            raise above
        try:
            return _match(self.name, anchor, product, steps, weights)
        except Mixed as mixed:
            raise Reject(anchor, f"the layout of the scores cannot be followed: {mixed}") from mixed

    def check(self, match: AttentionMatch) -> Refusal | None:
        """Checks the shapes."""
        return check_attention(match)

    def rewrite(self, graph: Graph, match: AttentionMatch) -> None:
        """Puts the canonical node in."""
        insert_attention(graph, match)


def _match(name: str, softmax: Node, product: Product, steps: list[Step], weights: Weights) -> AttentionMatch:
    outer = fresh(sizes(product.node))
    axes = list(outer)
    named = dict(zip(product.result, axes, strict=True))
    before: list[tuple[Axis, ...]] = []  # what the scores' dimensions stand for ahead of each step
    for step in steps:
        before.append(tuple(axes))
        if step.role != "sink":
            axes = _after(step.node, step.source, axes)
    dim = softmax.args[1]
    assert isinstance(dim, int)
    keys, of_scores = axes[dim], tuple(axes)
    for source, node in zip(weights.path, weights.path[1:], strict=False):
        if not drops_last(node):
            axes = _after(node, source, axes)
    k_side = _key_side(softmax, product, named, keys)
    width = tuple(
        Atom(size)
        for label, size in zip(product.labels[0], sizes(product.operands[0]), strict=True)
        if label is not None and label not in product.result and size != 1
    )
    summed = [label for label in product.labels[0] if label is not None and label not in product.result]
    by_size = iter(width)
    for label, size in zip(product.labels[0], sizes(product.operands[0]), strict=True):
        if label in summed:
            named[label] = () if size == 1 else (next(by_size),)
    q = peeled(_operand(product, 1 - k_side, named), factors=True, repeats=False)
    k = peeled(_operand(product, k_side, named), factors=True, repeats=True)
    second: Product = weights.product
    w_side = second.side(weights.path[-1])
    assert w_side is not None
    if second.added is not None or second.factor != 1.0:
        raise Reject(second.node, "something is added to the product with values")
    of_values = _second_axes(second, w_side, axes)
    lost = [label for label in second.labels[w_side] if label is not None and label not in second.result]
    summed_keys = leaves(atom for label in lost for atom in of_values[label])
    if set(summed_keys) != set(leaves(keys)) or not keys:
        raise Reject(
            softmax,
            f"the softmax is over dimension {dim}, not over the keys that the product with values sums over",
        )
    v = peeled(_operand(second, 1 - w_side, of_values), factors=False, repeats=True)
    out_axes = tuple(of_values[label] for label in second.result)
    rows = _rows(steps, before, keys)
    _check_neutral(steps, before, keys)
    roles = assign(q, k, v, keys, width, outer)
    if isinstance(roles, str):
        raise Reject(softmax, roles)
    scale, softcap = _scale_and_cap(product, product.factor * q.factor * k.factor, steps)
    sink = check_sinks(softmax, steps, before, keys, weights.path)
    return AttentionMatch(
        rule=name,
        output=second.node,
        out_axes=out_axes,
        q=q,
        k=k,
        v=v,
        roles=roles,
        scale=scale,
        is_causal=False,
        dropout_p=weights.dropout_p,
        mask=_mask_maker(product, steps, before, of_scores, keys),
        rows=rows,
        leaving=weights.leaving,
        softcap=softcap,
        sinks=None if sink is None else sinks_maker(*sink, roles, q.node),
    )


def _scale_and_cap(product: Product, factor: float, steps: Sequence[Step]) -> tuple[float, float]:
    """The factor on the product, and the bound b of b·tanh(scale·q·k / b); 0 where there is no tanh.

    Args:
        product: Of queries and keys.
        factor: What it is multiplied with ahead of the steps.
        steps: What happens to the scores.
    """
    cap = next((number for number, step in enumerate(steps) if step.role == "cap"), None)
    bound = 1.0
    for number, step in enumerate(steps):
        late = cap is not None and number > cap
        unbounded = ("row", "cap") if late else ("mask", "neutral", "sink")
        if cap is not None and number != cap and step.role in unbounded:
            raise Reject(step.node, "the scores are changed on the wrong side of a tanh")
        by = (constant_factor(step.node) or 1.0) if step.role == "scale" else 1.0
        bound, factor = (bound * by, factor) if late else (bound, factor * by)
    if cap is None:
        return factor, 0.0
    if product.added is not None:
        raise Reject(steps[cap].node, "a mask is added to the scores before a tanh")
    return factor * bound, bound


def _after(node: Node, source: Node, axes: list[Axis]) -> list[Axis]:
    """The axes behind one node."""
    moved = forward(node, axes)
    if moved is not None:
        return moved
    if sizes(node) != sizes(source):
        raise Reject(node, "the scores are broadcast to another shape")
    return axes


def _key_side(softmax: Node, product: Product, named: dict[str, Axis], keys: Axis) -> int:
    """Which operand of the product the keys are: the one that has the softmax's axis and the other has not."""
    wanted = set(leaves(keys))
    labels = {label for label, axis in named.items() if wanted & set(leaves(axis))}
    sides = [side for side in (0, 1) if labels & set(product.labels[side])]
    if len(sides) != 1:
        what = "both factors have" if sides else "is of size 1"
        raise Reject(softmax, f"the softmax is over an axis that {what}, not over the keys")
    return sides[0]


def _operand(product: Product, side: int, named: dict[str, Axis]) -> Operand:
    axes = tuple(() if label is None else named[label] for label in product.labels[side])
    return Operand(product.operands[side], axes)


def _second_axes(second: Product, w_side: int, axes: Sequence[Axis]) -> dict[str, Axis]:
    """Axes by label of the product with values: those of the weights, new ones for what only values have."""
    named: dict[str, Axis] = {
        label: axis for label, axis in zip(second.labels[w_side], axes, strict=True) if label is not None
    }
    other = 1 - w_side
    own = fresh(sizes(second.operands[other]))
    for label, axis in zip(second.labels[other], own, strict=True):
        if label is not None:
            named.setdefault(label, axis)
    return named


def _rows(steps: list[Step], before: list[tuple[Axis, ...]], keys: Axis) -> tuple[RowFactor, ...]:
    """The factors that are tensors; one that varies over the keys must be a mask's, which comes after it."""
    found = []
    for number, (step, axes) in enumerate(zip(steps, before, strict=True)):
        if step.role != "row":
            continue
        other = _other(step)
        own = broadcast_axes(other, axes)
        if _varies(own, keys):
            if is_call(step.node, aten.mul.Tensor) and any(later.role == "mask" for later in steps[number:]):
                continue
            raise Reject(step.node, "the scores are multiplied with a tensor that varies over the keys")
        found.append(RowFactor(other, own, is_call(step.node, aten.div.Tensor)))
    return tuple(found)


def _check_neutral(steps: Sequence[Step], before: Sequence[tuple[Axis, ...]], keys: Axis) -> None:
    """Checks that what is added to a row of scores, or taken from it, is one number for all that the softmax is over."""
    sink = next((number for number, step in enumerate(steps) if step.role == "sink"), -1)
    for number, (step, axes) in enumerate(zip(steps, before, strict=True)):
        if step.role != "neutral":
            continue
        if number < sink:
            raise Reject(
                step.node, "a number is added to the scores, but not to the logit that stands beside them"
            )
        other = step.node.args[1]
        known = isinstance(other, Node) and shape(other) is not None
        if known and _varies(broadcast_axes(other, axes), keys):  # type: ignore[arg-type]
            raise Reject(step.node, "the maximum taken from the scores is not that over the keys")


def _other(step: Step) -> Node:
    other = step.node.args[1] if step.node.args[0] is step.source else step.node.args[0]
    assert isinstance(other, Node)
    return other


def _varies(own: Sequence[Axis], keys: Axis) -> bool:
    return bool({atom for axis in own for atom in leaves(axis)} & set(leaves(keys)))


def _mask_maker(
    product: Product,
    steps: list[Step],
    before: list[tuple[Axis, ...]],
    axes: tuple[Axis, ...],
    keys: Axis,
) -> Any:
    """Makes the mask by running the steps on scores of zero: what comes out is what they add or hide."""
    gates = {
        step.node
        for step, at in zip(steps, before, strict=True)
        if step.role == "row" and _varies(broadcast_axes(_other(step), at), keys)
    }
    first = next(
        (number for number, step in enumerate(steps) if step.role == "mask" or step.node in gates), None
    )
    if product.added is not None:
        first = 0
    if first is None:
        return None
    kept = [step for step in steps[first:] if step.role not in ("neutral", "sink")]
    source = product.node if product.added is not None else kept[0].source

    def make(editor: Editor, roles: Roles) -> Node:
        full = any(step.role == "layout" or assigns(step.node) for step in kept)
        new = (
            [editor.size(size, product.node) for size in sizes(source)]
            if full
            else [1] * len(shape(source) or ())
        )
        anchor = product.operands[0]
        current = editor.call(aten.new_zeros.default, anchor, new)
        if product.added is not None:
            term, beta = product.added
            if beta != 1.0:
                term = editor.call(aten.mul.Tensor, term, beta)
            current = editor.call(aten.add.Tensor, current, term)
        for step in kept:
            current = _again(editor, step, current)
            if step.node in gates:
                # What is multiplied with anything but 1 had better be hidden.
                whole = editor.call(aten.eq.Scalar, _other(step), 1)
                current = editor.call(aten.where.ScalarOther, whole, current, float("-inf"))
        own = tuple(() if size == 1 else axis for size, axis in zip(sizes(current), axes, strict=True))
        return editor.to_groups(current, own, roles.scores, broadcast=range(4))

    return make


def _again(editor: Editor, step: Step, source: Node) -> Node:
    """The step's node once more, on another input."""
    node = step.node
    args, kwargs = torch.fx.map_arg(
        (node.args, node.kwargs), lambda item: source if item is step.source else item
    )
    with editor.graph.inserting_before(editor.before):
        new = editor.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    editor.value(new)
    return new
