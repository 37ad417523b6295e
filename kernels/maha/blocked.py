"""MAHA by chunks of queries: each chunk attends to one contiguous range of cells per scale.

Queries [a, a+C)  →  scale 0: sinks and tokens [e_0(a), a+C), scale l: cells [e_l(a), e_{l−1}(a+C)), last: a prefix

Memory is linear in n: of a chunk, only the logits of its own ranges exist at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retrofit.kernels.maha.aggregate import scale_weights
from retrofit.kernels.maha.bands import Bands, at_least

CHUNK = 128


@dataclass(frozen=True)
class Range:
    """Consecutive tokens or cells that a chunk of queries may attend to.

    Attributes:
        scale: The scale; 0 are the tokens.
        first: Number of the first member, counted from the row's start; one for all rows or per row [B].
        place: Its index in the tensor.
        count: Number of members M.
        certain: Whether every real query attends to all of them.
    """

    scale: int
    first: int | Tensor
    place: int | Tensor
    count: int
    certain: bool = False

    def take(self, x: Tensor) -> Tensor:
        """Returns the members' rows of x [B, H, N, D]: [B, H, M, D]."""
        if isinstance(self.place, int):
            return x.narrow(2, self.place, self.count)
        return x.gather(2, self._index(x, self.place))

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Adds ``grad`` [B, H, M, D] to the members' rows of ``total``."""
        if isinstance(self.place, int):
            total.narrow(2, self.place, self.count).add_(grad)
        else:
            total.scatter_add_(2, self._index(total, self.place), grad.to(total.dtype))

    def _index(self, x: Tensor, place: Tensor) -> Tensor:
        index = place[:, None] + torch.arange(self.count, device=x.device)
        return index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


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
    levels = [(k, v), *zip(keys, values, strict=True)]
    sizes = [x.shape[2] for x, _ in levels]
    shared = common_start(start)
    whole = aggregation == "convex" and regularizer == "entropy"
    inner = None
    if whole and shared is not None and not bands.last_width and int(length.min()) + shared == k.shape[2]:
        inner = InnerBias(bands, offsets, k, shared)
    for begin in range(0, q.shape[2], CHUNK):
        chunk = q[:, :, begin : begin + CHUNK]
        index = k.shape[2] - q.shape[2] + begin
        ranges = plan(index, chunk.shape[2], sizes, start, shared, bands)
        part_keys = [r.take(levels[r.scale][0]) for r in ranges]
        part_values = [r.take(levels[r.scale][1]) for r in ranges]
        bias = inner.find(index, chunk.shape[2], ranges) if inner is not None else None
        if bias is not None:
            result = softmax(chunk, torch.cat(part_keys, 2), torch.cat(part_values, 2), bias, scale)
            out[:, :, begin : begin + CHUNK] = result
            continue
        seen, real = visible(ranges, index, chunk.shape[2], start, length, bands)
        out[:, :, begin : begin + CHUNK] = attend(
            chunk,
            part_keys,
            part_values,
            offsets,
            list(zip([r.scale for r in ranges], seen, strict=True)),
            real,
            scale=scale,
            ratio=bands.ratio,
            aggregation=aggregation,
            regularizer=regularizer,
        )
    return out


def common_start(start: Tensor) -> int | None:
    """Returns the start of all rows if they share it: their ranges are then views and not copies."""
    starts = set(start.tolist())
    return starts.pop() if len(starts) == 1 else None


