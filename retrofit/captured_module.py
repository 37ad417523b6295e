"""A module that takes another one's place and runs a graph of it.

It adopts the children, parameters and buffers of the original under the same names, so that state dicts, optimisers,
PEFT and hooks find everything where it was. Its forward has the original's signature and runs the captured graph on
itself, for calls that the graph was made for; any other raises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retrofit.capture.call import LeafPath, is_cache, lookup, spelled
from retrofit.capture.export import expanded, is_record
from retrofit.capture.ignored import GOES_AROUND, MEANINGFUL
from retrofit.capture.site_plan import CallPlan, compiled
from retrofit.capture.standin import is_tensor_slot
from retrofit.capture.unread import unread_parameters
from retrofit.dropout import check_trainable
from retrofit.errors import CaptureError

_SHARED_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class CapturedModule(nn.Module):
    """Runs the graph of a module in its place.

    Args:
        original: The module whose place this takes.
        path: Where it is in the model.
        plan: What was found out about it.
        own: Children that the graph calls and the original does not have, by name.

    Attributes:
        path: Where it is in the model.
        plan: What was found out about the original.
    """

    plan: CallPlan

    def __init__(self, original: nn.Module, path: str, plan: CallPlan, own: Mapping[str, nn.Module]) -> None:
        super().__init__()
        shared = vars(original)
        # The dictionaries themselves are shared: what moves or replaces a parameter here does so there.
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            vars(self)[name] = shared[name]
        for name in _SHARED_HOOKS:
            if name in shared:
                vars(self)[name] = shared[name]
        self._modules.update(original._modules)
        self._modules.update(own)
        vars(self)["_original"] = (original,)
        vars(self)["_own"] = frozenset(own)
        self.path = path
        self.plan = plan
        vars(self)["_constants"] = dict(plan.constants)
        self._compile()
        self.training = original.training

    @property
    def original(self) -> nn.Module:
        """The module whose place this took."""
        module: nn.Module = vars(self)["_original"][0]
        return module

    def restored(self) -> nn.Module:
        """Returns the original with the children as they are now."""
        original = self.original
        for name, child in self._modules.items():
            if name not in vars(self)["_own"]:
                original._modules[name] = child
        original.training = self.training
        return original

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            constants = vars(self).get("_constants", {})
            if name in constants:
                return constants[name]
            if "plan" in vars(self) and name in self.plan.unkept:
                return None
            if "_original" in vars(self) and name in vars(self.original):
                return vars(self.original)[name]
            if "_original" in vars(self) and hasattr(type(self.original), name):
                return getattr(self.original, name)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith(("_run", "_output"))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def _compile(self) -> None:
        plan = self.plan
        vars(self)["_run"] = compiled(plan.source)
        vars(self)["_run_training"] = None if plan.training is None else compiled(plan.training)
        vars(self)["_run_guards"] = [compiled(guard.source) for guard in plan.guards]
        vars(self)["_output"] = pytree.tree_flatten(plan.output)
        vars(self)["_unread"] = unread_parameters(self.original)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CapturedModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        constants = vars(self)["_constants"]
        vars(self)["_constants"] = {name: fn(value) for name, value in constants.items()}
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the original took and returns what it returned; attention weights become None."""
        plan = self.plan
        run = self._graph()
        values = plan.signature.bind(args, kwargs)
        for path, first in plan.same:
            if not _same(lookup(values, path), lookup(values, first)):
                raise CaptureError(
                    f"{self.path} was captured with {spelled(path)} and {spelled(first)} the same tensor, got two; "
                    "convert with an example that has two"
                )
        tensors: list[Tensor] = []
        for path in plan.inputs:
            tensor = lookup(values, path)
            if tensor is None:
                raise CaptureError(
                    f"{self.path} needs {spelled(path)}, which it was captured with, got None; "
                    "convert with an example that leaves it out"
                )
            tensors.append(expanded(tensor, tensors[0]) if path in plan.rows else tensor)
        if 0 in tensors[0].shape:
            raise CaptureError(
                f"{self.path} needs at least one row and one token, got {spelled(plan.inputs[0])} of shape "
                f"{list(tensors[0].shape)}; leave empty batches out"
            )
        self._check_rest(values)
        self._check_sizes(values)
        results = iter(run(self, *tensors, *self._around(values)))
        leaves, structure = vars(self)["_output"]
        return pytree.tree_unflatten(
            [next(results) if is_tensor_slot(leaf) else _own(leaf) for leaf in leaves], structure
        )

    def _around(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """What the graph takes besides tensors of a call with arguments ``values``."""
        return ()

    def _goes_around(self, path: LeafPath) -> bool:
        """Whether the argument at ``path`` is no part of the graph, and yet read."""
        return False

    def _graph(self) -> Callable[..., Any]:
        """The function that runs: in training one that drops out what the original does."""
        if self.training:
            check_trainable(self)
        dropping = self.training and self.plan.training is not None
        function: Callable[..., Any] = vars(self)["_run_training" if dropping else "_run"]
        return function

    def _check_sizes(self, values: Mapping[str, Any]) -> None:
        """Raises where the original would choose to do something else than the graph does."""
        plan = self.plan
        for guard, holds in zip(plan.guards, vars(self)["_run_guards"], strict=True):
            tensors = [lookup(values, path) for path, _ in guard.sizes]
            places = [dim for _, dim in guard.sizes]
            if not all(
                isinstance(x, Tensor) and dim < x.dim() for x, dim in zip(tensors, places, strict=True)
            ):
                continue
            sizes = [tensor.shape[dim] for tensor, dim in zip(tensors, places, strict=True)]
            if not holds(self, *sizes):
                raise CaptureError(
                    f"{self.path} was captured where {guard.text}, and does something else elsewhere; got "
                    f"{', '.join(map(str, sizes))}; convert with an example of such a size"
                )

    def _check_rest(self, values: Mapping[str, Any]) -> None:
        plan = self.plan
        for path, sizes in plan.sizes:
            tensor = lookup(values, path) if path[0] not in self._unread else None
            if isinstance(tensor, Tensor) and not _fits(tensor, sizes):
                raise CaptureError(
                    f"{self.path} was captured with {spelled(path)} of shape {_shape(sizes)}, got "
                    f"{list(tensor.shape)}; convert with an example of such a shape"
                )
        for path, recorded in plan.known:
            if path[0] in self._unread or not (plan.only or path[0] in plan.signature.names):
                continue
            value = lookup(values, path)
            if isinstance(value, Tensor):
                differs = recorded is None and path not in plan.inputs and not self._goes_around(path)
            elif _plain(value):
                differs = _plain(recorded) and value != recorded
            else:
                differs = recorded is None and not is_cache(value)
            if differs:
                shown = repr(value) if _plain(value) else f"a {type(value).__name__.lower()}"
                raise CaptureError(
                    f"{self.path} was captured with {spelled(path)}={recorded!r}, got {shown}; "
                    "convert with an example that has it"
                )
        for name in values.keys() - plan.only if plan.only else ():
            if values[name] is not None and name not in GOES_AROUND:
                raise CaptureError(
                    f"{self.path} was captured without {name}, got {values[name]!r}; convert with an example that "
                    "has it"
                )
        for name in MEANINGFUL:
            if name in values and (name,) not in plan.inputs and not self._goes_around((name,)):
                recorded = next((value for path, value in plan.known if path == (name,)), None)
                if values[name] is not recorded and values[name] != recorded:
                    raise CaptureError(
                        f"{self.path} was captured with {name}={recorded}, got {values[name]!r}; leave it "
                        "out, or leave this site out with where=…"
                    )


def _fits(tensor: Tensor, sizes: Sequence[int | None]) -> bool:
    """Whether ``tensor`` has the given sizes, where they are given."""
    return tensor.dim() == len(sizes) and all(
        size is None or size == own for size, own in zip(sizes, tensor.shape, strict=True)
    )


def _own(value: Any) -> Any:
    """``value``; of a dataclass, which the caller may change, a copy."""
    return copy.copy(value) if is_record(value) else value


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _shape(sizes: Sequence[int | None]) -> str:
    """``[*, *, 64]``, with a star where any size will do."""
    return f"[{', '.join('*' if size is None else str(size) for size in sizes)}]"


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are one tensor; copies of it that share its memory count."""
    if a is b:
        return True
    if torch.compiler.is_compiling() or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
