"""The custom nodes of an exported model, and the functions that give them their meaning.

    torch.ops.retrofit.hsa_attention(q, k, v, …)      a call in the exported program
      ↓ opaque_translations, while torch.onnx translates
    ai.retrofit::HSAAttention(q, k, v, …)  {window=512, …}
      ↓ add_functions
    the same node, and a function of that name whose body is the operator's blocked PyTorch implementation,
    exported with the call's attributes. Calls with equal attributes and input types share one function; the
    overload name of a node tells which.

A runtime that has a kernel of that name uses it; any other runs the body. The translation leaves the node
opaque because a function known to the exporter would be inlined by its version conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch import Tensor

from retrofit.onnx.translate import as_function, translate

DOMAIN = "ai.retrofit"
VERSION = 1

_MIXED = (
    "tensor(float)",
    "tensor(float16)",
    "tensor(bfloat16)",
    "tensor(double)",
    "tensor(int64)",
    "tensor(int32)",
    "tensor(uint8)",
)


@dataclass(frozen=True)
class CustomNode:
    """How an operator of torch becomes a node.

    Attributes:
        op: The operator, for example ``torch.ops.retrofit.hsa_attention.default``.
        name: Name of the node's type.
        body: The operator's implementation in a form that ``torch.export`` takes; same signature.
        hidden: Arguments that are no attributes of the node, because they choose how and not what to compute.
        outputs: Number of outputs by the arguments, for an operator that returns a list or more than the node;
            None for as many as the operator's schema says.
        inner: How operators that the body calls, other than those of torch, become nodes.
    """

    op: Any
    name: str
    body: Callable[..., Any]
    hidden: tuple[str, ...] = ("implementation",)
    outputs: Callable[[Mapping[str, Any]], int] | None = None
    inner: Mapping[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)


def opaque_translations(nodes: Sequence[CustomNode]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns the ``custom_translation_table`` that keeps every call of ``nodes`` as one opaque node."""
    return {node.op: _translation(node) for node in nodes}


def add_functions(
    model: ir.Model, nodes: Sequence[CustomNode], opset: int, done: Callable[[], None] | None = None
) -> int:
    """Adds to ``model``, as the exporter returned it, the function that each custom node calls.

    Returns:
        The number of custom nodes.
    """
    known = {node.op: node for node in nodes}
    overloads: dict[tuple[Any, ...], str] = {}
    count = 0
    for placed in list(model.graph.all_nodes()):
        if placed.domain != DOMAIN:
            continue
        count += 1
        call = placed.meta["node"]
        node = known[call.target]
        arguments = _arguments(call)
        inputs = list(_flatten(node.op, arguments))
        for index, (_, value) in enumerate(inputs):
            if value is None and index < len(placed.inputs):  # those at the end are left out
                placed.replace_input_with(index, None)
        key = (node.name, *_attributes(node, arguments).items(), *(_type(value) for _, value in inputs))
        if key not in overloads:
            alike = sum(existing[0] == node.name for existing in overloads)
            overloads[key] = f"v{alike}"
            function = _function(node, arguments, overloads[key], opset)
            model.functions[function.identifier()] = function
            if done is not None:
                done()
        placed.overload = overloads[key]
        placed.version = None
    if count:
        model.graph.opset_imports[DOMAIN] = VERSION
    return count


def _translation(node: CustomNode) -> Callable[..., Any]:
    def translate(*args: Any, **kwargs: Any) -> Any:
        arguments = _bind(node.op, args, kwargs)
        inputs = [value for _, value in _flatten(node.op, arguments)]
        while inputs and inputs[-1] is None:
            inputs.pop()
        returns = len(node.op._schema.returns) if node.outputs is None else node.outputs(arguments)
        result = _op_type(node, returns)(*inputs, **_attributes(node, arguments))
        return [result] if node.outputs is not None and returns == 1 else result

    return translate


