"""Recovers a converted model's accuracy from its own weights with dense attention."""

from __future__ import annotations

from retrofit.distill.config import DistillConfig
from retrofit.distill.run import DistillReport, StageReport, distill

__all__ = ["DistillConfig", "DistillReport", "StageReport", "distill"]
