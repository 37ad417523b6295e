"""A model of many equal layers, translated by three of them.

    layers 0, 1, 2  ──translate──▶  graph  ──unroll──▶  layers 0, 1, 2, 3, …, n − 1

Layer 2 of the graph has to be layer 1 moved on by one: the same nodes in the same order, each input the same value,
the counterpart of what layer 1 reads, or layer 1's own. Then layer 3 is layer 2 moved on, and so on to the last.
Translating takes a time per layer that copying does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from retrofit.capture.site_plan import SitePlan

TRANSLATED = 3
"""Layers that are translated: one to start, one to repeat, and one to see how it repeats."""

_FROM = TRANSLATED - 1
_SCOPES = "pkg.torch.onnx.name_scopes"
_SMALL = 4096


@dataclass(frozen=True)
class Layers:
    """Equal layers of a model.

    Attributes:
        path: Where the list of them is.
        modules: The list.
        config: The model's configuration, which says how many there are.
    """

    path: str
    modules: nn.ModuleList
    config: Any

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Meanwhile the model has only the first ``TRANSLATED`` of them."""
        modules, count = self.modules._modules, len(self.modules)
        changed = {
            name: value
            for name, value in vars(self.config).items()
            if name == "num_hidden_layers" or (isinstance(value, list) and len(value) == count)
        }
        vars(self.modules)["_modules"] = dict(list(modules.items())[:TRANSLATED])
        for name, value in changed.items():
            vars(self.config)[name] = value[:TRANSLATED] if isinstance(value, list) else TRANSLATED
        try:
            yield
        finally:
            vars(self.modules)["_modules"] = modules
            vars(self.config).update(changed)


def equal_layers(model: nn.Module) -> Layers | None:
    """The list of a model's layers if they differ in nothing but their weights, and are many."""
    config = getattr(model, "config", None)
    count = vars(config).get("num_hidden_layers", 0) if config is not None else 0
    if count <= TRANSLATED:
        return None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            first = _description(module[0])
            alike = all(_description(layer) == first for layer in module)
            return Layers(path, module, config) if alike else None
    return None


def unroll(graph: ir.Graph, prefix: str, count: int, weights: Mapping[str, Tensor]) -> bool:
    """Puts layers ``TRANSLATED`` … ``count − 1`` into ``graph``.

    Args:
        graph: The translation of the first layers.
        prefix: Name of the layers' list in the names of initializers and scopes.
        count: Layers of the whole model.
        weights: Its parameters and buffers under the names of the initializers.

    Returns:
        Whether layer 2 is layer 1 moved on; if not, nothing was done.
    """
    repeat = _repeat(graph, prefix)
    if repeat is None or any(
        repeat.moved(value, i) not in weights
        for value in repeat.initializers
        for i in range(TRANSLATED, count)
    ):
        return False
    end, before, made = repeat.nodes[-1], dict[ir.Value, ir.Value](), dict[ir.Value, ir.Value]()
    for i in range(TRANSLATED, count):
        before, made = made, {}
        for value in repeat.initializers:
            name = repeat.moved(value, i)
            made[value] = _like(value, name, TorchTensor(weights[name], name))
            graph.register_initializer(made[value])
        for value in repeat.inputs:
            made[value] = _like(value, repeat.moved(value, i))
            graph.inputs.append(made[value])
        for earlier, later in repeat.carried.items():
            made[earlier] = before.get(later, later)
        copies = [_copied(node, i, made) for node in repeat.nodes]
        for value in repeat.outputs:
            made[value].name = repeat.moved(value, i)
            graph.outputs.append(made[value])
        graph.insert_after(end, copies)
        end = copies[-1]
    for node, index in repeat.behind:
        last = node.inputs[index]
        assert last is not None
        node.replace_input_with(index, made[last])
    graph.sort()
    return True


@dataclass(frozen=True)
class _Repeat:
    """How layer 2 of a graph follows from layer 1.

    Attributes:
        prefix: Of the layers' initializers and scopes.
        nodes: Layer 2.
        carried: Values of layer 1 that layer 2 reads, and what a layer 3 reads in their place.
        initializers: Weights of layer 2.
        inputs: Inputs of the graph that layer 2 reads.
        outputs: Outputs of the graph that layer 2 makes.
        behind: Where nodes that are in no layer read layer 2: for them it is the last.
    """

    prefix: str
    nodes: list[ir.Node]
    carried: dict[ir.Value, ir.Value]
    initializers: list[ir.Value]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    behind: list[tuple[ir.Node, int]]

    def moved(self, value: ir.Value, layer: int) -> str:
        """Name of the counterpart in ``layer`` of a value of layer 2."""
        return _moved(value, self.prefix, _FROM, layer)


