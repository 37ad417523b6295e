"""Tiny models of transformers' architectures, built offline from their default configurations.

LlamaConfig  →  the same with 64 channels, 2 layers, 4 heads, 512 tokens  →  a random model
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_sizes import OVERRIDES, PLAIN_ROPE, SIZES


def tiny_config(cls: type, overrides: dict[str, Any] | None = None) -> Any:
    """Returns a configuration of ``cls`` with every size reduced that its default one has."""
    default = cls()
    given = {name: value for name in _settable(cls, default) if (value := _read(default, name)) is not None}
    kwargs: dict[str, Any] = {name: size for name, size in SIZES.items() if isinstance(given.get(name), int)}
    if "qk_rope_head_dim" in kwargs:
        kwargs.pop("head_dim", None)
        if "head_dim" in given:
            kwargs["head_dim"] = kwargs["qk_rope_head_dim"]
        if "num_key_value_heads" in given:
            kwargs["num_key_value_heads"] = 4
    for name in ("num_key_value_heads", "n_head_kv", "num_kv_heads", "swa_num_key_value_heads"):
        value = given.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and name not in kwargs:
            heads = given.get("num_attention_heads", value)
            kwargs[name] = 1 if value == 1 else 4 if value == heads else 2
    if given.get("is_decoder") is False and not given.get("is_encoder_decoder"):
        kwargs["is_decoder"] = True
    kinds = given.get("layer_types")
    if isinstance(kinds, (list, tuple)) and kinds:
        kinds = list(dict.fromkeys(kinds))
        kinds += kinds[-1:] * (len(kinds) == 1)
        kwargs["layer_types"] = kinds
        kwargs["num_hidden_layers"] = len(kinds)
    for name, value in given.items():
        if name.endswith("token_id") and isinstance(value, int) and value >= SIZES["vocab_size"]:
            kwargs[name] = 7
    for name in getattr(cls, "sub_configs", {}):
        sub = given.get(name)
        if hasattr(sub, "to_dict"):
            of_part = (overrides or {}).get(name)
            kwargs[name] = tiny_config(type(sub), of_part if isinstance(of_part, dict) else None).to_dict()
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
        kwargs["rope_parameters"] = _rope(given, kwargs)
    parts = getattr(cls, "sub_configs", {})
    kwargs.update(
        {
            name: value
            for name, value in (overrides or {}).items()
            if name not in parts or not isinstance(value, dict)
        }
    )
    return cls(**{name: value for name, value in kwargs.items() if value is not ...})


def _rope(given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Rotary sections of time, height and width that fill the heads."""
    rope = dict(given.get("rope_parameters") or PLAIN_ROPE)
    width = kwargs.get("head_dim") or kwargs["hidden_size"] // kwargs["num_attention_heads"]
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    side = 3 * half // 8
    return {**rope, "mrope_section": [half - 2 * side, side, side]}


def _settable(cls: type, default: Any) -> list[str]:
    """Names that a configuration may be given."""
    names = {*vars(default), *getattr(cls, "attribute_map", {}), *getattr(cls, "__dataclass_fields__", {})}
    names |= {name for name in SIZES if _read(default, name) is not None}
    mapped = getattr(cls, "attribute_map", {})
    return sorted(
        name
        for name in names
        for kept in [getattr(cls, mapped.get(name, name), None)]
        if not (isinstance(kept, property) and kept.fset is None)
    )


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name)
    except Exception:  # per-layer attributes have no one value
        return None


def built(name: str, config_class: type, model_class: Any) -> Any:
    """Returns a random model of the architecture ``name``."""
    config = tiny_config(config_class, OVERRIDES.get(model_class.__name__, OVERRIDES.get(name)))
    torch.manual_seed(0)
    model = _callable(model_class(_part(config, model_class)).eval())
    generation = getattr(model, "generation_config", None)
    if (
        generation is not None
        and getattr(generation, "decoder_start_token_id", 0) is generation.bos_token_id is None
    ):
        generation.decoder_start_token_id = 1
    return model


def _callable(model: Any) -> Any:
    """``model``, or the first of its models where it holds some and has no forward of its own."""
    return next(model.children()) if model.forward.__name__ == "_forward_unimplemented" else model


def _part(config: Any, model_class: Any) -> Any:
    """The part of a configuration that a model is made from: the whole, or that of its text or its images."""
    parts = [config, config.get_text_config(decoder=True), getattr(config, "vision_config", None)]
    wanted = model_class.config_class or object
    return next((part for part in parts if isinstance(part, wanted)), config)
