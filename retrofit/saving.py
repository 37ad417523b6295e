"""Save a converted model, and load it converted.

    config.json     "retrofit": {"version": 1, "sites": {"model.layers.0.self_attn": {"target": "hsa", …}}, …}
                    "quantization_config": {"quant_method": "retrofit"}
                    "attn_implementation": "retrofit"

The record says what was converted. The second entry is the place where transformers lets a library change a
model between building it and loading its weights; nothing is quantised, and a loaded model says so. The third
makes transformers refuse the folder where retrofit has not been imported, instead of loading it as dense.
So ``model.save_pretrained``, ``Trainer`` and ``AutoModelForCausalLM.from_pretrained`` do the right thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from retrofit import folders
from retrofit.configs import TargetConfig, config_from_dict, config_to_dict
from retrofit.errors import ModelLoadError, OutputError

METHOD = "retrofit"
VERSION = 1
SHAPE = ("heads", "kv_heads", "head_dim", "value_dim", "scale", "causal", "sliding_window", "implementation")
"""What a target is built from besides its configuration."""


# The record.


def record(model: nn.Module) -> None:
    """Writes down in ``model.config`` what is converted, for whoever saves it; a plain module keeps no record.

    Args:
        model: A converted model, or one that wraps it, as PEFT does.
    """
    from retrofit.api import sites

    root = _root(model)
    if root is None:
        return
    converted = sites(root)
    if not converted:
        forget(model)
        return
    root.config.retrofit = {
        "version": VERSION,
        "retrofit_version": _own_version(),
        "sites": {path: config_to_dict(site.retrofit.config) for path, site in converted},
        "shapes": {path: {name: getattr(site.retrofit, name) for name in SHAPE} for path, site in converted},
    }
    method = getattr(getattr(root.config, "quantization_config", None), "quant_method", None)
    if method in (None, METHOD):
        root.config.quantization_config = RetrofitQuantizationConfig()
    root.config.attn_implementation = _implementations(root.config)


def forget(model: nn.Module) -> None:
    """Removes the record, after the last site was reverted."""
    root = _root(model)
    if root is None:
        return
    values = vars(root.config)
    values.pop("retrofit", None)
    values.pop("attn_implementation", None)
    if isinstance(values.get("quantization_config"), RetrofitQuantizationConfig):
        del values["quantization_config"]


def _root(model: nn.Module) -> Any:
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


def _own_version() -> str:
    try:
        return version("retrofit-attention")
    except PackageNotFoundError:
        return "unknown"


# What transformers calls.


class RetrofitQuantizationConfig(QuantizationConfigMixin):
    """The entry of config.json that names retrofit to transformers; what was converted is in ``retrofit``."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]

    def get(self, name: str, default: Any = None) -> Any:
        """Reads it like the dictionary it is in the file; transformers does when given a loaded config."""
        return vars(self).get(name, default)


class RetrofitLoader(HfQuantizer):
    """Converts a model while transformers loads it.

    Before the weights: each site's target becomes a child of its attention module, so that its parameters are
    loaded like any other. After them: the sites are converted and take these parameters over.
    """

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, (config, shape) in _sites(model).items():
            from retrofit.targets import target_class

            model.get_submodule(path).add_module("retrofit", target_class(config)(config, **shape))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from retrofit import masks
        from retrofit.api import convert, sites

        self._disown(model)
        masks.restore(model)
        configs: dict[str, TargetConfig] = {}
        loaded: dict[str, Mapping[str, torch.Tensor]] = {}
        for path, (config, _) in _sites(model).items():
            configs[path] = config
            loaded[path] = model.get_submodule(path)._modules.pop("retrofit").state_dict()
        convert(model, configs)
        for path, site in sites(model):
            site.retrofit.load_state_dict(loaded[path])
        return model

    def _disown(self, model: Any) -> None:
        """Takes back what marks a model as quantised: it can be trained, cast and saved like any other."""
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        model.is_quantized = False
        for module in model.modules():
            if hasattr(module, "config"):
                vars(module.config).pop("_is_quantized", None)

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """A converted model is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A converted model is trained like any other."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A converted model is compiled like any other."""
        return True


def register() -> None:
    """Makes converted folders and their attention implementation known to transformers; twice changes nothing."""
    from transformers.quantizers import auto

    from retrofit import masks

    masks.register()
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = RetrofitQuantizationConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = RetrofitLoader


def _sites(model: Any) -> dict[str, tuple[TargetConfig, dict[str, Any]]]:
    """Reads the record: configuration and shape by the path that the site has in this model."""
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
        found[_path_in(model, path)] = (config_from_dict(values), noted["shapes"][path])
    return found


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


# Saving and loading by hand.


def save_pretrained(model: nn.Module, path: str | Path, tokenizer: Any = None) -> Path:
    """Saves a converted model as a transformers folder, wholly or not at all.

    Args:
        model: A converted transformers model.
        path: A folder that does not exist, is empty, or holds a converted model, which is replaced.
        tokenizer: Saved beside it, so that the folder is complete.

    Returns:
        The folder.

    Raises:
        OutputError: If the model cannot be saved like that, or the folder cannot be written.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        remedy = (
            "merge its adapters first" if _root(model) is not None else "use torch.save on its state_dict"
        )
        raise OutputError(
            f"only a transformers model can be saved as a folder, got {type(model).__name__}; {remedy}"
        )
    if getattr(model.config, "retrofit", None) is None:
        raise OutputError(f"{type(model).__name__} is not converted; use its own save_pretrained")
    if not isinstance(getattr(model.config, "quantization_config", None), RetrofitQuantizationConfig):
        raise OutputError(
            "a converted model that is quantised as well cannot be saved; dequantise it before converting"
        )
    with new_folder(path) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(path)


def from_pretrained(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Loads a converted model from a folder or the Hub.

    Args:
        path: Where it is, as :func:`retrofit.load_model` takes it.
        dtype: Of the weights; ``auto`` for the one they are stored in.
        device: Where the model goes.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ModelLoadError: If there is no such model, it is not converted, or its files cannot be used.
    """
    from retrofit.loading import load_model

    model = load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code).model
    if getattr(model.config, "retrofit", None) is None:
        raise ModelLoadError(
            f"{path} is not a converted model; load it with retrofit.load_model and convert it"
        )
    return model


def new_folder(path: str | Path) -> AbstractContextManager[Path]:
    """Gives a folder to fill that takes its place only when it is complete.

    Raises:
        OutputError: If ``path`` is a file or holds something that retrofit did not write, or writing fails.
    """
    return folders.new_folder(path, _is_ours, "converted model")


def check_folder(path: Path) -> None:
    """Checks that a folder may be written, before anything is done for it.

    Raises:
        OutputError: If ``path`` is a file, or a folder with something that retrofit did not write.
    """
    folders.check_folder(path, _is_ours, "converted model")


def _is_ours(path: Path) -> bool:
    try:
        return "retrofit" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


register()