def _repeat(graph: ir.Graph, prefix: str) -> _Repeat | None:
    by_layer: dict[int, list[ir.Node]] = {i: [] for i in range(TRANSLATED)}
    for node, layer in _owners(graph, prefix).items():
        by_layer[layer].append(node)
    first, second = by_layer[_FROM - 1], by_layer[_FROM]
    if not second or len(first) != len(second):
        return None
    later = {
        a: b
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one.outputs, two.outputs, strict=False)
    }
    own = set(later.values())
    carried: dict[ir.Value, ir.Value] = {}
    initializers: dict[ir.Value, None] = {}
    inputs: dict[ir.Value, None] = {}
    for one, two in zip(first, second, strict=True):
        if not _same_operation(one, two):
            return None
        for a, b in zip(one.inputs, two.inputs, strict=True):
            if a is b or (a is not None and a in later and later[a] is b):
                continue
            if a is None or b is None or a in later or b in own:
                return None
            if b in later:
                carried[b] = later[b]
            elif b.is_initializer() and b.name == _moved(a, prefix, _FROM - 1, _FROM):
                initializers[b] = None
            elif b.is_graph_input() and b.name == _moved(a, prefix, _FROM - 1, _FROM):
                inputs[b] = None
            elif not _same_constant(a, b):
                return None
    outputs = [value for value in graph.outputs if value in own]
    if any(f".{_FROM}." not in (value.name or "") for value in outputs):
        return None
    inside = {*first, *second}
    if any(use.node not in inside for value in later for use in value.uses()):
        return None
    behind = [(use.node, use.idx) for value in own for use in value.uses() if use.node not in inside]
    ordered = [value for value in graph.inputs if value in inputs]
    return _Repeat(prefix, second, carried, list(initializers), ordered, outputs, behind)


def _owners(graph: ir.Graph, prefix: str) -> dict[ir.Node, int]:
    """The layer of each node, in the order of the graph; nodes that are in none are left out.

    What serves only one layer or its outputs belongs to it wherever it is written.
    """
    scope = re.compile(rf"'{re.escape(prefix)}\.(\d+)[.']")
    owner: dict[ir.Node, int] = {}
    for node in reversed(graph):
        found = scope.search(node.metadata_props.get(_SCOPES, ""))
        if found is not None:
            owner[node] = int(found[1])
            continue
        served = {owner.get(use.node) for value in node.outputs for use in value.uses()}
        served |= {_layer_of_output(value) for value in node.outputs if value.is_graph_output()}
        (only, *others) = served or {None}
        if only is not None and not others:
            owner[node] = only
    return {node: owner[node] for node in graph if node in owner}


def _layer_of_output(value: ir.Value) -> int | None:
    kind, _, rest = (value.name or "").partition(".")
    return int(rest.split(".")[0]) if kind == "present" else None


def _moved(value: ir.Value, prefix: str, layer: int, to: int) -> str:
    name = value.name or ""
    for begin in (f"{prefix}.", "past_key_values.", "present."):
        if name.startswith(f"{begin}{layer}."):
            return f"{begin}{to}." + name[len(f"{begin}{layer}.") :]
    return name


def _same_operation(one: ir.Node, two: ir.Node) -> bool:
    same = one.op_identifier() == two.op_identifier() and one.attributes.keys() == two.attributes.keys()
    same = same and len(one.inputs) == len(two.inputs) and len(one.outputs) == len(two.outputs)
    return same and all(
        _same_attribute(one.attributes[name], two.attributes[name]) for name in one.attributes
    )


def _same_attribute(one: ir.Attr, two: ir.Attr) -> bool:
    if one.type != two.type or one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False
    if one.type == ir.AttributeType.TENSOR:
        return _same_tensor(one.as_tensor(), two.as_tensor())
    return bool(one.value == two.value)


def _same_constant(one: ir.Value, two: ir.Value) -> bool:
    a, b = one.const_value, two.const_value
    if a is not None and b is not None:
        return _same_tensor(a, b)
    first, second = one.producer(), two.producer()
    if first is None or second is None or first.op_type != "Constant" or second.op_type != "Constant":
        return False
    return _same_operation(first, second)


def _same_tensor(one: ir.TensorProtocol, two: ir.TensorProtocol) -> bool:
    if one.dtype != two.dtype or tuple(one.shape) != tuple(two.shape) or one.size > _SMALL:
        return False
    return one.tobytes() == two.tobytes()


def _like(value: ir.Value, name: str, content: ir.TensorProtocol | None = None) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=content)


def _copied(node: ir.Node, layer: int, made: dict[ir.Value, ir.Value]) -> ir.Node:
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else made.get(value, value) for value in node.inputs],
        node.attributes.values(),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=f"{node.name}.{layer}",
        metadata_props=dict(node.metadata_props),
    )
    copy.meta.update(node.meta)
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.shape, new.type = f"{old.name}.{layer}", old.shape, old.type
        made[old] = new
    return copy


def _description(layer: nn.Module) -> Any:
    """All of a layer but what its weights hold, and where it stands."""
    return [
        (
            name,
            type(module),
            [(key, _shape(value)) for key, value in (*module._parameters.items(), *module._buffers.items())],
            [list(map(id, hooks.values())) for hooks in (module._forward_hooks, module._forward_pre_hooks)],
            {
                key: _described(value)
                for key, value in vars(module).items()
                if not key.startswith("_")
                and key not in ("layer_idx", "layer_id", "path", "training", "fingerprint")
            },
        )
        for name, module in layer.named_modules()
    ]


def _shape(value: Tensor | None) -> Any:
    return None if value is None else (tuple(value.shape), value.dtype)


def _described(value: Any) -> Any:
    if isinstance(value, SitePlan):
        parts = (value.source, value.mask, value.scale, value.keep_mask, value.heads, value.kv_heads)
        return (*parts, [(name, _described(constant)) for name, constant in value.constants])
    if isinstance(value, Tensor):
        return _shape(value), value.tolist()
    if isinstance(value, dict):
        return {key: _described(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_described(each) for each in value]
    return value
