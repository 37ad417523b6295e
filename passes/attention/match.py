"""One attention with its parts named, whatever its spelling, and how the canonical node takes its place.

q, k, v with their axes, factors, mask   →   permute, reshape → retrofit::attention → reshape, permute
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import shape
from retrofit.passes.attention.axes import Axis, Mixed, leaves, sizes
from retrofit.passes.attention.canonical import ATTENTION
from retrofit.passes.attention.layout import Editor
from retrofit.passes.attention.operands import Operand
from retrofit.passes.attention.roles import Roles
from retrofit.passes.attention.rule import Refusal, refusal_at

aten = torch.ops.aten


@dataclass(frozen=True)
class RowFactor:
    """A tensor that multiplies scores and does not vary over the keys: it may as well multiply the queries."""

    node: Node
    axes: tuple[Axis, ...]
    divides: bool


@dataclass(frozen=True)
class AttentionMatch:
    """The parts of one attention, whatever its spelling.

    Attributes:
        output: The node whose value is the attention's output.
        out_axes: What its dimensions stand for.
        scale: Factor on the scores, those on q and k included.
        rows: Further factors, one for each query.
        mask: Makes the mask's node, canonical; None if there is none.
        leaving: Results of the module made from the weights alone; they become None.
        softcap: Bound c of the scores, which become c·tanh(score / c) before the mask; 0 for none.
        sinks: Makes the node of one more logit for each query head, [Hq]; None if there is none.
    """

    rule: str
    output: Node
    out_axes: tuple[Axis, ...]
    q: Operand
    k: Operand
    v: Operand
    roles: Roles
    scale: float
    is_causal: bool
    dropout_p: float
    mask: Callable[[Editor, Roles], Node] | None = None
    rows: tuple[RowFactor, ...] = ()
    leaving: tuple[Node, ...] = ()
    softcap: float = 0.0
    sinks: Callable[[Editor, Roles], Node] | None = None


def check_attention(match: AttentionMatch) -> Refusal | None:
    """Checks what holds for every spelling: that heads and widths are fixed."""
    roles = match.roles
    for name, axis in (
        ("the number of heads", (*roles.heads, *roles.group)),
        ("the width of the heads", roles.width),
        ("the width of the values", roles.value_width),
    ):
        if any(not atom.size.is_number for atom in leaves(axis)):
            return refusal_at(match.rule, match.output, f"{name} depends on the input")
    return None


def insert_attention(graph: Graph, match: AttentionMatch) -> Node:
    """Replaces the match by a canonical node; weights that leave the module become None."""
    editor, roles = Editor(graph, match.output), match.roles
    q = editor.to_groups(match.q.node, match.q.axes, roles.q)
    for row in match.rows:
        factor = editor.to_groups(row.node, row.axes, roles.scores, broadcast=range(4))
        scaled = editor.call(aten.div.Tensor if row.divides else aten.mul.Tensor, q, factor)
        q = editor.call(aten.to.dtype, scaled, q.meta["val"].dtype)
    k = editor.to_groups(match.k.node, match.k.axes, roles.k)
    v = editor.to_groups(match.v.node, match.v.axes, roles.v)
    mask = None if match.mask is None else match.mask(editor, roles)
    sinks = None if match.sinks is None else match.sinks(editor, roles)
    options = (match.is_causal, match.scale, match.dropout_p, match.softcap)
    node = editor.call(ATTENTION, q, k, v, mask, *options, sinks)
    node.meta = {**match.output.meta, "val": node.meta["val"], "spelling": match.rule}
    out = editor.to_groups(node, roles.out, match.out_axes)
    dtype = match.output.meta["val"].dtype
    if out.meta["val"].dtype != dtype:
        out = editor.call(aten.to.dtype, out, dtype)
    match.output.replace_all_uses_with(out)
    leaving = next(item for item in graph.nodes if item.op == "output")
    (values,) = leaving.args
    assert isinstance(values, tuple)
    leaving.args = (tuple(None if item in match.leaving else item for item in values),)
    return node


def broadcast_axes(node: Node, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """What the dimensions of ``node`` stand for, which is broadcast against a tensor of ``axes``.

    Raises:
        Mixed: If it does not fit.
    """
    own = shape(node)
    if own is None or len(own) > len(axes):
        raise Mixed("a mask of another rank than the scores")
    last = axes[len(axes) - len(own) :]
    return tuple(() if size == 1 else axis for size, axis in zip(sizes(node), last, strict=True))
