"""Votes of queries for leaves on a GPU: how much each leaf candidate weighs for whom.

    vote          queries of a block × keys of sinks and window, nodes of the leaf candidates   →  votes, shift
    vote_parts    the same for some of the candidates                                           →  votes

Scores are in powers of two. A tile is a query block times up to HEADS heads of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.triton_execute import LISTED, load_keys, near_edges, sink_of
from retrofit.kernels.hsa.triton_select import LOG2E, covered_leaves, in_reach, row_range
from retrofit.kernels.launch import kernel


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
def best_head(x, PLACES: tl.constexpr, HEADS: tl.constexpr, LEAVES: tl.constexpr):
    """The highest of the heads of each query: x [ROWS, LEAVES] → [PLACES, LEAVES]."""
    LOW: tl.constexpr = HEADS // 2 if HEADS > 1 else 1
    HIGH: tl.constexpr = 2 if HEADS > 1 else 1
    x = tl.max(tl.reshape(x, [PLACES * LOW // 8, HIGH, 8, LEAVES]), 1)
    x = tl.max(tl.reshape(x, [PLACES, LOW, LEAVES]), 1)
    return x


@triton.jit
def rounded(x):
    """The integers next to floats x of at most 2²²: added to 3·2²², they stand in its low bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def weigh(top, total, s, factor):
    """One step of a log-sum-exp of the scores s [M, N] times ``factor``, which is positive.

    The product with it is never rounded by itself, so that steps with and without a mask give the same bits.
    """
    new_top = tl.maximum(top, tl.max(s, 1) * factor)
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp2(tl.fma(s, tl.broadcast_to(factor, s.shape), tl.broadcast_to(-safe[:, None], s.shape)))
    return new_top, total * tl.exp2(top - safe) + tl.sum(weights, 1)


@triton.jit
def weigh_near(
    x, keys, stride_kt, t, t0, high, factor,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr,
    BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    REACH: tl.constexpr,
):  # fmt: skip
    """Highest score and log-sum-exp [ROWS] of the queries x [ROWS, DIM_PAD] at t for sinks and window.

    In the order sinks, window, and the part of the window that only the first rows see.
    """
    key = tl.arange(0, KEYS)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    from_ = tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK
    alike = 0 if REACH else (SINK + whole - last) // KEYS * KEYS
    for n in range(0, alike, KEYS):
        j = n + key + tl.where(n + key < SINK, 0, last - SINK)
        y = load_keys(keys, j, stride_kt, None, DIM, DIM_PAD)
        top, total = weigh(top, total, tl.dot(x, y, input_precision=PRECISION), factor)
    end = SINK + t0 + QUERY_BLOCK - last
    for n in range(alike, end + last - first, KEYS):
        j = n + key + tl.where(n + key < SINK, 0, tl.where(n + key < end, last - SINK, first - end))
        inside = (n + key < end + last - first) & (j < high)
        y = load_keys(keys, j, stride_kt, inside, DIM, DIM_PAD)
        s = tl.dot(x, y, input_precision=PRECISION)
        visible = (j[None] <= t[:, None]) & ((j[None] < SINK) | (j[None] >= from_[:, None]))
        if REACH:
            visible &= in_reach(j[None], t[:, None], REACH)
        top, total = weigh(top, total, tl.where(visible & inside[None], s, -float("inf")), factor)
    return top, top + tl.log2(total)


@triton.jit
def span_at(kept, index, used, edge):
    """Number of the span in place ``index``: kept ones, then those of the cover's edge."""
    return tl.where(index < used, tl.load(kept + index, mask=index < used, other=0), edge + index - used)


