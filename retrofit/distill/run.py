"""Runs a distillation: the loop over stages and steps, with accelerate as the engine.

    report = distill(model, "book.txt", DistillConfig(length=2048), tokenizer=tokenizer, output="run")

Whatever is random in a step is seeded by (seed, stage, step), and the learning rate and the batch are functions
of the step: a checkpoint holds parameters, optimiser and step, and a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor, nn

from retrofit.api import sites
from retrofit.configs import config_to_dict
from retrofit.data import DEFAULT_SOURCE, Source, batch, pack, tokens
from retrofit.distill.adapters import Adapters
from retrofit.distill.config import DistillConfig
from retrofit.distill.files import RunFolder
from retrofit.distill.stages import Engine, Sites, nothing_to_train, stage_1, stage_2, trained_in_stage_1
from retrofit.distill.teacher import CopiedTeacher, SharedTeacher, StoredTeacher, Teacher
from retrofit.errors import ConfigError, DataError
from retrofit.evaluate.account import dense_until
from retrofit.evaluate.perplexity import device_of, positions_of
from retrofit.progress import track

Progress = Callable[[dict[str, Any]], None]
"""Receives each step's record: stage, step, loss and its parts, learning rate."""


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """One stage of a run.

    Attributes:
        stage: 1 or 2.
        steps: Optimiser steps.
        trained: Number of trained parameters (elements).
        first_loss: Mean loss of the first tenth of the steps.
        last_loss: Mean loss of the last tenth.
    """

    stage: int
    steps: int
    trained: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True, kw_only=True)
class DistillReport:
    """What ``distill`` did.

    Attributes:
        stages: One entry per stage run.
        sequences: Sequences of the data.
        tokens: Tokens trained on, over all stages and processes.
        losses: Each step's record, as in ``losses.jsonl``.
        resumed_from: Steps that were done before, over all stages; None for a new run.
        seconds: Time of this call.
    """

    stages: tuple[StageReport, ...]
    sequences: int
    tokens: int
    losses: tuple[dict[str, Any], ...]
    resumed_from: int | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)


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
    loop = _Loop(model, sequences, config, accelerator, device, folder, progress, own, found, stages)
    with _restored(model), _random_state(device):
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