def _op_type(node: CustomNode, returns: int) -> values.Op:
    """The node's type as the exporter wants it: any inputs, the operator's attributes, as many outputs."""
    schema = node.op._schema
    parameter = onnx.defs.OpSchema.FormalParameter
    kinds = {"int": "INT", "float": "FLOAT", "bool": "INT", "str": "STRING", "List[int": "INTS"}
    kind = onnx.defs.OpSchema.AttrType
    return values.Op(
        values.Opset(DOMAIN, VERSION),
        node.name,
        onnx.defs.OpSchema(
            node.name,
            DOMAIN,
            VERSION,
            inputs=[
                parameter(
                    "inputs",
                    "T",
                    param_option=onnx.defs.OpSchema.FormalParameterOption.Variadic,
                    is_homogeneous=False,
                )
            ],
            outputs=[parameter(f"out_{i}", f"T{i}") for i in range(returns)],
            type_constraints=[
                ("T", list(_MIXED), ""),
                *((f"T{i}", list(_MIXED), "") for i in range(returns)),
            ],
            attributes=[
                onnx.defs.OpSchema.Attribute(
                    argument.name,
                    getattr(kind, kinds[str(argument.type).removeprefix("Optional[").removesuffix("]")]),
                    "",
                    required=False,
                )
                for argument in schema.arguments
                if not _is_tensor(argument) and argument.name not in node.hidden
            ],
        ),
    )


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _bind(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = {}
    for index, argument in enumerate(op._schema.arguments):
        if argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif index < len(args):
            bound[argument.name] = args[index]
        else:
            bound[argument.name] = argument.default_value
    return bound


def _flatten(op: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the node's inputs: single tensors first, absent ones as None, then the members of the lists."""
    tensors = [argument for argument in op._schema.arguments if _is_tensor(argument)]
    for argument in tensors:
        if not isinstance(arguments[argument.name], list | tuple):
            yield argument.name, arguments[argument.name]
    for argument in tensors:
        if isinstance(arguments[argument.name], list | tuple):
            for index, member in enumerate(arguments[argument.name]):
                yield f"{argument.name}_{index}", member


def _attributes(node: CustomNode, arguments: Mapping[str, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for argument in node.op._schema.arguments:
        value = arguments[argument.name]
        if _is_tensor(argument) or argument.name in node.hidden:
            continue
        if isinstance(value, list | tuple):
            if value:
                attributes[argument.name] = tuple(value)
        elif value is not None:
            attributes[argument.name] = int(value) if isinstance(value, bool) else value
    return attributes


def _arguments(call: torch.fx.Node) -> dict[str, Any]:
    """The arguments of a call in the exported program, tensors as the fake ones recorded there."""
    args, kwargs = torch.fx.map_arg((call.args, call.kwargs), lambda node: node.meta["val"])
    return _bind(call.target, args, kwargs)


def _type(value: Tensor | None) -> tuple[Any, ...] | None:
    if value is None:
        return None
    return value.dtype, *(size if isinstance(size, int) else None for size in value.shape)


def _function(node: CustomNode, arguments: Mapping[str, Any], overload: str, opset: int) -> ir.Function:
    inputs = list(_flatten(node.op, arguments))
    present = {name: value for name, value in inputs if value is not None}
    program = translate(
        _Body(node, arguments),
        {
            name: torch.zeros([_hint(size) for size in value.shape], dtype=value.dtype)
            for name, value in present.items()
        },
        {
            name: {
                axis: torch.export.Dim.DYNAMIC
                for axis, size in enumerate(value.shape)
                if not isinstance(size, int)
            }
            for name, value in present.items()
        },
        opset=opset,
        translations=node.inner,
    )
    function = as_function(program.model.graph, program.model.functions, (DOMAIN, node.name, overload))
    given = {value.name: value for value in function.inputs}
    function.inputs[:] = [given.get(name) or ir.Value(name=name) for name, _ in inputs]
    for name, value in _attributes(node, arguments).items():
        function.attributes.add(ir.convenience.convert_attribute(name, value))
    return function


def _hint(size: int | torch.SymInt) -> int:
    # Tracing takes sizes of 0 and 1 for constants, and a coarse level of the example may have no more.
    return size if isinstance(size, int) else max(int(size.node.hint), 2)


class _Body(torch.nn.Module):
    """The operator's implementation as a module of flat tensor arguments."""

    def __init__(self, node: CustomNode, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.node = node
        self.arguments = dict(arguments)

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        arguments: dict[str, Any] = {}
        for argument in self.node.op._schema.arguments:
            value = self.arguments[argument.name]
            if not _is_tensor(argument) or value is None:
                arguments[argument.name] = value
            elif isinstance(value, list | tuple):
                arguments[argument.name] = [tensors[f"{argument.name}_{i}"] for i in range(len(value))]
            else:
                arguments[argument.name] = tensors[argument.name]
        return self.node.body(**arguments)
