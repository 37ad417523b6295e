"""MAHA by chunks of queries: each chunk attends to one contiguous range of cells per scale.

Queries [a, a+C)  →  scale 0: sinks and tokens [e_0(a), a+C), scale l: cells [e_l(a), e_{l−1}(a+C)), last: a prefix

Memory is linear in n: of a chunk, only the logits of its own ranges exist at a time. The backward pass computes
each chunk again and adds its gradients into the ranges it read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrofit.kernels.maha.aggregate import scale_weights
from retrofit.kernels.maha.bands import Bands

CHUNK = 128


@dataclass(frozen=True)
class Part:
    """A contiguous range of tokens or cells that a chunk attends to, in every row.

    Attributes:
        scale: The scale; 0 are the tokens.
        origin: Index of the first one, one for all rows or one per row [B].
        keys: [B, Hkv, M, D].
        values: [B, Hkv, M, Dv].
        visible: Which of them a query attends to [B, C, M].
    """

    scale: int
    origin: int | Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor


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
    bands: Bands,
    aggregation: str,
    regularizer: str,
) -> Tensor:
    """Returns the attention of the last T of N tokens; see :func:`retrofit.kernels.maha.ops.maha_attention`."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    common = _common(start)
    for first in range(0, q.shape[2], CHUNK):
        chunk = q[:, :, first : first + CHUNK]
        index = k.shape[2] - q.shape[2] + first
        parts, real = select(index, chunk.shape[2], k, v, start, length, keys, values, bands, common)
        out[:, :, first : first + CHUNK] = attend(
            chunk,
            [part.keys for part in parts],
            [part.values for part in parts],
            offsets,
            [(part.scale, part.visible) for part in parts],
            real,
            scale=scale,
            ratio=bands.ratio,
            aggregation=aggregation,
            regularizer=regularizer,
        )
    return out


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
    grad_offsets = torch.zeros_like(offsets)
    common = _common(start)
    for first in range(0, q.shape[2], CHUNK):
        chunk = q[:, :, first : first + CHUNK].detach().requires_grad_()
        index = k.shape[2] - q.shape[2] + first
        parts, real = select(index, chunk.shape[2], k, v, start, length, keys, values, bands, common)
        part_keys = [part.keys.detach().requires_grad_() for part in parts]
        part_values = [part.values.detach().requires_grad_() for part in parts]
        own = offsets.detach().requires_grad_()
        with torch.enable_grad():
            out = attend(
                chunk,
                part_keys,
                part_values,
                own,
                [(part.scale, part.visible) for part in parts],
                real,
                scale=scale,
                ratio=bands.ratio,
                aggregation=aggregation,
                regularizer=regularizer,
            )
        found = torch.autograd.grad(
            out, [chunk, own, *part_keys, *part_values], grad[:, :, first : first + CHUNK]
        )
        grad_q[:, :, first : first + CHUNK] = found[0]
        grad_offsets += found[1]
        for i, part in enumerate(parts):
            _add(grad_keys[part.scale], part.origin, found[2 + i])
            _add(grad_values[part.scale], part.origin, found[2 + len(parts) + i])
    return (
        grad_q,
        [x.to(k.dtype) for x in grad_keys],
        [x.to(v.dtype) for x in grad_values],
        grad_offsets,
    )


def select(
    index: int,
    queries: int,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bands: Bands,
    common: int | None,
) -> tuple[list[Part], Tensor]:
    """Returns the ranges that queries [index, index + queries) attend to, and which queries are real [B, C].

    ``common`` is the start of all rows if they share it: their ranges are then views and not copies.
    """
    device = k.device
    t = torch.arange(index, index + queries, device=device) - start[:, None]
    real = (t >= 0) & (t < length[:, None])
    from_t = (start if common is None else torch.tensor([common])) * -1 + index  # position of the first query
    from_t = from_t.clamp(min=0)
    parts = []

    def add(scale: int, origin: Tensor, count: int, low: Tensor, high: Tensor) -> None:
        # origin: first token or cell by position [B or 1]; low, high: positions seen by each query [B, C].
        cell = bands.cell(scale)
        source, content = ((k, v), *zip(keys, values, strict=True))[scale]
        count = min(count, source.shape[2])
        if count <= 0:
            return
        place: int | Tensor
        if common is not None:
            shift = common if scale == 0 else 0
            place = min(int(origin) + shift, source.shape[2] - count)
            first = torch.tensor([place - shift], device=device)
        else:
            shifts = start if scale == 0 else torch.zeros_like(start)
            place = torch.minimum(origin + shifts, torch.full_like(start, source.shape[2] - count))
            first = place - shifts
        begin = (first[:, None] + torch.arange(count, device=device)) * cell
        visible = (begin[:, None] >= low[..., None]) & (begin[:, None] < high[..., None]) & real[..., None]
        parts.append(Part(scale, place, _take(source, place, count), _take(content, place, count), visible))

    zero = from_t * 0
    if bands.sink:
        add(0, zero, bands.sink, t * 0, (t + 1).clamp(max=bands.sink))
    last = bands.scales - 1
    for scale in range(bands.scales):
        cell = bands.cell(scale)
        low, high = bands.edge(scale, t).clamp(min=bands.sink), bands.edge(scale - 1, t)
        bounded = scale < len(bands.reaches)
        if bounded:
            width = (
                bands.last_width if scale == last and bands.last_width is not None else bands.widths[scale]
            )
            origin = bands.edge(scale, from_t).clamp(min=bands.sink) // cell
            count = (queries + width + cell * bands.ratio - 2) // cell
        else:
            origin = zero + bands.sink // cell
            reach = bands.reaches[scale - 1] if scale else 0
            count = max(0, index + queries - reach) // cell - bands.sink // cell
        if index + queries > (bands.reaches[scale - 1] if scale else 0):
            add(scale, origin, count, low, high)
    return parts, real


