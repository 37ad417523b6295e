"""The settings of a distillation.

DistillConfig(stage="1", steps=200)      the targets' own parameters alone
DistillConfig(trainable="lora")          … then LoRA on the attention's projections, taught by the same weights
"""

from __future__ import annotations

from dataclasses import dataclass

from retrofit.checks import at_least, check_types, one_of
from retrofit.errors import ConfigError

STAGES = ("1", "2", "both")
TRAINABLE = ("own", "lora", "all")
TEACHERS = ("shared", "copy", "logits")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Two stages; ``stage`` says which.

    Stage 1 trains the targets' own parameters, each site by itself, on the hidden states of the dense model.
    Stage 2 trains what ``trainable`` says, and the targets' own parameters with it, on the attention outputs and
    the logits of the dense model.

    Attributes:
        stage: ``1``, ``2`` or ``both``; None means both if the targets have parameters that stage 1 trains, else 2.
        steps: Optimiser steps of stage 1.
        steps_2: Optimiser steps of stage 2; None means as many as ``steps``.
        learning_rate: Peak of stage 1.
        learning_rate_2: Peak of stage 2.
        warmup: Share of a stage's steps over which the rate rises; it then falls along a cosine to a tenth.
        weight_decay: Of AdamW.
        clip: Largest norm of a step's gradient.
        length: Tokens of a sequence; must exceed the sites' dense start.
        batch_size: Sequences of a forward, on each process.
        accumulation: Forwards of a step.
        precision: ``fp32``, or ``bf16`` for mixed precision with float32 parameters.
        gradient_checkpointing: Whether stage 2 recomputes activations.
        trainable: Of stage 2: ``own`` (the targets' own parameters), ``lora`` (PEFT adapters on the linear
            layers of the converted attention modules) or ``all`` (every parameter).
        lora_rank: Rank r of the adapters.
        lora_alpha: Their scale is ``lora_alpha / lora_rank``.
        merge_lora: Whether the adapters are added to the weights at the end, so that the model has its old
            parameters again.
        teacher: Of stage 2: ``shared`` (the same weights with dense attention, no copy; not with
            ``trainable="all"``), ``copy`` (a frozen copy) or ``logits`` (the likeliest logits of each position,
            computed before training and kept in the output folder).
        teacher_device: Where a copied teacher computes, for example ``cpu``; None means beside the model.
        teacher_top: Number of logits kept of each position by ``teacher="logits"``.
        attention_weight: Of the attention outputs' relative squared error, mean over the sites; must be 0 with
            ``teacher="logits"``.
        logits_weight: Of the Kullback-Leibler divergence of the logits.
        seed: Of the order of the data and of every random choice.
        save_every: Steps between checkpoints; 0 means only at the end of a stage.

    Raises:
        ConfigError: If a value is out of its range or contradicts another.
    """

    stage: str | None = None
    steps: int = 300
    steps_2: int | None = None
    learning_rate: float = 1e-3
    learning_rate_2: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    length: int = 2048
    batch_size: int = 1
    accumulation: int = 1
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    trainable: str = "lora"
    lora_rank: int = 8
    lora_alpha: int = 16
    merge_lora: bool = True
    teacher: str = "shared"
    teacher_device: str | None = None
    teacher_top: int = 64
    attention_weight: float = 1.0
    logits_weight: float = 1.0
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.stage, int):
            object.__setattr__(self, "stage", str(self.stage))
        check_types(self)
        if self.stage is not None:
            one_of(self, "stage", STAGES)
        one_of(self, "trainable", TRAINABLE)
        one_of(self, "teacher", TEACHERS)
        one_of(self, "precision", PRECISIONS)
        for name in ("steps", "batch_size", "accumulation", "lora_rank", "lora_alpha", "teacher_top"):
            at_least(self, name, 1)
        at_least(self, "length", 2)
        at_least(self, "save_every", 0)
        if self.steps_2 is not None:
            at_least(self, "steps_2", 1)
        for name in ("learning_rate", "learning_rate_2", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("attention_weight", "logits_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must be at least 0 and below 1, got {self.warmup}")
        if self.stage == "1":
            return
        if self.attention_weight == 0 and self.logits_weight == 0:
            raise ConfigError(
                "attention_weight and logits_weight are both 0, so stage 2 has no loss; set one"
            )
        if self.trainable == "all" and self.teacher == "shared":
            raise ConfigError(
                "teacher='shared' needs frozen base weights, got trainable='all'; take teacher='copy' or 'logits'"
            )
        if self.teacher == "logits" and self.attention_weight != 0:
            raise ConfigError(
                f"teacher='logits' keeps no attention outputs, got attention_weight={self.attention_weight}; "
                "set it to 0 or take teacher='copy'"
            )

    def steps_of(self, stage: int) -> int:
        """Optimiser steps of ``stage``."""
        return self.steps if stage == 1 or self.steps_2 is None else self.steps_2
