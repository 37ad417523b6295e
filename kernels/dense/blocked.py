"""Dense attention with memory linear in the length, on any device.

Nothing padded and all queries present: one ``scaled_dot_product_attention`` with ``is_causal``.
Otherwise every row is moved into position space, and queries go in chunks whose masks are
[chunk, keys in reach]. Where the scores have rules of their own, chunks are worked out step by step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.rows import CHUNK, Tile, row_tiles
from retrofit.kernels.dense.scores import PLAIN, ScoreRules, share_of_keys


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
    tokens, slots = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    padded = bool(((start != 0) | (length != slots)).any())
    if not rules.plain:
        tiles = row_tiles(
            tokens,
            slots,
            start,
            length,
            causal=causal,
            sliding_window=sliding_window,
            padded=padded,
            chunk=CHUNK,
        )
        return _by_rules(q, k, v, tiles, scale, rules)
    reach_all = not sliding_window or sliding_window >= slots
    if not padded and reach_all and (tokens == slots or tokens == 1 or not causal):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal and tokens > 1, scale=scale, enable_gqa=gqa
        )
    if tokens == 1 and reach_all and bool((start + length == slots).all()):
        key = torch.arange(slots, device=k.device)
        seen = (key >= start[:, None])[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    rows = row_tiles(
        tokens, slots, start, length, causal=causal, sliding_window=sliding_window, padded=padded
    )
    for rows_slice, tile in rows:
        out[rows_slice, :, tile.queries] = F.scaled_dot_product_attention(
            q[rows_slice, :, tile.queries],
            k[rows_slice, :, tile.keys],
            v[rows_slice, :, tile.keys],
            attn_mask=tile.mask(q.device),
            is_causal=tile.triangular,
            scale=scale,
            enable_gqa=gqa,
        )
    return out


def _by_rules(
    q: Tensor, k: Tensor, v: Tensor, tiles: Iterator[tuple[slice, Tile]], scale: float, rules: ScoreRules
) -> Tensor:
    """What SDPA does not do: scores that are capped, and a softmax with a sink."""
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for rows, tile in tiles:
        scores = _scores(q, k, rows, tile, dtype, scale, rules)
        weights = scores.softmax(dim=-1)
        part = weights @ v[rows, :, tile.keys].to(dtype).unsqueeze(2)
        if rules.sinks is not None:
            part = part * _kept(scores, weights, rules.sinks, group)
        out[rows, :, tile.queries] = part.flatten(1, 2).to(out.dtype)
    return out


def _scores(
    q: Tensor, k: Tensor, rows: slice, tile: Tile, dtype: torch.dtype, scale: float, rules: ScoreRules
) -> Tensor:
    """Scores of a tile, hidden ones −∞: [B, Hkv, G, T, N]."""
    q_c = _grouped(q[rows, :, tile.queries], q.shape[1] // k.shape[1]).to(dtype)
    k_c = k[rows, :, tile.keys].to(dtype).unsqueeze(2)
    scores = rules.capped_(q_c @ k_c.transpose(-1, -2) * scale)
    mask = tile.full_mask(q.device)
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _kept(scores: Tensor, weights: Tensor, sinks: Tensor, group: int) -> Tensor:
    """Share of the softmax that the keys keep from the sinks: [B, Hkv, G, T, 1]."""
    top, peak = scores.amax(dim=-1, keepdim=True), weights.amax(dim=-1, keepdim=True)
    return share_of_keys(top, peak, sinks.to(scores.dtype).view(-1, group, 1, 1))


def dense_attention_backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and, if there are any, the sinks; scores are computed again, one chunk of queries at a time."""
    tokens, slots = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.zeros_like(q)
    grad_k = torch.zeros_like(k, dtype=dtype)
    grad_v = torch.zeros_like(v, dtype=dtype)
    grad_sinks = None if rules.sinks is None else torch.zeros_like(rules.sinks, dtype=dtype)
    padded = bool(((start != 0) | (length != slots)).any())
    rows = row_tiles(
        tokens, slots, start, length, causal=causal, sliding_window=sliding_window, padded=padded, chunk=CHUNK
    )
    for rows_slice, tile in rows:
        q_c = _grouped(q[rows_slice, :, tile.queries], group).to(dtype)
        g_c = _grouped(grad[rows_slice, :, tile.queries], group).to(dtype)
        k_c = k[rows_slice, :, tile.keys].to(dtype).unsqueeze(2)
        v_c = v[rows_slice, :, tile.keys].to(dtype).unsqueeze(2)
        scores = _scores(q, k, rows_slice, tile, dtype, scale, rules)
        weights = scores.softmax(dim=-1)
        lost = None
        if rules.sinks is not None:
            kept = _kept(scores, weights, rules.sinks, group)
            weights, lost = weights * kept, 1 - kept
        grad_v[rows_slice, :, tile.keys] += (weights.transpose(-1, -2) @ g_c).sum(dim=2)
        grad_w = g_c @ v_c.transpose(-1, -2)
        mean = (weights * grad_w).sum(dim=-1, keepdim=True)
        grad_s = weights * (grad_w - mean) * scale
        if rules.softcap:
            grad_s = grad_s * rules.slope(scores)
        if grad_sinks is not None and lost is not None:
            grad_sinks -= (lost * mean).sum(dim=(0, 3, 4)).flatten()
        grad_q[rows_slice, :, tile.queries] = (grad_s @ k_c).flatten(1, 2).to(q.dtype)
        grad_k[rows_slice, :, tile.keys] += (grad_s.transpose(-1, -2) @ q_c).sum(dim=2)
    if grad_sinks is not None and rules.sinks is not None:
        grad_sinks = grad_sinks.to(rules.sinks.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_sinks


def _grouped(x: Tensor, group: int) -> Tensor:
    """[B, Hq, T, D] → [B, Hkv, G, T, D]."""
    batch, heads, tokens, width = x.shape
    return x.reshape(batch, heads // group, group, tokens, width)


__all__ = ["Tile", "dense_attention", "dense_attention_backward"]
