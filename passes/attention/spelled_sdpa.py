"""torch.nn.functional.scaled_dot_product_attention, in every form of its arguments.

sdpa(q, repeat(k), repeat(v), mask, p, causal, scale=None, enable_gqa=…)
    →   retrofit::attention(q, k, v, mask, causal, scale, p)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import arguments, shape
from retrofit.passes.attention.axes import Atom, Axis, Mixed, fresh, sizes
from retrofit.passes.attention.layout import Editor
from retrofit.passes.attention.match import AttentionMatch, broadcast_axes, check_attention, insert_attention
from retrofit.passes.attention.operands import Operand, peeled
from retrofit.passes.attention.roles import Roles, assign
from retrofit.passes.attention.rule import Refusal, Reject, Rule, calls

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class SdpaSpelling(Rule[AttentionMatch]):
    """Rewrites SDPA calls."""

    name = "sdpa"

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """The SDPA calls."""
        return calls(graph, SDPA)

    def pattern(self, anchor: Node) -> AttentionMatch:
        """Reads the call."""
        try:
            return _match(self.name, anchor)
        except Mixed as mixed:
            raise Reject(anchor, f"the layout cannot be followed: {mixed}") from mixed

    def check(self, match: AttentionMatch) -> Refusal | None:
        """Checks the shapes."""
        return check_attention(match)

    def rewrite(self, graph: Graph, match: AttentionMatch) -> None:
        """Puts the canonical node in."""
        insert_attention(graph, match)


def _match(name: str, anchor: Node) -> AttentionMatch:
    given = arguments(anchor)
    if not isinstance(given["is_causal"], bool):
        raise Reject(anchor, "is_causal depends on the input's shape")
    tensors = [given["query"], given["key"], given["value"]]
    _agree(*(shape(node) or () for node in tensors))
    of_q, of_k, of_v = (sizes(node) for node in tensors)
    scale = given["scale"]
    if scale is None:
        if not of_q[-1].is_number or of_q[-1] == 0:
            raise Reject(anchor, "the width of the queries is not fixed")
        scale = float(of_q[-1]) ** -0.5
    if not isinstance(scale, (int, float)):
        raise Reject(anchor, "the scale depends on the input's shape")
    outer = fresh(of_q[:-2])
    queries, width = fresh(of_q[-2:])
    (keys,) = fresh(of_k[-2:-1])
    (value_width,) = fresh(of_v[-1:])
    outer_k, outer_v = (
        [
            _shared(anchor, axis, size, own)
            for axis, size, own in zip(outer, of_q[:-2], found[:-2], strict=True)
        ]
        for found in (of_k, of_v)
    )
    q = Operand(tensors[0], (*outer, queries, width))
    k = peeled(Operand(tensors[1], (*outer_k, keys, width)), factors=False, repeats=True)
    v = peeled(Operand(tensors[2], (*outer_v, keys, value_width)), factors=False, repeats=True)
    roles: Roles | str
    if len(of_q) == 4:
        group = tuple(
            atom for atom in Operand(q.node, (outer[1],)).atoms if atom not in k.atoms and atom not in v.atoms
        )
        heads = tuple(atom for atom in Operand(q.node, (outer[1],)).atoms if atom not in group)
        roles = Roles(outer[0], heads, group, queries, keys, width, value_width)
    else:
        q = peeled(q, factors=False, repeats=False)
        roles = assign(q, k, v, keys, width, [*outer, queries])
    if isinstance(roles, str):
        raise Reject(anchor, roles)
    return AttentionMatch(
        rule=name,
        output=anchor,
        out_axes=(*outer, queries, value_width),
        q=q,
        k=k,
        v=v,
        roles=roles,
        mask=_mask_maker(given["attn_mask"], (*outer, queries, keys)),
        is_causal=given["is_causal"],
        scale=float(scale),
        dropout_p=float(given["dropout_p"]),
    )


def _agree(of_q: Sequence[Any], of_k: Sequence[Any], of_v: Sequence[Any]) -> None:
    """Has the sizes that SDPA takes to be equal be one symbol: its fake does not compare them."""
    if len(of_q) == len(of_k) == len(of_v):
        pairs = [*zip(of_q[:-2], of_k[:-2], strict=True), *zip(of_k[:-1], of_v[:-1], strict=True)]
        for a, b in pairs:
            if not isinstance(a, int) and not isinstance(b, int):
                torch._check(a == b)


def _shared(anchor: Node, axis: Axis, of_q: Any, own: Any) -> Axis:
    """The axis of keys or values that queries have as ``axis``: the same, none, or the first part of it."""
    if own == of_q:
        return axis
    if own == 1:
        return ()
    if not own.is_number or not of_q.is_number or of_q % own:
        raise Reject(anchor, f"query heads must be a multiple of key and value heads, got {of_q} and {own}")
    (atom,) = axis
    if not atom.parts:
        atom.parts = (Atom(own), Atom(of_q / own))
    return (atom.parts[0],)


def _mask_maker(mask: Any, axes: tuple[Axis, ...]) -> Any:
    if mask is None:
        return None

    def make(editor: Editor, roles: Roles) -> Node:
        own = broadcast_axes(mask, axes)
        if len(own) == len(axes) == 4:
            return mask
        return editor.to_groups(mask, own, roles.scores, broadcast=range(4))

    return make
