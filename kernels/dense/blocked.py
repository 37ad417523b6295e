"""Dense attention with memory linear in the length, on any device.

Nothing padded and all queries present: one ``scaled_dot_product_attention`` with ``is_causal``.
Otherwise every row is moved into position space, and queries go in chunks whose masks are
[chunk, keys in reach].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.kernels.dense.rows import CHUNK, Tile, row_tiles


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
) -> Tensor:
    """Dense attention of q [B, Hq, T, D] to k [B, Hkv, N, D], v [B, Hkv, N, Dv]: [B, Hq, T, Dv]."""
    tokens, slots = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    padded = bool(((start != 0) | (length != slots)).any())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; scores are computed again, one chunk of queries at a time."""
    tokens, slots = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.zeros_like(q)
    grad_k = torch.zeros_like(k, dtype=dtype)
    grad_v = torch.zeros_like(v, dtype=dtype)
    padded = bool(((start != 0) | (length != slots)).any())
    rows = row_tiles(
        tokens, slots, start, length, causal=causal, sliding_window=sliding_window, padded=padded, chunk=CHUNK
    )
    for rows_slice, tile in rows:
        q_c = _grouped(q[rows_slice, :, tile.queries], group).to(dtype)
        g_c = _grouped(grad[rows_slice, :, tile.queries], group).to(dtype)
        k_c = k[rows_slice, :, tile.keys].to(dtype).unsqueeze(2)
        v_c = v[rows_slice, :, tile.keys].to(dtype).unsqueeze(2)
        scores = q_c @ k_c.transpose(-1, -2) * scale
        mask = tile.full_mask(q.device)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(dim=-1)
        grad_v[rows_slice, :, tile.keys] += (weights.transpose(-1, -2) @ g_c).sum(dim=2)
        grad_w = g_c @ v_c.transpose(-1, -2)
        grad_s = weights * (grad_w - (weights * grad_w).sum(dim=-1, keepdim=True)) * scale
        grad_q[rows_slice, :, tile.queries] = (grad_s @ k_c).flatten(1, 2).to(q.dtype)
        grad_k[rows_slice, :, tile.keys] += (grad_s.transpose(-1, -2) @ q_c).sum(dim=2)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _grouped(x: Tensor, group: int) -> Tensor:
    """[B, Hq, T, D] → [B, Hkv, G, T, D]."""
    batch, heads, tokens, width = x.shape
    return x.reshape(batch, heads // group, group, tokens, width)


__all__ = ["Tile", "dense_attention", "dense_attention_backward"]
