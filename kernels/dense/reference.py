"""Dense attention by its formula, with the whole mask: the definition.

out[t] = Σ_j softmax_j(scale · q[t]·k[j]) v[j] over the keys j visible to t: real ones, up to t if causal,
and later than t − w under a sliding window of w. The queries are the last T of the N index slots. With a softcap c
the scores s become c·tanh(s / c); with sinks the softmax has one more term, exp(sink of the head), of value 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules


def visible(
    tokens: int, slots: int, start: Tensor, length: Tensor, *, causal: bool, sliding_window: int
) -> Tensor:
    """Which keys each query sees: bool [B, T, N]; False throughout for queries that are padding."""
    key = torch.arange(slots, device=start.device)
    query = key[slots - tokens :, None]
    end = start + length
    seen = ((key >= start[:, None]) & (key < end[:, None]))[:, None, :]
    seen = seen & ((query >= start[:, None, None]) & (query < end[:, None, None]))
    if causal:
        seen = seen & (key <= query)
    if sliding_window:
        seen = seen & (key > query - sliding_window)
    return seen


def attention_weights(
    q: Tensor,
    k: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    causal: bool,
    sliding_window: int = 0,
    rules: ScoreRules = PLAIN,
    bias: Tensor | None = None,
) -> Tensor:
    """What each query of q [B, Hq, T, D] gives to the keys k [B, Hkv, N, D]: [B, Hq, T, N]; padding gives nothing.

    ``bias`` is added to the scores behind a softcap, broadcast to [B, Hq, T, N].
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = visible(
        q.shape[2], k.shape[2], start, length, causal=causal, sliding_window=sliding_window
    ).unsqueeze(1)
    scores = q @ k.transpose(-1, -2) * scale
    if rules.softcap:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, float("-inf"))
    top = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    if rules.sinks is not None:
        sink = rules.sinks.to(scores.dtype)[:, None, None]
        top = torch.maximum(top, sink)
    weights = (scores - top.detach()).exp()
    total = weights.sum(dim=-1, keepdim=True)
    if rules.sinks is not None:
        total = total + (sink - top.detach()).exp()
    return weights / total.clamp(min=torch.finfo(total.dtype).tiny)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    causal: bool,
    sliding_window: int = 0,
    rules: ScoreRules = PLAIN,
) -> Tensor:
    """Dense attention of q [B, Hq, T, D] to k [B, Hkv, N, D], v [B, Hkv, N, Dv]: [B, Hq, T, Dv]."""
    weights = attention_weights(
        q, k, start, length, scale=scale, causal=causal, sliding_window=sliding_window, rules=rules
    )
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