def plan(
    index: int, queries: int, sizes: Sequence[int], start: Tensor, shared: int | None, bands: Bands
) -> list[Range]:
    """Returns the ranges that queries [index, index + queries) may attend to, the largest last.

    Args:
        index: Index of the first query.
        queries: Number of queries C.
        sizes: Tokens, and cells of each further scale.
        start: Index of each row's first real token [B].
        shared: The start of all rows, if they share it.
        bands: The geometry.
    """
    result: list[Range] = []

    def add(scale: int, first: int | Tensor, count: int, certain: bool = False) -> None:
        count = min(count, sizes[scale])
        if count <= 0:
            return
        last = sizes[scale] - count
        if isinstance(first, int):
            shift = shared or 0 if scale == 0 else 0
            place = min(first + shift, last)
            result.append(Range(scale, place - shift, place, count, certain))
        else:
            shifts = start if scale == 0 else torch.zeros_like(start)
            places = (first + shifts).clamp(max=last)
            result.append(Range(scale, places - shifts, places, count, certain))

    # Position of the chunk's first query, where that is real, and the largest of its last one's in any row.
    origin: int | Tensor = max(index - shared, 0) if shared is not None else (index - start).clamp(min=0)
    end = max(1, index + queries - (shared or 0))
    if bands.sink:
        add(0, origin * 0, bands.sink)
    for scale in range(bands.scales):
        cell = bands.cell(scale)
        reach = bands.reaches[scale - 1] if scale else 0
        if end <= reach:
            break
        low = at_least(bands.edge(scale, origin), bands.sink) // cell
        if scale < len(bands.reaches):
            width = bands.reaches[scale] - reach
            add(scale, low, (queries + width + cell * bands.ratio - 2) // cell)
            continue
        stop = (end - reach) // cell
        inside = 0
        if isinstance(origin, int):
            inside = max(0, bands.edge(scale - 1, origin) // cell - bands.sink // cell)
        add(scale, low + inside, stop - bands.sink // cell - inside)
        add(scale, low, inside, certain=True)
    return result


def visible(
    ranges: Sequence[Range], index: int, queries: int, start: Tensor, length: Tensor, bands: Bands
) -> tuple[list[Tensor], Tensor]:
    """Returns which members of each range a query attends to [B, C, M], and which queries are real [B, C]."""
    t = torch.arange(index, index + queries, device=start.device) - start[:, None]
    real = (t >= 0) & (t < length[:, None])
    result = []
    sinks = bands.sink > 0
    for r in ranges:
        if sinks:
            low, high = t * 0, (t + 1).clamp(max=bands.sink)
            sinks = False  # the first range
        else:
            low = bands.edge(r.scale, t).clamp(min=bands.sink)
            high = bands.edge(r.scale - 1, t)
        first = r.first if isinstance(r.first, int) else r.first[:, None]
        begin = (torch.arange(r.count, device=t.device) + first) * bands.cell(r.scale)
        begin = begin.expand(t.shape[0], -1)[:, None]
        result.append((begin >= low[..., None]) & (begin < high[..., None]) & real[..., None])
    return result, real


def softmax_bias(offsets: Tensor, seen: Sequence[tuple[int, Tensor]], *, kv_heads: int, ratio: int) -> Tensor:
    """Returns the bias [B, Hkv, G·C, M] of one softmax over all ranges: offsets, cell sizes, −∞ where unseen."""
    visible = torch.cat([mask for _, mask in seen], 2)
    some = visible.any(-1, keepdim=True)  # where a query sees nothing it sees all, so that all stays finite
    closed = torch.zeros_like(visible, dtype=offsets.dtype).masked_fill(~visible & some, -torch.inf)
    own = torch.cat(
        [(offsets[:, i : i + 1] + i * log(ratio)).expand(-1, mask.shape[2]) for i, mask in seen], 1
    )
    bias = closed[:, None, None] + own.view(1, kv_heads, -1, 1, own.shape[1])
    return bias.flatten(2, 3)


class InnerBias:
    """The bias of a chunk far enough from the row's start, which is the same for all such chunks.

    Edges move with the queries: e_l(t + c) = e_l(t) + c if c is a multiple of the largest step ratio**L. So
    the bias is made once, for the longest prefix of last-scale cells, and each chunk uses its first columns.
    """

    def __init__(self, bands: Bands, offsets: Tensor, k: Tensor, start: int) -> None:
        self._bands = bands
        self._offsets = offsets.to(torch.promote_types(k.dtype, torch.float32))
        self._kv_heads = k.shape[1]
        self._tokens = k.shape[2]
        self._start = start
        self._found: dict[tuple[int, ...], Tensor] = {}

    def find(self, index: int, queries: int, ranges: Sequence[Range]) -> Tensor | None:
        """Returns the bias [1, Hkv, G·C, M] of the ranges of queries [index, index + queries), all real."""
        bands, t = self._bands, index - self._start
        step = bands.ratio**bands.scales
        if t < bands.sink + step + max(bands.reaches, default=0) or not ranges[-1].certain:
            return None
        fixed = ranges[:-1]
        key = [queries, t % step]
        for r in fixed[1:] if bands.sink else fixed:
            assert isinstance(r.first, int)
            key += [r.first * bands.cell(r.scale) - t, r.count]
        if tuple(key) not in self._found:
            zero = torch.tensor([self._start], device=self._offsets.device)
            seen, _ = visible(fixed, index, queries, zero, zero * 0 + self._tokens, bands)
            cells = self._tokens // bands.cell(bands.scales - 1)
            prefix = torch.ones(1, 1, 1, dtype=torch.bool, device=zero.device).expand(1, queries, cells)
            pairs = [*zip([r.scale for r in fixed], seen, strict=True), (ranges[-1].scale, prefix)]
            self._found[tuple(key)] = softmax_bias(
                self._offsets, pairs, kv_heads=self._kv_heads, ratio=bands.ratio
            )
        return self._found[tuple(key)][..., : sum(r.count for r in ranges)]


def softmax(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """One softmax for q [B, Hq, C, D], keys [B, Hkv, M, D], values [B, Hkv, M, Dv] and bias [·, Hkv, G·C, M]."""
    wide = bias.dtype
    folded = q.to(wide).reshape(q.shape[0], keys.shape[1], -1, q.shape[3])
    out = scaled_dot_product_attention(folded, keys.to(wide), values.to(wide), bias, scale=scale)
    return out.reshape(*q.shape[:3], -1).to(q.dtype)


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
    kv_heads = keys[0].shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    offsets = offsets.to(wide)
    if aggregation == "convex" and regularizer == "entropy":
        bias = softmax_bias(offsets, seen, kv_heads=kv_heads, ratio=ratio)
        out = softmax(q, torch.cat(list(keys), 2), torch.cat(list(values), 2), bias, scale)
        return torch.where(real[:, None, :, None], out, 0.0).to(q.dtype)
    lses, outputs, _ = attend_scales(
        q, keys, values, seen, real, scales=offsets.shape[1], scale=scale, ratio=ratio
    )
    weights = scale_weights(lses, outputs, offsets, aggregation=aggregation, regularizer=regularizer)
    out = (weights[..., None] * outputs).sum(-2)
    return torch.where(real[:, None, :, None], out, 0.0).to(q.dtype)


def attend_scales(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    seen: Sequence[tuple[int, Tensor]],
    real: Tensor,
    *,
    scales: int,
    scale: float,
    ratio: int,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Attends to each scale for itself; arguments as in :func:`attend`.

    Returns:
        Each scale's log-mass [B, Hq, C, L], −∞ where it is empty; its output [B, Hq, C, L, Dv], zero where it is
        empty; and per scale with ranges its softmax [B, Hkv, G·C, M] over them, zero where it is empty.
    """
    kv_heads = keys[0].shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    folded = (q.to(wide) * scale).reshape(q.shape[0], kv_heads, -1, q.shape[3])
    lses, outputs, softmaxes = [], [], {}
    for level in range(scales):
        chosen = [i for i, (of, _) in enumerate(seen) if of == level]
        if not chosen:
            lses.append(folded.new_full((*q.shape[:3],), -torch.inf))
            outputs.append(folded.new_zeros(*q.shape[:3], values[0].shape[3]))
            continue
        mask = torch.cat([seen[i][1] for i in chosen], 2)
        some = mask.any(-1)  # where a query sees nothing it sees all, so that all stays finite
        key = torch.cat([keys[i] for i in chosen], 2).to(wide)
        value = torch.cat([values[i] for i in chosen], 2).to(wide)
        logits = (folded @ key.transpose(2, 3)).view(*q.shape[:3], -1) + level * log(ratio)
        logits = logits.masked_fill((~mask & some[..., None])[:, None], -torch.inf)
        lse = logits.logsumexp(-1)
        shares = (logits - lse[..., None]).exp() * some[:, None, :, None]
        softmaxes[level] = shares.view(*folded.shape[:3], -1)
        outputs.append((softmaxes[level] @ value).view(*q.shape[:3], -1))
        if level == 0:
            some = some | ~real  # some scale must have weight, also where there is no query
        lses.append(lse.masked_fill(~some[:, None], -torch.inf))
    return torch.stack(lses, -1), torch.stack(outputs, -2), softmaxes
