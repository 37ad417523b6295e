"""The losses of the two stages, each for one batch; both leave gradients behind and return what to log.

stage 1    one dense forward without gradients; inside it each site's own loss on its detached q, k, v, and its
           backward at once, so that no graph outlives its site and no teacher is needed
stage 2    a forward of the converted model; its attention outputs and logits against the teacher's
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retrofit.api import dense
from retrofit.attention_call import AttentionCall
from retrofit.configs import DenseConfig, HSAConfig, TargetConfig
from retrofit.distill.config import DistillConfig
from retrofit.distill.taps import Collector, tapped
from retrofit.distill.teacher import Lesson, Teacher, pieces
from retrofit.errors import ConfigError
from retrofit.evaluate.logits import Outputs, run, run_without_logits
from retrofit.evaluate.perplexity import in_evaluation_mode
from retrofit.site import RetrofittedAttention

Sites = list[tuple[str, RetrofittedAttention]]


@dataclass(frozen=True)
class Engine:
    """What a stage needs of accelerate: ``backward(loss)`` and the context of a forward."""

    backward: Callable[[Tensor], None]
    autocast: Callable[[], AbstractContextManager[object]]
    accumulation: int


def trained_in_stage_1(sites: Sites) -> dict[str, list[nn.Parameter]]:
    """The parameters of each site that stage 1 trains; a site without any is left out."""
    found = {path: list(site.retrofit.parameters()) for path, site in sites if _has_layer_loss(site)}
    return {path: parameters for path, parameters in found.items() if parameters}


def nothing_to_train(sites: Sites) -> ConfigError:
    """The error of a stage 1 without parameters; says what would have some."""
    path, site = sites[0]
    config = site.retrofit.config
    what = f"pooling={config.pooling!r}" if isinstance(config, HSAConfig) else f"target {config.target!r}"
    return ConfigError(
        f"stage 1 trains the targets' own parameters, and {path} with {what} has none for it; convert with "
        "HSAConfig(pooling='learned' or 'attention') or MAHAConfig, or take stage='2'"
    )


def _has_layer_loss(site: RetrofittedAttention) -> bool:
    config: TargetConfig = site.retrofit.config
    if isinstance(config, HSAConfig):
        always_dense = getattr(
            site.retrofit, "always_dense", False
        )  # a sliding window with nothing to leave out
        return config.pooling in ("attention", "learned") and not always_dense
    return not isinstance(config, DenseConfig)


def stage_1(
    model: nn.Module, ids: Tensor, trained: dict[str, list[nn.Parameter]], engine: Engine
) -> dict[str, float]:
    """One batch of stage 1.

    Args:
        model: Converted; run with dense attention.
        ids: int64 [B, n].
        trained: Of ``trained_in_stage_1``.
        engine: Backward and precision.

    Returns:
        ``{"loss": mean over the sites}``.
    """
    losses: list[Tensor] = []

    def listen(
        path: str,
        site: RetrofittedAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        out: Tensor,
    ) -> None:
        if path not in trained:
            return
        # float32 whatever the forward ran in: selections and their targets are made in it.
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            loss = site.retrofit.layer_loss(q.detach().float(), k.detach().float(), v.detach().float(), call)
            if not loss.requires_grad:
                raise ConfigError(
                    f"the loss of {path} does not depend on its parameters at {q.shape[2]} tokens; pass a larger length"
                )
            engine.backward(loss / engine.accumulation)
        losses.append(loss.detach())

    with torch.no_grad(), engine.autocast(), in_evaluation_mode(model), dense(model), tapped(model, listen):
        run_without_logits(model, ids)
    return {"loss": torch.stack(losses).mean().item()}


def stage_2(
    model: nn.Module,
    ids: Tensor,
    rows: Tensor,
    teacher: Teacher,
    config: DistillConfig,
    engine: Engine,
) -> dict[str, float]:
    """One batch of stage 2.

    Args:
        model: Converted; in training mode.
        ids: int64 [B, n].
        rows: Which sequences these are, for stored logits.
        teacher: What to learn from.
        config: The weights of the two parts.
        engine: Backward and precision.

    Returns:
        ``{"loss": …, "attention": …, "logits": …}``; a part of weight 0 is left out.
    """
    collector = Collector()
    with engine.autocast():
        lesson = teacher.teach(ids, rows)
        with tapped(model, collector):
            outputs = run(model, ids)
        ours = collector.close()
        parts: dict[str, Tensor] = {}
        if config.attention_weight:
            errors = [_relative_error(ours[path], lesson.attention[path]) for path in ours]
            parts["attention"] = torch.stack(errors).mean()
        if config.logits_weight:
            parts["logits"] = _logits_loss(outputs, lesson)
        weights = {"attention": config.attention_weight, "logits": config.logits_weight}
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    engine.backward(loss / engine.accumulation)
    return {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """‖ours − theirs‖² / ‖theirs‖²."""
    theirs = theirs.to(ours.device).float()
    error: Tensor = (ours.float() - theirs).square().sum() / theirs.square().sum().clamp(min=1e-12)
    return error


def _logits_loss(outputs: Outputs, lesson: Lesson) -> Tensor:
    """Mean KL over positions; the logits of a piece are made again in the backward instead of kept."""
    total: Tensor | None = None
    for first, last in pieces(outputs.length):
        if outputs.hidden is None:
            part = lesson.divergence(outputs.logits(first, last), first, last)
        else:
            part = checkpoint(
                _piece, outputs, lesson, outputs.hidden[:, first:last], first, last, use_reentrant=False
            )
        total = part if total is None else total + part
    assert total is not None
    return total / (outputs.batch * outputs.length)


def _piece(outputs: Outputs, lesson: Lesson, hidden: Tensor, first: int, last: int) -> Tensor:
    return lesson.divergence(outputs.head(hidden), first, last)