class _Loop:
    """The state of one run."""

    def __init__(
        self,
        model: nn.Module,
        sequences: Tensor,
        config: DistillConfig,
        accelerator: Accelerator,
        device: torch.device,
        folder: RunFolder | None,
        progress: Progress | None,
        own: dict[str, list[nn.Parameter]],
        found: Sites,
        stages: tuple[int, ...],
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.config = config
        self.accelerator = accelerator
        self.device = device
        self.stages = stages
        self.folder = folder
        self.progress = progress
        self.own = own
        self.sites = found
        self.adapters = Adapters(model)
        self.losses: list[dict[str, Any]] = []
        self.reports: list[StageReport] = []
        self.resumed_from: int | None = None
        self.engine = Engine(
            accelerator.backward, partial(_precision, device, config.precision), config.accumulation
        )

    def run(self) -> None:
        """Runs the stages that are not done yet; adapters left by an error are taken off unmerged."""
        state: dict[str, Any] | None = None
        if self.folder is not None and (loaded := self.folder.load()) is not None:
            state, self.losses = loaded
            self.resumed_from = len(self.losses)
        finished = False
        try:
            for stage in self.stages:
                if state is not None and stage < state["stage"]:
                    self._report(stage, [parameter for group in self.own.values() for parameter in group])
                    continue
                # Taken before stage 2 changes or loads anything: the teacher is the model as it came.
                teacher = self._teacher() if stage == 2 else None
                self._stage(stage, teacher, state if state and state["stage"] == stage else None)
            finished = True
        finally:
            if self.config.merge_lora or not finished:
                self.adapters.remove(merge=finished)

    def _stage(self, stage: int, teacher: Teacher | None, state: dict[str, Any] | None) -> None:
        config, accelerator = self.config, self.accelerator
        steps = config.steps_of(stage)
        groups = self._prepare(stage)
        trained = [parameter for group in groups for parameter in group]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=config.weight_decay)
        begin = 0
        if state is not None:
            self._restore(state)
            optimizer.load_state_dict(state["optimizer"])
            begin = state["step"]
        optimizer = accelerator.prepare_optimizer(optimizer)
        base = config.learning_rate if stage == 1 else config.learning_rate_2
        for step in track(range(begin, steps), f"stage {stage}"):
            rate = base * _schedule(step, steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(_seed(config.seed, stage, step))
            parts = self._gradients(stage, step, teacher)
            self._synchronise(trained)
            for group in groups:
                accelerator.clip_grad_norm_(group, config.clip)
            optimizer.step()
            optimizer.zero_grad()
            self._note({"stage": stage, "step": step, **parts, "learning_rate": rate})
            done = step + 1
            if done == steps or (config.save_every and done % config.save_every == 0):
                self._save(stage, done, optimizer)
        self._report(stage, trained)

    def _report(self, stage: int, trained: list[nn.Parameter]) -> None:
        losses = [record["loss"] for record in self.losses if record["stage"] == stage]
        tenth = max(1, len(losses) // 10)
        self.reports.append(
            StageReport(
                stage=stage,
                steps=len(losses),
                trained=sum(parameter.numel() for parameter in trained),
                first_loss=sum(losses[:tenth]) / tenth,
                last_loss=sum(losses[-tenth:]) / tenth,
            )
        )

    def _prepare(self, stage: int) -> list[list[nn.Parameter]]:
        """Freezes and unfreezes for ``stage``; the groups whose gradients are clipped together."""
        config, model = self.config, self.model
        model.requires_grad_(False)
        if stage == 1:
            model.eval()
            groups = list(self.own.values())
        else:
            if config.trainable == "all":
                group = list(model.parameters())
            else:
                group = [parameter for _, site in self.sites for parameter in site.retrofit.parameters()]
            if config.trainable == "lora":
                torch.manual_seed(config.seed)
                if not self.adapters.added:
                    self.adapters.add(config.lora_rank, config.lora_alpha)
                group += self.adapters.parameters()
            if not group:
                raise ConfigError("trainable='own' found no parameters in the targets; take trainable='lora'")
            groups = [group]
            model.train()
            for _, site in self.sites:
                site.training = False  # converted attention has no dropout; its children keep theirs
            if config.gradient_checkpointing:
                _checkpoint_gradients(model)
        for group in groups:
            for parameter in group:
                if parameter.dtype != torch.float32:
                    raise ConfigError(
                        f"trained parameters must be float32, got {parameter.dtype}; load the model with "
                        "dtype=torch.float32 (precision='bf16' still computes in bfloat16)"
                    )
                parameter.requires_grad_(True)
        return groups

    def _teacher(self) -> Teacher:
        config = self.config
        if config.teacher == "shared":
            return SharedTeacher(self.model, self.adapters, attention=config.attention_weight > 0)
        if config.teacher == "copy":
            return CopiedTeacher(self.model, config.teacher_device, attention=config.attention_weight > 0)
        assert self.folder is not None
        teacher = StoredTeacher(self.folder.teacher, config.teacher_top)
        used = {
            row
            for step in range(config.steps_of(2))
            for _, rows in self._batches(2, step)
            for row in rows.tolist()
        }
        teacher.store(self.model, self.sequences, sorted(used), self.device)
        return teacher

    def _batches(self, stage: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        config, accelerator = self.config, self.accelerator
        for part in range(config.accumulation):
            number = (
                step * config.accumulation + part
            ) * accelerator.num_processes + accelerator.process_index
            yield batch(self.sequences, number, config.batch_size, config.seed + stage)

    def _gradients(self, stage: int, step: int, teacher: Teacher | None) -> dict[str, float]:
        """Adds up a step's gradients; the mean of what its batches say."""
        said = []
        for ids, rows in self._batches(stage, step):
            ids = ids.to(self.device)
            if teacher is None or stage == 1:
                said.append(stage_1(self.model, ids, self.own, self.engine))
            else:
                said.append(stage_2(self.model, ids, rows, teacher, self.config, self.engine))
        means = {name: sum(one[name] for one in said) / len(said) for name in said[0]}
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise ConfigError(f"stage {stage} step {step}: {bad[0]} is not finite; lower the learning rate")
        if self.accelerator.num_processes > 1:
            values = torch.tensor(list(means.values()), device=self.device)
            means = dict(zip(means, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        return means

    def _synchronise(self, trained: list[nn.Parameter]) -> None:
        """Averages gradients over processes; stage 1 runs many backwards a forward, which no wrapper expects."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in trained:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(gradient, "mean")

    def _note(self, record: dict[str, Any]) -> None:
        self.losses.append(record)
        if not self.accelerator.is_main_process:
            return
        if self.folder is not None:
            self.folder.append(record)
        if self.progress is not None:
            self.progress(record)

    def _save(self, stage: int, step: int, optimizer: Any) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        kept = {id(parameter) for _, site in self.sites for parameter in site.retrofit.parameters()}
        parameters = {
            name: parameter.detach().cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or id(parameter) in kept
        }
        self.folder.save(
            {"stage": stage, "step": step, "parameters": parameters, "optimizer": optimizer.state_dict()}
        )

    def _restore(self, state: dict[str, Any]) -> None:
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state["parameters"].items():
                mine[name].copy_(value)


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


def _precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


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
    begins = min(
        dense_until(site.retrofit.config) for _, site in found if site.retrofit.config.target != "dense"
    )
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


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Puts modes, ``requires_grad`` and gradient checkpointing back afterwards."""
    training = {module: module.training for module in model.modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    checkpointing = _checkpoints_gradients(model)
    try:
        yield
    finally:
        if _checkpoints_gradients(model) and not checkpointing:
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
def _random_state(device: torch.device) -> Iterator[None]:
    """Keeps the caller's random state."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _checkpoints_gradients(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _checkpoint_gradients(model: nn.Module) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    else:
        raise ConfigError(
            f"gradient_checkpointing needs a Hugging Face model, got {type(model).__name__}; turn it off"
        )


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: up along a line, then down along a cosine to a tenth."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def _seed(seed: int, stage: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()[:7], "big")
