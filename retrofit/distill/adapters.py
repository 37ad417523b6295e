"""LoRA on the projections of the converted attention modules, put in place so that the model keeps its class.

model.layers.0.self_attn.q_proj: Linear  ──add──▶  lora.Linear(base_layer=Linear)  ──remove──▶  Linear
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from retrofit.api import sites
from retrofit.errors import ConfigError


class Adapters:
    """The adapters of one distillation; none until ``add``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.added = False

    def add(self, rank: int, alpha: int) -> None:
        """Puts an adapter on every linear layer of every converted attention module.

        Raises:
            ConfigError: If the model carries adapters already, or there is no such layer.
        """
        from peft import LoraConfig, inject_adapter_in_model

        if self._layers():
            raise ConfigError(
                "trainable='lora' needs a model without adapters, got one that has them; merge them first"
            )
        targets = [
            f"{path}.{name}"
            for path, site in sites(self.model)
            for name, module in site.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and not name.startswith("retrofit.")
        ]
        if not targets:
            raise ConfigError(
                "trainable='lora' found no linear layer in the converted modules; take trainable='own' or 'all'"
            )
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)
        inject_adapter_in_model(config, self.model)
        self.added = True

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' weights."""
        return [
            parameter
            for layer in self._layers()
            for name, parameter in layer.named_parameters()
            if name.startswith("lora_")
        ]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without its adapters, inside the block."""
        layers = self._layers() if self.added else []
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def remove(self, *, merge: bool) -> None:
        """Puts the plain layers back, with what the adapters learned added to their weights if ``merge``."""
        if not self.added:
            return
        for path, module in list(self.model.named_modules()):
            if not _is_adapter(module):
                continue
            if merge:
                module.merge(safe_merge=True)
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, module.get_base_layer())
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self.added = False

    def _layers(self) -> list[Any]:
        return [module for module in self.model.modules() if _is_adapter(module)]


def _is_adapter(module: nn.Module) -> Any:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)
