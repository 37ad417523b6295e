"""Gradients of the attention to all scales on a GPU; its shares are computed again from ``lse``.

With P the shares of one softmax and dP = dO Vᵀ: dS = P ∘ (dP − ⟨dO, O⟩), and
dQ = scale·dS K, dK = scale·dSᵀ Q, dV = Pᵀ dO, d offset_l = Σ dS over the cells of scale l.

    query_gradients    a query block × the tiles of all its ranges                →  dQ, ⟨dO, O⟩
    key_gradients      a tile of cells of one scale × the queries that see any    →  dK, dV, parts of d offsets

Cell [a, a + c) of scale l is seen by the queries [a + c + R_{l−1} − 1, ⌊a/rc⌋·rc + rc + R_l − 1), with R_l = w_0 + … + w_l;
a sink by all from its own on.
"""

from __future__ import annotations

import triton.language as tl

from retrofit.kernels.hsa.triton_select import LOG2E
from retrofit.kernels.launch import kernel
from retrofit.kernels.maha.triton_execute import cells_at, cells_seen, edges, load_rows, range_sizes


@kernel()
def query_gradients(
    q, k, v, start, length, keys, values, offsets, out, lse, grad, grad_q, delta,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    strides_key, strides_value, slots, tokens, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    SCALES: tl.constexpr, RATIO: tl.constexpr, LOG: tl.constexpr, LOG_RATIO: tl.constexpr, SINK: tl.constexpr,
    REACHES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes ``grad_q`` [B, Hq, T, DIM] and ``delta`` = ⟨dO, O⟩ [B, Hq, T]; zeros for padding."""
    ROWS: tl.constexpr = HEADS * QUERY_BLOCK
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    bh = (tl.program_id(1) // PARTS).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    first = tl.load(start + b)
    p0 = (slots - tokens - first).to(tl.int32)
    begin = (p0 & -QUERY_BLOCK) + tl.program_id(0) * QUERY_BLOCK
    t0 = tl.maximum(tl.maximum(begin, p0), 0)
    t1 = tl.minimum(tl.minimum(begin + QUERY_BLOCK, p0 + tokens), tl.load(length + b).to(tl.int32)) - 1

    row = tl.arange(0, ROWS)
    g = tl.program_id(1) % PARTS * HEADS + row // QUERY_BLOCK
    t = begin + row % QUERY_BLOCK
    new = (t >= p0) & (t < p0 + tokens) & (g < GROUP)
    real = (t >= t0) & (t <= t1) & new
    dim = tl.arange(0, DIM_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    key = tl.arange(0, KEYS)
    at = b * stride_qb + (h * GROUP + g) * stride_qh + (t - p0) * stride_qt
    x = tl.load(q + at[:, None] + dim[None], mask=real[:, None] & (dim[None] < DIM), other=0.0)
    line = (bh * GROUP + g) * tokens + (t - p0)
    at_out = line[:, None] * VALUE_DIM + value_dim[None]
    inside = real[:, None] & (value_dim[None] < VALUE_DIM)
    above = tl.load(grad + at_out, mask=inside, other=0.0)
    result = tl.load(out + at_out, mask=inside, other=0.0)
    rest = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + line, rest, mask=new)
    mass = tl.load(lse + line, mask=real, other=0.0)
    k += first * stride_kt
    v += first * stride_vt
    own_offsets = offsets + (h * GROUP + tl.minimum(g, GROUP - 1)) * SCALES
    factor = scale * LOG2E
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)

    for of in range(0, SCALES + (SINK > 0)):
        near, far, cell = range_sizes(of, REACHES, RATIO, SCALES)
        low, _, _, end = cells_seen(t0, t1, of, near, far, cell, RATIO, LOG, SINK, SCALES, KEYS)
        pointer = cells_at(k, stride_kb, stride_kh, keys, strides_key, b, h, of, SCALES)
        value_pointer = cells_at(v, stride_vb, stride_vh, values, strides_value, b, h, of, SCALES)
        level = of % SCALES
        stride = tl.where(level == 0, stride_kt, DIM)
        value_stride = tl.where(level == 0, stride_vt, VALUE_DIM)
        bias = tl.load(own_offsets + level) * LOG2E + level * LOG_RATIO - mass
        from_, to = edges(t, of, near, far, cell, RATIO, LOG, SINK, SCALES)
        for n in range(low, end, KEYS):
            j = n + key
            place = tl.minimum(j, end - 1)
            y = load_rows(pointer, place[:, None], stride, dim[None], DIM, DIM_PAD)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * factor + bias[:, None]
            token = j * cell
            visible = (token[None] >= from_[:, None]) & (token[None] < to[:, None]) & real[:, None]
            p = tl.where(visible, tl.exp2(s), 0.0)
            z = load_rows(value_pointer, place[None], value_stride, value_dim[:, None], VALUE_DIM, VALUE_PAD)
            of_shares = tl.dot(above, z, input_precision=PRECISION)
            of_logits = p * (of_shares - rest[:, None])
            acc = tl.dot(of_logits.to(y.dtype), y, acc, input_precision=PRECISION)

    tl.store(
        grad_q + line[:, None] * DIM + dim[None],
        (acc * scale).to(grad_q.dtype.element_ty),
        mask=new[:, None] & (dim[None] < DIM),
    )


@kernel()
def key_gradients(
    q, k, v, start, length, keys, values, offsets, lse, grad, delta, grad_keys, grad_values, grad_offsets,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    strides_key, strides_value, cells, tiles, slots, tokens, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    SCALES: tl.constexpr, RATIO: tl.constexpr, LOG: tl.constexpr, LOG_RATIO: tl.constexpr, SINK: tl.constexpr,
    REACHES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the cells of all scales, and ``grad_offsets`` [SCALES, B·Hkv, tile, PARTS·HEADS].

    ``cells`` are the numbers of cells of the scales, ``tiles`` those of their tiles of ``KEYS`` cells. The first
    tile of scale 0 comes first, as it may hold the sinks, which most queries see; then the coarsest scale.
    """
    ROWS: tl.constexpr = HEADS * QUERY_BLOCK
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    first = tl.load(start + b).to(tl.int32)
    p0 = (slots - tokens - first).to(tl.int32)
    p1 = tl.minimum(p0 + tokens, tl.load(length + b).to(tl.int32))
    of, tile = 0, tl.program_id(0)
    before = 1
    count = cells[0]
    grad_key, grad_value = grad_keys[0], grad_values[0]
    for back in tl.static_range(1, SCALES):
        there = (tl.program_id(0) >= before) & (tl.program_id(0) < before + tiles[SCALES - back])
        of = tl.where(there, SCALES - back, of)
        tile = tl.where(there, tl.program_id(0) - before, tile)
        count = tl.where(there, cells[SCALES - back], count)
        grad_key = tl.where(there, grad_keys[SCALES - back], grad_key)
        grad_value = tl.where(there, grad_values[SCALES - back], grad_value)
        before += tiles[SCALES - back]
    tile = tl.where((of == 0) & (tile > 0), tile - before + 1, tile)
    near, far, cell = range_sizes(of, REACHES, RATIO, SCALES)

    # Of scale 0 the index in the tensor is the position plus the row's first.
    j = tile * KEYS + tl.arange(0, KEYS)
    a = j * cell
    inside = j < tl.where(of == 0, tl.load(length + b).to(tl.int32), count)
    sinks = (of == 0) & (a < SINK)
    enter = a + cell + near - 1
    step = cell * RATIO
    leave = tl.where(sinks, 1 << 30, a // step * step + step + far - 1)
    leave = tl.where(inside & (sinks | (a >= SINK)), leave, 0)
    dim = tl.arange(0, DIM_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    place = (tl.where(of == 0, first, 0) + tl.where(inside, j, 0)).to(tl.int64)
    pointer = cells_at(k, stride_kb, stride_kh, keys, strides_key, b, h, of, SCALES)
    value_pointer = cells_at(v, stride_vb, stride_vh, values, strides_value, b, h, of, SCALES)
    seen = inside[:, None]
    y = tl.load(
        pointer + place[:, None] * tl.where(of == 0, stride_kt, DIM) + dim[None],
        mask=seen & (dim[None] < DIM), other=0.0,
    )  # fmt: skip
    z = tl.load(
        value_pointer + place[:, None] * tl.where(of == 0, stride_vt, VALUE_DIM) + value_dim[None],
        mask=seen & (value_dim[None] < VALUE_DIM), other=0.0,
    )  # fmt: skip

    row = tl.arange(0, ROWS)
    factor = scale * LOG2E
    of_key = tl.zeros([KEYS, DIM_PAD], tl.float32)
    of_value = tl.zeros([KEYS, VALUE_PAD], tl.float32)
    from_ = tl.maximum(tl.min(tl.where(leave > 0, enter, 1 << 30), 0), tl.maximum(p0, 0))
    to = tl.minimum(tl.max(leave, 0), p1)
    for part in range(0, PARTS):
        g = part * HEADS + row // QUERY_BLOCK
        bias = (
            tl.load(offsets + (h * GROUP + tl.minimum(g, GROUP - 1)) * SCALES + of) * LOG2E + of * LOG_RATIO
        )
        of_offset = tl.zeros([ROWS], tl.float32)
        for begin in range(from_, to, QUERY_BLOCK):
            t = begin + row % QUERY_BLOCK
            real = (t < to) & (g < GROUP)
            at = b * stride_qb + (h * GROUP + g) * stride_qh + (t - p0) * stride_qt
            x = tl.load(q + at[:, None] + dim[None], mask=real[:, None] & (dim[None] < DIM), other=0.0)
            line = (bh * GROUP + g) * tokens + (t - p0)
            mass = tl.load(lse + line, mask=real, other=0.0)
            s = tl.dot(y, tl.trans(x), input_precision=PRECISION) * factor + (bias - mass)[None]
            visible = (t[None] >= enter[:, None]) & (t[None] < leave[:, None]) & real[None]
            p = tl.where(visible, tl.exp2(s), 0.0)
            above = tl.load(
                grad + line[:, None] * VALUE_DIM + value_dim[None],
                mask=real[:, None] & (value_dim[None] < VALUE_DIM), other=0.0,
            )  # fmt: skip
            of_value = tl.dot(p.to(above.dtype), above, of_value, input_precision=PRECISION)
            rest = tl.load(delta + line, mask=real, other=0.0)
            of_logits = p * (tl.dot(z, tl.trans(above), input_precision=PRECISION) - rest[None])
            of_key = tl.dot(of_logits.to(x.dtype), x, of_key, input_precision=PRECISION)
            of_offset += tl.sum(of_logits, 0)
        by_head = tl.sum(tl.reshape(of_offset, [HEADS, QUERY_BLOCK]), 1)
        at_head = (tl.program_id(0) * tl.num_programs(1) + bh) * PARTS * HEADS + part * HEADS
        tl.store(grad_offsets + at_head + tl.arange(0, HEADS), by_head)

    line = (bh * count + place)[:, None]
    tl.store(
        grad_key + line * DIM + dim[None], (of_key * scale).to(grad_key.dtype.element_ty),
        mask=seen & (dim[None] < DIM),
    )  # fmt: skip
    tl.store(
        grad_value + line * VALUE_DIM + value_dim[None], of_value.to(grad_value.dtype.element_ty),
        mask=seen & (value_dim[None] < VALUE_DIM),
    )  # fmt: skip
