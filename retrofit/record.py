"""What ``config.json`` says about a conversion.

"retrofit": {"version": 1, "sites": {"model.layers.0.self_attn": {"target": "hsa", …}}, "shapes": {…},
             "verified": {"model.layers.0.self_attn": "5f1c…"}, "example": {…}}
"quantization_config": {"quant_method": "retrofit"}
"attn_implementation": "retrofit"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from retrofit import example
from retrofit.capture.probes import ExampleInputs
from retrofit.configs import TargetConfig, config_from_dict, config_to_dict
from retrofit.errors import ModelLoadError

METHOD = "retrofit"
VERSION = 1
SHAPE = ("heads", "kv_heads", "head_dim", "value_dim", "scale", "causal", "sliding_window", "implementation")
"""What a target is built from besides its configuration."""


class RetrofitQuantizationConfig(QuantizationConfigMixin):
    """The entry of config.json that names retrofit to transformers; what was converted is in ``retrofit``."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]

    def get(self, name: str, default: Any = None) -> Any:
        """Reads it like the dictionary it is in the file; transformers does when given a loaded config."""
        return vars(self).get(name, default)


@dataclass(frozen=True)
class RecordedSite:
    """What the record says about one site.

    Attributes:
        config: Its target.
        shape: What the target is built from besides.
        proof: Of its verification; None if the folder has none.
    """

    config: TargetConfig
    shape: Mapping[str, Any]
    proof: str | None


def record(model: nn.Module, example_inputs: ExampleInputs | None = None) -> None:
    """Writes down in ``model.config`` what is converted, for whoever saves it; a plain module keeps no record.

    Args:
        model: A converted model, or one that wraps it, as PEFT does.
        example_inputs: What it was converted with; None if that was made up.
    """
    from retrofit.api import sites
    from retrofit.verify import own_version, proof

    root = transformers_model(model)
    if root is None:
        return
    converted = sites(root)
    if not converted:
        forget(model)
        return
    root.config.retrofit = {
        "version": VERSION,
        "retrofit_version": own_version(),
        "sites": {path: config_to_dict(site.retrofit.config) for path, site in converted},
        "shapes": {path: {name: getattr(site.retrofit, name) for name in SHAPE} for path, site in converted},
        "verified": {path: proof(site) for path, site in converted},
    }
    if example_inputs is not None:
        root.config.retrofit["example"] = example.to_record(example_inputs)
    method = getattr(getattr(root.config, "quantization_config", None), "quant_method", None)
    if method in (None, METHOD):
        root.config.quantization_config = RetrofitQuantizationConfig()
    root.config.attn_implementation = _implementations(root.config)


def forget(model: nn.Module) -> None:
    """Removes the record, after the last site was reverted."""
    root = transformers_model(model)
    if root is None:
        return
    values = vars(root.config)
    values.pop("retrofit", None)
    values.pop("attn_implementation", None)
    if isinstance(values.get("quantization_config"), RetrofitQuantizationConfig):
        del values["quantization_config"]


def recorded_sites(model: Any) -> dict[str, RecordedSite]:
    """Reads the record, by the path that each site has in this model.

    Raises:
        ModelLoadError: If there is none, it is of another version, or does not fit the model.
    """
    noted = getattr(model.config, "retrofit", None)
    if not isinstance(noted, dict) or not noted.get("sites"):
        raise ModelLoadError(
            "config.json names retrofit as its loader but has no record of what was converted; "
            "save the model again with retrofit.save_pretrained"
        )
    if noted.get("version") != VERSION:
        raise ModelLoadError(
            f"the folder was written by retrofit {noted.get('retrofit_version')} (record version "
            f"{noted.get('version')}), this one reads version {VERSION}; update retrofit-attention"
        )
    found = {}
    for path, values in noted["sites"].items():
        if path not in noted.get("shapes", {}):
            raise ModelLoadError(f"the record in config.json has no shape for {path}; save the model again")
        proven = noted.get("verified", {}).get(path)
        found[_path_in(model, path)] = RecordedSite(config_from_dict(values), noted["shapes"][path], proven)
    return found


def recorded_example(model: Any) -> Any:
    """Returns an example like the one that ``model`` was converted with; None if that was made up."""
    noted = model.config.retrofit.get("example")
    if noted is None:
        return None
    first = next(model.parameters(), torch.zeros(()))
    return example.from_record(noted, device=first.device, dtype=first.dtype)


def transformers_model(model: nn.Module) -> Any:
    """The transformers model in ``model``, without what is wrapped around it; None if there is none."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _implementations(config: Any) -> str | dict[str, Any]:
    """The attention implementation of a configuration as its constructor takes it, parts included."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: part._attn_implementation_internal for name, part in parts.items() if part is not None}
    return (
        {"": config._attn_implementation_internal, **found} if found else config._attn_implementation_internal
    )


def _path_in(model: Any, path: str) -> str:
    """The path of a recorded site in ``model``, which may be the saved model or only its body."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise ModelLoadError(
        f"config.json records a converted site {path}, which {type(model).__name__} does not have"
    )