def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    seen: Sequence[tuple[int, Tensor]],
    real: Tensor,
    *,
    scale: float,
    ratio: int,
    aggregation: str,
    regularizer: str,
) -> Tensor:
    """Attends to the ranges of a chunk; a pure, differentiable function of its tensors.

    Args:
        q: Queries [B, Hq, C, D].
        keys: Per range [B, Hkv, M, D].
        values: Per range [B, Hkv, M, Dv].
        offsets: Learned offsets of the scales [Hq, L].
        seen: Per range its scale, and which members a query attends to [B, C, M].
        real: Which queries are real [B, C]; the others get zeros.
        scale: Factor on q · k.
        ratio: Ratio of the cells of neighbouring scales.
        aggregation: ``convex`` or ``nash``.
        regularizer: ``entropy`` or ``euclidean``.
    """
    heads, tokens = q.shape[1], q.shape[2]
    kv_heads = keys[0].shape[1]
    group = heads // kv_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    offsets = offsets.to(wide)
    folded = q.to(wide).reshape(q.shape[0], kv_heads, group * tokens, q.shape[3])
    whole = aggregation == "convex" and regularizer == "entropy"
    lses, outputs = [], []
    scales = [list(range(offsets.shape[1]))] if whole else [[level] for level in range(offsets.shape[1])]
    for levels in scales:
        chosen = [i for i, (level, _) in enumerate(seen) if level in levels]
        if not chosen:
            lses.append(folded.new_full((*q.shape[:3],), -torch.inf))
            outputs.append(folded.new_zeros(*q.shape[:3], values[0].shape[3]))
            continue
        visible = torch.cat([seen[i][1] for i in chosen], 2)
        some = visible.any(-1)  # [B, C]; where nothing is seen everything is, so that all stays finite
        closed = torch.zeros_like(visible, dtype=wide).masked_fill(~visible & some[..., None], -torch.inf)
        key = torch.cat([keys[i] for i in chosen], 2).to(wide)
        value = torch.cat([values[i] for i in chosen], 2).to(wide)
        if whole:
            # One softmax over all scales: the offsets and the cells' sizes are a bias.
            bias = torch.cat(
                [
                    (offsets[:, seen[i][0]] + seen[i][0] * log(ratio))[:, None].expand(-1, keys[i].shape[2])
                    for i in chosen
                ],
                1,
            )
            mask = closed[:, None, None] + bias.view(1, kv_heads, group, 1, -1)
            out = scaled_dot_product_attention(folded, key, value, mask.flatten(2, 3), scale=scale)
            out = out.view(*q.shape[:3], -1)
            return torch.where(real[:, None, :, None], out, 0.0).to(q.dtype)
        logits = (folded * scale) @ key.transpose(2, 3)
        logits = (logits.view(q.shape[0], heads, tokens, -1) + closed[:, None]) + levels[0] * log(ratio)
        lse = logits.logsumexp(-1)
        shares = (logits - lse[..., None]).exp().view(*folded.shape[:3], -1)
        if levels[0] == 0:
            some = some | ~real  # some scale must have weight, also where there is no query
        lses.append(lse.masked_fill(~some[:, None], -torch.inf))
        output = (shares @ value).view(*q.shape[:3], -1)
        outputs.append(torch.where(some[:, None, :, None], output, 0.0))
    stacked = torch.stack(outputs, -2)
    weights = scale_weights(
        torch.stack(lses, -1), stacked, offsets, aggregation=aggregation, regularizer=regularizer
    )
    out = (weights[..., None] * stacked).sum(-2)
    return torch.where(real[:, None, :, None], out, 0.0).to(q.dtype)


def _common(start: Tensor) -> int | None:
    starts = set(start.tolist())
    return starts.pop() if len(starts) == 1 else None


def _take(x: Tensor, origin: int | Tensor, count: int) -> Tensor:
    if isinstance(origin, int):
        return x.narrow(2, origin, count)
    return x.gather(2, _index(x, origin, count))


def _add(total: Tensor, origin: int | Tensor, grad: Tensor) -> None:
    if isinstance(origin, int):
        total.narrow(2, origin, grad.shape[2]).add_(grad)
    else:
        total.scatter_add_(2, _index(total, origin, grad.shape[2]), grad.to(total.dtype))


def _index(x: Tensor, origin: Tensor, count: int) -> Tensor:
    index = origin[:, None] + torch.arange(count, device=x.device)
    return index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
