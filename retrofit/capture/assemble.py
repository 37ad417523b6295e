"""Writes the Python source of a site from its normalised graph.

graph with one retrofit::attention  →  forward(self, *tensors, context) that calls self.retrofit_attend in its place
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from retrofit.capture.observe import Normalized, mask_paths_of
from retrofit.handed_in import only_hides, same_slopes
from retrofit.passes.attention.added import added
from retrofit.passes.attention.bias import HIDDEN
from retrofit.passes.attention.masks import MaskClass
from retrofit.passes.attention.rewrite import target_call
from retrofit.passes.attention.rotary import fuse_rotary
from retrofit.passes.attention.rule import remove_dead
from retrofit.passes.attention.scores import HIDDEN as HIDDEN_SCORE


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


def assembled(
    normalized: Normalized,
    *,
    keep_mask: bool,
    mask: MaskClass,
    kind: str = "self",
    hides: str | None = None,
) -> Source:
    """Returns the forward of a site.

    Args:
        normalized: The captured module; stays as it is.
        keep_mask: Whether the graph computes the mask and hands it to the target call.
        mask: What the mask was seen to do. A position bias is handed to the target call beside it.
        kind: ``cross`` takes the mask as it is, and leaves keys and values to a function of their own.
        hides: The placeholder of a mask that goes around the graph, where there is a position bias besides.
    """
    graph, attention = copied(normalized)
    bias = added(graph, attention, hides) if mask.biased else None
    if keep_mask and kind == "self":
        floor = HIDDEN if mask.slopes else HIDDEN_SCORE if mask.biased else None
        if floor is None and mask_paths_of(normalized):
            _checked(graph, attention, only_hides)
        elif mask.slopes:
            _checked(graph, attention, same_slopes, mask.slopes)
        _as_visible(graph, attention, floor)
    target_call(graph, attention, keep_mask=keep_mask, keep_keys=kind == "self", bias=bias)
    fuse_rotary(graph)
    returned = _output(graph).args[0]
    assert isinstance(returned, tuple)
    source = _source(graph, returned)
    return Source(source.code, source.inputs[:-1], returned)  # the last one is the context


def assembled_keys(normalized: Normalized) -> Source:
    """Returns the function that computes the keys and values of a site alone."""
    graph, attention = copied(normalized)
    return function_of(graph, tuple(attention.args[1:3]))


def function_of(graph: Graph, results: tuple[Any, ...]) -> Source:
    """Returns the function that computes ``results`` alone; ``graph`` becomes its graph."""
    _output(graph).args = (results,)
    remove_dead(graph)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return _source(graph, results)


def copied(normalized: Normalized) -> tuple[Graph, Node]:
    """A copy of the graph, and its attention in it."""
    graph, copies = copied_graph(normalized.captured.graph)
    assert normalized.attention is not None
    return graph, copies[normalized.attention]


def copied_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy of ``graph``, and what each of its nodes is there."""
    new, copies = Graph(), dict[Node, Node]()
    new.output(new.graph_copy(graph, copies))
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    return new, copies


def _output(graph: Graph) -> Node:
    return next(node for node in graph.nodes if node.op == "output")


def _source(graph: Graph, results: tuple[Any, ...]) -> Source:
    code = graph.python_code("self")
    names = tuple(node.name for node in graph.nodes if node.op == "placeholder")
    return Source(_format_import_block(code.globals, sys_importer) + "\n" + code.src, names, results)


def _checked(graph: Graph, attention: Node, check: Callable[..., Tensor], *known: Any) -> None:
    """Has every call check that an additive mask does what it was seen to do."""
    mask = attention.args[3]
    if isinstance(mask, Node) and mask.meta["val"].is_floating_point():
        with graph.inserting_before(attention):
            checked = graph.call_function(check, (mask, *known))
        checked.meta = dict(mask.meta)
        attention.args = (*attention.args[:3], checked, *attention.args[4:])


def _as_visible(graph: Graph, attention: Node, floor: float | None) -> None:
    """Turns an additive mask into a boolean one.

    Without a bias it is known to hide and no more, so that whatever hides, hides all; with one, what is at most
    ``floor`` hides.
    """
    mask = attention.args[3]
    if isinstance(mask, Node) and mask.meta["val"].is_floating_point():
        with graph.inserting_before(attention):
            test = (torch.ops.aten.eq.Scalar, 0) if floor is None else (torch.ops.aten.gt.Scalar, floor)
            visible = graph.call_function(test[0], (mask, test[1]))
        attention.args = (*attention.args[:3], visible, *attention.args[4:])
