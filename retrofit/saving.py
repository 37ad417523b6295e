"""Save a converted model, and load it converted.

The record in config.json (see ``retrofit.record``) says what was converted. Its ``quantization_config`` is the place
where transformers lets a library change a model between building it and loading its weights; nothing is quantised,
and a loaded model says so. Its ``attn_implementation`` makes transformers refuse the folder where retrofit has not
been imported, instead of loading it as dense.
So ``model.save_pretrained``, ``Trainer`` and ``AutoModelForCausalLM.from_pretrained`` do the right thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from retrofit import folders
from retrofit.errors import ModelLoadError, OutputError
from retrofit.record import (
    METHOD,
    RetrofitQuantizationConfig,
    recorded_example,
    recorded_sites,
    transformers_model,
)

# What transformers calls.


class RetrofitLoader(HfQuantizer):
    """Converts a model while transformers loads it.

    Before the weights: each site's target becomes a child of its attention module, so that its parameters are
    loaded like any other. After them: the sites are converted and take these parameters over.
    """

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from retrofit.targets import target_class

        for path, noted in recorded_sites(model).items():
            target = target_class(noted.config)(noted.config, **noted.shape)
            model.get_submodule(path).add_module("retrofit", target)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from retrofit import masks
        from retrofit.api import convert_again, sites

        self._disown(model)
        masks.restore(model)
        noted = recorded_sites(model)
        loaded: dict[str, Mapping[str, torch.Tensor]] = {
            path: model.get_submodule(path)._modules.pop("retrofit").state_dict() for path in noted
        }
        convert_again(
            model,
            {path: site.config for path, site in noted.items()},
            recorded_example(model),
            {path: site.proof for path, site in noted.items() if site.proof is not None},
        )
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
            "merge its adapters first"
            if transformers_model(model) is not None
            else "use torch.save on its state_dict"
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
    if folders.is_export(path):
        return False  # its config.json has the record too
    try:
        return "retrofit" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


register()
