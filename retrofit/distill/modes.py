"""What a run changes about a model and its process besides weights, and puts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from retrofit.errors import ConfigError


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Puts modes, ``requires_grad`` and gradient checkpointing back afterwards."""
    training = {module: module.training for module in model.modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    checkpointing = checkpoints_gradients(model)
    try:
        yield
    finally:
        if checkpoints_gradients(model) and not checkpointing:
            if hasattr(model, "activation_checkpointing_disable"):
                model.activation_checkpointing_disable()  # type: ignore[operator]
            else:
                model.gradient_checkpointing_disable()  # type: ignore[operator]
        for module, mode in training.items():
            module.training = mode
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.requires_grad_(trained[name])
                parameter.grad = None


@contextmanager
def random_state(device: torch.device) -> Iterator[None]:
    """Keeps the caller's random state."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def checkpoints_gradients(model: nn.Module) -> bool:
    """Whether a part of ``model`` recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def checkpoint_gradients(model: nn.Module) -> None:
    """Has a Hugging Face model recompute its activations.

    Raises:
        ConfigError: If it is none.
    """
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    else:
        raise ConfigError(
            f"gradient_checkpointing needs a Hugging Face model, got {type(model).__name__}; turn it off"
        )
