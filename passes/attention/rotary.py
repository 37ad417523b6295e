"""Makes one call of the rotary positions of queries and keys, which are spelled operator by operator.

q·cos + cat([−q₂, q₁])·sin,  k·cos + cat([−k₂, k₁])·sin   →   rotary(q, k, cos, sin)[0],  rotary(q, k, cos, sin)[1]
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch.fx import Graph, Node

from retrofit.kernels.rotary.ops import rotary
from retrofit.passes.attention.arguments import arguments, is_call, shape
from retrofit.passes.attention.rule import calls, remove_dead

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotation:
    """x·cos + cat([−x₂, x₁])·sin, the value of ``node``."""

    node: Node
    x: Node
    cos: Node
    sin: Node


def fuse_rotary(graph: Graph) -> int:
    """Makes one call of every two rotations by the same angles; returns how many."""
    count = 0
    while (pair := _pair(graph)) is not None:
        _fuse(graph, *pair)
        count += 1
    if count:
        remove_dead(graph)
        graph.lint()
    return count


def rotation(node: Node) -> Rotation | None:
    """``node`` as a rotation of [B, H, T, D] by angles [B or 1, 1, T, D]; None if it is not one."""
    terms: list[Any] = list(node.args[:2])
    if arguments(node)["alpha"] != 1 or not all(is_call(term, aten.mul.Tensor) for term in terms):
        return None
    for plain, turned in (terms, terms[::-1]):
        for half, sin in (turned.args, turned.args[::-1]):
            x = _turned(half)
            if x is None or x not in plain.args:
                continue
            cos = plain.args[plain.args[0] is x]
            if _are_angles(cos, x) and _are_angles(sin, x):
                return Rotation(node, x, cos, sin)
    return None


def _turned(node: Any) -> Node | None:
    """The x of which ``node`` is cat([−x₂, x₁], −1); None if it is nothing of the kind."""
    if not is_call(node, aten.cat.default) or len(node.args[0]) != 2:
        return None
    negative, low = node.args[0]
    if not is_call(negative, aten.neg.default):
        return None
    high = negative.args[0]
    if not (is_call(low, aten.slice.Tensor) and is_call(high, aten.slice.Tensor)):
        return None
    x = low.args[0]
    sizes = shape(x)
    if (
        high.args[0] is not x
        or sizes is None
        or len(sizes) != 4
        or not isinstance(sizes[3], int)
        or sizes[3] % 2
    ):
        return None
    joined, *parts = (arguments(part) for part in (node, low, high))
    if any(values["dim"] not in (3, -1) for values in (joined, *parts)) or any(
        part["step"] != 1 for part in parts
    ):
        return None
    ends = [
        (part["start"] or 0, sizes[3] if part["end"] is None else min(part["end"], sizes[3]))
        for part in parts
    ]
    return x if ends == [(0, sizes[3] // 2), (sizes[3] // 2, sizes[3])] else None


def _are_angles(node: Any, x: Node) -> bool:
    sizes, own = shape(node), shape(x)
    return sizes is not None and own is not None and len(sizes) == 4 and (sizes[1], sizes[3]) == (1, own[3])


def _pair(graph: Graph) -> tuple[Rotation, Rotation] | None:
    order = {node: number for number, node in enumerate(graph.nodes)}
    found = [known for node in calls(graph, aten.add.Tensor) if (known := rotation(node)) is not None]
    for first, second in combinations(found, 2):
        alike = (first.cos, first.sin) == (second.cos, second.sin)
        # Both are computed where the second one is; nothing else moves.
        if alike and all(order[user] > order[second.node] for user in first.node.users):
            return first, second
    return None


def _fuse(graph: Graph, first: Rotation, second: Rotation) -> None:
    with graph.inserting_before(second.node):
        both = graph.call_function(rotary, (first.x, second.x, first.cos, first.sin))
        parts = [graph.call_function(operator.getitem, (both, place)) for place in range(2)]
    both.meta = {"val": tuple(rotation.node.meta.get("val") for rotation in (first, second))}
    for old, new in zip((first.node, second.node), parts, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
