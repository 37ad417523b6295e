"""Attention of query blocks to sinks, window and chosen leaves on a GPU.

A tile is a query block times up to HEADS heads of a group. What its rows see is cut into blocks of BLOCK keys:

    listed   sinks, the window that all rows see whole, leaves in the order of choices     [0 … counts[row])
    edges    the window's two ends, where rows differ key by key

    attend_listed   shift, list  →  out, lse     tiles that end behind DENSE_END
    attend_run      →  out, lse                  tiles that end by DENSE_END, which see all keys up to themselves, unless
                                                 others have done them

The weights of a listed block are times its share. ``attend_listed`` shifts its scores by the highest one among sinks and
window, which the selection has found, and needs no maximum of its own. Where that is too low for the range of numbers, the
tile is put on the list ``todo``, as ``attend_by_roles`` does, and ``attend_run`` does it again with a running maximum:

    todo = how many, how many tiles programs have taken (which ``triton_roles`` counts), the tiles
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.triton_select import LOG2E, in_reach, row_range
from retrofit.kernels.launch import INTERPRETED, kernel

TAKEN, LISTED = tl.constexpr(1), tl.constexpr(2)
"""Places in ``todo``: of the number of tiles taken, and of the first tile."""


@triton.jit
def settled(x):
    """The sum x of products as it is, but finished.

    The next product otherwise begins while this one runs; where registers do not suffice for both, each of their
    instructions waits for the one before.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("", "=f,0", [x], tl.float32, True, 1)


