"""Runs a distillation: checks what is asked for, and hands over to the loop.

report = distill(model, "book.txt", DistillConfig(length=2048), tokenizer=tokenizer, output="run")
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor, nn

from retrofit.api import sites
from retrofit.configs import config_to_dict
from retrofit.data import DEFAULT_SOURCE, Source, pack, tokens
from retrofit.distill.config import DistillConfig
from retrofit.distill.files import RunFolder
from retrofit.distill.loop import Loop, Progress
from retrofit.distill.modes import random_state, restored
from retrofit.distill.reports import DistillReport
from retrofit.distill.stages import Sites, nothing_to_train, trained_in_stage_1
from retrofit.errors import ConfigError, DataError
from retrofit.evaluate.account import dense_until
from retrofit.evaluate.perplexity import device_of, positions_of


def distill(
    model: nn.Module,
    data: Source | Tensor = DEFAULT_SOURCE,
    config: DistillConfig | None = None,
    *,
    tokenizer: Any = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    field: str = "text",
) -> DistillReport:
    """Trains a converted model, in place, to do what its weights do with dense attention.

    Args:
        model: Converted. One process trains it where it lies; of several, each on accelerate's device.
        data: See ``retrofit.data.tokens``; or token ids.
        config: The settings; None means the defaults.
        tokenizer: The model's tokenizer; may be left out if ``data`` is token ids.
        output: Folder for checkpoints, losses and stored logits; None keeps nothing. The model itself is saved
            by ``retrofit.save_pretrained``.
        resume: Whether to go on with the run in ``output``, from a model in the state in which that run began.
            An empty or missing folder begins a new run.
        progress: Called after each step.
        field: See ``retrofit.data.documents``.

    Raises:
        ConfigError: If the model is not converted, or has nothing to train in a stage.
        DataError: If the data is too short, a sequence is beyond the model's positions, or none of its queries
            would be sparse.
        OutputError: If the folder cannot be used or written.
    """
    began = time.perf_counter()
    config = DistillConfig() if config is None else config
    found = _converted(model)
    _check_length(model, found, config)
    if output is None and (resume or config.teacher == "logits"):
        what = "resume=True" if resume else "teacher='logits'"
        raise ConfigError(f"{what} needs a folder, got output=None; pass output=…")
    sequences = pack(tokens(data, tokenizer, field=field), config.length)
    own, stages = _stages(found, config)

    # A process alone trains where the model lies; accelerate places the models of several.
    accelerator = Accelerator(device_placement=False)
    if accelerator.num_processes > 1:
        model.to(accelerator.device)
    device = device_of(model)
    folder = _folder(accelerator, output, config, sequences, found, resume)
    loop = Loop(model, sequences, config, accelerator, device, folder, progress, own, found, stages)
    with restored(model), random_state(device):
        loop.run()
    return DistillReport(
        stages=tuple(loop.reports),
        sequences=sequences.shape[0],
        tokens=len(loop.losses)
        * config.accumulation
        * config.batch_size
        * accelerator.num_processes
        * config.length,
        losses=tuple(loop.losses),
        resumed_from=loop.resumed_from,
        seconds=time.perf_counter() - began,
    )


def _stages(found: Sites, config: DistillConfig) -> tuple[dict[str, list[nn.Parameter]], tuple[int, ...]]:
    """What stage 1 trains, and the stages to run."""
    stages = {None: (1, 2), "both": (1, 2), "1": (1,), "2": (2,)}[config.stage]
    if 1 not in stages:
        return {}, stages
    own = trained_in_stage_1(found)
    if not own and config.stage is None:
        return {}, (2,)
    if not own:
        raise nothing_to_train(found)
    return own, stages


def _converted(model: nn.Module) -> Sites:
    found = list(sites(model))
    if not found:
        raise ConfigError(
            "distill needs a converted model, got one without converted sites; call retrofit.convert"
        )
    if all(site.retrofit.config.target == "dense" for _, site in found):
        raise ConfigError(
            "every site is DenseConfig, so there is nothing to recover; convert to another target"
        )
    return found


def _check_length(model: nn.Module, found: Sites, config: DistillConfig) -> None:
    positions = positions_of(model)
    if positions is not None and config.length > positions:
        raise DataError(
            f"length must be at most the model's {positions} positions, got {config.length}; pass a smaller length"
        )
    begins = min(dense_until(site.retrofit) for _, site in found if site.retrofit.config.target != "dense")
    if config.length <= begins:
        raise DataError(
            f"length={config.length} leaves no query sparse, as the sites are dense up to position {begins}; "
            "pass a larger length or convert with a smaller dense_until"
        )


def _folder(
    accelerator: Accelerator,
    output: str | Path | None,
    config: DistillConfig,
    sequences: Tensor,
    found: Sites,
    resume: bool,
) -> RunFolder | None:
    if output is None:
        return None
    settings = asdict(config)
    del settings["save_every"]
    digest = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
    record = {
        "config": settings,
        "processes": accelerator.num_processes,
        "data": {"sequences": sequences.shape[0], "sha256": digest},
        "sites": {path: config_to_dict(site.retrofit.config) for path, site in found},
    }
    with accelerator.main_process_first():
        return RunFolder(output, record, resume=resume or not accelerator.is_main_process)
