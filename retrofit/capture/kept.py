"""What a module keeps on itself in a call: weights for somebody to look at, a table, or keys for the next call.

self.attn_map = weights   →   None on a converted site, if nothing in the model reads it; else a refusal
self.keys = cat([self.keys, k])   →   a refusal: the graph of one call knows nothing of the last one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.capture.call import LeafPath, leaves, rebuild

_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = (type(None), bool, int, float, str, Tensor)
_ABSENT = object()

State = Mapping[LeafPath, Any]


def state_of(module: nn.Module) -> State:
    """The tensors and plain values among the attributes and buffers of ``module``, those in lists and dicts included."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    found = leaves({**own, **_buffers(module)})
    return {path: leaf for path, leaf in found.items() if isinstance(leaf, _PLAIN)}


def changed(before: State, after: State) -> frozenset[str]:
    """Names of the attributes that hold something else than before."""
    return frozenset(
        path[0]
        for path in {*before, *after}
        if not _same(before.get(path, _ABSENT), after.get(path, _ABSENT))
    )


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b)


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts back what ``modules`` keep, after they were called for another purpose than their result."""
    before = [(module, state_of(module), _attributes(module)) for module in modules]
    try:
        yield
    finally:
        for module, state, attributes in before:
            for name in changed(state, state_of(module)):
                place = _place(module, name)
                if name not in attributes:
                    del place[name]
                    continue
                value, content = attributes[name]
                if type(value) is list:
                    value[:] = content
                elif type(value) is dict:
                    value.clear()
                    value.update(content)
                place[name] = value


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Attributes and buffers by name: what they are, and for lists and dicts a copy of what is in them."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH} | _buffers(module)
    copies = rebuild(own, {})
    return {name: (value, copies[name]) for name, value in own.items()}


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers by name; those of a ScriptModule are no dict."""
    return dict(module._buffers.items())


def _place(module: nn.Module, name: str) -> Any:
    return module._buffers if name in module._buffers else vars(module)


def remembers(module: nn.Module, run: Callable[[], Tensor]) -> bool:
    """Whether a second call of ``module`` gives something else than the first.

    Args:
        module: The module.
        run: Calls it, and returns its first result.
    """
    with restored(module.modules()):
        try:
            return not torch.equal(run(), run())
        except Exception:  # what it keeps does not fit the next call
            return True


class Unreadable:
    """Has nobody but a module itself find the tensors that it keeps in attributes ``names``, while it is in place."""

    def __init__(self, module: nn.Module, names: frozenset[str]) -> None:
        self.module, self.names = module, names
        self.hidden: dict[LeafPath, tuple[Tensor, Tensor]] = {}
        self.handles = [
            module.register_forward_pre_hook(lambda *_: self._show()),
            module.register_forward_hook(lambda *_: self._hide()),
        ]

    def remove(self) -> None:
        """Puts the tensors back."""
        self._show()
        for handle in self.handles:
            handle.remove()

    def _hide(self) -> None:
        for path, leaf in state_of(self.module).items():
            if path[0] in self.names and isinstance(leaf, Tensor):
                wrong = torch.full_like(leaf, float("nan") if leaf.is_floating_point() else 0)
                self.hidden[path] = (wrong, leaf)
                _put(_place(self.module, path[0]), path, wrong)

    def _show(self) -> None:
        state = state_of(self.module)
        for path, (wrong, leaf) in self.hidden.items():
            if state.get(path) is wrong:
                _put(_place(self.module, path[0]), path, leaf)
        self.hidden = {}


def _put(place: Any, path: LeafPath, leaf: Tensor) -> None:
    key, rest = path[0], path[1:]
    if not rest:
        place[key] = leaf
    elif isinstance(place[key], tuple):
        items = list(place[key])
        _put(items, rest, leaf)
        place[key] = tuple(items)
    else:
        _put(place[key], rest, leaf)
