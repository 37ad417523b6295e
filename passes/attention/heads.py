"""Folds repeated key and value heads back.

unsqueeze(2) → expand(group) → reshape, or repeat_interleave(group, 1)   →   the heads before it
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.fx import Node

from retrofit.passes.attention.arguments import arguments, is_call, shape

aten = torch.ops.aten
_RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.clone.default,
    aten.contiguous.default,
)


def unrepeated(node: Node) -> Node:
    """Returns the node whose heads ``node`` repeats, or ``node`` itself if it repeats none."""
    if is_call(node, aten.repeat_interleave.self_int):
        given = arguments(node)
        return given["self"] if given["dim"] in (1, -3) and len(shape(node) or ()) == 4 else node
    current: Any = node
    while is_call(current, *_RESHAPES):
        current = current.args[0]
    if not is_call(current, aten.expand.default):
        return node
    current = _without_slices(current.args[0])
    if not is_call(current, aten.unsqueeze.default) or current.args[1] not in (2, -3):
        return node
    source = _without_slices(current.args[0])
    before, after = shape(source), shape(node)
    if before is None or after is None or len(before) != 4 or len(after) != 4:
        return node
    same = _same(before[0], after[0]) and _same(before[2], after[2]) and _same(before[3], after[3])
    return source if same and isinstance(before[1], int) and after[1] % before[1] == 0 else node


def _same(a: object, b: object) -> bool:
    return str(a) == str(b)


def _without_slices(node: Any) -> Node:
    """Skips slices that take a whole dimension."""
    while is_call(node, aten.slice.Tensor):
        given = arguments(node)
        whole = given["start"] in (0, None) and given["end"] in (None, sys.maxsize) and given["step"] == 1
        if not whole:
            break
        node = given["self"]
    assert isinstance(node, Node)
    return node
