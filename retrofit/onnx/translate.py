"""PyTorch to an ONNX graph, without the exporter's own talk.

module, named example inputs, dynamic axes  →  torch.onnx.ONNXProgram with these input names
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants_ir
from torch import Tensor


def translate(
    module: torch.nn.Module,
    inputs: Mapping[str, Tensor],
    dynamic: Mapping[str, Mapping[int, Any]],
    *,
    opset: int,
    output_names: Sequence[str] | None = None,
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    shrunk: bool = True,
) -> torch.onnx.ONNXProgram:
    """Returns ``module``, called with the one dict ``inputs``, as an ONNX program.

    Args:
        module: Its forward takes a dict of tensors.
        inputs: Example inputs by name; sizes of dynamic axes must not be 0 or 1.
        dynamic: Per input, the axes whose size may change.
        opset: Version of the standard operators.
        output_names: Names of the outputs.
        translations: How operators of torch that are not standard become nodes.
        shrunk: Whether to fold constants and to remove what is there twice.
    """
    with _quiet(), torch.no_grad():
        exported = torch.export.export(
            module,
            (dict(inputs),),
            dynamic_shapes=({name: dict(dynamic.get(name, {})) for name in inputs},),
            strict=False,
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=output_names,
            custom_translation_table=dict(translations or {}),
            verbose=False,
            optimize=False,
        )
    assert program is not None
    if shrunk:
        shrink(program.model)
    return program


def _unless_shared(node: ir.Node) -> bool | None:
    """Keeps the transposition of a weight that is used elsewhere too: folded, a tied embedding would be stored twice."""
    if node.op_type == "Transpose" and node.inputs[0] is not None and len(node.inputs[0].uses()) > 1:
        return False
    return None


def shrink(model: ir.Model) -> None:
    """Folds constants and removes what is there twice: a runtime reads a function once for every call of it.

    The exporter's own optimisation also tries hundreds of rewriting rules, for more time than all the rest takes.
    """
    fold_constants_ir(model, onnx_shape_inference=True, should_fold=_unless_shared)
    RemoveUnusedNodesPass()(model)
    remove_repetitions(model)


def remove_repetitions(model: ir.Model) -> None:
    """Keeps one of several equal constants and of several equal computations."""
    for step in (
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        LiftSubgraphInitializersToMainGraphPass(),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    ):
        step(model)


def as_function(
    graph: ir.Graph, functions: Mapping[ir.OperatorIdentifier, ir.Function], name: ir.OperatorIdentifier
) -> ir.Function:
    """Returns ``graph`` as the body of a function, its initializers turned into constants.

    Args:
        graph: The graph; it is taken over.
        functions: Functions that the graph calls; they are put in their calls' place.
        name: Domain, name and overload of the function.
    """
    model = ir.Model(graph, ir_version=10, functions=list(functions.values()))
    InlinePass()(model)
    graph = model.graph
    for part in (graph, *graph.subgraphs()):
        _constants(part)
    # onnxruntime confuses names inside a function's subgraphs with equal ones of the graph that calls it, and
    # takes symbolic sizes of one name for equal, also where one is the caller's.
    prefix = f"{name[1]}.{name[2]}."
    inner = [value for part in graph.subgraphs() for value in part.inputs]
    for value in [*inner, *(value for node in graph.all_nodes() for value in node.outputs)]:
        value.name = f"{prefix}{value.name}"
        value.shape = None
    return ir.Function(*name, graph=graph, attributes=())


def _constants(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        node = ir.node("Constant", [], {"value": value.const_value})
        constant = node.outputs[0]
        constant.shape, constant.type = value.shape, value.type
        value.replace_all_uses_with(constant, replace_graph_outputs=True)
        del graph.initializers[name]
        constant.name = name
        first = next(iter(graph), None)
        if first is None:
            graph.append(node)
        else:
            graph.insert_before(first, node)


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter reports each optional operator package that is not installed, and deprecations of its own.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
