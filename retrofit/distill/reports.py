"""What a distillation says about itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
