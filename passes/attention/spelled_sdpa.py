"""torch.nn.functional.scaled_dot_product_attention, in every form of its arguments.

sdpa(q, repeat(k), repeat(v), mask, p, causal, scale=None, enable_gqa=…)
    →   retrofit::attention(q, k, v, mask, causal, scale, p)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import arguments, shape
from retrofit.passes.attention.canonical import ATTENTION
from retrofit.passes.attention.heads import unrepeated
from retrofit.passes.attention.rule import Refusal, Reject, Rule, calls

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class AttentionMatch:
    """The parts of one attention, whatever its spelling.

    Attributes:
        output: The node whose value is the attention's output.
        weights: Nodes that hold the attention weights and may leave the module; they become None.
    """

    rule: str
    output: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    is_causal: bool
    scale: float
    dropout_p: float
    weights: tuple[Node, ...] = ()


class SdpaSpelling(Rule[AttentionMatch]):
    """Rewrites SDPA calls."""

    name = "sdpa"

    def anchors(self, graph: Graph) -> Iterable[Node]:
        """The SDPA calls."""
        return calls(graph, SDPA)

    def pattern(self, anchor: Node) -> AttentionMatch:
        """Reads the call."""
        given = arguments(anchor)
        if not isinstance(given["is_causal"], bool):
            raise Reject(anchor, "is_causal depends on the input's shape")
        q = given["query"]
        width = (shape(q) or (0,))[-1]
        scale = given["scale"]
        if scale is None:
            if not isinstance(width, int) or width == 0:
                raise Reject(anchor, "the width of the queries is not fixed")
            scale = width**-0.5
        return AttentionMatch(
            rule=self.name,
            output=anchor,
            q=q,
            k=unrepeated(given["key"]),
            v=unrepeated(given["value"]),
            mask=given["attn_mask"],
            is_causal=given["is_causal"],
            scale=float(scale),
            dropout_p=float(given["dropout_p"]),
        )

    def check(self, match: AttentionMatch) -> Refusal | None:
        """Checks the shapes."""
        return check_attention(match)

    def rewrite(self, graph: Graph, match: AttentionMatch) -> None:
        """Puts the canonical node in."""
        insert_attention(graph, match)


def check_attention(match: AttentionMatch) -> Refusal | None:
    """Checks what holds for every spelling: ranks, heads, and that no foreign node uses the weights."""
    shapes = [shape(node) for node in (match.q, match.k, match.v)]
    for name, found in zip("qkv", shapes, strict=True):
        if found is None or len(found) != 4:
            rank = "unknown rank" if found is None else f"rank {len(found)}"
            return Refusal(
                match.rule, match.output.name, f"{name} must be [batch, heads, length, width], got {rank}"
            )
    (q_heads, k_heads, v_heads) = (found[1] for found in shapes if found is not None)
    if not all(isinstance(heads, int) for heads in (q_heads, k_heads, v_heads)):
        return Refusal(match.rule, match.output.name, "the number of heads depends on the input")
    if k_heads != v_heads or q_heads % k_heads:
        return Refusal(
            match.rule,
            match.output.name,
            f"query heads must be a multiple of key and value heads, got {q_heads}, {k_heads} and {v_heads}",
        )
    inside = {*match.weights, match.output}
    for node in match.weights:
        for user in node.users:
            if user not in inside and user.op != "output":
                return Refusal(
                    match.rule, node.name, f"the attention weights are used elsewhere, by {user.name}"
                )
    return None


def insert_attention(graph: Graph, match: AttentionMatch) -> Node:
    """Replaces the match by a canonical node; weights that leave the module become None."""
    with graph.inserting_before(match.output):
        node = graph.call_function(
            ATTENTION,
            (match.q, match.k, match.v, match.mask, match.is_causal, match.scale, match.dropout_p),
        )
    node.meta = {**match.output.meta, "spelling": match.rule}
    match.output.replace_all_uses_with(node)
    leaving = next(item for item in graph.nodes if item.op == "output")
    for weights in match.weights:
        if leaving in weights.users:
            leaving.args = (tuple(None if item is weights else item for item in _returned(leaving)),)
    return node


def _returned(output: Node) -> tuple[Any, ...]:
    """The values a graph returns, as a flat tuple."""
    (values,) = output.args
    assert isinstance(values, tuple)
    return values
