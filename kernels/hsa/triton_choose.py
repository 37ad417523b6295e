"""The leaf step of the selection on a GPU: which leaf is chosen by whom, and the list of what a block executes.

    choose         queries of a block × keys of sinks and window, nodes of the leaf candidates   →  choices, shift
    list_blocks    choices                                                               →  list, shares, counts

Scores are in powers of two. A tile is a query block times up to HEADS heads of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.geometry import FADE, RISE_BITS, UNUSED
from retrofit.kernels.hsa.triton_execute import load_keys, near_edges
from retrofit.kernels.hsa.triton_select import LOG2E, covered_leaves, row_range
from retrofit.kernels.launch import kernel

WHOLE, NONE = tl.constexpr(FADE), tl.constexpr(UNUSED)
SHIFT, RISES = tl.constexpr(RISE_BITS), tl.constexpr(2**RISE_BITS - 1)
MOST_KEYS = tl.constexpr(128)
"""Keys in a step of any kernel, at most."""
CHOICES_AT_ONCE = tl.constexpr(32)
"""Choices that are counted at a time where leaves fade in."""
SOME = tl.constexpr(64)
"""Choices of a block that its entries are made of at a time."""


@triton.jit
def place_and_head(row, HEADS: tl.constexpr):
    """(place in the query block, head in the tile) of the rows of a tile.

    Of 16 rows, those 8 apart stand in one thread's registers, and neighbours in neighbouring threads: these are the
    heads of one query, [places / LOW, 2, 8 / LOW, LOW] → place, head.
    """
    LOW: tl.constexpr = HEADS // 2 if HEADS > 1 else 1
    HIGH: tl.constexpr = 2 if HEADS > 1 else 1
    place = row // (8 * HIGH) * (8 // LOW) + row // LOW % (8 // LOW)
    return place, row // 8 % HIGH * LOW + row % LOW


@triton.jit
def best_head(x, QUERY_BLOCK: tl.constexpr, HEADS: tl.constexpr, LEAVES: tl.constexpr):
    """The highest of the heads of each query: x [ROWS, LEAVES] → [QUERY_BLOCK, LEAVES]."""
    LOW: tl.constexpr = HEADS // 2 if HEADS > 1 else 1
    HIGH: tl.constexpr = 2 if HEADS > 1 else 1
    x = tl.max(tl.reshape(x, [QUERY_BLOCK * LOW // 8, HIGH, 8, LEAVES]), 1)
    x = tl.max(tl.reshape(x, [QUERY_BLOCK, LOW, LEAVES]), 1)
    return x


@triton.jit
def highest_left(above, ROOM: tl.constexpr, BITS: tl.constexpr):
    """The highest of the numbers [N, M] for which there is no room in each row; 0 where there is room for all above 0.

    Found bit by bit.
    """
    found = tl.zeros([above.shape[0]], tl.int32)
    step = tl.full([], 1, tl.int32) << BITS
    for _ in range(BITS):
        step = step // 2
        higher = found + step
        many = tl.sum((above >= higher[:, None]).to(tl.int32), 1) > ROOM
        found = tl.where(many, higher, found)
    return found


@triton.jit
def rounded(x):
    """The integers next to floats x of at most 2²²: added to 3·2²², they stand in its low bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def weigh(top, total, s):
    """One step of a log-sum-exp: scores s [M, N]."""
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    return new_top, total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)


