"""The loop over stages and steps, with accelerate as the engine.

Whatever is random in a step is seeded by (seed, stage, step), and the learning rate and the batch are functions
of the step: a checkpoint holds parameters, optimiser and step, and a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor, nn

from retrofit.data import batch
from retrofit.distill.adapters import Adapters
from retrofit.distill.config import DistillConfig
from retrofit.distill.files import RunFolder
from retrofit.distill.modes import checkpoint_gradients
from retrofit.distill.reports import StageReport
from retrofit.distill.stages import Engine, Sites, stage_1, stage_2
from retrofit.distill.teacher import CopiedTeacher, SharedTeacher, StoredTeacher, Teacher
from retrofit.errors import ConfigError
from retrofit.progress import track

Progress = Callable[[dict[str, Any]], None]
"""Receives each step's record: stage, step, loss and its parts, learning rate."""


class Loop:
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
                checkpoint_gradients(model)
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


def _precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: up along a line, then down along a cosine to a tenth."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def _seed(seed: int, stage: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()[:7], "big")
