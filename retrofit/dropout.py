"""Dropout of a converted site in training: read from where the original has it, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from retrofit.errors import CaptureError

if TYPE_CHECKING:
    from retrofit.captured_module import CapturedModule
    from retrofit.site import RetrofittedAttention


def dropout_of(site: RetrofittedAttention) -> float:
    """The probability with which ``site`` drops each attention weight; 0 in evaluation.

    Raises:
        CaptureError: If its target has no weights to drop.
    """
    where = site.plan.dropout
    if not site.training or not where:
        return 0.0
    value, named = where, "its attention dropout"
    if isinstance(where, str):
        path, _, name = where.rpartition(".")
        owner = site.get_submodule(path)
        value, named = getattr(owner, name) if owner.training else 0.0, f"{site.path}.{where}"
    if value and not site.retrofit.drops_weights:
        raise CaptureError(
            f"{named} must be 0 to train {site.path}, as the weights of {site.retrofit.config.target} attention "
            f"cannot be dropped one by one, got {value}; set it to 0, convert the site to DenseConfig(), or call "
            "eval() on it"
        )
    return float(value)


def check_trainable(site: CapturedModule) -> None:
    """Refuses to train with dropout that the captured graph would leave out.

    Raises:
        CaptureError: If there is any.
    """
    plan = site.plan
    if plan.untrainable is not None:
        raise CaptureError(
            f"{site.path} cannot be trained: {plan.untrainable}; set its dropout to 0 and convert "
            "again, or call eval() on the site"
        )
    if plan.training is not None:
        return
    for name, value in (vars(site.original) | vars(site)).items():
        if "drop" in name and isinstance(value, float) and value > 0:
            _refuse(site, name, value)
    for name, child in site._modules.items():
        # Dropout of anything but the weights of attention is still called by the graph.
        if isinstance(child, nn.Dropout) and child.p > 0 and f"self.{name}(" not in plan.source:
            _refuse(site, f"{name}.p", child.p)


def _refuse(site: CapturedModule, name: str, value: float) -> None:
    raise CaptureError(
        f"{site.path}.{name} must be 0 as when the site was converted, got {value}; convert again, or call eval() "
        "on the site"
    )
