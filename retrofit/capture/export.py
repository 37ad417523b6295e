"""Turns one recorded call of a module into a graph with its live children as ``call_module`` leaves.

module + call  →  torch.export of flat tensors, dynamic batch and length, children opaque
               →  Captured(graph, inputs, output)
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from retrofit.capture.call import (
    CACHE_NAMES,
    LeafPath,
    Signature,
    is_cache,
    rebuild,
    same_tensors,
    tensor_leaves,
)
from retrofit.capture.dynamic import batches, dynamic, keys_of_queries
from retrofit.capture.failed import failure
from retrofit.capture.kept import restored
from retrofit.capture.record import OwnerCall, slow_path
from retrofit.capture.standin import (
    CHILD,
    TENSOR,
    TracedCalls,
    fixed_causality,
    is_tensor_slot,
    stand_ins,
)
from retrofit.errors import CaptureError
from retrofit.passes.attention.rule import remove_dead


@dataclass(frozen=True)
class Captured:
    """A module's forward as a graph.

    Attributes:
        graph: Placeholders are tensors; ``get_attr`` and ``call_module`` name what lives on the module.
        inputs: Where each placeholder's value is found in a call, by placeholder name.
        output: The module's output, ``TENSOR`` where the graph's next output goes.
        constants: Tensors the forward made once, by the attribute name the graph uses.
        same: Arguments that must be the same tensor as another one, as they were in the call.
        rows: Inputs whose one row stands for every row of the batch; the graph takes them expanded.
        unfit: What it returns besides that no graph can give; None if there is no such thing.
        conditions: What export found out about the sizes on the way, each a guard of torch's.
    """

    graph: Graph
    inputs: Mapping[str, LeafPath]
    output: Any
    constants: Mapping[str, Tensor]
    same: Mapping[LeafPath, LeafPath]
    rows: tuple[LeafPath, ...]
    unfit: str | None
    conditions: tuple[Any, ...]

    def sizes(self) -> dict[LeafPath, tuple[int | None, ...]]:
        """The sizes that the graph is made for, of each input, also where it reads nothing else of it.

        None stands for any size. One is taken for a broadcast, and two may be the rows of the example.
        """
        return {
            self.inputs[node.name]: tuple(
                size if isinstance(size, int) and size > 2 else None for size in node.meta["val"].shape
            )
            for node in self.graph.nodes
            if node.op == "placeholder"
        }


class _FlatCall(nn.Module):
    """Calls the module from a flat list of tensors and returns a flat list."""

    def __init__(
        self,
        site: nn.Module,
        values: dict[str, Any],
        paths: list[LeafPath],
        same: Mapping[LeafPath, LeafPath],
        alone: bool,
    ) -> None:
        super().__init__()
        self.site = site
        object.__setattr__(self, "_call", (values, paths, same, alone))

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        values, paths, same, alone = self.__dict__["_call"]
        for place, dim in batches(tensors):
            torch._check(tensors[place].shape[dim] == tensors[0].shape[dim])
        for place in keys_of_queries(tensors) if alone else ():
            torch._check(tensors[place].shape[2] == tensors[0].shape[2])
        given = dict(zip(paths, tensors, strict=True))
        given.update({path: given[first] for path, first in same.items()})
        found, spec = pytree.tree_flatten(self.site(**rebuild(values, given)))
        self.__dict__["_unfit"] = _unfit(self.site, found)
        template = [TENSOR if isinstance(leaf, Tensor) else emptied(leaf) for leaf in found]
        self.__dict__["_returned"] = pytree.tree_unflatten(template, spec)
        return [leaf for leaf in found if isinstance(leaf, Tensor)]


def _unfit(module: nn.Module, leaves: Sequence[Any]) -> str | None:
    """What among the results of ``module`` no graph can give: numbers that follow from sizes, and other objects."""
    for leaf in leaves:
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return f"{type(module).__name__}.forward returns a number that depends on the sizes of its inputs"
        plain = isinstance(leaf, (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device))
        if not plain and not is_record(leaf):
            return (
                f"{type(module).__name__}.forward returns a {type(leaf).__name__}, which is neither a tensor nor a "
                "tuple, dict or dataclass of tensors"
            )
    return None


def is_record(value: Any) -> bool:
    """Whether ``value`` is a dataclass, which torch takes for one leaf, whatever is in it."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def emptied(value: Any) -> Any:
    """``value``; of a dataclass a copy with None in the place of tensors, as of weights that nobody gets."""
    if not is_record(value):
        return value
    copied = copy.copy(value)
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        symbolic = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
        lost = any(isinstance(leaf, symbolic) for leaf in pytree.tree_leaves(item))
        object.__setattr__(copied, field.name, None if lost else emptied(item))
    return copied


