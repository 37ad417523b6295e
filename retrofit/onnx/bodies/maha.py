"""MAHA by chunks of queries, each of which fetches its ranges of cells by position.

The chunk's attention is that of ``retrofit.kernels.maha.blocked``; here its ranges have fixed sizes, so that one
graph serves every chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.maha.blocked import attend
from retrofit.onnx.bodies.chunks import join, scan_chunks, split

CHUNK = 64


def maha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    offsets: Tensor,
    *,
    scale: float,
    causal: bool,
    widths: Sequence[int],
    last_width: int | None,
    sink: int,
    ratio: int,
    aggregation: str,
    regularizer: str,
    implementation: str,
) -> Tensor:
    """As ``torch.ops.retrofit.maha_attention``, exportable."""
    bands = Bands(tuple(widths), last_width or None, sink, ratio)
    tokens, slots = q.shape[2], k.shape[2]
    size = torch.sym_min(tokens, CHUNK)
    chunks = split(q, size)
    indices = torch.arange(chunks.shape[0] * size, device=q.device).unflatten(0, (-1, size)) + slots - tokens

    def step(queries: Tensor, index: Tensor, held: Mapping[str, Tensor]) -> Sequence[Tensor]:
        start, length = held["start"], held["length"]
        t = index - start[:, None]
        real = (t >= 0) & (t < length[:, None])
        first = t[:, 0].clamp(min=0)
        contents = [(held[f"keys{level}"], held[f"values{level}"]) for level in range(bands.scales)]
        parts = []
        for level, low, high, origin, count in _ranges(bands, t, first):
            key, value = contents[level]
            rows = key.shape[2] - (level > 0)
            if count is None:
                member = torch.arange(key.shape[2], device=key.device).expand(start.shape[0], -1)
                if level == 0:
                    member = member - start[:, None]
                exists = member + (start[:, None] if level == 0 else 0) < rows
            else:
                member = origin[:, None] + torch.arange(count, device=key.device)
                place = member + start[:, None] if level == 0 else member
                exists = place < rows
                place = place.clamp(max=key.shape[2] - 1)[:, None, :, None].expand(-1, key.shape[1], -1, -1)
                key = key.gather(2, place.expand(-1, -1, -1, key.shape[3]))
                value = value.gather(2, place.expand(-1, -1, -1, value.shape[3]))
            begin = member * bands.cell(level)
            visible = (begin[:, None] >= low[..., None]) & (begin[:, None] < high[..., None])
            parts.append(((level, visible & real[..., None] & exists[:, None]), key, value))
        out = attend(
            queries,
            [key for _, key, _ in parts],
            [value for _, _, value in parts],
            held["offsets"],
            [seen for seen, _, _ in parts],
            real,
            scale=scale,
            ratio=ratio,
            aggregation=aggregation,
            regularizer=regularizer,
        )
        return [out]

    held = {"start": start, "length": length, "offsets": offsets}
    for name, levels in (("keys", [k, *keys]), ("values", [v, *values])):
        for level, content in enumerate(levels):
            # An empty level gets a cell that nobody sees, for the fetches of those who see nothing.
            held[f"{name}{level}"] = pad(content, (0, 0, 0, 1)) if level else content
    return join(scan_chunks(step, [chunks, indices], held)[0], tokens)


def _ranges(bands: Bands, t: Tensor, first: Tensor) -> list[tuple[int, Tensor, Tensor, Tensor, Any]]:
    """Per range its scale, what each query sees of it, its first member, and how many (None for all)."""
    ranges: list[tuple[int, Tensor, Tensor, Tensor, Any]] = []
    if bands.sink:
        ranges.append((0, t * 0, (t + 1).clamp(max=bands.sink), first * 0, bands.sink))
    for scale in range(bands.scales):
        cell = bands.cell(scale)
        low, high = bands.edge(scale, t).clamp(min=bands.sink), bands.edge(scale - 1, t)
        if scale == len(bands.reaches):
            ranges.append((scale, low, high, first * 0, None))
            continue
        width = ([*bands.widths, bands.last_width])[scale]
        assert width is not None
        origin = bands.edge(scale, first).clamp(min=bands.sink) // cell
        count = (t.shape[1] + width + cell * bands.ratio - 2) // cell
        ranges.append((scale, low, high, origin, count))
    return ranges
