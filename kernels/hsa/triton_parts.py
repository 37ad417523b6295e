"""Attention of the last few tokens of each row, spread evenly over many programs.

What one query of a group sees is an item of so many steps of KEYS keys. The steps of all items stand in one row, of which
each program does as many; what it does of an item is a part of that.

    share_out      steps of all items                  →  what each program does
    attend_parts   what a program does                 →  sums of parts, where the parts of each item begin and end
    join_parts     parts of one item, one head of it   →  out

Programs and items are both in order: the part of program p and item x has the place p + x, and no other part has.
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
def work_on(
    item, start, length, counts, slots, tokens, rows, blocks,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, KEYS: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """What the query of an item, or of each of several, sees: blocks of a list, and the window's two ends.

    Returns:
        Its steps, 0 if it is no token; its position t; the place of its list among all, and the blocks that it sees of that;
        the steps to the end of the list and to the end of the near end; where the near end begins, which ends with t, and
        where the far end begins and ends; the first key that it sees of both.
    """
    LEAVES: tl.constexpr = KEYS // BLOCK
    bh = item % rows
    low, high, offset, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    t = item // rows - offset
    real = (t >= low) & (t < high)
    number = t // QUERY_BLOCK
    t0 = number * QUERY_BLOCK
    sparse = real & (t0 + QUERY_BLOCK > DENSE_END)
    at = bh.to(tl.int64) * blocks + number - low // QUERY_BLOCK
    seen = tl.load(counts + at * QUERY_BLOCK + t - t0, mask=sparse, other=0)
    first, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    # Where query blocks are wider than the window, the last row's begins behind t.
    near, far, end = (
        tl.where(sparse, whole, 0),
        tl.where(sparse, first, 0),
        tl.where(sparse, tl.minimum(last, t + 1), 0),
    )
    from_ = tl.where(sparse, tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK, 0)
    list_end = (seen + LEAVES - 1) // LEAVES
    near_end = list_end + (tl.maximum(t + 1 - near, 0) + KEYS - 1) // KEYS
    steps = tl.where(real, near_end + (end - far + KEYS - 1) // KEYS, 0)
    return steps, t, at, seen, list_end, near_end, near, far, end, from_


@triton.jit
def steps_from(
    begin, start, length, counts, slots, tokens, rows, blocks,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, KEYS: tl.constexpr, AT_ONCE: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Steps of AT_ONCE items from number ``begin`` on, 0 behind the last."""
    item, items = begin + tl.arange(0, AT_ONCE), tokens * rows
    steps = work_on(
        tl.minimum(item, items - 1), start, length, counts, slots, tokens, rows, blocks,
        KV_HEADS, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, LAYOUT,
    )[0]  # fmt: skip
    return tl.where(item < items, steps, 0)


