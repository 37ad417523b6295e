"""Refuses to hand out attention weights, which converted attention does not compute.

model(ids, output_attentions=True)  →  ConfigError, where transformers would return tuples with nothing in them
"""

from __future__ import annotations

from typing import Any

from torch import nn

from retrofit.errors import ConfigError

_HOOK = "_retrofit_output_hook"
_CAPTURING, _INSTALLED = "output_capturing_hook", "_output_capturing_hooks_installed"


def guard(model: nn.Module) -> None:
    """Has every transformers model around a converted site check what it is asked for; twice is once."""
    from transformers import PreTrainedModel

    release(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _sites(module):
            vars(module)[_HOOK] = module.register_forward_pre_hook(_check, with_kwargs=True)


def release(model: nn.Module) -> None:
    """Undoes :func:`guard`."""
    for module in model.modules():
        hook = vars(module).pop(_HOOK, None)
        if hook is not None:
            hook.remove()
        # transformers puts its own hooks on classes of attention once; those that were converted then have none.
        for number, own in list(module._forward_hooks.items()):
            if getattr(own, "__name__", "") == _CAPTURING:
                del module._forward_hooks[number]
        vars(module).pop(_INSTALLED, None)


def _check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(module.config, "output_attentions", False)
    if asked:
        paths = _sites(module)
        raise ConfigError(
            f"output_attentions must be False, got {asked}: {len(paths)} converted sites ({paths[0]}, …) compute no "
            "attention weights; call retrofit.revert(model) to get them, or leave the sites dense with where=…"
        )


def _sites(model: nn.Module) -> list[str]:
    from retrofit.site import RetrofittedAttention

    return [path for path, module in model.named_modules() if isinstance(module, RetrofittedAttention)]
