"""Evaluates one node of a captured graph on real values, and says what it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import SIZE_ONLY


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


def attribute(module: nn.Module, path: str) -> Any:
    """Returns the attribute at a dotted ``path``."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
