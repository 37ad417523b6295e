"""The example a model was converted with, as JSON, so that a saved model can be captured again.

    {"pixel_values": float32 [2, 3, 8, 8]}  →  {"kind": "dict", "items": {"pixel_values": {"kind": "tensor", …}}}

Small tensors keep their values. Of large ones shape and dtype are kept, and for whole numbers the range: what is
captured depends on them alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retrofit.errors import ModelLoadError

VALUES = 4096
"""Tensors of at most so many elements keep their values."""


def to_record(value: Any) -> dict[str, Any]:
    """Returns the JSON form; what has none is named, and refused by :func:`from_record`."""
    if isinstance(value, Tensor):
        return _tensor_record(value.detach())
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"kind": "dict", "items": {key: to_record(item) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {"kind": type(value).__name__, "items": [to_record(item) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"kind": "value", "value": value}
    return {"kind": "unknown", "class": type(value).__name__}


def from_record(record: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns an example like the recorded one.

    Args:
        record: Of :func:`to_record`.
        device: Where tensors go.
        dtype: Of floating tensors, whatever they had: the model's.

    Raises:
        ModelLoadError: If a part of it could not be recorded.
    """
    kind = record["kind"]
    if kind == "tensor":
        tensor = _tensor(record)
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    if kind == "dict":
        return {key: from_record(item, device=device, dtype=dtype) for key, item in record["items"].items()}
    if kind in ("list", "tuple"):
        made = [from_record(item, device=device, dtype=dtype) for item in record["items"]]
        return made if kind == "list" else tuple(made)
    if kind == "value":
        return record["value"]
    raise ModelLoadError(
        f"the model was converted with an example that holds a {record.get('class', kind)}, which config.json cannot "
        "keep; load the original model, load_state_dict the weights into it and convert it with that example"
    )


def _tensor_record(tensor: Tensor) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": "tensor",
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    if tensor.numel() <= VALUES:
        record["values"] = tensor.flatten().tolist()
    elif not tensor.is_floating_point():
        record["range"] = [int(tensor.min()), int(tensor.max())]
    return record


def _tensor(record: Mapping[str, Any]) -> Tensor:
    dtype, shape = getattr(torch, record["dtype"]), record["shape"]
    generator = torch.Generator().manual_seed(0)
    if "values" in record:
        return torch.tensor(record["values"], dtype=dtype).reshape(shape)
    if "range" in record:
        low, high = record["range"]
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)