@triton.jit
def share_out(
    start, length, counts, slots, tokens, rows, blocks,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, KEYS: tl.constexpr, AT_ONCE: tl.constexpr,
    LEAST: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """(first item, item behind the last, first step in the first item, steps) of this program."""
    zero = slots * 0
    total = zero
    for begin in range(0, tokens * rows, AT_ONCE):
        steps = steps_from(
            begin, start, length, counts, slots, tokens, rows, blocks,
            KV_HEADS, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, AT_ONCE, LAYOUT,
        )  # fmt: skip
        total += tl.sum(steps, 0)
    each = tl.maximum((total + tl.num_programs(0) - 1) // tl.num_programs(0), LEAST)
    begin_step = tl.minimum(tl.program_id(0) * each, total)
    end_step = tl.minimum(begin_step + each, total)
    # The first item is the one behind those of which all steps come before.
    before, first_item, end_item, first_step = zero, zero, zero, begin_step
    for begin in range(0, tokens * rows, AT_ONCE):
        steps = steps_from(
            begin, start, length, counts, slots, tokens, rows, blocks,
            KV_HEADS, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, AT_ONCE, LAYOUT,
        )  # fmt: skip
        ends = before + tl.cumsum(steps, 0)
        first_item += tl.sum((ends <= begin_step).to(tl.int32), 0)
        first_step -= tl.sum(tl.where(ends <= begin_step, steps, 0), 0)
        end_item += tl.sum((ends - steps < end_step).to(tl.int32), 0)
        before += tl.sum(steps, 0)
    return first_item, end_item, first_step, end_step - begin_step


@triton.jit
def listed_at(listed, shares, step, seen, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """(block, share) of a step, or of each of its keys if it has several; 0 and 1 behind the ``seen`` blocks of the list."""
    u = step * (KEYS // BLOCK)
    if KEYS > BLOCK:
        u += tl.arange(0, KEYS) // BLOCK
    return tl.load(listed + u, mask=u < seen, other=0), tl.load(shares + u, mask=u < seen, other=1.0)


@triton.jit
def attend_keys(
    acc, total, top, x, keys, values, stride_kt, stride_vt, j, visible, factor, added,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the queries x over the rows j of keys and values, all of them if ``visible`` is None; ``added`` is
    added to scores in powers of two."""
    y = load_keys(keys, j, stride_kt, visible, DIM, DIM_PAD)
    s = tl.dot(x, y, input_precision=PRECISION) * factor + added
    if visible is not None:
        s = tl.where(visible[None], s, -float("inf"))
    z = load_values(values, j, stride_vt, visible, VALUE_DIM, VALUE_PAD)
    return add_tile(acc, total, top, s, z, PRECISION)


@kernel(do_not_specialize=["slots", "tokens", "rows", "blocks"])
def attend_parts(
    q, k, v, start, length, ordered, shares, counts, sums, totals, tops, parts,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    slots, tokens, rows, blocks, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    LIST: tl.constexpr, KEYS: tl.constexpr, AT_ONCE: tl.constexpr, LEAST: tl.constexpr,
    PRECISION: tl.constexpr, REACH: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The sums of exponentials, and of values times these, of parts.

    An item is i · rows + bh for query i and row bh of B·Hkv. ``sums`` is float32 [places, GROUP, VALUE_DIM]; ``totals``
    and ``tops``, by which scores in powers of two are shifted, are [places, GROUP]. ``parts`` is [T·B·Hkv, 2], the
    places of an item's first part and behind its last, written for tokens only.
    """
    LEAVES: tl.constexpr = KEYS // BLOCK
    first_item, end_item, step, left = share_out(
        start, length, counts, slots, tokens, rows, blocks,
        KV_HEADS, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, AT_ONCE, LEAST, LAYOUT,
    )  # fmt: skip
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    key = tl.arange(0, KEYS)
    factor = scale * LOG2E
    for item in range(first_item, end_item):
        steps, t, at, seen, list_end, near_end, near, far, end, from_ = work_on(
            item, start, length, counts, slots, tokens, rows, blocks,
            KV_HEADS, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, LAYOUT,
        )  # fmt: skip
        until = tl.minimum(steps, step + left)
        if step < until:
            bh = (item % rows).to(tl.int64)
            b, h = bh // KV_HEADS, bh % KV_HEADS
            _, _, _, begin = row_range(start, length, slots, tokens, b, LAYOUT)
            at_q = b * stride_qb + (h * GROUP + row) * stride_qh + item // rows * stride_qt
            x = tl.load(
                q + at_q[:, None] + dim[None], mask=(row < GROUP)[:, None] & (dim[None] < DIM), other=0.0
            )
            keys = k + b * stride_kb + h * stride_kh + begin.to(tl.int64) * stride_kt
            values = v + b * stride_vb + h * stride_vh + begin.to(tl.int64) * stride_vt
            listed, weights = ordered + at * LIST, shares + at * LIST
            acc = tl.zeros([ROWS, VALUE_PAD], tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            top = tl.full([ROWS], -float("inf"), tl.float32)
            block, share = listed_at(listed, weights, step, seen, BLOCK, KEYS)
            for at_step in range(step, tl.minimum(until, list_end)):
                # The keys and values of a step are fetched ahead, for which its list has to be there before.
                next_block, next_share = listed_at(listed, weights, at_step + 1, seen, BLOCK, KEYS)
                origin, j, visible, added = block * BLOCK, key, None, tl.log2(share)
                if KEYS > BLOCK:
                    origin, j, added = t * 0, origin + key % BLOCK, added[None]
                    visible = at_step * LEAVES + key // BLOCK < seen
                if REACH:
                    within = in_reach(origin + j, t, REACH)
                    visible = within if visible is None else visible & within
                acc, total, top = attend_keys(
                    acc, total, top, x, keys + origin.to(tl.int64) * stride_kt,
                    values + origin.to(tl.int64) * stride_vt, stride_kt, stride_vt, j, visible, factor, added,
                    DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, PRECISION,
                )  # fmt: skip
                block, share = next_block, next_share
            for at_step in range(tl.maximum(step, list_end), until):
                is_near = at_step < near_end
                origin = tl.where(
                    is_near, near + (at_step - list_end) * KEYS, far + (at_step - near_end) * KEYS
                )
                visible = (key >= from_ - origin) & (key < tl.where(is_near, t + 1, end) - origin)
                if REACH:
                    visible &= in_reach(origin + key, t, REACH)
                acc, total, top = attend_keys(
                    acc, total, top, x, keys + origin.to(tl.int64) * stride_kt,
                    values + origin.to(tl.int64) * stride_vt, stride_kt, stride_vt, key, visible, factor, 0.0,
                    DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, PRECISION,
                )  # fmt: skip

            place = tl.program_id(0) + item
            to = place.to(tl.int64) * GROUP + row
            tl.store(
                sums + to[:, None] * VALUE_DIM + value_dim[None],
                acc,
                mask=(row < GROUP)[:, None] & (value_dim[None] < VALUE_DIM),
            )
            tl.store(totals + to, total, mask=row < GROUP)
            tl.store(tops + to, top, mask=row < GROUP)
            tl.store(parts + 2 * item, place, mask=step == 0)
            tl.store(parts + 2 * item + 1, place + 1, mask=until == steps)
        left -= until - step
        step = step * 0


@kernel(do_not_specialize=["slots", "tokens", "rows"])
def join_parts(
    sinks, start, length, sums, totals, tops, parts, out,
    slots, tokens, rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` [B, Hq, T, VALUE_DIM], zero for what is no token."""
    item, g = tl.program_id(0), tl.program_id(1)
    i, bh = item // rows, item % rows
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, _ = row_range(start, length, slots, tokens, b, LAYOUT)
    real = (i - offset >= low) & (i - offset < high)
    value_dim = tl.arange(0, VALUE_PAD)
    wide = value_dim < VALUE_DIM
    first, end = tl.load(parts + 2 * item), tl.load(parts + 2 * item + 1)
    first, end = tl.where(real, first, 0), tl.where(real, end, 0)
    top, total = tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32)
    if sinks is not None:
        top, total = sink_of(sinks, h * GROUP + g, real), tl.full([], 1.0, tl.float32)
    acc = tl.zeros([VALUE_PAD], tl.float32)
    for place in range(first, end, AT_ONCE):
        part = place + tl.arange(0, AT_ONCE)
        at = part.to(tl.int64) * GROUP + g
        tops_of = tl.load(tops + at, mask=part < end, other=-float("inf"))
        totals_of = tl.load(totals + at, mask=part < end, other=0.0)
        sums_of = tl.load(
            sums + at[:, None] * VALUE_DIM + value_dim[None],
            mask=(part < end)[:, None] & wide[None],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops_of, 0))
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight, old = tl.exp2(tops_of - safe), tl.exp2(top - safe)
        total = total * old + tl.sum(weight * totals_of, 0)
        acc = acc * old + tl.sum(weight[:, None] * sums_of, 0)
        top = new_top
    to = ((b * KV_HEADS + h) * GROUP + g).to(tl.int64) * tokens + i
    tl.store(
        out + to * VALUE_DIM + value_dim,
        (acc / tl.where(real, total, 1.0)).to(out.dtype.element_ty),
        mask=wide,
    )
