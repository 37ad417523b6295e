"""The published form of MAHA, for encoders: queries are pooled too, and scale 0 is dense.

X_0 = X, X_l = Conv1d(X_{l−1}, kernel 3, stride r)  →  O_l = softmax(Q_l K_lᵀ·scale) V_l  →  O* = Σ w_l up(O_l)

Source: Erden, 2512.14925. There X is the layer's input; here the convolutions are depthwise on q, k and v, so that
a trained model's projections stay. ``up`` repeats a cell's output for its tokens (nearest neighbour). The weights are
those of :mod:`retrofit.kernels.maha.aggregate` with equal masses, so the learned offsets alone decide: the paper's
softmax(θ), 1/L at the start. A query sees later tokens through its cell; hence encoders only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv1d, max_pool1d, pad

from retrofit.errors import ConfigError
from retrofit.kernels.dense.ops import dense_attention
from retrofit.kernels.maha.aggregate import scale_weights

KERNEL = 3


def paper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    weights: Sequence[tuple[Tensor, Tensor, Tensor] | None],
    offsets: Tensor,
    *,
    scale: float,
    ratio: int,
    aggregation: str,
    regularizer: str,
) -> Tensor:
    """Attends at every resolution and mixes the results.

    Args:
        q: Queries [B, Hq, N, D].
        k: Keys [B, Hkv, N, D].
        v: Values [B, Hkv, N, Dv].
        start: int64 [B], index of each row's first real token.
        length: int64 [B], number of real tokens of each row.
        weights: For each scale from 1 on the convolutions of q [Hq, D, 3], k [Hkv, D, 3] and v [Hkv, Dv, 3];
            None pools by the maximum.
        offsets: Learned θ [Hq, L].
        scale: Factor on q · k.
        ratio: Stride r.
        aggregation: ``convex`` or ``nash``.
        regularizer: ``entropy`` or ``euclidean``.

    Returns:
        [B, Hq, N, Dv]; zeros in rows that are padding.

    Raises:
        ConfigError: If there are not as many queries as keys.
    """
    if q.shape[2] != k.shape[2]:
        raise ConfigError(
            f'mode="paper" needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}; use mode="causal"'
        )
    tokens = q.shape[2]
    position = torch.arange(tokens, device=q.device)
    real = position < length[:, None]
    row = (position + start[:, None]).clamp(max=tokens - 1)
    q, k, v = (_take(x, row) for x in (q, k, v))
    origin, cells = torch.zeros_like(start), length
    outputs = []
    for level, level_weights in enumerate([None, *weights]):
        if level:
            inside = torch.arange(q.shape[2], device=q.device) < cells[:, None]
            own = level_weights or (None, None, None)
            q, k, v = (_pool(x, inside, w, ratio) for x, w in zip((q, k, v), own, strict=True))
            cells = (cells + ratio - 1) // ratio
        out = dense_attention(q, k, v, origin, cells, scale=scale, causal=False)
        outputs.append(out[:, :, position // ratio**level])
    wide = torch.promote_types(q.dtype, torch.float32)
    stacked = torch.stack(outputs, -2).to(wide)
    masses = stacked.new_zeros(stacked.shape[:-1])
    mix = scale_weights(masses, stacked, offsets.to(wide), aggregation=aggregation, regularizer=regularizer)
    mixed = (mix[..., None] * stacked).sum(-2).masked_fill(~real[:, None, :, None], 0.0)
    index = torch.arange(tokens, device=q.device) - start[:, None]
    own_rows = (index >= 0) & (index < length[:, None])
    back = _take(mixed, index.clamp(min=0)).masked_fill(~own_rows[:, None, :, None], 0.0)
    return back.to(q.dtype)


def _take(x: Tensor, index: Tensor) -> Tensor:
    # x [B,H,N,D], index [B,M]  →  [B,H,M,D]
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _pool(x: Tensor, inside: Tensor, weight: Tensor | None, ratio: int) -> Tensor:
    # x [B,H,N,D], inside [B,N], weight [H,D,3]  →  [B,H,⌈N/ratio⌉,D]
    batch, heads, tokens, dim = x.shape
    lines = x.transpose(2, 3).reshape(batch, heads * dim, tokens)
    if weight is None:
        lowest = torch.finfo(x.dtype).min
        lines = lines.masked_fill(~inside[:, None], lowest)
        pooled = max_pool1d(pad(lines, (0, -tokens % ratio), value=lowest), ratio, ratio)
        # A cell without any real token is never read, but has to be finite in a product with 0.
        pooled = pooled.masked_fill(pooled == lowest, 0.0)
    else:
        lines = lines.masked_fill(~inside[:, None], 0.0)
        taps = weight.to(x.dtype).reshape(heads * dim, 1, KERNEL)
        pooled = conv1d(lines, taps, stride=ratio, padding=1, groups=heads * dim)
    return pooled.view(batch, heads, dim, -1).transpose(2, 3)
