"""Watches a real call of a model: which modules own attention, and with what they were called.

model(**inputs)  →  Recording(owners={"model.layers.0.self_attn": [call]}, children of each call)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.capture.attend import Attend
from retrofit.capture.call import is_cache
from retrofit.capture.flops import AttentionFlops
from retrofit.capture.in_parts import SoftmaxInParts
from retrofit.capture.kept import changed, state_of

_SOFTMAX = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
_FUSED = ("scaled_dot_product", "native_multi_head_attention", "transformer_encoder_layer", "flex_attention")
_PASSED_THROUGH = (nn.Softmax, nn.Dropout)


@dataclass(frozen=True)
class ChildCall:
    """How a child was called: the shapes that went in and came out."""

    path: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    output: Any  # the output's structure, its tensors replaced by their number


@dataclass
class OwnerCall:
    """One call of a module that owns attention.

    Attributes:
        written: The layers of the key-value cache that hold more tokens after the call.
        shared: Whether it was given a cache that holds tokens, and added none.
        continued: Whether it added some to those that a layer of the cache held.
        flops: Of its attention: the products of queries and keys, and of weights and values.
        kept: Names of the attributes of the module that hold something else after the call.
        alone: Whether the module around it was handed one sequence, so that queries and keys are the same tokens.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    sdpa: int = 0
    softmax: int = 0
    children: list[ChildCall] = field(default_factory=list)
    written: tuple[int, ...] = ()
    shared: bool = False
    continued: bool = False
    flops: int = 0
    alone: bool = False
    kept: frozenset[str] = frozenset()


@dataclass
class Recording:
    """What one call of the model showed.

    Attributes:
        owners: The calls of each module that owns attention, by path, in order of the first call.
        output: What the model returned.
        exchanged: Modules that the model itself replaced during the call: class before and after, by path.
    """

    owners: dict[str, list[OwnerCall]]
    output: Any
    exchanged: dict[str, tuple[str, str]]

    @property
    def observed(self) -> int:
        """Number of modules in which an SDPA call, a softmax or a sigmoid attention was seen."""
        return len(self.owners)


class _Frame:
    def __init__(self, module: nn.Module, call: OwnerCall) -> None:
        self.module = module
        self.call = call
        self.filled = _filled(call.args, call.kwargs)
        self.state = state_of(module)


class _Watch(TorchDispatchMode):
    """Sees every kernel that runs, whatever Python or TorchScript function it was called by."""

    def __init__(self, stack: list[_Frame]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        self.flops = AttentionFlops()
        self.parts = SoftmaxInParts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused = any(part in func.__name__ for part in _FUSED)
        softmax = func in _SOFTMAX
        opens = not fused and not softmax and self.parts.opens(func, args)
        owner = self._owner() if fused or softmax or opens else None
        result = func(*args, **(kwargs or {}))
        self.flops.saw(func, args, result, owner)
        in_parts = self.parts.saw(func, args, result)
        owner = owner or (self._owner() if in_parts else None)
        if owner is not None:
            owner.sdpa += fused
            owner.softmax += softmax or in_parts is not None
        return result

    def _owner(self) -> OwnerCall | None:
        frames = (frame for frame in reversed(self.stack) if not isinstance(frame.module, _PASSED_THROUGH))
        frame = next(frames, None)
        return None if frame is None else frame.call


@contextmanager
def slow_path() -> Iterator[None]:
    """Has torch.nn's attention modules call one another instead of one fused kernel for all."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def record(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Recording:
    """Calls ``model`` without gradients and returns what was seen."""
    paths = {module: path for path, module in model.named_modules()}
    stack: list[_Frame] = []
    finished: dict[str, list[OwnerCall]] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        around = stack[-1].call if stack else OwnerCall((), {})
        alone = len(_sequences(around.args, around.kwargs)) == 1
        if isinstance(module, Attend):
            alone = module.alone
        stack.append(_Frame(module, OwnerCall(args, kwargs, alone=alone)))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        frame = stack.pop()
        call = frame.call
        if stack and not isinstance(module, nn.Softmax):
            stack[-1].call.children.append(_child_call(stack[-1].module, module, args, kwargs, output))
        if call.sdpa or call.softmax:
            call.output = output
            call.kept = changed(frame.state, state_of(module))
            call.written = _written(frame.filled, _filled(args, kwargs))
            call.shared = any(frame.filled or ()) and not call.written
            call.continued = any((frame.filled or ())[layer : layer + 1] > (0,) for layer in call.written)
            finished.setdefault(paths[module], []).append(call)

    handles = []
    for module in paths:
        # By way of nn.Module: a ScriptModule has no such methods, but calls the hooks.
        handles.append(nn.Module.register_forward_pre_hook(module, enter, with_kwargs=True))
        handles.append(nn.Module.register_forward_hook(module, leave, with_kwargs=True))
    try:
        with torch.no_grad(), slow_path(), _Watch(stack):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return Recording(finished, output, _exchanged(paths, model))


def _child_call(parent: nn.Module, child: nn.Module, args: Any, kwargs: Any, output: Any) -> ChildCall:
    path = next((name for name, module in parent.named_modules() if module is child), "")
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    leaves, spec = torch.utils._pytree.tree_flatten(output)
    results = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor))
    plain = bool(results) and len(results) == len(leaves)
    return ChildCall(
        path=path,
        inputs=tuple(tuple(tensor.shape) for tensor in tensors),
        outputs=results if plain and path and tensors else (),
        output=spec,
    )


def _sequences(args: Any, kwargs: Any) -> set[int]:
    """The tensors [B, N, C] among the arguments of a call that have as many rows as the first."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    found = [
        leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3
    ]
    return {id(leaf) for leaf in found if leaf.shape[0] == found[0].shape[0]}


def _exchanged(before: Mapping[nn.Module, str], model: nn.Module) -> dict[str, tuple[str, str]]:
    """What stands elsewhere than before the call, without what is inside of it."""
    earlier = {path: type(module).__name__ for module, path in before.items()}
    found: dict[str, tuple[str, str]] = {}
    for path, module in model.named_modules():
        if module not in before and path in earlier and not any(path.startswith(f"{top}.") for top in found):
            found[path] = (earlier[path], type(module).__name__)
    return found


def _filled(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Tokens in each layer of the cache among the arguments of a call; None if there is no cache."""
    cache: Any = next((value for value in (*args, *kwargs.values()) if is_cache(value)), None)
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    return tuple(layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0 for layer in layers)


def _written(before: tuple[int, ...] | None, after: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers that hold more tokens than before."""
    if before is None or after is None:
        return ()
    return tuple(
        place for place, tokens in enumerate(after) if tokens > (before[place] if place < len(before) else 0)
    )
