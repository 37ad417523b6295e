"""Attention of query blocks to their ranges of all scales on a GPU, in one softmax.

A tile is a query block times up to ``HEADS`` heads of a group. Over its queries [t0, t1] scale l has

    cells [low(t0), high(t1))    seen by some row      low(t) = max(e_l(t), SINK) / r^l,  high(t) = e_{l−1}(t) / r^l
    cells [low(t1), high(t0))    seen by every row

and the sinks are a range of their own, number SCALES. What every row sees, in whole tiles of ``KEYS`` cells, needs no
mask; the edges on both sides of it are read as one run. Each of the two loops goes through the tiles of all scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.triton_execute import add_tile
from retrofit.kernels.hsa.triton_select import LOG2E
from retrofit.kernels.launch import kernel


@triton.jit
def floor_to(x, step, LOG: tl.constexpr):
    """The multiple of ``step``, a power of two if ``LOG``, at or below x ≥ 0."""
    return x & -step if LOG else x // step * step


@triton.jit
def edges(
    t, of, near, far, cell, RATIO: tl.constexpr, LOG: tl.constexpr, SINK: tl.constexpr, SCALES: tl.constexpr
):
    """The tokens [low, high) that queries at ``t`` see in cells of range ``of``."""
    low = tl.maximum(floor_to(tl.maximum(t + 1 - far, 0), cell * RATIO, LOG), SINK)
    high = floor_to(tl.maximum(t + 1 - near, 0), cell, LOG)
    sinks = of == SCALES
    return tl.where(sinks, 0, low), tl.where(sinks, tl.minimum(high, SINK), high)


@triton.jit
def range_sizes(of, REACHES: tl.constexpr, RATIO: tl.constexpr, SCALES: tl.constexpr):
    """(tokens back to the near end, to the far end, tokens of a cell) of range ``of``."""
    near, far, cell = REACHES[0], REACHES[1], 1
    for level in tl.static_range(1, SCALES):
        near = tl.where(of == level, REACHES[level], near)
        far = tl.where(of == level, REACHES[level + 1], far)
        cell = tl.where(of == level, RATIO**level, cell)
    return near, far, cell


@triton.jit
def cells_seen(
    t0, t1, of, near, far, cell,
    RATIO: tl.constexpr, LOG: tl.constexpr, SINK: tl.constexpr, SCALES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """(first cell, first that every row sees, whole tiles from there, end of the cells) for queries [t0, t1]."""
    begin, sure_end = edges(t0, of, near, far, cell, RATIO, LOG, SINK, SCALES)
    sure, end = edges(t1, of, near, far, cell, RATIO, LOG, SINK, SCALES)
    if LOG:
        shift = tl.where(of == SCALES, 0, of * LOG)
        begin, sure, sure_end, end = begin >> shift, sure >> shift, sure_end >> shift, end >> shift
    else:
        begin, sure, sure_end, end = begin // cell, sure // cell, sure_end // cell, end // cell
    tiles = tl.where(t0 <= t1, tl.maximum(sure_end - sure, 0) // KEYS, 0)
    return begin, sure, tiles, tl.where(t0 <= t1, tl.maximum(end, begin), begin)


@triton.jit
def tile_counts(
    t0, t1, REACHES: tl.constexpr, RATIO: tl.constexpr, LOG: tl.constexpr, SINK: tl.constexpr,
    SCALES: tl.constexpr, RANGES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles that every row sees, the ranges that have any as bits, and the same of the edges."""
    sure_count, sure_ranges, edge_count, edge_ranges = 0, 0, 0, 0
    for level in tl.static_range(RANGES):
        low, _, tiles, end = cells_seen(
            t0, t1, level, REACHES[level % SCALES], REACHES[level % SCALES + 1], RATIO ** (level % SCALES),
            RATIO, LOG, SINK, SCALES, KEYS,
        )  # fmt: skip
        rest = tl.cdiv(end - low - tiles * KEYS, KEYS)
        sure_count += tiles
        edge_count += rest
        sure_ranges |= tl.where(tiles > 0, 1 << level, 0)
        edge_ranges |= tl.where(rest > 0, 1 << level, 0)
    return sure_count, sure_ranges, edge_count, edge_ranges


