"""The calls of a model by which its attention is observed.

Hugging Face text model  →  made-up tokens, longer than any sliding window: plain, padded left, padded right
example inputs           →  those; with token ids among them also padded
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.errors import CaptureError

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
TOKENS = 45
BEYOND_WINDOW = 13


@dataclass(frozen=True)
class Probe:
    """One call of the model.

    Attributes:
        keep: bool [B, N], the real tokens; None if that is not known.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keep: Tensor | None


@contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers that are the same each time: a masked autoencoder chooses its patches by them."""
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(0)
        yield


def is_transformers(model: nn.Module) -> bool:
    """Whether ``model`` is, or wraps, a model of transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for module in model.modules()
        for base in type(module).__mro__
    )


def make_probes(model: nn.Module, example_inputs: ExampleInputs | None) -> list[Probe]:
    """Returns the probes for ``model``; the first is the example itself.

    Raises:
        CaptureError: If there is no example and none can be made up.
    """
    if example_inputs is None:
        if not is_transformers(model):
            raise CaptureError(
                f"example_inputs is needed for {type(model).__name__}, which is no transformers model; pass a "
                "tuple or a dict of what its forward takes, two rows or more"
            )
        made_up = _made_up(model)
        return _padded(made_up, len(made_up["input_ids"]))
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), {name: _two_rows(value) for name, value in example_inputs.items()}
    elif isinstance(example_inputs, (tuple, list)):
        args, kwargs = tuple(_two_rows(value) for value in example_inputs), {}
    else:
        raise CaptureError(
            f"example_inputs must be a tuple or a dict, as for torch.export, got {type(example_inputs).__name__}"
        )
    if not is_transformers(model):
        return [Probe("example", args, kwargs, None)]
    if args and isinstance(args[0], Tensor) and "input_ids" not in kwargs and args[0].dim() == 2:
        args, kwargs = args[1:], {"input_ids": args[0], **kwargs}
    ids = kwargs.get("input_ids")
    if args or not isinstance(ids, Tensor) or ids.dim() != 2:
        return [Probe("example", args, kwargs, None)]
    if "attention_mask" in kwargs:
        keep = kwargs["attention_mask"].bool()
        first = Probe("example", (), kwargs, keep)
        plain = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        padded = _padded(plain, len(keep))
        return [first, *padded] if bool(keep.all()) else [*padded[:1], first]
    return _padded(kwargs, len(ids))


def _two_rows(value: Any) -> Any:
    """A batch of one would be taken for a constant."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1:
        return torch.cat([value, value])
    return value


def _padded(kwargs: dict[str, Any], rows: int) -> list[Probe]:
    """The example with all of its tokens, and with padding on either side.

    Args:
        kwargs: The example without a mask of ``input_ids``.
        rows: Of that mask: one for each sequence, which may have a row of token ids for each of several codebooks.
    """
    ids = kwargs["input_ids"]
    whole = ids.new_ones(rows, ids.shape[1])
    left, right = whole.clone(), whole.clone()
    pad = max(1, ids.shape[1] // 5)
    left[0, :pad] = 0
    right[-1, ids.shape[1] - pad :] = 0
    to_left, to_right = {"attention_mask": left}, {"attention_mask": right}
    if "decoder_input_ids" in kwargs:
        tokens = kwargs["decoder_input_ids"]
        decoder = torch.ones_like(kwargs.get("decoder_attention_mask", tokens.new_ones(tokens.shape[:2])))
        decoder[-1, -pad:] = 0
        to_right["decoder_attention_mask"] = decoder
    return [
        Probe("plain", (), dict(kwargs), whole.bool()),
        Probe("padded left", (), {**kwargs, **to_left}, left.bool()),
        Probe("padded right", (), {**kwargs, **to_right}, right.bool()),
    ]


def _made_up(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    name = getattr(model, "main_input_name", "input_ids")
    vocabulary = getattr(text, "vocab_size", None)
    if name != "input_ids" or not isinstance(vocabulary, int):
        raise CaptureError(
            f"example_inputs is needed for {type(model).__name__}, which does not take token ids alone; pass a "
            "dict of what its forward takes"
        )
    length = _length(model, text)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, length), generator=generator)
    padding = getattr(text, "pad_token_id", None)
    padding = 0 if padding is None else padding  # what a model takes for padding that names no token for it
    if isinstance(padding, int) and 0 <= padding < vocabulary:
        ids = torch.where(ids == padding, (padding + 1) % vocabulary, ids)
    inputs: dict[str, Any] = {"input_ids": ids.to(device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, : length - 7]
    return inputs


def _length(model: nn.Module, config: Any) -> int:
    """A length beyond every sliding window and chunk, within the positions, and unlike any size of the weights."""
    windows = [0]
    for module in model.modules():
        for name in ("sliding_window", "attention_chunk_size"):
            window = getattr(module, name, None)
            if isinstance(window, int):
                windows.append(window)
    # Where layers differ, the configuration of a model refuses to be asked for all of them.
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    for layer in layers:
        chunk = getattr(layer, "attention_chunk_size", None)
        if isinstance(chunk, int) and "chunked_attention" in (getattr(layer, "layer_types", None) or ()):
            windows.append(chunk)
        window = getattr(layer, "sliding_window", None)
        if isinstance(window, int) and getattr(layer, "use_sliding_window", True):
            windows.append(window)
    length = max(TOKENS, max(windows) + BEYOND_WINDOW)
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    most = getattr(config, "max_position_embeddings", None)
    while length in sizes:
        length += 1
    if isinstance(most, int) and 0 < most < length:
        length = most
        while length in sizes and length > 8:
            length -= 1
    return length
