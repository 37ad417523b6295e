"""Gradients of the blocked form: each chunk is computed again, and adds its gradients into the ranges it read.

With P_l, O_l, lse_l the softmax, output and log-mass of scale l, and O* = Σ w_l O_l:
dw_l = ⟨dO*, O_l⟩ gives d lse, d offsets and a part of dO_l through the aggregation, dO_l = w_l dO* + that part, and
dS_l = P_l ∘ (dO_l V_lᵀ − ⟨dO_l, O_l⟩ + d lse_l) are the gradients of the logits.
The entropy's weights are those of one softmax: dS = P ∘ (dO* Vᵀ − ⟨dO*, O*⟩), summed over a scale for its offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.kernels.maha.aggregate import scale_weights, scale_weights_backward
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.maha.blocked import (
    CHUNK,
    attend_scales,
    common_start,
    plan,
    softmax_bias,
    visible,
)


def maha_attention_backward(
    grad: Tensor,
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
    bands: Bands,
    aggregation: str,
    regularizer: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Returns the gradients of q, of [k, *keys], of [v, *values] and of the offsets."""
    wide = torch.promote_types(k.dtype, torch.float32)
    grad_q = torch.empty_like(q)
    grad_keys = [torch.zeros_like(x, dtype=wide) for x in (k, *keys)]
    grad_values = [torch.zeros_like(x, dtype=wide) for x in (v, *values)]
    grad_offsets = torch.zeros_like(offsets, dtype=wide)
    shared = common_start(start)
    levels = [(k, v), *zip(keys, values, strict=True)]
    whole = aggregation == "convex" and regularizer == "entropy"
    for begin in range(0, q.shape[2], CHUNK):
        chunk = q[:, :, begin : begin + CHUNK].to(wide)
        queries, index = chunk.shape[2], k.shape[2] - q.shape[2] + begin
        ranges = plan(index, queries, [x.shape[2] for x, _ in levels], start, shared, bands)
        masks, real = visible(ranges, index, queries, start, length, bands)
        seen = list(zip([r.scale for r in ranges], masks, strict=True))
        part_keys = [r.take(levels[r.scale][0]).to(wide) for r in ranges]
        part_values = [r.take(levels[r.scale][1]).to(wide) for r in ranges]
        own = torch.where(real[:, None, :, None], grad[:, :, begin : begin + CHUNK].to(wide), 0.0)
        folded = chunk.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        if whole:
            bias = softmax_bias(offsets.to(wide), seen, kv_heads=k.shape[1], ratio=bands.ratio)
            logits = (folded * scale) @ torch.cat(part_keys, 2).transpose(2, 3) + bias
            groups: list[tuple[list[int], Tensor, Tensor, Tensor | None]] = [
                (list(range(len(ranges))), logits.softmax(-1), own, None)
            ]
        else:
            lse, outputs, shares = attend_scales(
                chunk,
                part_keys,
                part_values,
                seen,
                real,
                scales=bands.scales,
                scale=scale,
                ratio=bands.ratio,
            )
            options = {"aggregation": aggregation, "regularizer": regularizer}
            weights = scale_weights(lse, outputs, offsets.to(wide), **options)
            own_lse, own_outputs, own_offsets = scale_weights_backward(
                (own[..., None, :] * outputs).sum(-1), lse, outputs, offsets.to(wide), **options
            )
            own_outputs = own_outputs + weights[..., None] * own[..., None, :]
            grad_offsets += own_offsets
            groups = [
                (
                    [i for i, r in enumerate(ranges) if r.scale == level],
                    softmax,
                    own_outputs[..., level, :],
                    own_lse[..., level],
                )
                for level, softmax in shares.items()
            ]
        grad_chunk = torch.zeros_like(folded)
        for members, softmax, above, extra in groups:
            key = torch.cat([part_keys[i] for i in members], 2)
            value = torch.cat([part_values[i] for i in members], 2)
            above = above.reshape(*folded.shape[:3], -1)
            of_shares = above @ value.transpose(2, 3)
            rest = -(of_shares * softmax).sum(-1, keepdim=True)
            if extra is not None:
                rest = rest + extra.reshape(*folded.shape[:3], 1)
            of_logits = softmax * (of_shares + rest)
            grad_chunk += of_logits @ key * scale
            sizes = [ranges[i].count for i in members]
            of_keys = torch.split(of_logits.transpose(2, 3) @ folded * scale, sizes, 2)
            of_values = torch.split(softmax.transpose(2, 3) @ above, sizes, 2)
            columns = torch.split(of_logits, sizes, 3)
            for i, of_key, of_value, column in zip(members, of_keys, of_values, columns, strict=True):
                ranges[i].add(grad_keys[ranges[i].scale], of_key)
                ranges[i].add(grad_values[ranges[i].scale], of_value)
                if whole:
                    by_head = column.reshape(*q.shape[:2], -1).sum((0, 2))
                    grad_offsets[:, ranges[i].scale] += by_head
        grad_q[:, :, begin : begin + CHUNK] = grad_chunk.view_as(chunk)
    return (
        grad_q,
        [x.to(k.dtype) for x in grad_keys],
        [x.to(v.dtype) for x in grad_values],
        grad_offsets.to(offsets.dtype),
    )
