"""How far the numbers reach that stand in the computation of a mask.

(i − j < 2200) & (i // 64 − j // 64 < 40)   →   {2200, 64, 2560}
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from retrofit.capture.evaluate import attribute
from retrofit.passes.attention.arguments import SIZE_ONLY, arguments, is_call, shape
from retrofit.passes.attention.axes import RESHAPES
from retrofit.passes.attention.scores import HIDDEN

aten = torch.ops.aten
LIMIT = 2**17  # what is larger stands for infinity
_LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.index_select.default)
_DIVISIONS = (
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    operator.floordiv,
    operator.truediv,
)
_SHIFTS = (
    aten.__rshift__.Scalar,
    aten.bitwise_right_shift.Tensor_Scalar,
    operator.rshift,
)
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar)
_REPEATS = (aten.repeat_interleave.self_int,)
# Arguments that say where something is done, or to how many, not from which index on.
_NO_INDICES = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "size", "sizes", "shape", "alpha"}
_NO_INDICES |= {"dtype", "layout", "device", "pin_memory", "memory_format", "implicit"}


def numbers_in(
    mask: Node, module: nn.Module, constants: Mapping[str, Any], learned: Mapping[str, Any]
) -> set[int]:
    """The indices or distances at which the computation of ``mask`` may do something else.

    A number that is compared reaches further where other numbers are added before, or where indices are divided.

    Args:
        mask: Of a normalised module.
        module: The module.
        constants: Tensors its forward makes, by name.
        learned: Its parameters, by name; what is looked up in one of them is added to scores and hides nothing.
    """
    nodes = list(_made_of(mask, learned))
    own = {node: _own(node, module, constants) for node in nodes}
    found: set[int] = set()
    for node in nodes:
        numbers, divisor = own[node]
        if not numbers and divisor == 1 and not _compares(node):
            continue
        before = set(_made_of(node, learned))
        within = sum(max(own[item][0], default=0) for item in before)
        reaches = {*numbers, divisor, max(within, 1) * _divided(node, own, {})}
        found |= {number for number in reaches if 2 < number < LIMIT}
    return found


def held_by(node: Node, module: nn.Module, constants: Mapping[str, Any]) -> Any:
    """What a ``get_attr`` node stands for."""
    target = str(node.target)
    return constants[target] if target in constants else attribute(module, target)


def _made_of(node: Node, learned: Mapping[str, Any]) -> Iterator[Node]:
    """What ``node`` is computed from, itself included: values, and the numbers that sizes are made with."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or is_call(current, aten.sym_size.int):
            continue
        seen.add(current)
        yield current
        pending += _inputs(current, learned)


def _inputs(node: Node, learned: Mapping[str, Any]) -> Iterable[Node]:
    if node.op == "call_module":
        return ()
    if is_call(node, *_LOOKUPS) and any(
        item.op == "get_attr" and item.target in learned for item in node.all_input_nodes
    ):
        return ()
    if node.op == "call_function" and node.target in SIZE_ONLY:
        return [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.SymInt)]
    return node.all_input_nodes


def _own(node: Node, module: nn.Module, constants: Mapping[str, Any]) -> tuple[set[int], int]:
    """The numbers that ``node`` brings in, and what it divides indices by."""
    if node.op == "get_attr":
        value = held_by(node, module, constants)
        single = isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool
        return (set(_whole([value.item()])) if single else set()), 1
    if node.op != "call_function" or is_call(node, *RESHAPES):
        return set(), 1
    if isinstance(node.target, torch._ops.OpOverload):
        given = [value for name, value in arguments(node).items() if name not in _NO_INDICES]
    else:
        given = [*node.args, *node.kwargs.values()]
    plain = [
        value
        for value in pytree.tree_leaves(given)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    numbers = set(_whole(plain))
    if is_call(node, *_DIVISIONS, *_REPEATS):
        return set(), max(numbers, default=1)
    if is_call(node, *_SHIFTS):
        return set(), 2 ** min(max(numbers, default=0), 20)
    if is_call(node, *_FACTORS):
        # A distance times 1/64 is one divided by 64.
        return set(), max(
            (math.ceil(1 / abs(value)) for value in plain if 1 / LIMIT < abs(value) < 1), default=1
        )
    return numbers, 1


def _compares(node: Node) -> bool:
    """Whether ``node`` makes a mask of numbers."""
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.bool
        and any(
            item.meta["val"].dtype != torch.bool for item in node.all_input_nodes if shape(item) is not None
        )
    )


def _whole(numbers: Iterable[float]) -> Iterator[int]:
    for number in numbers:
        # A large negative one that is no integer hides.
        if 2 < abs(number) < LIMIT and not (isinstance(number, float) and number <= HIDDEN):
            yield math.ceil(abs(number))


def _divided(node: Node, own: Mapping[Node, tuple[set[int], int]], known: dict[Node, int]) -> int:
    """What the indices in ``node`` are divided by, one after the other."""
    if node not in known:
        before = (_divided(item, own, known) for item in node.all_input_nodes if item in own)
        known[node] = own[node][1] * max(before, default=1)
    return known[node]
