"""Evaluates one node of a captured graph on real values, and says what it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import nn
from torch.fx import Graph, Node

from retrofit.errors import CaptureError
from retrofit.passes.attention.arguments import SIZE_ONLY, shape


def ancestors(node: Node, *, through_sizes: bool = True) -> set[Node]:
    """Every node ``node`` is computed from, itself included; without sizes only what gives it values."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        if not through_sizes and current.op == "call_function" and current.target in SIZE_ONLY:
            continue
        pending.extend(current.all_input_nodes)
    return found


def evaluate(
    graph: Graph, node: Node, module: nn.Module, values: Mapping[str, Any], constants: Mapping[str, Any]
) -> Any:
    """Returns the value of ``node`` for the placeholders' ``values``, with the live children of ``module``."""
    needed = ancestors(node)
    results: dict[Node, Any] = {}
    for current in graph.nodes:
        if current not in needed:
            continue
        args, kwargs = torch.fx.map_arg((current.args, current.kwargs), lambda n: results[n])
        if current.op == "placeholder":
            results[current] = values[current.name]
        elif current.op == "get_attr":
            target = str(current.target)
            results[current] = constants[target] if target in constants else attribute(module, target)
        elif current.op == "call_module":
            results[current] = module.get_submodule(str(current.target))(*args, **kwargs)
        else:
            results[current] = current.target(*args, **kwargs)
    return results[node]


def symbols_of(graph: Graph, values: Mapping[str, Any]) -> dict[sympy.Symbol, int]:
    """What the symbols in the placeholders' shapes are for the tensors ``values``."""
    known: dict[sympy.Symbol, int] = {}
    for node in graph.nodes:
        own = shape(node) if node.op == "placeholder" else None
        for size, actual in zip(own or (), values.get(node.name, torch.empty(0)).shape, strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                known.setdefault(size.node.expr, actual)
    return known


def input_dims(graph: Graph) -> dict[sympy.Symbol, tuple[str, int]]:
    """The placeholder and the dimension of it that each symbol stands for; the first that has it."""
    found: dict[sympy.Symbol, tuple[str, int]] = {}
    for node in graph.nodes:
        for dim, size in enumerate(shape(node) or () if node.op == "placeholder" else ()):
            if isinstance(size, torch.SymInt) and size.node._expr.is_Symbol:
                found.setdefault(size.node._expr, (node.name, dim))
    return found


def concrete(sizes: tuple[Any, ...], known: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
    """``sizes`` as numbers.

    Raises:
        CaptureError: If one is made of symbols that are not among ``known``.
    """
    result = []
    for size in sizes:
        value = size if isinstance(size, int) else size.node.expr.subs(known)
        if not isinstance(value, int) and not value.is_number:
            raise CaptureError(f"the size {size} does not follow from the sizes of the inputs")
        result.append(int(value))
    return tuple(result)


def evaluate_for(
    graph: Graph,
    node: Node,
    module: nn.Module,
    known: Mapping[sympy.Symbol, int],
    constants: Mapping[str, Any],
) -> Any:
    """Returns the value of ``node``, which no input gives values to, for other sizes of the inputs."""
    needed = ancestors(node, through_sizes=False)
    results: dict[Node, Any] = {}
    last = {item: current for current in graph.nodes if current in needed for item in current.all_input_nodes}

    def value(item: Node) -> Any:
        if item in results:
            return results[item]
        like = item.meta["val"]
        if isinstance(like, torch.SymInt):
            return concrete((like,), known)[0]
        return torch.empty(concrete(tuple(like.shape), known), dtype=like.dtype, device=like.device)

    for current in graph.nodes:
        if current not in needed:
            continue
        args, kwargs = torch.fx.map_arg((current.args, current.kwargs), value)
        if isinstance(current.meta.get("val"), torch.SymInt):
            (results[current],) = concrete((current.meta["val"],), known)
        elif current.op == "get_attr":
            target = str(current.target)
            results[current] = constants[target] if target in constants else attribute(module, target)
        elif current.op == "call_module":
            results[current] = module.get_submodule(str(current.target))(*args, **kwargs)
        else:
            results[current] = current.target(*args, **kwargs)
        for item in current.all_input_nodes:
            if last[item] is current and item is not node:
                results.pop(item, None)  # of many tokens, it is large
    return results[node]


def attribute(module: nn.Module, path: str) -> Any:
    """Returns the attribute at a dotted ``path``."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
