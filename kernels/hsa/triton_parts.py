"""Attention of the last few tokens of each row, the work on one of them spread over many programs.

attend_parts   one query × part of what it sees   →  sums of the part
join_parts     sums of the parts                  →  out
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.triton_execute import (
    add_tile,
    load_keys,
    load_values,
    near_edges,
    sink_of,
)
from retrofit.kernels.hsa.triton_select import LOG2E, in_reach, row_range
from retrofit.kernels.launch import kernel


@triton.jit
def listed_at(listed, shares, step, seen, key, BLOCK: tl.constexpr, LEAVES: tl.constexpr):
    """(block, share) of each key of a step; 0 and 1 behind the ``seen`` blocks of the list."""
    u = step * LEAVES + key // BLOCK
    return tl.load(listed + u, mask=u < seen, other=0), tl.load(shares + u, mask=u < seen, other=1.0)


@kernel(do_not_specialize=["slots", "tokens", "blocks"])
def attend_parts(
    q, k, v, start, length, ordered, shares, counts, sums, totals, tops,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    slots, tokens, blocks, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    LIST: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, REACH: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """The sums of exponentials, and of values times these, of one part of the keys that one query sees.

    ``sums`` is float32 [T, B·Hkv, parts, GROUP, VALUE_DIM]; ``totals`` and ``tops``, by which scores in powers of
    two are shifted, are [T, B·Hkv, parts, GROUP].
    """
    LEAVES: tl.constexpr = KEYS // BLOCK
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
    t = i - offset
    if (t >= low) & (t < high):
        row = tl.arange(0, ROWS)
        head = h * GROUP + row
        dim = tl.arange(0, DIM_PAD)
        value_dim = tl.arange(0, VALUE_PAD)
        at_q = b * stride_qb + head * stride_qh + i * stride_qt
        x = tl.load(q + at_q[:, None] + dim[None], mask=(row < GROUP)[:, None] & (dim[None] < DIM), other=0.0)
        keys = k + b * stride_kb + h * stride_kh + begin.to(tl.int64) * stride_kt
        values = v + b * stride_vb + h * stride_vh + begin.to(tl.int64) * stride_vt
        key = tl.arange(0, KEYS)
        factor = scale * LOG2E
        acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], -float("inf"), tl.float32)

        number = t // QUERY_BLOCK
        t0 = number * QUERY_BLOCK
        sparse = t0 + QUERY_BLOCK > DENSE_END
        at = bh * blocks + number - low // QUERY_BLOCK
        listed, weights = ordered + at * LIST, shares + at * LIST
        seen = t * 0
        if sparse:
            seen = tl.load(counts + at * QUERY_BLOCK + t - t0)
        first, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
        from_ = tl.where(sparse, tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK, 0)
        first, last, whole = tl.where(sparse, first, 0), tl.where(sparse, last, 0), tl.where(sparse, whole, 0)
        # Where query blocks are wider than the window, the last row's begins behind t.
        last, right = tl.minimum(last, t + 1), tl.maximum(t + 1 - whole, 0)
        edges = right + last - first
        from_list = (seen + LEAVES - 1) // LEAVES
        steps = from_list + (edges + KEYS - 1) // KEYS
        each = (steps + parts - 1) // parts
        begin_step = part * each
        block, share = listed_at(listed, weights, begin_step, seen, key, BLOCK, LEAVES)
        for step in range(begin_step, tl.minimum(steps, begin_step + each)):
            # The keys and values of a step are fetched ahead, for which its list has to be there before.
            next_block, next_share = listed_at(listed, weights, step + 1, seen, key, BLOCK, LEAVES)
            is_listed = step < from_list
            n = (step - from_list) * KEYS + key
            j = tl.where(
                is_listed, block * BLOCK + key % BLOCK, n + tl.where(n < right, whole, first - right)
            )
            inside = tl.where(is_listed, step * LEAVES + key // BLOCK < seen, n < edges)
            visible = inside & (j >= tl.where(is_listed, 0, from_))
            if REACH:
                visible &= in_reach(j, t, REACH)
            y = load_keys(keys, j, stride_kt, visible, DIM, DIM_PAD)
            s = tl.dot(x, y, input_precision=PRECISION) * factor
            s = tl.where(visible[None], s + tl.log2(share)[None], -float("inf"))
            z = load_values(values, j, stride_vt, visible, VALUE_DIM, VALUE_PAD)
            acc, total, top = add_tile(acc, total, top, s, z, PRECISION)
            block, share = next_block, next_share

        to = (((i * tl.num_programs(1)).to(tl.int64) + bh) * parts + part) * GROUP + row
        tl.store(
            sums + to[:, None] * VALUE_DIM + value_dim[None],
            acc,
            mask=(row < GROUP)[:, None] & (value_dim[None] < VALUE_DIM),
        )
        tl.store(totals + to, total, mask=row < GROUP)
        tl.store(tops + to, top, mask=row < GROUP)


@kernel(do_not_specialize=["slots", "tokens"])
def join_parts(
    sinks, start, length, sums, totals, tops, out,
    slots, tokens,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` [B, Hq, T, VALUE_DIM], zero for what is no token."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, _ = row_range(start, length, slots, tokens, b, LAYOUT)
    row = tl.arange(0, ROWS)
    value_dim = tl.arange(0, VALUE_PAD)
    t = row * 0 + i - offset
    real = (t >= low) & (t < high)
    mine = (row < GROUP) & real
    wide = mine[:, None] & (value_dim[None] < VALUE_DIM)
    origin = ((i * tl.num_programs(1)).to(tl.int64) + bh) * PARTS * GROUP + row
    sink = tl.full([ROWS], -float("inf"), tl.float32)
    if sinks is not None:
        sink = sink_of(sinks, h * GROUP + row, mine)
    top = sink
    for part in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(tops + origin + part * GROUP, mask=mine, other=0.0))
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    total = tl.exp2(sink - top)
    for part in tl.static_range(PARTS):
        at = origin + part * GROUP
        weight = tl.exp2(tl.load(tops + at, mask=mine, other=0.0) - top)
        total += weight * tl.load(totals + at, mask=mine, other=1.0)
        acc += weight[:, None] * tl.load(
            sums + at[:, None] * VALUE_DIM + value_dim[None], mask=wide, other=0.0
        )
    at_out = ((b * KV_HEADS * GROUP + h * GROUP + row) * tokens + i).to(tl.int64) * VALUE_DIM
    tl.store(
        out + at_out[:, None] + value_dim[None],
        tl.where(real[:, None], acc / total[:, None], 0.0).to(out.dtype.element_ty),
        mask=(row < GROUP)[:, None] & (value_dim[None] < VALUE_DIM),
    )
