"""How many keys a query attends to, and how many products an attention takes.

MAHAConfig(scales=4, widths=(112, 32, 32), sink=8), 4096 tokens  →  mean keys per query
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels.maha.bands import Bands


def keys_per_query(bands: Bands, position: Tensor) -> Tensor:
    """Returns the keys and cells that queries at ``position`` (int64, any shape, at least 0) attend to."""
    return torch.stack([bands.count(scale, position) for scale in range(bands.scales)]).sum(0)


def mean_keys(bands: Bands, tokens: int) -> float:
    """Returns the mean number of keys and cells per query over a row of ``tokens`` tokens."""
    return keys_per_query(bands, torch.arange(tokens)).double().mean().item()


def visible_pairs(bands: Bands, start: Tensor, length: Tensor, *, queries: int, slots: int) -> int:
    """Returns the (query, key or cell) pairs of one head over the whole batch.

    Args:
        bands: The geometry.
        start: Index of each row's first real token [B].
        length: Number of real tokens of each row [B].
        queries: Number of queries T, the last of the slots.
        slots: Number of index slots N.
    """
    position = torch.arange(slots - queries, slots, device=start.device) - start[:, None]
    valid = (position >= 0) & (position < length[:, None])
    return int(torch.where(valid, keys_per_query(bands, position.clamp(min=0)), 0).sum())
