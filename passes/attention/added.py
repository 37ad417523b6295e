"""Splits what a mask adds to the scores from what it hides.

where(visible & mask, table[j − i], −∞)   →   table[j − i]
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import arguments, is_call, shape
from retrofit.passes.attention.axes import SAME
from retrofit.passes.attention.rule import Reject
from retrofit.passes.attention.scores import FILL, HIDDEN, WHERE, assigns, fill_of

aten = torch.ops.aten


def added(graph: Graph, attention: Node, hides: str | None) -> Node:
    """The node of what the mask of ``attention`` adds to visible scores; changes the graph.

    Args:
        graph: Of a normalised module.
        attention: Its canonical node, which has a mask.
        hides: The placeholder of a mask that hides and adds nothing; from now on it hides nothing either.

    Raises:
        Reject: If the mask adds nothing.
    """
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name == hides:
            _open(graph, node)
    mask = arguments(attention)["mask"]
    found = _visible_part(mask)
    if not isinstance(found, Node) or not found.meta["val"].is_floating_point():
        raise Reject(attention, "the mask adds nothing to the scores")
    return found


def _open(graph: Graph, mask: Node) -> None:
    """Puts a mask that hides nothing in the place of ``mask``."""
    value = mask.meta["val"]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    make = aten.new_zeros.default if value.is_floating_point() else aten.new_ones.default
    with graph.inserting_after(placeholders[-1]):
        whole = graph.call_function(make, (placeholders[0], [1] * value.dim()), {"dtype": value.dtype})
    whole.meta["val"] = value
    mask.replace_all_uses_with(whole, delete_user_cb=lambda user: not is_call(user, aten.sym_size.int))


def _visible_part(node: object) -> object:
    """``node`` behind the steps that set some of it to what hides, or that add nothing."""
    while isinstance(node, Node):
        if is_call(node, *SAME):
            node = node.args[0]
        elif (term := _beside_zero(node)) is not None:
            node = term
        elif (is_call(node, *FILL) or assigns(node)) and _hides(node.args[2]):
            node = node.args[0]
        elif is_call(node, *WHERE) and _hides(node.args[2]):
            node = node.args[1]
        elif is_call(node, *WHERE) and _hides(node.args[1]):
            node = node.args[2]
        else:
            return node
    return node


def _beside_zero(node: Node) -> Node | None:
    """What ``node`` adds to zeros, if it does nothing else."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    terms = [item for item in node.all_input_nodes if not is_call(item, aten.new_zeros.default)]
    return terms[0] if len(terms) == 1 and len(shape(terms[0]) or ()) == len(shape(node) or ()) else None


def _hides(value: object) -> bool:
    number = fill_of(value)
    return number is not None and number <= HIDDEN
