"""Stand-ins that keep child modules opaque while their parent is exported.

self.q_proj(x)   →   retrofit::child([x], call, sizes, ranks, dtypes)   →   call_module q_proj(x)

A child need not be traceable then: quantised linears, LoRA wrappers and transformers' ``Conv1D`` stay what
they are, hooks included, and a later exchange of the child takes effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retrofit.capture.record import ChildCall
from retrofit.errors import CaptureError


@torch.library.custom_op("retrofit::child", mutates_args=())
def _child(
    inputs: list[Tensor], call: int, sizes: Sequence[int], ranks: Sequence[int], dtypes: Sequence[int]
) -> list[Tensor]:
    raise CaptureError("retrofit::child stands for a module during export; it cannot be run")


@_child.register_fake
def _(
    inputs: list[Tensor], call: int, sizes: Sequence[int], ranks: Sequence[int], dtypes: Sequence[int]
) -> list[Tensor]:
    results, position = [], 0
    for rank, dtype in zip(ranks, dtypes, strict=True):
        results.append(inputs[0].new_empty(sizes[position : position + rank], dtype=DTYPES[dtype]))
        position += rank
    return results


TENSOR = "<tensor>"  # stands for a tensor among the leaves of a call or a result
CHILD = torch.ops.retrofit.child.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)


def is_tensor_slot(leaf: Any) -> bool:
    """Whether ``leaf`` marks the place of a tensor."""
    return isinstance(leaf, str) and leaf == TENSOR


class TracedCalls:
    """The calls of stand-ins met in one export: by number, the child's path and its arguments' structure."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, list[Any]]] = []


class _StandIn(nn.Module):
    def __init__(
        self, path: str, original: nn.Module, recorded: list[ChildCall], traced: TracedCalls
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_standin", (path, original, recorded, traced))
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_standin"][1], name)

    def __bool__(self) -> bool:
        return bool(self.__dict__["_standin"][1])  # without it, __len__ would be asked

    def __len__(self) -> int:
        return len(self.__dict__["_standin"][1])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        path, original, recorded, traced = self.__dict__["_standin"]
        call = recorded[self._count % len(recorded)]
        self._count += 1
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        sizes = _sizes(call, tensors)
        if isinstance(original, nn.Linear):  # its width may be that of the example's sequences
            sizes[0][-1] = original.out_features
        traced.calls.append((path, spec, [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]))
        flat = [size for shape in sizes for size in shape]
        ranks = [len(shape) for shape in sizes]
        dtypes = [DTYPES.index(dtype) for _, dtype in call.outputs]
        results = CHILD(tensors, len(traced.calls) - 1, flat, ranks, dtypes)
        return pytree.tree_unflatten(results, call.output)


def _sizes(call: ChildCall, tensors: list[Tensor]) -> list[list[Any]]:
    """The output's sizes in terms of the input's: a size that was equal in the recorded call stays equal."""
    if len(tensors) != len(call.inputs):
        raise CaptureError(
            f"{call.path} was called with {len(call.inputs)} tensors, traced with {len(tensors)}"
        )
    known: dict[int, Any] = {}
    for recorded, tensor in zip(call.inputs, tensors, strict=True):
        for size, actual in zip(recorded, tensor.shape, strict=True):
            if not isinstance(actual, int):
                known.setdefault(size, actual)
    first, actual_first = call.inputs[0], tensors[0].shape
    shapes = []
    for shape, _ in call.outputs:
        sizes: list[Any] = []
        for position, size in enumerate(shape):
            if position < len(first) and first[position] == size:
                sizes.append(actual_first[position])
            else:
                sizes.append(known.get(size, size) if size > 2 else size)
        shapes.append(sizes)
    return shapes


@contextmanager
def stand_ins(site: nn.Module, calls: list[ChildCall]) -> Iterator[TracedCalls]:
    """Puts stand-ins in the place of the children that ``calls`` names, for the time of an export."""
    traced = TracedCalls()
    recorded: dict[str, list[ChildCall]] = {}
    for call in calls:
        if call.outputs:
            recorded.setdefault(call.path, []).append(call)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, of_child in recorded.items():
            parent_path, _, name = path.rpartition(".")
            parent = site.get_submodule(parent_path)
            child = parent._modules[name]
            assert child is not None
            replaced.append((parent, name, child))
            parent._modules[name] = _StandIn(path, child, of_child, traced)
        yield traced
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child


def chosen(condition: torch.SymBool) -> bool:
    """What a condition of the model's is in the example."""
    return bool(condition)


@contextmanager
def fixed_causality() -> Iterator[None]:
    """Has SDPA take ``is_causal=tokens > 1`` during an export for what it is in the example.

    It must not be a symbol; and where there is one token, there are no later ones to hide.
    """
    original = F.scaled_dot_product_attention

    def fixed(*args: Any, **kwargs: Any) -> Tensor:
        args = tuple(chosen(value) if isinstance(value, torch.SymBool) else value for value in args)
        if isinstance(kwargs.get("is_causal"), torch.SymBool):
            kwargs["is_causal"] = chosen(kwargs["is_causal"])
        return original(*args, **kwargs)

    F.scaled_dot_product_attention = fixed
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
