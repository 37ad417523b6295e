"""A Hugging Face model as a function of named tensors: its inputs, its outputs, and the cache between.

    {"input_ids", "attention_mask", "position_ids", "past_key_values.0.key", …}
      →  (logits, present.0.key, present.0.value, present.0.nodes.0, …)

What a converted site keeps besides keys and values is a dataclass; its tensors become inputs and outputs under
the names of its fields.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.cache import RetrofitLayer
from retrofit.errors import ExportError
from retrofit.exchange import sites
from retrofit.targets.hsa import HSAAttention
from retrofit.targets.maha import MAHAAttention

FIRST_SIZES = {"batch": 3, "sequence": 150, "past": 210}
"""Sizes of the example: none of them 0 or 1, which tracing would take for constants, and no two equal."""


class CallModel(torch.nn.Module):
    """A model with tensors in and tensors out.

    Args:
        model: A Hugging Face model in evaluation mode.
        with_past: Whether the cache goes in and out; None means that it does in generative models.

    Raises:
        ExportError: If the model takes no token ids, or has no cache of a kind that can be carried.
    """

    def __init__(self, model: Any, *, with_past: bool | None) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        if "input_ids" not in parameters or "attention_mask" not in parameters:
            raise ExportError(
                f"{type(model).__name__} must take input_ids and attention_mask to be exported; it takes "
                f"{', '.join(parameters)}"
            )
        generative = bool(getattr(model, "can_generate", bool)()) and "past_key_values" in parameters
        if with_past and not generative:
            raise ExportError(f"{type(model).__name__} keeps no cache; export it with with_past=False")
        self.with_past = generative if with_past is None else with_past
        self.extra = [name for name in ("position_ids", "token_type_ids") if name in parameters]
        self.device = next(model.parameters()).device
        self.cache: Any = self._prefill(2) if self.with_past else None
        self.past_names = [name for i in range(self._layers()) for name in self._names(i)]

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in order."""
        return [
            "input_ids",
            "attention_mask",
            *self.extra,
            *(f"past_key_values.{n}" for n in self.past_names),
        ]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in order."""
        first = "logits" if hasattr(self._run(2), "logits") else "last_hidden_state"
        return [first, *(f"present.{name}" for name in self.past_names)]

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs the model without changing it."""
        arguments: dict[str, Any] = {
            name: inputs[name] for name in ("input_ids", "attention_mask", *self.extra)
        }
        cache = None
        if self.with_past:
            cache = arguments["past_key_values"] = self._filled(inputs)
            arguments["use_cache"] = True
        elif "use_cache" in inspect.signature(self.model.forward).parameters:
            arguments["use_cache"] = False
        output = self.model(**arguments)
        first = output.logits if hasattr(output, "logits") else output.last_hidden_state
        present = (
            [] if cache is None else [t for i in range(self._layers()) for t in _tensors(cache.layers[i])]
        )
        return (first, *present)

    def example(self) -> dict[str, Tensor]:
        """Inputs to trace the model with."""
        batch, new, past = (FIRST_SIZES[name] for name in ("batch", "sequence", "past"))
        past = past if self.with_past else 0
        ids = torch.ones(batch, new, dtype=torch.int64, device=self.device)
        inputs = {"input_ids": ids, "attention_mask": ids.new_ones(batch, past + new)}
        if "position_ids" in self.extra:
            inputs["position_ids"] = torch.arange(past, past + new, device=self.device).expand(batch, -1)
        if "token_type_ids" in self.extra:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        if self.with_past:
            cache = self._prefill(past, batch)
            for i in range(self._layers()):
                for name, value in zip(self._names(i), _tensors(cache.layers[i]), strict=True):
                    shape = [
                        max(size, 2) if axis in _growing(name) else size
                        for axis, size in enumerate(value.shape)
                    ]
                    inputs[f"past_key_values.{name}"] = value.new_zeros(shape)
        return inputs

    def dynamic(self) -> dict[str, dict[int, Any]]:
        """Per input, its dynamic axes."""
        anything = torch.export.Dim.DYNAMIC
        axes: dict[str, dict[int, Any]] = {}
        for name in self.input_names:
            growing = _growing(name.removeprefix("past_key_values.")) if "." in name else (1,)
            axes[name] = {axis: anything for axis in (0, *growing)}
        return axes

    def axis_names(self, inputs: Sequence[Any]) -> dict[Any, str]:
        """Names for the symbolic sizes of the exported graph's inputs."""
        names: dict[Any, str] = {}
        for value in inputs:
            part = value.name.split(".")
            for axis, size in enumerate(value.shape):
                if isinstance(size, int):
                    continue
                if axis == 0:
                    name = "batch"
                elif value.name == "attention_mask":
                    name = "past_sequence_and_sequence" if self.with_past else "sequence"
                elif len(part) == 1:
                    name = "sequence"
                elif part[2] in ("key", "value"):
                    name = "past_sequence"
                else:
                    name = "past_" + "_".join(part[2:])
                names.setdefault(str(size), name)
        return names

    @property
    def sparse_from(self) -> int:
        """Length from which some converted site leaves keys out; 0 if none does."""
        longest = 0
        for module in self.model.modules():
            if isinstance(module, HSAAttention):
                longest = max(longest, module.geometry.dense_end)
            elif isinstance(module, MAHAAttention):
                longest = max(longest, module.config.sink + sum(module.config.widths))
        return longest

    def _layers(self) -> int:
        return len(self.cache.layers) if self.cache is not None else 0

    def _names(self, index: int) -> list[str]:
        return [f"{index}.{name}" for name in _tensor_names(self.cache.layers[index])]

    def _filled(self, inputs: Mapping[str, Tensor]) -> Any:
        """A cache of the model's own kind that holds the inputs."""
        cache = copy.copy(self.cache)
        cache.layers = []
        for i, layer in enumerate(self.cache.layers):
            given = [inputs[f"past_key_values.{name}"] for name in self._names(i)]
            cache.layers.append(_with_tensors(layer, given))
        return cache

    def _prefill(self, tokens: int, batch: int = 2) -> Any:
        return self._run(tokens, batch).past_key_values

    def _run(self, tokens: int, batch: int = 2) -> Any:
        ids = torch.ones(batch, tokens, dtype=torch.int64, device=self.device)
        with torch.no_grad(), _states_kept(self.model):
            return self.model(input_ids=ids, attention_mask=torch.ones_like(ids))