@triton.jit
def near_edges(t0, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr):
    """(start of the first row's window, of the last row's, end of the blocks that all rows of t0's block see whole).

    They do not depend on which of the rows there are.
    """
    first = tl.maximum(tl.maximum(t0 + 1 - WINDOW, 0) // BLOCK * BLOCK, SINK)
    last = tl.maximum(tl.maximum(t0 + QUERY_BLOCK - WINDOW, 0) // BLOCK * BLOCK, SINK)
    return first, last, tl.maximum(last, t0 // BLOCK * BLOCK)


@triton.jit
def sink_of(sinks, head, mask):
    """The logits of heads' sinks, in powers of two."""
    return tl.load(sinks + head, mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def at_token(b, at, head, tokens, HEADS: tl.constexpr):
    """Row of [B, T, HEADS], as the projection behind attention reads outputs."""
    return (b * tokens + at) * HEADS + head


@triton.jit
def listed_keys(listed, u, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Positions [KEYS] of the keys in the blocks u, u + 1, … of the list."""
    key = tl.arange(0, KEYS)
    block = tl.load(listed + u)
    for i in tl.static_range(1, KEYS // BLOCK):
        block = tl.where(key // BLOCK == i, tl.load(listed + u + i), block)
    return block * BLOCK + key % BLOCK


@triton.jit
def listed_shares(shares, u, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Shares [KEYS] of the keys in the blocks u, u + 1, … of the list."""
    key = tl.arange(0, KEYS)
    share = tl.load(shares + u)
    for i in tl.static_range(1, KEYS // BLOCK):
        share = tl.where(key // BLOCK == i, tl.load(shares + u + i), share)
    return tl.broadcast_to(share, [KEYS])


@triton.jit
def listed_shifts(shares, u, seen, top, KEYS: tl.constexpr, BLOCK: tl.constexpr, FADES: tl.constexpr):
    """What is added to scores [ROWS, KEYS] for the blocks u, u + 1, … of the list: the logarithm of a block's share
    less ``top``, for rows that see ``seen`` blocks. Unless leaves fade in, all shares are 1."""
    key = tl.arange(0, KEYS)
    shift = tl.broadcast_to(top[:, None], [top.shape[0], KEYS])
    for i in tl.static_range(KEYS // BLOCK):
        own = -top
        if FADES:
            own += tl.log2(tl.load(shares + u + i))
        own = tl.where(u + i < seen, own, -float("inf"))
        shift = tl.where((key // BLOCK == i)[None], own[:, None], shift)
    return shift


@triton.jit
def load_keys(keys, j, stride, mask, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows j [N] of keys as [DIM_PAD, N]; ``mask`` [N] or None."""
    dim = tl.arange(0, DIM_PAD)
    at = keys + j[None].to(tl.int64) * stride + dim[:, None]
    if mask is not None:
        return tl.load(at, mask=mask[None] & (dim[:, None] < DIM), other=0.0)
    elif DIM_PAD > DIM:
        return tl.load(at, mask=dim[:, None] < DIM, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_values(values, j, stride, mask, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows j [N] of values as [N, DIM_PAD]; ``mask`` [N] or None."""
    dim = tl.arange(0, DIM_PAD)
    at = values + j[:, None].to(tl.int64) * stride + dim[None]
    if mask is not None:
        return tl.load(at, mask=mask[:, None] & (dim[None] < DIM), other=0.0)
    elif DIM_PAD > DIM:
        return tl.load(at, mask=dim[None] < DIM, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def add_shifted(acc, total, p, values, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Adds weights p [ROWS, KEYS]; their sum is kept in 8 columns, which need not be joined in every step."""
    total += tl.sum(tl.reshape(p, [ROWS, KEYS // 8, 8]), 1)
    return settled(tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)), total


@kernel(do_not_specialize=["slots", "tokens", "blocks"])
def attend_listed(
    q, k, v, sinks, start, length, ordered, shares, counts, shift, todo, out, lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    slots, tokens, blocks, scale, limit,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    DENSE_END: tl.constexpr, LIST: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, REACH: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` [B, T, Hq, VALUE_DIM] and ``lse`` [B, Hq, T] of sparse tiles.

    Where sums exceed ``limit``, ``lse`` is a NaN and the tile is put on the list ``todo``.
    """
    ROWS: tl.constexpr = HEADS * QUERIES
    SPLIT: tl.constexpr = QUERY_BLOCK // QUERIES
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    LEAVES: tl.constexpr = KEYS // BLOCK
    FADES: tl.constexpr = q.dtype.element_ty == tl.float32
    i = tl.program_id(0) // SPLIT
    bh = (tl.program_id(1) // PARTS).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
    t0 = (low // QUERY_BLOCK + i) * QUERY_BLOCK
    if (t0 < high) & (t0 + QUERY_BLOCK > DENSE_END):
        row = tl.arange(0, ROWS)
        place = tl.program_id(0) % SPLIT * QUERIES + row % QUERIES
        head = h * GROUP + tl.program_id(1) % PARTS * HEADS + row // QUERIES
        t = t0 + place
        new = (t >= low) & (t < high) & (head < (h + 1) * GROUP)
        dim = tl.arange(0, DIM_PAD)
        value_dim = tl.arange(0, VALUE_PAD)
        at = (t + offset).to(tl.int64)
        at_q = b * stride_qb + head * stride_qh + at * stride_qt
        x = tl.load(q + at_q[:, None] + dim[None], mask=new[:, None] & (dim[None] < DIM), other=0.0)
        at_out = (b * KV_HEADS * GROUP + head) * tokens + at
        top = tl.load(shift + at_out, mask=new, other=0.0)
        keys = k + b * stride_kb + h * stride_kh + begin.to(tl.int64) * stride_kt
        values = v + b * stride_vb + h * stride_vh + begin.to(tl.int64) * stride_vt
        key = tl.arange(0, KEYS)
        factor = scale * LOG2E
        acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
        total = tl.zeros([ROWS, 8], tl.float32)

        listed, weights = ordered + (bh * blocks + i) * LIST, shares + (bh * blocks + i) * LIST
        seen_by = counts + (bh * blocks + i) * QUERY_BLOCK
        seen = tl.load(seen_by + place)
        most = tl.load(seen_by + QUERY_BLOCK - 1)
        for u in range(0, most, LEAVES):
            j = listed_keys(listed, u, KEYS, BLOCK)
            y = load_keys(keys, j, stride_kt, None, DIM, DIM_PAD)
            s = tl.dot(x, y, input_precision=PRECISION)
            at_top = listed_shifts(weights, u, seen, top, KEYS, BLOCK, FADES)
            if REACH:
                at_top = tl.where(in_reach(j[None], t[:, None], REACH), at_top, -float("inf"))
            p = tl.exp2(tl.fma(s, tl.broadcast_to(factor, s.shape), at_top))
            z = load_values(values, j, stride_vt, None, VALUE_DIM, VALUE_PAD)
            acc, total = add_shifted(acc, total, p, z, ROWS, KEYS, PRECISION)

        first, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
        right = t0 + QUERY_BLOCK - whole
        from_ = tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK
        for n in range(0, right + last - first, KEYS):
            j = n + key + tl.where(n + key < right, whole, first - right)
            inside = (n + key < right + last - first) & (j < high)
            y = load_keys(keys, j, stride_kt, inside, DIM, DIM_PAD)
            s = tl.dot(x, y, input_precision=PRECISION)
            visible = inside[None] & (j[None] <= t[:, None]) & (j[None] >= from_[:, None])
            if REACH:
                visible &= in_reach(j[None], t[:, None], REACH)
            p = tl.where(visible, tl.exp2(s * factor - top[:, None]), 0.0)
            z = load_values(values, j, stride_vt, inside, VALUE_DIM, VALUE_PAD)
            acc, total = add_shifted(acc, total, p, z, ROWS, KEYS, PRECISION)

        sums = tl.sum(total, 1)
        fits = sums <= limit
        if sinks is not None:
            sums += tl.exp2(sink_of(sinks, head, new) - top)
            fits &= sums < float("inf")
        tl.store(
            out + at_token(b, at, head, tokens, KV_HEADS * GROUP)[:, None] * VALUE_DIM + value_dim[None],
            (acc / sums[:, None]).to(out.dtype.element_ty),
            mask=new[:, None] & (value_dim[None] < VALUE_DIM),
        )
        tl.store(lse + at_out, tl.where(fits, (top + tl.log2(sums)) / LOG2E, float("nan")), mask=new)
        if tl.max((new & (fits == 0)).to(tl.int32), 0) > 0:
            tl.store(
                todo + LISTED + tl.atomic_add(todo, 1), tl.program_id(1) * (blocks * SPLIT) + tl.program_id(0)
            )


@triton.jit
def add_tile(acc, total, top, s, values, PRECISION: tl.constexpr):
    """One step of the online softmax: scores s [M, N] in powers of two, values [N, D]."""
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(s - safe[:, None])
    old = tl.exp2(top - safe)
    total = total * old + tl.sum(p, 1)
    acc = settled(tl.dot(p.to(values.dtype), values, acc * old[:, None], input_precision=PRECISION))
    return acc, total, new_top


@kernel(do_not_specialize=["slots", "tokens", "blocks"])
def attend_run(
    q, k, v, sinks, start, length, ordered, shares, counts, todo, out, lse,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    slots, tokens, blocks, batch, dense_blocks, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    DENSE_END: tl.constexpr, LIST: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, REACH: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` and ``lse`` of the first ``dense_blocks`` of each row, and of the tiles listed in ``todo``, which may
    be dense as well."""
    ROWS: tl.constexpr = HEADS * QUERIES
    SPLIT: tl.constexpr = QUERY_BLOCK // QUERIES
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    LEAVES: tl.constexpr = KEYS // BLOCK
    ALL_PARTS: tl.constexpr = KV_HEADS * PARTS
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    dim = tl.arange(0, DIM_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    factor = scale * LOG2E
    dense = dense_blocks * SPLIT * batch * ALL_PARTS
    for w in range(tl.program_id(0), dense + tl.load(todo), tl.num_programs(0)):
        again = tl.load(todo + LISTED + tl.maximum(w - dense, 0))
        tile = tl.where(w < dense, w // (batch * ALL_PARTS), again % (blocks * SPLIT))
        part = tl.where(w < dense, w % (batch * ALL_PARTS), again // (blocks * SPLIT))
        i = tile // SPLIT
        bh = (part // PARTS).to(tl.int64)
        b, h = bh // KV_HEADS, bh % KV_HEADS
        low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
        t0 = (low // QUERY_BLOCK + i) * QUERY_BLOCK
        head = h * GROUP + part % PARTS * HEADS + row // QUERIES
        place = tile % SPLIT * QUERIES + row % QUERIES
        t = t0 + place
        new = (t >= low) & (t < high) & (head < (h + 1) * GROUP)
        at = (t + offset).to(tl.int64)
        at_out = (b * KV_HEADS * GROUP + head) * tokens + at
        sparse = (w >= dense) & (t0 + QUERY_BLOCK > DENSE_END)
        if w >= dense:
            found = tl.load(lse + at_out, mask=new, other=0.0)
            new = new & (found != found)
        else:
            new = new & (t - place + QUERY_BLOCK <= DENSE_END)
        at_q = b * stride_qb + head * stride_qh + at * stride_qt
        x = tl.load(q + at_q[:, None] + dim[None], mask=new[:, None] & (dim[None] < DIM), other=0.0)
        keys = k + b * stride_kb + h * stride_kh + begin.to(tl.int64) * stride_kt
        values = v + b * stride_vb + h * stride_vh + begin.to(tl.int64) * stride_vt
        acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        if sinks is not None:
            total += 1.0
            top = sink_of(sinks, head, new)

        first, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
        from_ = tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK
        if sparse:
            listed, weights = ordered + (bh * blocks + i) * LIST, shares + (bh * blocks + i) * LIST
            seen_by = counts + (bh * blocks + i) * QUERY_BLOCK
            seen = tl.load(seen_by + place)
            for u in range(0, tl.load(seen_by + QUERY_BLOCK - 1), LEAVES):
                j = listed_keys(listed, u, KEYS, BLOCK)
                y = load_keys(keys, j, stride_kt, None, DIM, DIM_PAD)
                s = tl.dot(x, y, input_precision=PRECISION) * factor
                s += tl.log2(listed_shares(weights, u, KEYS, BLOCK))[None]
                s = tl.where((u + key // BLOCK)[None] < seen[:, None], s, -float("inf"))
                if REACH:
                    s = tl.where(in_reach(j[None], t[:, None], REACH), s, -float("inf"))
                z = load_values(values, j, stride_vt, None, VALUE_DIM, VALUE_PAD)
                acc, total, top = add_tile(acc, total, top, s, z, PRECISION)
        else:
            first, last, whole, from_ = first * 0, last * 0, whole * 0, from_ * 0
        right = t0 + QUERY_BLOCK - whole
        for n in range(0, right + last - first, KEYS):
            j = n + key + tl.where(n + key < right, whole, first - right)
            inside = (n + key < right + last - first) & (j < high)
            y = load_keys(keys, j, stride_kt, inside, DIM, DIM_PAD)
            s = tl.dot(x, y, input_precision=PRECISION) * factor
            visible = inside[None] & (j[None] <= t[:, None]) & (j[None] >= from_[:, None])
            if REACH:
                visible &= in_reach(j[None], t[:, None], REACH)
            z = load_values(values, j, stride_vt, inside, VALUE_DIM, VALUE_PAD)
            acc, total, top = add_tile(acc, total, top, tl.where(visible, s, -float("inf")), z, PRECISION)

        tl.store(
            out + at_token(b, at, head, tokens, KV_HEADS * GROUP)[:, None] * VALUE_DIM + value_dim[None],
            (acc / total[:, None]).to(out.dtype.element_ty),
            mask=new[:, None] & (value_dim[None] < VALUE_DIM),
        )
        tl.store(lse + at_out, (top + tl.log2(total)) / LOG2E, mask=new)