@triton.jit
def vote_spans(
    q, k, nodes, spreads, sinks, shift, kept, held, b, h, t0, begin_place, low, high, offset, begin, from_pair, to_pair,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh, stride_sb, stride_sh,
    tokens, leaves, scale, spread,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, PER_LEAF: tl.constexpr,
    BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, MOST: tl.constexpr,
    REACH: tl.constexpr,
):  # fmt: skip
    """Votes of PLACES queries of the block at t0 for the leaves of its spans, from one pair of spans to another.

    Writes them to ``held`` [QUERY_BLOCK, WIDTH_PAD + FANOUT], integers, and the highest scores among sinks and window
    to ``shift`` [B, Hq, T]. Spans are those in ``kept`` and then those of the cover's edge. HEADS of the group's
    heads meet the nodes of two spans in one product.
    """
    ROWS: tl.constexpr = HEADS * PLACES
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
    place = begin_place + tl.arange(0, PLACES)
    factor = scale * LOG2E
    base = nodes + b * stride_nb + h * stride_nh
    keys = k + b * stride_kb + h * stride_kh + begin.to(tl.int64) * stride_kt
    edge = covered_leaves(t0, WINDOW, SINK, BLOCK) // FANOUT
    used, first_span = spans_kept(kept, BEAM, WIDTH_PAD // FANOUT), 2 * from_pair
    for h0 in range(0, GROUP, HEADS):
        row_place, row_head = place_and_head(row, HEADS)
        head = h * GROUP + h0 + row_head
        t = t0 + begin_place + row_place
        at = (t + offset).to(tl.int64)
        new = (t >= low) & (t < high) & (head < (h + 1) * GROUP)
        at_q = b * stride_qb + head * stride_qh + at * stride_qt
        x = tl.load(q + at_q[:, None] + dim[None], mask=new[:, None] & (dim[None] < DIM), other=0.0)
        wide = x.to(tl.float32)
        second = tl.sum(wide * wide, 1) * (0.5 * spread * scale)
        left, right = span_at(kept, first_span, used, edge), span_at(kept, first_span + 1, used, edge)
        top, near = weigh_near(
            x, keys, stride_kt, t, t0, high, factor,
            DIM, DIM_PAD, ROWS, WINDOW, SINK, BLOCK, QUERY_BLOCK, KEYS, PRECISION, REACH,
        )  # fmt: skip
        if shift is not None:
            tl.store(shift + (b * KV_HEADS * GROUP + head) * tokens + at, top, mask=new)
        if sinks is not None:
            sink = sink_of(sinks, head, new)
            more = tl.maximum(near, sink)
            near = more + tl.log2(tl.exp2(near - more) + tl.exp2(sink - more))
        near = tl.where(new, near * STEPS, float("inf"))
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
            weight = best_head(best * (factor * STEPS) - near[:, None], PLACES, HEADS, LEAVES)
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


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks", "leaves", "first", "end"])
def vote(
    q, k, nodes, spreads, sinks, start, length, spans, votes, shift, todo,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh, stride_sb, stride_sh,
    slots, tokens, blocks, total_blocks, leaves, first, end, scale, spread,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, PER_LEAF: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, STEPS: tl.constexpr, MOST: tl.constexpr, REACH: tl.constexpr,
    LAYOUT: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Votes of the query blocks number ``first`` … ``end`` of [B·Hkv, blocks]: ``votes``
    [end − first, QUERY_BLOCK, WIDTH_PAD + FANOUT], integers.

    ``spreads`` is [B, Hkv, leaves·PER_LEAF, …]; ``shift`` [B, Hq, T] gets the highest scores among sinks and window.
    ``todo`` becomes an empty list, as ``triton_execute`` says.
    """
    if tl.program_id(0) == 0:
        tl.store(todo + tl.arange(0, LISTED), tl.zeros([LISTED], tl.int32))
    for tile in range(first + tl.program_id(0), end, tl.num_programs(0)):
        bh = (tile // blocks).to(tl.int64)
        b, h = bh // KV_HEADS, bh % KV_HEADS
        low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
        number = low // QUERY_BLOCK + tile % blocks
        t0 = number * QUERY_BLOCK
        if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
            for begin_place in range(0, QUERY_BLOCK, PLACES):
                vote_spans(
                    q, k, nodes, spreads, sinks, shift, spans + (bh * total_blocks + number) * BEAM,
                    votes + (tile - first).to(tl.int64) * (QUERY_BLOCK * (WIDTH_PAD + FANOUT)),
                    b, h, t0, begin_place, low, high, offset, begin, 0, WIDTH,
                    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh,
                    stride_sb, stride_sh, tokens, leaves, scale, spread,
                    KV_HEADS, GROUP, HEADS, DIM, DIM_PAD, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK,
                    PLACES, WIDTH, WIDTH_PAD, KEYS, PRECISION, STEPS, MOST, REACH,
                )  # fmt: skip


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks", "leaves", "pairs"])
def vote_parts(
    q, k, nodes, spreads, sinks, start, length, spans, votes,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh, stride_sb, stride_sh,
    slots, tokens, blocks, total_blocks, leaves, pairs, scale, spread,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, PER_LEAF: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, STEPS: tl.constexpr, MOST: tl.constexpr,
    REACH: tl.constexpr, LAYOUT: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """As ``vote`` for all blocks; each program has PLACES queries of one block, some of them new, vote for ``pairs`` pairs
    of its spans."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
    here = (low // PLACES + tl.program_id(0)) * PLACES
    number = here // QUERY_BLOCK
    t0, i = number * QUERY_BLOCK, number - low // QUERY_BLOCK
    if (t0 + QUERY_BLOCK > DENSE_END) & (here < high):
        from_pair = tl.program_id(2) * pairs
        vote_spans(
            q, k, nodes, spreads, sinks, None, spans + (bh * total_blocks + number) * BEAM,
            votes + (bh * blocks + i) * (QUERY_BLOCK * (WIDTH_PAD + FANOUT)),
            b, h, t0, here - t0, low, high, offset, begin, from_pair, from_pair + pairs,
            stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_nb, stride_nh,
            stride_sb, stride_sh, tokens, leaves, scale, spread,
            KV_HEADS, GROUP, HEADS, DIM, DIM_PAD, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK,
            PLACES, WIDTH, WIDTH_PAD, KEYS, PRECISION, STEPS, MOST, REACH,
        )  # fmt: skip