@triton.jit
def weigh_near(
    x, keys, stride_kt, t, t0, high, factor,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr,
    BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Highest score and log-sum-exp [ROWS] of the queries x [ROWS, DIM_PAD] at t for sinks and window.

    In the order sinks, window, and the part of the window that only the first rows see.
    """
    key = tl.arange(0, KEYS)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    from_ = tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK
    alike = (SINK + whole - last) // KEYS * KEYS
    for n in range(0, alike, KEYS):
        j = n + key + tl.where(n + key < SINK, 0, last - SINK)
        y = load_keys(keys, j, stride_kt, None, DIM, DIM_PAD)
        top, total = weigh(top, total, tl.dot(x, y, input_precision=PRECISION) * factor)
    end = SINK + t0 + QUERY_BLOCK - last
    for n in range(alike, end + last - first, KEYS):
        j = n + key + tl.where(n + key < SINK, 0, tl.where(n + key < end, last - SINK, first - end))
        inside = (n + key < end + last - first) & (j < high)
        y = load_keys(keys, j, stride_kt, inside, DIM, DIM_PAD)
        s = tl.dot(x, y, input_precision=PRECISION) * factor
        visible = (j[None] <= t[:, None]) & ((j[None] < SINK) | (j[None] >= from_[:, None]))
        top, total = weigh(top, total, tl.where(visible & inside[None], s, -float("inf")))
    return top, top + tl.log2(total)


@triton.jit
def span_at(kept, index, used, edge):
    """Number of the span in place ``index``: kept ones, then those of the cover's edge."""
    return tl.where(index < used, tl.load(kept + index, mask=index < used, other=0), edge + index - used)


@triton.jit
def vote_spans(
    q, k, nodes, spreads, shift, kept, held, b, h, t0, low, high, offset, begin, from_pair, to_pair,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh, stride_sb, stride_sh,
    tokens, leaves, scale, spread,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, PER_LEAF: tl.constexpr,
    BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Votes of the queries of the block at t0 for the leaves of its spans, from one pair of spans to another.

    Writes them to ``held`` [QUERY_BLOCK, WIDTH_PAD + FANOUT], integers, and the highest scores among sinks and window
    to ``shift`` [B, Hq, T]. Spans are those in ``kept`` and then those of the cover's edge. HEADS of the group's
    heads meet the nodes of two spans in one product.
    """
    ROWS: tl.constexpr = HEADS * QUERY_BLOCK
    STRIDE: tl.constexpr = WIDTH_PAD + FANOUT
    LEAVES: tl.constexpr = 2 * FANOUT
    EDGE_SPANS: tl.constexpr = (WIDTH - BEAM * FANOUT + FANOUT - 1) // FANOUT
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PAD)
    # Columns are (four leaves, nodes by PAIR, leaf of the four, node of the pair): where an accumulator has columns
    # 0 1 … 8 9 … in one thread's registers, these are the nodes of a leaf, one after another.
    PAIR: tl.constexpr = 2 if PER_LEAF > 1 else 1
    column = tl.arange(0, LEAVES * PER_LEAF)
    column_leaf = column // (4 * PER_LEAF) * 4 + column // PAIR % 4
    column_node = column // (4 * PAIR) % (PER_LEAF // PAIR) * PAIR + column % PAIR
    leaf = tl.arange(0, LEAVES)
    node = tl.arange(0, PER_LEAF)
    place = tl.arange(0, QUERY_BLOCK)
    factor = scale * LOG2E
    base = nodes + b * stride_nb + h * stride_nh
    keys = k + b * stride_kb + h * stride_kh + begin.to(tl.int64) * stride_kt
    edge = covered_leaves(t0, WINDOW, SINK, BLOCK) // FANOUT
    used = spans_kept(kept, BEAM, WIDTH_PAD // FANOUT)
    for h0 in range(0, GROUP, HEADS):
        row_place, row_head = place_and_head(row, HEADS)
        head = h * GROUP + h0 + row_head
        t = t0 + row_place
        at = (t + offset).to(tl.int64)
        new = (t >= low) & (t < high) & (head < (h + 1) * GROUP)
        at_q = b * stride_qb + head * stride_qh + at * stride_qt
        x = tl.load(q + at_q[:, None] + dim[None], mask=new[:, None] & (dim[None] < DIM), other=0.0)
        wide = x.to(tl.float32)
        second = tl.sum(wide * wide, 1) * (0.5 * spread * scale)
        top, near = weigh_near(
            x, keys, stride_kt, t, t0, high, factor,
            DIM, DIM_PAD, ROWS, WINDOW, SINK, BLOCK, QUERY_BLOCK, KEYS, PRECISION,
        )  # fmt: skip
        if shift is not None:
            tl.store(shift + (b * KV_HEADS * GROUP + head) * tokens + at, top, mask=new)
        near = tl.where(new, near * STEPS, float("inf"))
        first_span = 2 * from_pair
        left, right = span_at(kept, first_span, used, edge), span_at(kept, first_span + 1, used, edge)
        for j in range(first_span, tl.minimum(used + EDGE_SPANS, 2 * to_pair), 2):
            of_leaf = tl.where(leaf < FANOUT, left, right)
            of_column = tl.where(column_leaf < FANOUT, left, right)
            left, right = span_at(kept, j + 2, used, edge), span_at(kept, j + 3, used, edge)
            # Leaves that are not complete are nobody's candidates; the last one stands for them.
            n = tl.minimum(of_column * FANOUT + column_leaf % FANOUT, leaves - 1) * PER_LEAF + column_node
            y = load_keys(base, n, DIM, None, DIM, DIM_PAD)
            if spreads is not None:
                m = tl.minimum(of_leaf * FANOUT + leaf % FANOUT, leaves - 1)
                spread_at = spreads + b * stride_sb + h * stride_sh
                apart = tl.load(spread_at + m[:, None] * PER_LEAF + node[None])
            s = tl.dot(x, y, input_precision=PRECISION)
            if spreads is not None:
                apart = tl.reshape(apart, [LEAVES // 4, 4, PER_LEAF // PAIR, PAIR])
                apart = tl.reshape(tl.permute(apart, (0, 2, 1, 3)), [LEAVES * PER_LEAF])
                s = tl.fma(
                    tl.broadcast_to(second[:, None], s.shape), tl.broadcast_to(apart[None], s.shape), s
                )
            best = tl.max(tl.reshape(s, [ROWS, LEAVES // 4, PER_LEAF // PAIR, 4, PAIR]), 4)
            best = tl.reshape(tl.max(best, 2), [ROWS, LEAVES])
            weight = best_head(best * (factor * STEPS) - near[:, None], QUERY_BLOCK, HEADS, LEAVES)
            vote = rounded(tl.minimum(tl.maximum(weight, -MOST), MOST))
            at_leaf = tl.where(j + leaf // FANOUT >= used, BEAM - used, 0) * FANOUT + j * FANOUT + leaf
            to = held + place[:, None] * STRIDE + at_leaf[None]
            if GROUP > HEADS:
                earlier = tl.load(to, mask=(at_leaf < WIDTH_PAD)[None], other=0)
                vote = tl.where(h0 > 0, tl.maximum(vote, earlier), vote)
            tl.store(to, vote, mask=(at_leaf < WIDTH_PAD)[None])
        tl.debug_barrier()  # every thread has written its votes


@triton.jit
def spans_kept(kept, BEAM: tl.constexpr, PLACES: tl.constexpr):
    """How many of the BEAM places hold a span."""
    slot = tl.arange(0, PLACES)
    return tl.sum((tl.load(kept + slot, mask=slot < BEAM, other=-1) >= 0).to(tl.int32), 0)


@triton.jit
def unpack(choice, QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(row, candidate, rise) of choices; (QUERY_BLOCK, 0, 0) where there is none."""
    used, place = choice < NONE, choice >> SHIFT
    return (
        tl.where(used, place // WIDTH, QUERY_BLOCK),
        tl.where(used, place % WIDTH, 0),
        tl.where(used, choice & RISES, 0),
    )


@triton.jit
def read_choices(
    choices, candidate, some,
    QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """How many choices there are, and how far each candidate has risen by them; nothing is read unless ``some``."""
    MANY: tl.constexpr = CHOICES_AT_ONCE if PARTS < WHOLE else triton.next_power_of_2(CHOICES)
    place = tl.arange(0, MANY)
    risen = candidate * 0
    count = tl.full([], 0, tl.int32)
    more = tl.full([], 0, tl.int32) + some
    while more > 0:
        choice = tl.load(choices + count + place, mask=count + place < CHOICES, other=NONE)
        used = choice < NONE
        _row, which, rise = unpack(choice, QUERY_BLOCK, WIDTH)
        if PARTS == WHOLE:
            risen += tl.histogram(which, WIDTH_PAD, mask=used) * WHOLE
        else:
            risen += tl.sum(tl.where(which[:, None] == candidate[None], rise[:, None], 0), 0)
        count += tl.sum(used.to(tl.int32), 0)
        more = tl.min(used.to(tl.int32), 0)
    return count, risen


@triton.jit
def settle(
    kept, choices, held, t0, low, high, least,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    CHOICES: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Each new query of the block at t0 chooses by the votes ``held``, ROWS queries at a time: adds to ``choices``
    [CHOICES].

    Where leaves fade in, how far each query wants the leaves takes the place of the votes. If ``choices`` is FRESH,
    the places behind the last one get NONE.
    """
    STRIDE: tl.constexpr = WIDTH_PAD + FANOUT
    CHILDREN: tl.constexpr = BEAM * FANOUT
    candidate = tl.arange(0, WIDTH_PAD)
    row = tl.arange(0, ROWS)
    is_edge = (candidate >= CHILDREN) & (candidate < WIDTH)
    edge = covered_leaves(t0, WINDOW, SINK, BLOCK) // FANOUT
    used = spans_kept(kept, BEAM, WIDTH_PAD // FANOUT)
    count, reached = read_choices(choices, candidate, low > t0, QUERY_BLOCK, WIDTH, WIDTH_PAD, CHOICES, PARTS)
    first = candidate * 0 + QUERY_BLOCK
    for r in range(tl.maximum(low - t0, 0) // ROWS * ROWS, tl.minimum(high - t0, QUERY_BLOCK), ROWS):
        some = r + row
        limit = covered_leaves(t0 + some, WINDOW, SINK, BLOCK)
        open_ = is_edge[None] & ((edge * FANOUT + candidate - CHILDREN)[None] < limit[:, None])
        open_ = open_ | (candidate < used * FANOUT)[None]
        new = (t0 + some >= low) & (t0 + some < high)
        at = held + some[:, None] * STRIDE + candidate[None]
        vote = tl.load(at, mask=open_, other=0).to(tl.int32)
        level = tl.where(open_ & new[:, None], vote - least, 0)
        if tl.max(tl.sum((level > 0).to(tl.int32), 1), 0) > ROOM:
            level -= highest_left(level, ROOM, BITS)[:, None]
        if PARTS == WHOLE:
            first = tl.minimum(first, tl.min(tl.where(level > 0, some[:, None], QUERY_BLOCK), 0))
        else:
            level = tl.minimum(tl.maximum(level, 0) * PARTS, WHOLE)
            if tl.max(tl.reshape(level - reached[None], [ROWS * WIDTH_PAD]), 0) > 0:
                tl.debug_barrier()  # every thread has read its votes
                tl.store(at, level)
                tl.debug_barrier()
                before = tl.broadcast_to(reached[None], level.shape)
                for back in tl.static_range(1, ROWS):
                    earlier = tl.load(at - back * STRIDE, mask=(row >= back)[:, None], other=0)
                    before = tl.maximum(before, earlier)
                rise = tl.maximum(level - before, 0)
                is_one = (rise > 0).to(tl.int32)
                of_row = tl.sum(is_one, 1)
                to = (count + tl.cumsum(of_row, 0) - of_row - 1)[:, None] + tl.cumsum(is_one, 1)
                choice = ((some[:, None] * WIDTH + candidate[None]) << SHIFT) + rise
                tl.store(choices + to, choice, mask=(rise > 0) & (to < CHOICES))
                count += tl.sum(of_row, 0)
                reached = tl.maximum(reached, tl.max(level, 0))
    if PARTS == WHOLE:
        is_new = (first < QUERY_BLOCK) & (reached == 0)
        choice = tl.sort(tl.where(is_new, ((first * WIDTH + candidate) << SHIFT) + WHOLE, NONE))
        tl.store(choices + count + candidate, choice, mask=(choice < NONE) & (count + candidate < CHOICES))
        count += tl.sum(is_new.to(tl.int32), 0)
    if FRESH:
        leave_unused(choices, count, candidate, CHOICES, WIDTH_PAD)


@triton.jit
def leave_unused(choices, count, candidate, CHOICES: tl.constexpr, WIDTH_PAD: tl.constexpr):
    """Marks the places of ``choices`` from ``count`` on as unused."""
    for n in range(0, CHOICES, WIDTH_PAD):
        place = n + candidate
        tl.store(choices + place, place * 0 + NONE, mask=(place >= count) & (place < CHOICES))


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks", "leaves", "tiles"])
def choose(
    q, k, nodes, spreads, start, length, spans, choices, shift, scratch, todo,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh, stride_sb, stride_sh,
    slots, tokens, blocks, total_blocks, leaves, tiles, scale, spread, least,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, PER_LEAF: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    CHOICES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, MOST: tl.constexpr,
    PARTS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, FRESH: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Each new query chooses the leaves that weigh enough, ROOM at most: adds to ``choices``.

    ``spreads`` is [B, Hkv, leaves·PER_LEAF, …] and ``choices`` [B·Hkv, total_blocks, CHOICES]; ``shift`` [B, Hq, T]
    gets the highest scores among sinks and window. The votes of a block wait in ``scratch``
    [programs, QUERY_BLOCK, WIDTH_PAD + FANOUT], integers, until all are known. Votes count that are above ``least``.
    ``todo`` becomes an empty list, its length first. If ``choices`` is FRESH, unused places get NONE.
    """
    if tl.program_id(0) == 0:
        tl.store(todo, 0)
    held = scratch + tl.program_id(0).to(tl.int64) * (QUERY_BLOCK * (WIDTH_PAD + FANOUT))
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tile % blocks
        bh = (tile // blocks).to(tl.int64)
        b, h = bh // KV_HEADS, bh % KV_HEADS
        low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
        number = low // QUERY_BLOCK + i
        t0 = number * QUERY_BLOCK
        made = choices + (bh * total_blocks + number) * CHOICES
        if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
            kept = spans + (bh * total_blocks + number) * BEAM
            vote_spans(
                q, k, nodes, spreads, shift, kept, held, b, h, t0, low, high, offset, begin, 0, WIDTH,
                stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh,
                stride_sb, stride_sh, tokens, leaves, scale, spread,
                KV_HEADS, GROUP, HEADS, DIM, DIM_PAD, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK,
                WIDTH, WIDTH_PAD, KEYS, PRECISION, STEPS, MOST,
            )  # fmt: skip
            settle(
                kept, made, held, t0, low, high, least,
                WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, ROOM, WIDTH, WIDTH_PAD, CHOICES, PARTS, BITS, ROWS,
                FRESH,
            )  # fmt: skip
            tl.debug_barrier()  # the next tile's votes take their place
        elif FRESH:
            count = tl.where(number < total_blocks, 0, CHOICES)
            leave_unused(made, count, tl.arange(0, WIDTH_PAD), CHOICES, WIDTH_PAD)


@triton.jit
def chosen_leaf(kept, candidate, t0, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
                FANOUT: tl.constexpr, BEAM: tl.constexpr):  # fmt: skip
    """Numbers of the leaves that are the candidates of the query block at t0."""
    child = candidate < BEAM * FANOUT
    parent = tl.load(kept + candidate // FANOUT, mask=child, other=0)
    edge = covered_leaves(t0, WINDOW, SINK, BLOCK) // FANOUT
    return tl.where(child, parent * FANOUT + candidate % FANOUT, edge * FANOUT + candidate - BEAM * FANOUT)


@triton.jit
def list_block(
    kept, choices, listed, shares, seen_by, t0,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """What ``triton_execute`` calls the list of the query block at t0, and how many of it each of its rows sees.

    Writes ``listed`` [LIST], by position / BLOCK, ``shares`` [LIST], and ``seen_by`` [QUERY_BLOCK]; behind the last,
    as many places as one step may read are block 0, of share 0.
    """
    NEAR: tl.constexpr = triton.next_power_of_2((SINK + WINDOW) // BLOCK + 1)
    MANY: tl.constexpr = triton.next_power_of_2(CHOICES + MOST_KEYS // BLOCK)
    _, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    near = (SINK + whole - last) // BLOCK
    place = tl.arange(0, NEAR)
    block = place + tl.where(place < SINK // BLOCK, 0, (last - SINK) // BLOCK)
    tl.store(listed + place, block, mask=place < near)
    tl.store(shares + place, place * 0.0 + 1.0, mask=place < near)
    number = tl.arange(0, MANY)
    choice = tl.load(choices + number, mask=number < CHOICES, other=NONE)
    used = choice < NONE
    row, candidate, rise = unpack(choice, QUERY_BLOCK, WIDTH)
    leaf = chosen_leaf(kept, candidate, t0, WINDOW, SINK, BLOCK, FANOUT, BEAM)
    tl.store(listed + near + number, tl.where(used, SINK // BLOCK + leaf, 0), mask=near + number < LIST)
    tl.store(shares + near + number, rise.to(tl.float32) / WHOLE, mask=near + number < LIST)
    seen = near + tl.cumsum(tl.histogram(row, QUERY_BLOCK, mask=used), 0)
    tl.store(seen_by + tl.arange(0, QUERY_BLOCK), seen)


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks"])
def list_blocks(
    start, length, spans, choices, ordered, shares, counts,
    slots, tokens, blocks, total_blocks,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr, LIST: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``ordered`` and ``shares`` [B·Hkv, blocks, LIST] and ``counts`` [B·Hkv, blocks, QUERY_BLOCK], as
    ``list_block`` says."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    number = low // QUERY_BLOCK + i
    t0 = number * QUERY_BLOCK
    if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
        at, to = bh * total_blocks + number, bh * blocks + i
        list_block(
            spans + at * BEAM, choices + at * CHOICES, ordered + to * LIST, shares + to * LIST,
            counts + to * QUERY_BLOCK, t0,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH, CHOICES, LIST,
        )  # fmt: skip
