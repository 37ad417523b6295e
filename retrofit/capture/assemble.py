"""Writes the Python source of a site from its normalised graph.

graph with one retrofit::attention  →  forward(self, *tensors, context) that calls self.attend in its place
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from retrofit.capture.observe import Normalized
from retrofit.passes.attention.bias import HIDDEN
from retrofit.passes.attention.rewrite import target_call


def assembled(
    normalized: Normalized, *, keep_mask: bool, biased: bool = False
) -> tuple[str, list[str], tuple[Any, ...]]:
    """Returns the source, the names of the inputs it takes, and its results, None where weights were.

    Args:
        normalized: The captured module; stays as it is.
        keep_mask: Whether the graph computes the mask and hands it to the target call.
        biased: Whether the mask also has a bias, which is carried over elsewhere.
    """
    graph = Graph()
    copied: dict[Node, Node] = {}
    returned = graph.graph_copy(normalized.captured.graph, copied)
    assert isinstance(returned, tuple)
    graph.output(returned)
    assert normalized.attention is not None
    attention = copied[normalized.attention]
    attention.meta = dict(normalized.attention.meta)
    if keep_mask:
        _as_visible(graph, attention, normalized.attention, biased=biased)
    target_call(graph, attention, keep_mask=keep_mask)
    code = graph.python_code("self")
    used = [node.name for node in graph.nodes if node.op == "placeholder"][:-1]
    return _format_import_block(code.globals, sys_importer) + "\n" + code.src, used, returned


def _as_visible(graph: Graph, attention: Node, of_capture: Node, *, biased: bool) -> None:
    """Turns an additive mask, known to hide and no more but for a bias, into a boolean one: whatever hides, hides all."""
    mask, value = attention.args[3], of_capture.args[3]
    if isinstance(value, Node) and isinstance(mask, Node) and value.meta["val"].is_floating_point():
        with graph.inserting_before(attention):
            test = (torch.ops.aten.gt.Scalar, HIDDEN) if biased else (torch.ops.aten.eq.Scalar, 0)
            visible = graph.call_function(test[0], (mask, test[1]))
        attention.args = (*attention.args[:3], visible, *attention.args[4:])