def capture(module: nn.Module, call: OwnerCall, *, training: bool = False) -> Captured:
    """Exports ``module`` as it was called, in evaluation mode or as it is in training.

    Raises:
        CaptureError: If it cannot be exported, with the cause.
    """
    signature = Signature.of(module)
    values = without_cache(signature.bind(call.args, call.kwargs))
    tensors = tensor_leaves(values)
    if not tensors:
        raise CaptureError(f"{type(module).__name__} was called without tensors")
    same = same_tensors(values)
    paths = [path for path in tensors if path not in same]
    flat = _FlatCall(module, values, paths, same, call.alone)
    rows = tuple(path for path in paths if _is_one_row(tensors[path], tensors[paths[0]]))
    example = tuple(
        expanded(tensors[path].detach(), tensors[paths[0]]) if path in rows else tensors[path].detach()
        for path in paths
    )
    try:
        with (
            set_training(module, training),
            restored(module.modules()),
            _assigning(),
            torch.no_grad(),
            slow_path(),
            fixed_causality(),
            stand_ins(module, call.children) as traced,
        ):
            program = torch.export.export(flat, example, dynamic_shapes=(dynamic(example),), strict=False)
            conditions = _conditions(program)
            if any(_changes(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
                # It asserts all conditions again, those of torch's own code as well.
                again = (guard for guard in _conditions(program) if fixes_a_size(guard.expr))
                conditions = (*conditions, *again)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(failure(module, error)) from error
    returned, unfit = flat.__dict__["_returned"], flat.__dict__["_unfit"]
    captured = _as_graph(program, module, paths, traced, returned, same, rows)
    return replace(captured, unfit=unfit, conditions=conditions)


@contextmanager
def set_training(module: nn.Module, training: bool) -> Iterator[None]:
    """Has ``module`` and its children in training or evaluation mode for a while."""
    before = [(item, item.training) for item in module.modules()]
    for item, _ in before:
        item.training = training
    try:
        yield
    finally:
        for item, mode in before:
            item.training = mode


@contextmanager
def _assigning() -> Iterator[None]:
    """Has torch.export not warn of attributes that the module assigns: they are put back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        yield


def _is_one_row(tensor: Tensor, first: Tensor) -> bool:
    """Whether ``tensor`` holds the positions of a row, once for the whole batch of ``first``."""
    return not tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[0] == 1 < first.shape[0]


def expanded(tensor: Tensor, first: Tensor) -> Tensor:
    """``tensor`` with as many rows as ``first``."""
    return tensor.expand(first.shape[0], *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor


def symbolic(value: Any) -> list[torch.SymInt]:
    """The sizes in the value of a node that stand for any number."""
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


def fixes_a_size(condition: Any) -> bool:
    """Whether a condition makes a size a number."""
    return isinstance(condition, sympy.Eq) and any(side.is_number for side in condition.args)


def _conditions(program: torch.export.ExportedProgram) -> tuple[Any, ...]:
    sizes = (size for node in program.graph.nodes for size in symbolic(node.meta.get("val")))
    first = next(sizes, None)
    return () if first is None else tuple(first.node.shape_env.guards)


def _changes(node: Node) -> bool:
    """Whether ``node`` changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def without_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves caches out of a call; they are passed around the graph."""
    kept = {name: None if name in CACHE_NAMES or is_cache(value) else value for name, value in values.items()}
    if "use_cache" in kept:
        kept["use_cache"] = False
    return kept


def _as_graph(
    program: torch.export.ExportedProgram,
    module: nn.Module,
    paths: list[LeafPath],
    traced: TracedCalls,
    returned: Any,
    same: Mapping[LeafPath, LeafPath],
    rows: tuple[LeafPath, ...],
) -> Captured:
    signature = program.graph_signature
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
        raise CaptureError(
            f"{type(module).__name__}.forward changes a buffer or an input, which a shared graph cannot do"
        )
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    graph = Graph()
    copied: dict[Node, Node] = {}
    inputs: dict[str, LeafPath] = {}
    constants: dict[str, Tensor] = {}
    buffers = dict(module.named_buffers())
    user_inputs = iter(paths)
    deferred: list[tuple[Node, Any]] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                copied[node] = graph.placeholder(node.name)
                inputs[copied[node].name] = next(user_inputs)
                copied[node].meta = dict(node.meta)
            else:
                deferred.append((node, spec))
    for node, spec in deferred:
        target = str(spec.target)
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and target.startswith("site."):
            target = target[len("site.") :]
        else:
            value = program.constants[target]
            target = _live_name(module, value) or f"constant_{len(constants)}"
            if target.startswith("constant_"):
                constants[target] = value
        copied[node] = graph.get_attr(target)
        copied[node].meta = dict(node.meta)
        if target in constants and constants[target].numel() == 1:
            copied[node].meta["constant"] = constants[target].item()
        elif target in buffers and buffers[target].numel() == 1:
            copied[node].meta["held"] = buffers[target].item()  # it may hold another number some day
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            raise CaptureError(
                f"{type(module).__name__}.forward has a nested graph ({node.target}), as autocast or no_grad make"
            )
        if node.op == "output":
            tensors = list(pytree.tree_map(lambda n: copied.get(n, n), list(node.args[0])))
            copied[node] = graph.output(tuple(tensors))
        elif node.op == "call_function" and node.target is CHILD:
            copied[node] = _child_node(graph, module, node, copied, traced)
        elif _is_single_child(node):
            copied[node] = copied[node.args[0]]
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    _prefer_first(graph)
    remove_dead(graph)
    graph.lint()
    return Captured(graph, inputs, returned, constants, same, rows, None, ())


def _live_name(module: nn.Module, value: Any) -> str | None:
    named = [*module.named_parameters(), *module.named_buffers()]
    return next((name for name, tensor in named if tensor is value), None)


def _child_node(
    graph: Graph, module: nn.Module, node: Node, copied: Mapping[Node, Node], traced: TracedCalls
) -> Node:
    path, spec, given = traced.calls[node.args[1]]  # type: ignore[index]
    tensors = iter([copied[n] for n in node.args[0]])  # type: ignore[union-attr, index]
    args, kwargs = pytree.tree_unflatten(
        [next(tensors) if is_tensor_slot(leaf) else _number(graph, path, leaf) for leaf in given], spec
    )
    call = graph.call_module(path, args, kwargs)
    value = node.meta["val"]
    call.meta = {**node.meta, "val": value[0] if len(value) == 1 else value}
    call.meta["module_class"] = type(module.get_submodule(path))
    return call


def _number(graph: Graph, path: str, leaf: Any) -> Any:
    """What a child is given that is no tensor; a size becomes the node that holds it."""
    if not isinstance(leaf, torch.SymInt):
        return leaf
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == leaf.node.expr:
            return node
        if node.op == "placeholder" and isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == leaf.node.expr:
                    new = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    new.meta["val"] = leaf
                    return new
    raise CaptureError(f"{path} is called with a number that depends on more than the sizes of the inputs")


def _is_single_child(node: Node) -> bool:
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem":
        return False
    source = node.args[0]
    return isinstance(source, Node) and source.target is CHILD and len(source.meta["val"]) == 1


def _prefer_first(graph: Graph) -> None:
    """Reads sizes from the first input that has them, so that no other input, as a mask, is kept for its size."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.sym_size.int:
            continue
        source, size = node.args[0], str(node.meta["val"])
        earlier = inputs[: inputs.index(source)] if source in inputs else inputs[:1]
        for item in earlier:
            dims = [
                dim
                for dim, own in enumerate(item.meta["val"].shape)
                if not isinstance(own, int) and str(own) == size
            ]
            if dims and item is not source:
                with graph.inserting_after(item):
                    new = graph.call_function(torch.ops.aten.sym_size.int, (item, dims[0]))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                break
