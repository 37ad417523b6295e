"""A GGUF file as an ordinary model: unpacked, in the dtype asked for, and no longer thought to be quantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from retrofit.errors import ModelLoadError


def load_gguf(path: Path, source: str, dtype: str | torch.dtype) -> tuple[Any, Any]:
    """Returns the model and the tokenizer in a GGUF file.

    Args:
        path: The file.
        source: What the user called it.
        dtype: Of the weights, or ``auto``.

    Raises:
        ModelLoadError: If the file is of another kind; besides what transformers raises.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(
                f"{source} is not a GGUF file: it does not start with GGUF; download it again"
            )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": path.name}
    with _read_once():
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
        packed = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=dtype, **options, **_unpacked())
    return _rebuilt(packed), tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Keeps what transformers otherwise reads and builds again for tokenizer, configuration and every weight."""
    import gguf

    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, made in before.items():
        setattr(gguf, name, cache(made))
    try:
        yield
    finally:
        for name, made in before.items():
            setattr(gguf, name, made)


def _unpacked() -> dict[str, Any]:
    """Returns the option that makes transformers unpack every weight; older versions always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _rebuilt(packed: Any) -> Any:
    """Returns the model anew from its configuration and weights: the loaded one believes itself quantised."""
    from transformers.initialization import no_init_weights

    config = packed.config
    for name in ("quantization_config", "_is_quantized"):
        if name in vars(config):
            delattr(config, name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(packed.dtype)
    try:
        with no_init_weights():
            model = type(packed)(config)
    finally:
        torch.set_default_dtype(before)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    model.generation_config = packed.generation_config
    return model
