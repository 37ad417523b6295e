"""Attention of the last few tokens of each row, the work on one of them spread over many programs.

    coarse steps   where a token begins a query block                        →  spans
    vote_parts     queries of a block × keys of sinks and window, and nodes of some of its spans   →  votes
    settle_parts   votes                                                     →  choices, lists
    attend_parts   one query × part of what it sees                          →  sums of the part
    join_parts     sums of the parts                                         →  out

The votes are those of ``choose`` to the bit: products have the same shape. Which tokens there are is read on the
device, and every size follows from shapes: a call can be captured in a CUDA graph and replayed for later tokens.
"""

from __future__ import annotations

import triton.language as tl

from retrofit.kernels.hsa.triton_choose import list_block, settle, vote_spans
from retrofit.kernels.hsa.triton_execute import (
    add_tile,
    listed_keys,
    listed_shares,
    load_keys,
    load_values,
    near_edges,
)
from retrofit.kernels.hsa.triton_select import LOG2E, row_range
from retrofit.kernels.launch import kernel


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks", "leaves", "pairs"])
def vote_parts(
    q, k, nodes, spreads, start, length, spans, votes,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh, stride_sb, stride_sh,
    slots, tokens, blocks, total_blocks, leaves, pairs, scale, spread,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, PER_LEAF: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    CHOICES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, MOST: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Votes [B·Hkv, blocks, QUERY_BLOCK, WIDTH_PAD + FANOUT], integers; each program those of ``pairs`` pairs of spans."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
    number = low // QUERY_BLOCK + i
    t0 = number * QUERY_BLOCK
    if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
        from_pair = tl.program_id(2) * pairs
        vote_spans(
            q, k, nodes, spreads, None, spans + (bh * total_blocks + number) * BEAM,
            votes + (bh * blocks + i) * (QUERY_BLOCK * (WIDTH_PAD + FANOUT)),
            b, h, t0, low, high, offset, begin, from_pair, from_pair + pairs,
            stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh,
            stride_sb, stride_sh, tokens, leaves, scale, spread,
            KV_HEADS, GROUP, HEADS, DIM, DIM_PAD, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK,
            WIDTH, WIDTH_PAD, KEYS, PRECISION, STEPS, MOST,
        )  # fmt: skip


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks"])
def settle_parts(
    start, length, spans, choices, votes, ordered, shares, counts,
    slots, tokens, blocks, total_blocks, least,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    ROOM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr,
    LIST: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Adds to ``choices`` by the votes, and lists what each block executes as ``list_blocks`` does."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    number = low // QUERY_BLOCK + i
    t0 = number * QUERY_BLOCK
    if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
        kept = spans + (bh * total_blocks + number) * BEAM
        at = bh * blocks + i
        made = choices + (bh * total_blocks + number) * CHOICES
        settle(
            kept, made, votes + at * (QUERY_BLOCK * (WIDTH_PAD + FANOUT)), t0, low, high, least,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, ROOM, WIDTH, WIDTH_PAD, CHOICES, PARTS, BITS,
            ROWS, False,
        )  # fmt: skip
        tl.debug_barrier()  # every thread has written its choices
        list_block(
            kept, made, ordered + at * LIST, shares + at * LIST, counts + at * QUERY_BLOCK, t0,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH, CHOICES, LIST,
        )  # fmt: skip


@kernel(do_not_specialize=["slots", "tokens", "blocks"])
def attend_parts(
    q, k, v, start, length, ordered, shares, counts, sums, totals, tops,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    slots, tokens, blocks, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    LIST: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, LAYOUT: tl.constexpr,
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
        right = t + 1 - whole
        edges = right + last - first
        from_list = (seen + LEAVES - 1) // LEAVES
        steps = from_list + (edges + KEYS - 1) // KEYS
        each = (steps + parts - 1) // parts
        for step in range(part * each, tl.minimum(steps, part * each + each)):
            is_listed = step < from_list
            u = tl.where(is_listed, step * LEAVES, 0)
            n = (step - from_list) * KEYS + key
            j = n + tl.where(n < right, whole, first - right)
            inside = n < edges
            share = key * 0.0 + 1.0
            if is_listed:
                share = listed_shares(weights, u, KEYS, BLOCK)
                j = listed_keys(listed, u, KEYS, BLOCK)
                inside = u + key // BLOCK < seen
            visible = inside & (j >= tl.where(is_listed, 0, from_))
            y = load_keys(keys, j, stride_kt, visible, DIM, DIM_PAD)
            s = tl.dot(x, y, input_precision=PRECISION) * factor
            s = tl.where(visible[None], s + tl.log2(share)[None], -float("inf"))
            z = load_values(values, j, stride_vt, visible, VALUE_DIM, VALUE_PAD)
            acc, total, top = add_tile(acc, total, top, s, z, PRECISION)

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
    start, length, sums, totals, tops, out,
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
    top = tl.full([ROWS], -float("inf"), tl.float32)
    for part in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(tops + origin + part * GROUP, mask=mine, other=0.0))
    acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
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
