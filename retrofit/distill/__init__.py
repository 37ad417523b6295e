"""Recovers a converted model's accuracy from its own weights with dense attention."""

from __future__ import annotations

from retrofit.distill.config import DistillConfig
from retrofit.distill.reports import DistillReport, StageReport
from retrofit.distill.run import distill

__all__ = ["DistillConfig", "DistillReport", "StageReport", "distill"]