@triton.jit
def following(of, among, RANGES: tl.constexpr):
    """The first range after ``of`` whose bit is set."""
    found = of
    for level in tl.static_range(RANGES - 1, -1, -1):
        found = tl.where((level > of) & ((among >> level) & 1 > 0), level, found)
    return found


@triton.jit
def cells_at(first, stride_b, stride_h, rest, strides, b, h, of, SCALES: tl.constexpr):
    """Where the cells of range ``of`` begin, for row b and kv head h."""
    pointer = first
    at_b, at_h = stride_b, stride_h
    for level in tl.static_range(1, SCALES):
        pointer = tl.where(of == level, rest[level - 1], pointer)
        at_b = tl.where(of == level, strides[level - 1][0], at_b)
        at_h = tl.where(of == level, strides[level - 1][1], at_h)
    return pointer + b * at_b + h * at_h


@triton.jit
def load_rows(pointer, row, stride, dim, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows of ``DIM`` numbers, zeros beyond; ``row`` and ``dim`` broadcast against each other."""
    at = pointer + row.to(tl.int64) * stride + dim
    if DIM == DIM_PAD:
        return tl.load(at)
    return tl.load(at, mask=dim < DIM, other=0.0)


@kernel()
def attend(
    q, k, v, start, length, keys, values, offsets, out, lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    strides_key, strides_value, slots, tokens, blocks, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    SCALES: tl.constexpr, RATIO: tl.constexpr, LOG: tl.constexpr, LOG_RATIO: tl.constexpr, SINK: tl.constexpr,
    REACHES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` [B, Hq, T, VALUE_DIM], zeros for padding, and ``lse`` [B, Hq, T] to base 2, −∞ for padding.

    ``keys`` and ``values`` are the cells of the scales from 1 on, ``strides_key`` and ``strides_value`` their
    (batch, head) strides; ``REACHES`` are the tokens back to the near end of each scale, and to the last one's end.
    """
    ROWS: tl.constexpr = HEADS * QUERY_BLOCK
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    RANGES: tl.constexpr = SCALES + (SINK > 0)
    i = blocks - 1 - tl.program_id(0)
    bh = (tl.program_id(1) // PARTS).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    first = tl.load(start + b)
    p0 = (slots - tokens - first).to(tl.int32)
    begin = (p0 & -QUERY_BLOCK) + i * QUERY_BLOCK
    t0 = tl.maximum(tl.maximum(begin, p0), 0)
    t1 = tl.minimum(tl.minimum(begin + QUERY_BLOCK, p0 + tokens), tl.load(length + b).to(tl.int32)) - 1

    row = tl.arange(0, ROWS)
    g = tl.program_id(1) % PARTS * HEADS + row // QUERY_BLOCK
    t = begin + row % QUERY_BLOCK
    new = (t >= p0) & (t < p0 + tokens) & (g < GROUP)
    real = (t >= t0) & (t <= t1)
    dim = tl.arange(0, DIM_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    key = tl.arange(0, KEYS)
    at = b * stride_qb + (h * GROUP + g) * stride_qh + (t - p0) * stride_qt
    x = tl.load(q + at[:, None] + dim[None], mask=new[:, None] & (dim[None] < DIM), other=0.0)
    k += first * stride_kt
    v += first * stride_vt
    own_offsets = offsets + (h * GROUP + tl.minimum(g, GROUP - 1)) * SCALES
    factor = scale * LOG2E
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)

    sure_count, sure_ranges, edge_count, edge_ranges = tile_counts(
        t0, t1, REACHES, RATIO, LOG, SINK, SCALES, RANGES, KEYS
    )
    of, until, shift, stride, value_stride, pointer, value_pointer = -1, 0, 0, stride_kt, stride_vt, k, v
    for step in range(0, sure_count):
        if step == until:
            of = following(of, sure_ranges, RANGES)
            near, far, cell = range_sizes(of, REACHES, RATIO, SCALES)
            low, sure, tiles, end = cells_seen(t0, t1, of, near, far, cell, RATIO, LOG, SINK, SCALES, KEYS)
            until += tiles
            shift = sure - step * KEYS
            pointer = cells_at(k, stride_kb, stride_kh, keys, strides_key, b, h, of, SCALES)
            value_pointer = cells_at(v, stride_vb, stride_vh, values, strides_value, b, h, of, SCALES)
            stride = tl.where(of % SCALES == 0, stride_kt, DIM)
            value_stride = tl.where(of % SCALES == 0, stride_vt, VALUE_DIM)
        j = shift + step * KEYS + key
        y = load_rows(pointer, j[None], stride, dim[:, None], DIM, DIM_PAD)
        level = of % SCALES
        bias = tl.load(own_offsets + level) * LOG2E + level * LOG_RATIO
        s = tl.dot(x, y, input_precision=PRECISION) * factor + bias[:, None]
        z = load_rows(value_pointer, j[:, None], value_stride, value_dim[None], VALUE_DIM, VALUE_PAD)
        acc, total, top = add_tile(acc, total, top, s, z, PRECISION)

    of, until, shift, stride, value_stride, pointer, value_pointer = -1, 0, 0, stride_kt, stride_vt, k, v
    sure, skipped, last, near, far, cell = 0, 0, 0, 0, 0, 1
    for step in range(0, edge_count):
        if step == until:
            of = following(of, edge_ranges, RANGES)
            near, far, cell = range_sizes(of, REACHES, RATIO, SCALES)
            low, sure, tiles, end = cells_seen(t0, t1, of, near, far, cell, RATIO, LOG, SINK, SCALES, KEYS)
            skipped = tiles * KEYS
            until += tl.cdiv(end - low - skipped, KEYS)
            shift = low - step * KEYS
            last = end - 1
            pointer = cells_at(k, stride_kb, stride_kh, keys, strides_key, b, h, of, SCALES)
            value_pointer = cells_at(v, stride_vb, stride_vh, values, strides_value, b, h, of, SCALES)
            stride = tl.where(of % SCALES == 0, stride_kt, DIM)
            value_stride = tl.where(of % SCALES == 0, stride_vt, VALUE_DIM)
        j = shift + step * KEYS + key
        j += tl.where(j >= sure, skipped, 0)
        inside = tl.minimum(j, last)
        y = load_rows(pointer, inside[None], stride, dim[:, None], DIM, DIM_PAD)
        level = of % SCALES
        bias = tl.load(own_offsets + level) * LOG2E + level * LOG_RATIO
        s = tl.dot(x, y, input_precision=PRECISION) * factor + bias[:, None]
        from_, to = edges(t, of, near, far, cell, RATIO, LOG, SINK, SCALES)
        token = j * cell
        s = tl.where((token[None] >= from_[:, None]) & (token[None] < to[:, None]), s, -float("inf"))
        z = load_rows(value_pointer, inside[:, None], value_stride, value_dim[None], VALUE_DIM, VALUE_PAD)
        acc, total, top = add_tile(acc, total, top, s, z, PRECISION)

    total = tl.where(real, total, 1.0)
    result = tl.where(real[:, None], acc / total[:, None], 0.0)
    at_out = (bh * GROUP + g) * tokens + (t - p0)
    tl.store(
        out + at_out[:, None] * VALUE_DIM + value_dim[None],
        result.to(out.dtype.element_ty),
        mask=new[:, None] & (value_dim[None] < VALUE_DIM),
    )
    tl.store(lse + at_out, top + tl.log2(total), mask=new)
