"""Dense attention, a chunk of queries at a time: scores [chunk, keys], never [queries, keys]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retrofit.onnx.bodies.chunks import join, scan_chunks, split

CHUNK = 64


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool,
    sliding_window: int,
    implementation: str,
) -> Tensor:
    """As ``torch.ops.retrofit.dense_attention``, exportable. ``export_onnx`` refuses sinks and a softcap."""
    tokens, slots = q.shape[2], k.shape[2]
    size = torch.sym_min(tokens, CHUNK)
    chunks = split(q, size)
    indices = torch.arange(chunks.shape[0] * size, device=q.device).unflatten(0, (-1, size)) + slots - tokens

    def step(queries: Tensor, index: Tensor, held: Mapping[str, Tensor]) -> Sequence[Tensor]:
        k, v, start, length = held["k"], held["v"], held["start"], held["length"]
        group = queries.shape[1] // k.shape[1]
        key, first, end = torch.arange(k.shape[2], device=k.device), start[:, None], (start + length)[:, None]
        seen = ((key >= first) & (key < end))[:, None, :]
        if causal:
            seen = seen & (key <= index[:, None])
        if sliding_window:
            seen = seen & (key > index[:, None] - sliding_window)
        grouped = queries.unflatten(1, (k.shape[1], group)) * scale
        scores = (grouped.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (group, index.shape[0]))
        weights = scores.float().masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
        out = (weights.flatten(2, 3) @ v).unflatten(2, (group, index.shape[0])).flatten(1, 2)
        valid = (index >= first) & (index < end)
        return [out.masked_fill(~valid[:, None, :, None], 0)]

    return join(
        scan_chunks(step, [chunks, indices], {"k": k, "v": v, "start": start, "length": length})[0], tokens
    )