@contextmanager
def _states_kept(model: nn.Module) -> Iterator[None]:
    """Inside, every target keeps its state from the first token on."""
    targets = [site.retrofit for _, site in sites(model)]
    for target in targets:
        target.keeps_state = True
    try:
        yield
    finally:
        for target in targets:
            target.keeps_state = False


def _tensor_names(layer: Any) -> list[str]:
    names = ["key", "value"]
    state = getattr(layer, "state", None)
    if state is None:
        return names
    if not is_dataclass(state):
        raise ExportError(f"the cache's state must be a dataclass to be exported, got {type(state).__name__}")
    for field in fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            names.append(field.name)
        elif isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
            names += [f"{field.name}.{index}" for index in range(len(value))]
    return names


def _tensors(layer: Any) -> list[Tensor]:
    tensors = [layer.keys, layer.values]
    for name in _tensor_names(layer)[2:]:
        field, _, index = name.partition(".")
        value = getattr(layer.state, field)
        tensors.append(value[int(index)] if index else value)
    return tensors


def _with_tensors(layer: Any, tensors: Sequence[Tensor]) -> Any:
    """A layer like ``layer`` that holds ``tensors``, in the order of ``_tensor_names``."""
    if not isinstance(layer, RetrofitLayer):
        plain = copy.copy(layer)
        plain.keys, plain.values = tensors[:2]
        return plain
    filled = RetrofitLayer()
    filled.update(*tensors[:2])
    if layer.state is not None:
        changes: dict[str, Any] = {}
        for name, tensor in zip(_tensor_names(layer)[2:], tensors[2:], strict=True):
            field, _, index = name.partition(".")
            changes[field] = (*changes.get(field, ()), tensor) if index else tensor
        filled.state = replace(layer.state, **changes)
    return filled


def _growing(name: str) -> tuple[int, ...]:
    """Axes of a cached tensor [batch, heads, rows, …] that grow with the length; the others are fixed."""
    return (2,)
