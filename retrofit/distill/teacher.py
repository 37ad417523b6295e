"""Where stage 2 learns from.

SharedTeacher    the same weights, dense attention, adapters off: no second copy
CopiedTeacher    a frozen copy, on any device
StoredTeacher    the likeliest logits of each position, computed once and kept in files
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from retrofit.api import dense
from retrofit.distill.adapters import Adapters
from retrofit.distill.files import replace
from retrofit.distill.taps import Collector, tapped
from retrofit.errors import OutputError
from retrofit.evaluate.logits import run
from retrofit.evaluate.perplexity import CHUNK, in_evaluation_mode
from retrofit.progress import track

Divergence = Callable[[Tensor, int, int], Tensor]
"""(student's logits [B, c, vocabulary] at positions first to last, first, last) → KL summed over positions."""


@dataclass(frozen=True)
class Lesson:
    """What the teacher says about one batch.

    Attributes:
        divergence: Of a student's logits from the teacher's.
        attention: By site, the attention's output [B, Hq, n, Dv].
    """

    divergence: Divergence
    attention: dict[str, Tensor] = field(default_factory=dict)


class SharedTeacher:
    """The model itself with dense attention and its adapters off; its base weights must be frozen."""

    def __init__(self, model: nn.Module, adapters: Adapters, *, attention: bool) -> None:
        self.model = model
        self.adapters = adapters
        self.attention = attention

    @torch.no_grad()
    def teach(self, ids: Tensor, rows: Tensor) -> Lesson:
        """Runs the dense model on ``ids`` [B, n]."""
        with dense(self.model), self.adapters.off():
            return _lesson(self.model, ids, self.attention)


class CopiedTeacher:
    """A frozen copy of the model, taken before training."""

    def __init__(self, model: nn.Module, device: str | None, *, attention: bool) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        if device is not None:
            self.model.to(device)
        self.device = device
        self.attention = attention

    @torch.no_grad()
    def teach(self, ids: Tensor, rows: Tensor) -> Lesson:
        """Runs the copy on ``ids`` [B, n]."""
        with dense(self.model):
            return _lesson(self.model, ids if self.device is None else ids.to(self.device), self.attention)


class StoredTeacher:
    """Files ``<row>.safetensors`` with the ``top`` likeliest tokens of each position and their log-probabilities.

    What is not kept is one bucket, in the teacher and in the student.
    """

    def __init__(self, folder: Path, top: int) -> None:
        self.folder = folder
        self.top = top

    @torch.no_grad()
    def store(self, model: nn.Module, sequences: Tensor, rows: list[int], device: torch.device) -> None:
        """Computes the files of ``rows`` that are not there yet, with the untrained model.

        Raises:
            OutputError: If they cannot be written.
        """
        from safetensors.torch import save

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be made: {error.strerror}; choose another output"
            ) from error
        missing = [row for row in rows if not self._file(row).exists()]
        with dense(model), in_evaluation_mode(model):
            for row in track(missing, "teacher's logits"):
                outputs = run(model, sequences[row][None].to(device))
                values, indices = [], []
                for first, last in pieces(outputs.length):
                    logs = outputs.logits(first, last)[0].float().log_softmax(-1)
                    best = logs.topk(min(self.top, logs.shape[-1]), dim=-1)
                    values.append(best.values.cpu())
                    indices.append(best.indices.int().cpu())
                tensors = {"logprobs": torch.cat(values), "tokens": torch.cat(indices)}
                replace(self._file(row), save(tensors))

    def teach(self, ids: Tensor, rows: Tensor) -> Lesson:
        """Reads the files of ``rows``."""
        from safetensors.torch import load_file

        read = [load_file(self._file(row)) for row in rows.tolist()]
        logprobs = torch.stack([tensors["logprobs"] for tensors in read]).to(ids.device)
        tokens = torch.stack([tensors["tokens"] for tensors in read]).long().to(ids.device)

        def divergence(student: Tensor, first: int, last: int) -> Tensor:
            taught, index = logprobs[:, first:last], tokens[:, first:last]
            logs = student.float().log_softmax(-1).gather(-1, index)
            inside = (taught.exp() * (taught - logs)).sum()
            rest, guess = _rest(taught), _rest(logs)
            return inside + (rest.exp() * (rest - guess)).sum()

        return Lesson(divergence)

    def _file(self, row: int) -> Path:
        return self.folder / f"{row:08d}.safetensors"


Teacher = SharedTeacher | CopiedTeacher | StoredTeacher


def pieces(length: int) -> list[tuple[int, int]]:
    """Cuts ``length`` positions into pieces of at most ``CHUNK``."""
    return [(first, min(first + CHUNK, length)) for first in range(0, length, CHUNK)]


def _lesson(model: nn.Module, ids: Tensor, attention: bool) -> Lesson:
    collector = Collector()
    with in_evaluation_mode(model), tapped(model, collector):
        outputs = run(model, ids)
    collected = collector.close()

    def divergence(student: Tensor, first: int, last: int) -> Tensor:
        with torch.no_grad():
            taught = outputs.logits(first, last).to(student.device).float().log_softmax(-1)
        logs = student.float().log_softmax(-1)
        return nn.functional.kl_div(logs, taught, reduction="sum", log_target=True)

    return Lesson(divergence, collected if attention else {})


def _rest(logprobs: Tensor) -> Tensor:
    """Log of the probability that the last dimension leaves over, at least 1e-6 of it."""
    left: Tensor = 1 - logprobs.exp().sum(-1)
    return left.clamp(min=1e-6).log()
