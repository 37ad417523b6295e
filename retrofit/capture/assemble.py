"""Writes the Python source of a site from its normalised graph.

graph with one retrofit::attention  →  forward(self, *tensors, context) that calls self.attend in its place
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from retrofit.capture.observe import Normalized
from retrofit.passes.attention.bias import HIDDEN
from retrofit.passes.attention.rewrite import target_call
from retrofit.passes.attention.rule import remove_dead


@dataclass(frozen=True)
class Source:
    """A function of a site.

    Attributes:
        code: Its Python source.
        inputs: The names of the tensors it takes.
        results: What it returns, None where weights were.
    """

    code: str
    inputs: tuple[str, ...]
    results: tuple[Any, ...]


def assembled(normalized: Normalized, *, keep_mask: bool, biased: bool = False, kind: str = "self") -> Source:
    """Returns the forward of a site.

    Args:
        normalized: The captured module; stays as it is.
        keep_mask: Whether the graph computes the mask and hands it to the target call.
        biased: Whether the mask also has a bias, which is carried over elsewhere.
        kind: ``cross`` takes the mask as it is, and leaves keys and values to a function of their own.
    """
    graph, attention = _copied(normalized)
    assert normalized.attention is not None
    if keep_mask and kind == "self":
        _as_visible(graph, attention, normalized.attention, biased=biased)
    returned = _output(graph).args[0]
    assert isinstance(returned, tuple)
    target_call(graph, attention, keep_mask=keep_mask, keep_keys=kind == "self")
    source = _source(graph, returned)
    return Source(source.code, source.inputs[:-1], returned)  # the last one is the context


def assembled_keys(normalized: Normalized) -> Source:
    """Returns the function that computes the keys and values of a site alone."""
    graph, attention = _copied(normalized)
    results = tuple(attention.args[1:3])
    output = _output(graph)
    output.args = (results,)
    remove_dead(graph)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return _source(graph, results)


def _copied(normalized: Normalized) -> tuple[Graph, Node]:
    """A copy of the graph, and its attention in it."""
    graph = Graph()
    copied: dict[Node, Node] = {}
    graph.output(graph.graph_copy(normalized.captured.graph, copied))
    assert normalized.attention is not None
    attention = copied[normalized.attention]
    attention.meta = dict(normalized.attention.meta)
    return graph, attention


def _output(graph: Graph) -> Node:
    return next(node for node in graph.nodes if node.op == "output")


def _source(graph: Graph, results: tuple[Any, ...]) -> Source:
    code = graph.python_code("self")
    names = tuple(node.name for node in graph.nodes if node.op == "placeholder")
    return Source(_format_import_block(code.globals, sys_importer) + "\n" + code.src, names, results)


def _as_visible(graph: Graph, attention: Node, of_capture: Node, *, biased: bool) -> None:
    """Turns an additive mask, known to hide and no more but for a bias, into a boolean one: whatever hides, hides all."""
    mask, value = attention.args[3], of_capture.args[3]
    if isinstance(value, Node) and isinstance(mask, Node) and value.meta["val"].is_floating_point():
        with graph.inserting_before(attention):
            test = (torch.ops.aten.gt.Scalar, HIDDEN) if biased else (torch.ops.aten.eq.Scalar, 0)
            visible = graph.call_function(test[0], (mask, test[1]))
        attention.args = (*attention.args[:3], visible, *attention.args[4:])
