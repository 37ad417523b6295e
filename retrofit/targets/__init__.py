"""The targets: one module class for each configuration class, imported when first used."""

from __future__ import annotations

from importlib import import_module

from retrofit.configs import TargetConfig
from retrofit.errors import ConfigError
from retrofit.targets.base import TargetAttention

_CLASSES = {
    "dense": ("retrofit.targets.dense", "DenseAttention"),
    "hsa": ("retrofit.targets.hsa", "HSAAttention"),
    "maha": ("retrofit.targets.maha", "MAHAAttention"),
}


def target_class(config: TargetConfig) -> type[TargetAttention]:
    """Returns the module class that serves ``config``.

    Raises:
        ConfigError: If the configuration is of no known target.
    """
    name = getattr(config, "target", None)
    if name not in _CLASSES:
        raise ConfigError(
            f"config must be one of the targets {', '.join(_CLASSES)}, got {config!r}; "
            "pass DenseConfig(), HSAConfig() or MAHAConfig()"
        )
    module, attribute = _CLASSES[name]
    found: type[TargetAttention] = getattr(import_module(module), attribute)
    return found


__all__ = ["TargetAttention", "target_class"]
