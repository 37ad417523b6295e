"""Definition of MAHA by explicit masks: dense, short, in any floating dtype.

For query t, r = ratio: e_{−1} = t+1, e_l = r^(l+1)·⌊max(0, t+1−w_0−…−w_l)/r^(l+1)⌋, and scale l attends to the cells
of r^l tokens in [max(e_l, sink), e_{l−1}); the last scale's e is 0 unless it has a width; scale 0 also attends to
the sinks. Logits are scale·q·k_cell + log(cell size); O* = Σ w_l O_l.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from retrofit.kernels.maha.aggregate import scale_weights


def maha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    *,
    scale: float,
    widths: Sequence[int],
    last_width: int | None,
    sink: int,
    ratio: int,
    aggregation: str,
    regularizer: str,
) -> Tensor:
    """Returns the attention of the last T of N tokens; see :func:`retrofit.kernels.maha.ops.maha_attention`."""
    group = q.shape[1] // k.shape[1]
    slots = torch.arange(k.shape[2], device=q.device)
    t = slots[k.shape[2] - q.shape[2] :] - start[:, None]  # [B, T]
    real = (t >= 0) & (t < length[:, None])
    reach = list(widths) + ([] if last_width is None else [last_width])
    upper = t + 1
    lses, outputs = [], []
    for level, (cells, contents) in enumerate(zip([k, *keys], [v, *values], strict=True)):
        size = ratio**level
        lower = torch.zeros_like(t)
        if level < len(reach):
            step = size * ratio
            lower = (t + 1 - sum(reach[: level + 1])).clamp(min=0) // step * step
        index = torch.arange(cells.shape[2], device=q.device)
        begin = (index - start[:, None] if level == 0 else index * size + 0 * start[:, None])[:, None]
        visible = (begin >= lower.clamp(min=sink)[..., None]) & (begin < upper[..., None])
        if level == 0:
            visible |= (begin >= 0) & (begin < sink) & (begin <= t[..., None])
        visible = (visible & real[..., None])[:, None]  # [B, 1, T, cells]
        logits = scale * q @ cells.repeat_interleave(group, 1).transpose(2, 3) + log(size)
        some = visible.any(-1)
        logits = logits.masked_fill(~visible & some[..., None], -torch.inf)
        if cells.shape[2]:
            lse = logits.logsumexp(-1)
            output = logits.softmax(-1) @ contents.repeat_interleave(group, 1)
        else:
            lse, output = q.new_zeros(q.shape[:3]), q.new_zeros(*q.shape[:3], v.shape[3])
        if level == 0:
            some = some | ~real[:, None]  # some scale must have weight, also where there is no query
        lses.append(lse.masked_fill(~some, -torch.inf))
        outputs.append(torch.where(some[..., None], output, 0.0))
        upper = lower
    stacked = torch.stack(outputs, -2)
    weights = scale_weights(
        torch.stack(lses, -1), stacked, offsets.to(q.dtype), aggregation=aggregation, regularizer=regularizer
    )
    out = (weights[..., None] * stacked).sum(-2)
    return torch.where(real[:, None, :, None], out, 0.0)
