"""What two modules and their calls must share to share a captured graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.capture.call import CACHE_NAMES, Signature, is_cache, leaves, same_tensors
from retrofit.capture.record import OwnerCall


def identity(module: nn.Module, call: OwnerCall, signature: Signature) -> Any:
    """What two modules and their calls must share to share a graph."""
    parts = []
    for name, part in module.named_modules():
        shapes = [
            (key, tuple(value.shape), value.dtype)
            for key, value in (*part._parameters.items(), *part._buffers.items())
            if value is not None
        ]
        parts.append((name, type(part), tuple(shapes), _numbers(part), _plain_attributes(part)))
    arguments = tuple(
        (path, (tuple(leaf.shape), leaf.dtype)) if isinstance(leaf, Tensor) else (path, _plain(leaf))
        for path, leaf in leaves(signature.bind(call.args, call.kwargs)).items()
        if path[0] not in CACHE_NAMES and not is_cache(leaf)
    )
    same = tuple(same_tensors(signature.bind(call.args, call.kwargs)).items())
    return tuple(parts), arguments, same, call.alone


def _numbers(module: nn.Module) -> tuple[float, ...]:
    """What its buffers of one number hold: the rules read what masked scores are set to."""
    buffers = (value for value in module._buffers.values() if value is not None)
    return tuple(value.item() for value in buffers if value.numel() == 1 and value.is_floating_point())


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, _plain(value))
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in ("layer_idx", "layer_id", "training")
    )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    return (type(value).__qualname__, id(value))
