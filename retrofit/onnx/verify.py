"""Compares an exported model, run by onnxruntime, with the PyTorch model it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrofit.errors import ExportError
from retrofit.onnx.session import OnnxModel

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 1e-1}
"""Greatest absolute difference of a logit, by the dtype of the weights."""

LONGEST = 1_200
"""Tokens of the longest comparison: it has to run in a moment on a processor."""


@dataclass(frozen=True)
class Difference:
    """The greatest difference to PyTorch.

    Attributes:
        value: Greatest absolute difference of an output.
        tolerance: What it may be.
        length: Length at which it was found.
        batch: Batch size at which it was found; rows after the first are padded on the left.
        cached: Whether it was found on tokens that follow a cached prefix.
        lengths: All lengths that were compared.
    """

    value: float
    tolerance: float
    length: int
    batch: int
    cached: bool
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        where = f"length {self.length}, batch {self.batch}{', after a cached prefix' if self.cached else ''}"
        return (
            f"worst difference to torch {self.value:.2e} (tolerance {self.tolerance:.0e}) at {where}; "
            f"compared at lengths {', '.join(map(str, self.lengths))}"
        )


def verify(model: Any, file: Path, *, sparse_from: int, ids: Tensor | None = None) -> Difference:
    """Compares first outputs at several lengths and batch sizes, with padding and through the cache.

    Args:
        model: The PyTorch model, in evaluation mode.
        file: The exported model.
        sparse_from: Length from which converted attention leaves something out; one length lies above it.
        ids: Tokens of a real text, int64 [length]; None takes random ones.

    Raises:
        ExportError: If a difference is above the tolerance of the model's dtype.
    """
    exported = OnnxModel(file)
    tolerance = TOLERANCES[next(model.parameters()).dtype]
    limit = getattr(model.config, "max_position_embeddings", None) or LONGEST
    lengths = sorted({min(length, limit) for length in (1, 17, min(sparse_from + 41, LONGEST))})
    if ids is None or len(ids) < lengths[-1]:
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        ids = torch.randint(vocabulary, (lengths[-1],), generator=torch.Generator().manual_seed(0))
    worst: Difference | None = None
    for length in lengths:
        for batch in (1, 2):
            for cached, value in _differences(model, exported, ids[:length], batch):
                found = Difference(value, tolerance, length, batch, cached, tuple(lengths))
                if worst is None or not value <= worst.value:
                    worst = found
    assert worst is not None
    if not worst.value <= tolerance:
        raise ExportError(
            f"the exported model differs from torch: {worst}; nothing was written. Report it, or pass "
            "check=False to write it all the same"
        )
    return worst


def _differences(model: Any, exported: OnnxModel, ids: Tensor, batch: int) -> Iterator[tuple[bool, float]]:
    tokens = len(ids)
    rows = ids.repeat(batch, 1)
    mask = torch.ones_like(rows)
    for row in range(1, batch):
        mask[row, : row * tokens // (batch + 1)] = 0
    real = mask.bool().numpy()
    split = tokens - tokens // 3 if exported.with_past and tokens > 1 else tokens
    whole = _torch(model, rows, mask, None)
    yield False, _greatest(whole[0], exported.logits(rows.numpy(), mask.numpy()), real)
    if split < tokens:
        first = _torch(model, rows[:, :split], mask[:, :split], None, use_cache=True)
        second = _torch(model, rows[:, split:], mask, first[1], use_cache=True)
        outputs = exported.step(rows[:, :split].numpy(), mask[:, :split].numpy(), exported.empty_past(batch))
        past = {
            name.replace("present.", "past_key_values.", 1): value
            for name, value in outputs.items()
            if name.startswith("present.")
        }
        outputs = exported.step(rows[:, split:].numpy(), mask.numpy(), past)
        yield True, _greatest(second[0], outputs["logits"], real[:, split:])


def _torch(
    model: Any, ids: Tensor, mask: Tensor, past: Any, use_cache: bool | None = None
) -> tuple[np.ndarray[Any, Any], Any]:
    device = next(model.parameters()).device
    options: dict[str, Any] = {}
    if use_cache is not None:
        options = {"use_cache": use_cache, "past_key_values": past}
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options["position_ids"] = positions.to(device)
    elif "position_ids" in model.forward.__code__.co_varnames:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(device)
    with torch.no_grad():
        output = model(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
    first = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return first.float().cpu().numpy(), getattr(output, "past_key_values", None)


def _greatest(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], real: np.ndarray[Any, Any]) -> float:
    """The greatest absolute difference at real tokens; NaN counts as infinite."""
    difference = np.abs(ours - theirs.astype(np.float32))[real]
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
