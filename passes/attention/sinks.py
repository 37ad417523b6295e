"""Reads one more logit for each head, which takes part in the softmax and has no value: an attention sink.

cat([scores, expand(sinks.view(1, H, 1, 1))], −1) → softmax → [..., :-1]   →   sinks [Hq]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

from retrofit.passes.attention.arguments import is_call
from retrofit.passes.attention.axes import SAME, Axis, leaves, sizes
from retrofit.passes.attention.layout import Editor
from retrofit.passes.attention.operands import CASTS, constant
from retrofit.passes.attention.roles import Roles
from retrofit.passes.attention.rule import Reject
from retrofit.passes.attention.scores import Step
from retrofit.passes.attention.weights import drops_last

aten = torch.ops.aten


def check_sinks(
    softmax: Node,
    steps: Sequence[Step],
    before: Sequence[tuple[Axis, ...]],
    keys: Axis,
    path: Sequence[Node],
) -> tuple[Step, tuple[Axis, ...]] | None:
    """The step that adds the sinks, and what the scores' dimensions stand for there; None if there is none.

    Args:
        softmax: The softmax.
        steps: What happens to the scores.
        before: What their dimensions stand for ahead of each step.
        keys: What the softmax is over.
        path: From the softmax to the product with values.

    Raises:
        Reject: If what is added is not taken away again, or changed in between.
    """
    found = [number for number, step in enumerate(steps) if step.role == "sink"]
    dropped = [node for node in path if drops_last(node)]
    if len(found) != len(dropped) or len(found) > 1:
        raise Reject(
            softmax, f"{len(found)} logits are added to the scores and {len(dropped)} taken from the weights"
        )
    if not found:
        return None
    step, axes = steps[found[0]], before[found[0]]
    if axes[-1] != keys:
        raise Reject(step.node, "the softmax is not over the dimension that a logit is added to")
    later = [item for item in steps[found[0] + 1 :] if item.role not in ("same", "neutral")]
    if later:
        raise Reject(later[0].node, "the scores are changed after a logit was added to them")
    return step, axes


def sinks_maker(
    step: Step, axes: tuple[Axis, ...], roles: Roles, like: Node
) -> Callable[[Editor, Roles], Node]:
    """Returns what makes the sinks' node [Hq].

    Args:
        step: What adds them.
        axes: What the scores' dimensions stand for there.
        roles: Which axes are what.
        like: A tensor of the device and dtype that a constant sink is to have.

    Raises:
        Reject: If they vary over more than the heads.
    """
    column: Any = step.node.args[0][1]  # type: ignore[index]
    own = [() if size == 1 else axis for size, axis in zip(sizes(column), (*axes[:-1], ()), strict=True)]
    while is_call(column, *CASTS, *SAME, aten.expand.default):
        assert isinstance(column, Node)
        source = column.args[0]
        assert isinstance(source, Node)
        shape = sizes(source)
        own = [
            () if size == 1 else axis for size, axis in zip(shape, own[len(own) - len(shape) :], strict=True)
        ]
        column = source

    heads = (*roles.heads, *roles.group)
    number = _constant(column)
    if number is not None:
        count = prod(int(atom.size) for atom in leaves(heads))

        def fill(editor: Editor, roles: Roles) -> Node:
            return editor.call(aten.new_full.default, like, [count], number)

        return fill
    if {atom for axis in own for atom in leaves(axis)} - set(leaves(heads)):
        raise Reject(step.node, "extra logits that vary over more than the heads stand beside the scores")

    def make(editor: Editor, roles: Roles) -> Node:
        return editor.to_groups(column, own, ((*roles.heads, *roles.group),))

    return make


def _constant(column: Node) -> float | None:
    """The number that all logits of ``column`` are; None if there is no such number."""
    if is_call(column, aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default):
        return 0.0
    if is_call(column, aten.ones_like.default, aten.new_ones.default, aten.ones.default):
        return 1.0
    return constant(column)
