"""Makes one attention of two that have the same weights, as differential attention is written.

attention(q, k, v1, …), attention(q, k, v2, …)   →   the halves of attention(q, k, cat([v1, v2], −1), …)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import arguments, shape
from retrofit.passes.attention.canonical import ATTENTION
from retrofit.passes.attention.layout import Editor
from retrofit.passes.attention.rule import calls
from retrofit.passes.attention.scores import depends_on
from retrofit.passes.attention.weights import same_computation

aten = torch.ops.aten
_NAMED = {
    "q": "queries",
    "k": "keys",
    "mask": "mask",
    "is_causal": "mask",
    "softcap": "softcap",
    "sinks": "sinks",
}


def merge_values(graph: Graph) -> int:
    """Merges what can be, in graph order; returns how often."""
    count = 0
    while (pair := _pair(list(calls(graph, ATTENTION)))) is not None:
        _merge(graph, *pair)
        count += 1
    return count


def differences(first: Node, second: Node) -> list[str]:
    """In what the weights of two canonical nodes differ, in words."""
    a, b = arguments(first), arguments(second)
    found = [_NAMED.get(name, name) for name in a if name != "v" and not same_computation(a[name], b[name])]
    if not found and (a["dropout_p"] or b["dropout_p"]):
        found = ["what they drop out"]
    if not found and depends_on(b["v"], first):
        found = ["their place: one attends to what comes of the other"]
    return list(dict.fromkeys(found))


def _pair(found: list[Node]) -> tuple[Node, Node] | None:
    for number, second in enumerate(found):
        for first in found[:number]:
            if not differences(first, second):
                return first, second
    return None


def _merge(graph: Graph, first: Node, second: Node) -> None:
    (q, k, v, *rest), other = first.args, second.args[2]
    assert isinstance(other, Node)
    _ahead(other, first)
    editor = Editor(graph, first)
    whole = editor.call(aten.cat.default, [v, other], -1)
    merged = editor.call(ATTENTION, q, k, whole, *rest)
    merged.meta = {**first.meta, "val": merged.meta["val"]}
    widths: list[Any] = [(shape(item) or ())[3] for item in (v, other)]
    parts = [(first, 0, widths[0]), (second, widths[0], sum(widths))]
    halves = [editor.call(aten.slice.Tensor, merged, 3, start, end) for _, start, end in parts]
    for (node, _, _), half in zip(parts, halves, strict=True):
        node.replace_all_uses_with(half)
        graph.erase_node(node)


def _ahead(node: Node, place: Node) -> None:
    """Moves ``node`` and what it is computed from before ``place``, which is not among it."""
    order = {item: number for number, item in enumerate(node.graph.nodes)}
    pending, late = [node], set()
    while pending:
        current = pending.pop()
        if order[current] > order[place] and current not in late:
            late.add(current)
            pending.extend(current.all_input_nodes)
    for item in sorted(late, key=order.__getitem__):
        place.prepend(item)
