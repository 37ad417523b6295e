"""Carries a bias by distance into queries and keys, so that every kernel serves it.

scale·q·k + slope·position(k)   =   scale·[q, slope/scale]·[k, position(k)]

A position is written as 256·a + b and a slope as a sum of three numbers, all exact in bfloat16 and float16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.errors import ConfigError

COLUMNS = 8
"""Added to the width of queries and keys: two digits times three parts, and two of 0, as kernels like multiples of 8."""

_BASE = 256
_MOST = _BASE * _BASE


def slope_columns(slopes: Sequence[float], heads: int, scale: float) -> Tensor:
    """The columns of the queries, float32 [heads, COLUMNS]; one slope stands for all heads."""
    rest = torch.tensor(slopes, dtype=torch.float64).expand(heads) / scale
    parts = []
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16).double())
        rest = rest - parts[-1]
    nothing = torch.zeros_like(rest)
    return torch.stack([*parts, *parts, nothing, nothing], dim=1).float()


def with_positions(
    q: Tensor, k: Tensor, columns: Tensor, start: Tensor, past: int, site: str
) -> tuple[Tensor, Tensor]:
    """Returns queries and new keys, wider by ``COLUMNS``.

    Args:
        q: Queries [B, Hq, T, D].
        k: New keys [B, Hkv, T, D].
        columns: Of the queries' heads [Hq, COLUMNS].
        start: Index of each row's first real token, int64 [B].
        past: Index slots before the new ones.
        site: Its path, for messages.

    Raises:
        ConfigError: If there are more positions than a low precision can tell apart.
    """
    slots = past + k.shape[2]
    if q.dtype.itemsize < 4 and slots > _MOST:
        raise ConfigError(
            f"{site} has a bias by distance, which {q.dtype} holds for {_MOST:,} tokens at most, got {slots:,}; "
            "run the model in float32"
        )
    index = torch.arange(past, slots, device=k.device)
    position = (index - start[:, None]).clamp(min=0)
    low = position % _BASE
    digits = torch.stack([position - low] * 3 + [low] * 3 + [torch.zeros_like(low)] * 2, dim=-1)
    wide_q = columns.to(q.dtype)[:, None].expand(q.shape[0], -1, q.shape[2], -1)
    wide_k = digits.to(k.dtype)[:, None].expand(-1, k.shape[1], -1, -1)
    return torch.cat([q, wide_q], dim=-1), torch.cat([k, wide_k], dim=-1)
