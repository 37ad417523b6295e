"""Attention of query blocks to sinks, window and listed leaves on a GPU, in one softmax.

A tile is a query block times up to ``HEADS`` heads of a group; a row of it sees

    keys [0, SINK) ∪ [window start, t]            exact
    leaves ordered[0 … counts[row])               listed

or, in a block that ends by DENSE_END, everything up to itself. As the list is ordered by who chose first, one
comparison with the row's count says what the row sees, and tiles that all rows see need none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.triton_select import LOG2E, row_range


@triton.jit
def add_tile(acc, total, top, s, values, PRECISION: tl.constexpr):
    """One step of the online softmax: scores s [M, N] in powers of two, values [N, D]."""
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(s - safe[:, None])
    old = tl.exp2(top - safe)
    total = total * old + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * old[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def attend(
    q, k, v, start, length, ordered, counts, out, lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    slots, tokens, blocks, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    LIST: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` [B, Hq, T, VALUE_DIM] and ``lse`` [B, Hq, T] for the new queries."""
    ROWS: tl.constexpr = HEADS * QUERY_BLOCK
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    i = tl.program_id(0)
    bh = (tl.program_id(1) // PARTS).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset = row_range(start, length, slots, tokens, b)
    t0 = (low // QUERY_BLOCK + i) * QUERY_BLOCK
    if t0 < high:
        row = tl.arange(0, ROWS)
        place = row % QUERY_BLOCK
        g = tl.program_id(1) % PARTS * HEADS + row // QUERY_BLOCK
        t = t0 + place
        new = (t >= low) & (t < high) & (g < GROUP)
        dim = tl.arange(0, DIM_PAD)
        value_dim = tl.arange(0, VALUE_PAD)
        at = b * stride_qb + (h * GROUP + g) * stride_qh + (t + offset) * stride_qt
        x = tl.load(q + at[:, None] + dim[None], mask=new[:, None] & (dim[None] < DIM), other=0.0)
        begin = tl.load(start + b)
        keys = k + b * stride_kb + h * stride_kh + begin * stride_kt
        values = v + b * stride_vb + h * stride_vh + begin * stride_vt
        key = tl.arange(0, KEYS)
        factor = scale * LOG2E
        acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], -float("inf"), tl.float32)

        # Sinks and window as one run of places: the window follows the sinks.
        sparse = t0 + QUERY_BLOCK > DENSE_END
        window = tl.maximum(t0 + 1 - WINDOW, 0) // BLOCK * BLOCK
        window = tl.where(sparse, window, 0)
        skipped = tl.maximum(window - SINK, 0)
        end = tl.minimum(t0 + QUERY_BLOCK, high) - skipped
        from_ = tl.where(sparse, tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK, 0)
        for n in range(0, end, KEYS):
            at_key = n + key
            j = at_key + tl.where(at_key >= SINK, skipped, 0)
            inside = at_key < end
            y = tl.load(
                keys + j[None].to(tl.int64) * stride_kt + dim[:, None],
                mask=inside[None] & (dim[:, None] < DIM), other=0.0,
            )  # fmt: skip
            s = tl.dot(x, y, input_precision=PRECISION) * factor
            visible = (j[None] <= t[:, None]) & ((j[None] < SINK) | (j[None] >= from_[:, None]))
            s = tl.where(visible & inside[None], s, -float("inf"))
            z = tl.load(
                values + j[:, None].to(tl.int64) * stride_vt + value_dim[None],
                mask=inside[:, None] & (value_dim[None] < VALUE_DIM), other=0.0,
            )  # fmt: skip
            acc, total, top = add_tile(acc, total, top, s, z, PRECISION)

        if sparse:
            LEAVES: tl.constexpr = KEYS // BLOCK
            listed = ordered + (bh * blocks + i) * LIST
            seen_by = counts + (bh * blocks + i) * QUERY_BLOCK
            seen = tl.load(seen_by + place)
            most = tl.load(seen_by + QUERY_BLOCK - 1)
            all_ = tl.load(seen_by + tl.maximum(low - t0, 0)) // LEAVES * LEAVES
            for m in range(0, all_, LEAVES):
                leaf = tl.load(listed + m + key // BLOCK)
                j = SINK + leaf.to(tl.int64) * BLOCK + key % BLOCK
                y = tl.load(keys + j[None] * stride_kt + dim[:, None], mask=dim[:, None] < DIM, other=0.0)
                s = tl.dot(x, y, input_precision=PRECISION) * factor
                z = tl.load(
                    values + j[:, None] * stride_vt + value_dim[None],
                    mask=value_dim[None] < VALUE_DIM, other=0.0,
                )  # fmt: skip
                acc, total, top = add_tile(acc, total, top, s, z, PRECISION)
            for u in range(all_, most, LEAVES):
                inside = u + key // BLOCK < most
                leaf = tl.load(listed + u + key // BLOCK, mask=inside, other=0)
                j = SINK + leaf.to(tl.int64) * BLOCK + key % BLOCK
                y = tl.load(
                    keys + j[None] * stride_kt + dim[:, None],
                    mask=inside[None] & (dim[:, None] < DIM), other=0.0,
                )  # fmt: skip
                s = tl.dot(x, y, input_precision=PRECISION) * factor
                s = tl.where((u + key // BLOCK)[None] < seen[:, None], s, -float("inf"))
                z = tl.load(
                    values + j[:, None] * stride_vt + value_dim[None],
                    mask=inside[:, None] & (value_dim[None] < VALUE_DIM), other=0.0,
                )  # fmt: skip
                acc, total, top = add_tile(acc, total, top, s, z, PRECISION)

        slot = (b * KV_HEADS + h) * GROUP + g
        at_out = slot * tokens + t + offset
        tl.store(
            out + at_out[:, None] * VALUE_DIM + value_dim[None],
            (acc / total[:, None]).to(out.dtype.element_ty),
            mask=new[:, None] & (value_dim[None] < VALUE_DIM),
        )
        tl.store(lse + at_out, (top + tl.log2(total)) / LOG2E, mask=new)
