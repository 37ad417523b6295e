"""Binds a call to a module's signature and takes it apart into tensors and the rest.

attn(x, (cos, sin), attention_mask=None, past_key_values=cache)
    →   tensors {("hidden_states",): x, ("position_embeddings", 0): cos, …}, rest {("attention_mask",): None, …}
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from retrofit.errors import CaptureError

LeafPath = tuple[Any, ...]


@dataclass(frozen=True)
class Signature:
    """The parameters of a module's forward.

    Attributes:
        names: Those that can be given by position, in order.
        defaults: The values of those that can be left out.
        variable: Name of the ``**kwargs`` parameter, if there is one.
    """

    names: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    variable: str | None

    @classmethod
    def of(cls, module: nn.Module) -> Signature:
        """Reads the signature of ``module.forward``."""
        parameters = inspect.signature(module.forward).parameters.values()
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise CaptureError(
                f"{type(module).__name__}.forward must name its arguments, got *args; "
                "write them out or leave the module out with where=…"
            )
        return cls(
            names=tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD),
            defaults=tuple((p.name, p.default) for p in parameters if p.default is not p.empty),
            variable=next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None),
        )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the call's values by parameter name; those of ``**kwargs`` by their own."""
        values = dict(self.defaults)
        if len(args) > len(self.names):
            raise TypeError(f"forward takes {len(self.names)} positional arguments, got {len(args)}")
        for name, value in zip(self.names, args, strict=False):
            values[name] = value
        for name, value in kwargs.items():
            if self.variable is None and name not in self.names:
                raise TypeError(f"forward has no argument {name!r}; it has {', '.join(self.names)}")
            values[name] = value
        ordered = [name for name in self.names if name in values]
        return {name: values[name] for name in [*ordered, *(n for n in values if n not in self.names)]}


def leaves(values: Mapping[str, Any]) -> dict[LeafPath, Any]:
    """Takes tuples, lists and dicts of ``values`` apart: leaves by path."""
    found: dict[LeafPath, Any] = {}

    def walk(path: LeafPath, value: Any) -> None:
        if type(value) in (tuple, list):
            for position, item in enumerate(value):
                walk((*path, position), item)
        elif type(value) is dict:
            for key, item in value.items():
                walk((*path, key), item)
        else:
            found[path] = value

    for name, value in values.items():
        walk((name,), value)
    return found


def rebuild(values: Mapping[str, Any], replaced: Mapping[LeafPath, Any]) -> dict[str, Any]:
    """Returns ``values`` with the leaves in ``replaced`` exchanged."""

    def walk(path: LeafPath, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(walk((*path, position), item) for position, item in enumerate(value))
        if type(value) is dict:
            return {key: walk((*path, key), item) for key, item in value.items()}
        return replaced.get(path, value)

    return {name: walk((name,), value) for name, value in values.items()}


def lookup(values: Mapping[str, Any], path: LeafPath) -> Any:
    """Returns the leaf at ``path``, None if there is none."""
    value: Any = values.get(path[0])
    for key in path[1:]:
        if value is None:
            return None
        value = value[key]
    return value


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a key-value cache of transformers."""
    return any(
        base.__module__.startswith("transformers.") and base.__name__ == "Cache"
        for base in type(value).__mro__
    ) or any(base.__name__ in ("EncoderDecoderCache", "KVSharingDict") for base in type(value).__mro__)


CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


def spelled(path: LeafPath) -> str:
    """``("position_embeddings", 0)`` → ``position_embeddings[0]``."""
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def tensor_leaves(values: Mapping[str, Any]) -> dict[LeafPath, Tensor]:
    """The tensors among the leaves of ``values``."""
    return {path: leaf for path, leaf in leaves(values).items() if isinstance(leaf, Tensor)}


def same_tensors(values: Mapping[str, Any]) -> dict[LeafPath, LeafPath]:
    """Arguments that are the tensor of an earlier one, by path: ``mha(x, x, x)`` is not ``mha(x, y, z)``."""
    first: dict[int, LeafPath] = {}
    return {
        path: first[id(leaf)]
        for path, leaf in tensor_leaves(values).items()
        if len(path) == 1 and leaf.dim() >= 3 and first.setdefault(id(leaf), path) != path
    }
