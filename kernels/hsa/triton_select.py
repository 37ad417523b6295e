"""The coarse steps of the selection on a GPU: which spans of level 1 each query block keeps.

    top_scores   first queries of many blocks × the nodes that all of them share    →  scores of the top level
    refine       first queries of many blocks × the nodes of the children of the spans that any of them keeps
                                                                                    →  scores of a lower level
    keep         scores  →  votes  →  the best ``beam`` spans

Scores are products in float32 of the inputs as they are; what a query computes depends neither on its company
nor on how many tokens a call brings. Blocks are counted from the one that the row's first new query is in; programs
begin with number ``first``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.launch import kernel

LOG2E = tl.constexpr(1.4426950408889634)
BEHIND = tl.constexpr(2**31 - 1)
"""Behind every span."""
SHARES = tl.constexpr(2.0**30)
"""Steps of a weight between 0 and 1."""
WHOLE, PADDED, ENDING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Layouts of a call: the queries are those of the last slots, and rows have all slots or lie from ``start`` on for
``length``; or the queries are the last tokens of their rows, behind which slots may be free."""


@triton.jit
def row_range(start, length, slots, tokens, b, LAYOUT: tl.constexpr):
    """(first position of a new query, tokens in the row, indices of position 0 among queries and slots), int32."""
    begin = slots * 0
    high = slots
    if LAYOUT != WHOLE:
        begin = tl.load(start + b).to(tl.int32)
        high = tl.load(length + b).to(tl.int32)
    offset = tokens - high if LAYOUT == ENDING else begin + tokens - slots
    return tl.maximum(-offset, 0), high, offset, begin


@triton.jit
def in_reach(j, t, REACH: tl.constexpr):
    """Whether keys at j lie in the sliding windows of queries at t."""
    return j > t - REACH


@triton.jit
def covered_leaves(t, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr):
    """Leaves between the sinks and the window of the query at t."""
    begin = tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK
    return tl.maximum(begin - SINK, 0) // BLOCK


@triton.jit
def top_level(covered, FANOUT: tl.constexpr, LIMIT: tl.constexpr, LEVELS: tl.constexpr):
    """Level of the first coarse step over so many leaves."""
    level = covered * 0 + 1
    spans = covered
    for _ in tl.static_range(1, LEVELS - 1):
        spans = spans // FANOUT
        level += tl.where(spans > LIMIT, 1, 0)
    return level


@triton.jit
def among_best(keys, COUNT: tl.constexpr):
    """Which keys [N], int32, are among the largest COUNT, ties to the lower index; those below 0 never are.

    The lowest of them is found bit by bit, until just COUNT are as high.
    """
    least = tl.full([], 0, tl.int32)
    many = tl.sum((keys >= 0).to(tl.int32), 0)
    bit = tl.full([], 1 << 30, tl.int32)
    while (many > COUNT) & (bit > 0):
        higher = least + bit
        count = tl.sum((keys >= higher).to(tl.int32), 0)
        least = tl.where(count >= COUNT, higher, least)
        many = tl.where(count >= COUNT, count, many)
        bit = bit >> 1
    chosen = keys >= least
    if many > COUNT:  # rare: the lowest is there several times
        level = keys == least
        room = COUNT - many + tl.sum(level.to(tl.int32), 0)
        chosen = chosen & (~level | (tl.cumsum(level.to(tl.int32), 0) <= room))
    return chosen


@triton.jit
def score_top(
    q, base, scores, bh, b, h, low, high, offset, first, stride_qb, stride_qh, stride_qt, blocks, node_count,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr,
    PER_SPAN: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``top_scores`` for a tile of blocks from number ``first`` on; ``base`` are the nodes of a row and its kv head."""
    row = tl.arange(0, TILE)
    group = row % GROUP_PAD
    i = first + row // GROUP_PAD
    t = (low // QUERY_BLOCK + i) * QUERY_BLOCK
    covered = covered_leaves(t, WINDOW, SINK, BLOCK)
    mine = (i < blocks) & (t >= low) & (t < high) & (t + QUERY_BLOCK > DENSE_END) & (group < GROUP)
    mine &= top_level(covered, FANOUT, BEAM * FANOUT, LEVELS) == LEVEL
    SIZE: tl.constexpr = FANOUT**LEVEL
    end = tl.max(tl.where(mine, covered // SIZE, 0), 0)
    if end > 0:
        dim = tl.arange(0, DIM_PAD)
        at = b * stride_qb + (h * GROUP + group) * stride_qh + (t + offset).to(tl.int64) * stride_qt
        x = tl.load(q + at[:, None] + dim[None], mask=mine[:, None] & (dim[None] < DIM), other=0.0)
        STEP: tl.constexpr = 64 // PER_SPAN if PER_SPAN < 64 else 1
        # Column c is node c // STEP of span c % STEP: the nodes of a span lie in one thread's registers.
        column = tl.arange(0, STEP * PER_SPAN)
        node = column % STEP * PER_SPAN + column // STEP
        span = tl.arange(0, STEP)
        out = scores + ((bh * blocks + i.to(tl.int64)) * GROUP + group) * WIDTH
        for begin in range(0, end, STEP):
            n = begin * PER_SPAN + node
            y = tl.load(
                base + n[None] * DIM + dim[:, None],
                mask=(n[None] < node_count) & (dim[:, None] < DIM), other=0.0,
            )  # fmt: skip
            s = tl.dot(x, y, input_precision=PRECISION)
            best = tl.max(tl.reshape(s, [TILE, PER_SPAN, STEP]), 1)
            s_id = begin + span
            tl.store(out[:, None] + s_id[None], best, mask=mine[:, None] & (s_id[None] < end))


@triton.jit
def score_below(
    q, base, spans, scores, bh, b, h, low, high, offset, first, stride_qb, stride_qh, stride_qt,
    blocks, total_blocks, node_count,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr,
    PER_SPAN: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``refine`` for a tile of blocks from number ``first`` on; ``base`` as in ``score_top``."""
    PER: tl.constexpr = TILE // GROUP_PAD
    i = first + tl.arange(0, PER)
    number = low // QUERY_BLOCK + i
    t = number * QUERY_BLOCK
    covered = covered_leaves(t, WINDOW, SINK, BLOCK)
    mine = (i < blocks) & (t >= low) & (t < high) & (t + QUERY_BLOCK > DENSE_END)
    mine &= top_level(covered, FANOUT, BEAM * FANOUT, LEVELS) > LEVEL
    place = tl.arange(0, triton.next_power_of_2(BEAM + 1))
    at = (bh * total_blocks + number)[:, None] * BEAM + place[None]
    parents = tl.load(spans + at, mask=mine[:, None] & (place < BEAM)[None], other=-1)
    edge = covered // FANOUT ** (LEVEL + 1)
    parents = tl.where((place == BEAM)[None] & mine[:, None], edge.to(tl.int32)[:, None], parents)
    parents = tl.where(parents >= 0, parents, BEHIND)
    parent = tl.min(parents)
    many, other = tl.full([], 0, tl.int32), parent
    while other < BEHIND:
        many += 1
        other = tl.min(tl.where(parents > other, parents, BEHIND))

    row = tl.arange(0, TILE)
    group = row % GROUP_PAD
    row_t = (low // QUERY_BLOCK + first + row // GROUP_PAD) * QUERY_BLOCK
    at = b * stride_qb + (h * GROUP + group) * stride_qh + (row_t + offset).to(tl.int64) * stride_qt
    real = (group < GROUP) & (row_t >= low) & (row_t < high)
    dim = tl.arange(0, DIM_PAD)
    x = tl.load(q + at[:, None] + dim[None], mask=real[:, None] & (dim[None] < DIM), other=0.0)
    column = tl.arange(0, FANOUT * PER_SPAN)
    node = column % FANOUT * PER_SPAN + column // FANOUT
    head = tl.arange(0, GROUP_PAD)
    child = tl.arange(0, FANOUT)
    out = scores + ((bh * blocks + i)[:, None] * GROUP + head[None]) * WIDTH
    for _ in range(0, many):
        n = parent.to(tl.int64) * (FANOUT * PER_SPAN) + node
        y = tl.load(
            base + n[None] * DIM + dim[:, None],
            mask=(n[None] < node_count) & (dim[:, None] < DIM), other=0.0,
        )  # fmt: skip
        s = tl.dot(x, y, input_precision=PRECISION)
        best = tl.max(tl.reshape(s, [TILE, PER_SPAN, FANOUT]), 1)
        to = tl.max(tl.where(parents == parent, place[None], -1), 1)
        to = to[:, None, None] * FANOUT + child[None, None]
        tl.store(
            out[:, :, None] + to,
            tl.reshape(best, [PER, GROUP_PAD, FANOUT]),
            mask=(to >= 0) & (to < WIDTH) & (head < GROUP)[None, :, None],
        )
        parent = tl.min(tl.where(parents > parent, parents, BEHIND))


@triton.jit
def keep_best(
    spans, scores, bh, low, high, i, blocks, total_blocks, scale,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr,
    BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, FRESH: tl.constexpr,
    REACH: tl.constexpr,
):  # fmt: skip
    """``keep`` for block number ``i``."""
    number = low // QUERY_BLOCK + i
    t = number * QUERY_BLOCK
    covered = covered_leaves(t, WINDOW, SINK, BLOCK)
    top = top_level(covered, FANOUT, BEAM * FANOUT, LEVELS)
    kept = spans + (bh * total_blocks + number) * BEAM
    place = tl.arange(0, WIDTH_PAD)
    if (t >= low) & (t < high) & (t + QUERY_BLOCK > DENSE_END) & (top >= LEVEL):
        count = covered // FANOUT**LEVEL
        is_child = place < BEAM * FANOUT
        parent = tl.load(kept + place // FANOUT, mask=is_child, other=-1).to(tl.int32)
        child = tl.where(parent >= 0, parent * FANOUT + place % FANOUT, -1)
        edge = covered // FANOUT ** (LEVEL + 1) * FANOUT + place - BEAM * FANOUT
        edge = tl.where((edge < count) & (place < BEAM * FANOUT + FANOUT - 1), edge, -1)
        below = tl.where(is_child, child, edge.to(tl.int32))
        ids = tl.where(top == LEVEL, tl.where(place < count, place, -1), below)
        if REACH:
            end = SINK + (ids + 1) * BLOCK * FANOUT**LEVEL
            ids = tl.where(in_reach(end - 1, t, REACH), ids, -1)
        votes = tl.zeros([WIDTH_PAD], tl.float32)
        base = scores + (bh * blocks + i) * GROUP * WIDTH
        for g in range(GROUP):
            s = tl.load(base + g * WIDTH + place, mask=(ids >= 0) & (place < WIDTH), other=-float("inf"))
            e = tl.exp2((s - tl.max(s, 0)) * (scale * LOG2E)) * SHARES
            # A sum of integers is the same in any order, and so by any number of warps.
            votes += e / tl.sum(e.to(tl.int64), 0).to(tl.float32)
        keys = tl.where(ids >= 0, votes.to(tl.int32, bitcast=True), -1)
        picked = among_best(keys, BEAM)
        slot = tl.cumsum(picked.to(tl.int32), 0) - 1
        many = tl.sum(picked.to(tl.int32), 0)
        tl.debug_barrier()  # every thread has read the parents
        tl.store(kept + slot, ids, mask=picked)
        tl.store(kept + place, place * 0 - 1, mask=(place >= many) & (place < BEAM))
    elif FRESH:
        tl.store(kept + place, place * 0 - 1, mask=place < tl.where(number < total_blocks, BEAM, 0))


@kernel(do_not_specialize=["slots", "tokens", "blocks", "first", "node_count"])
def top_scores(
    q, nodes, start, length, scores,
    stride_qb, stride_qh, stride_qt, stride_nb, stride_nh,
    slots, tokens, blocks, first, node_count,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, PER_SPAN: tl.constexpr,
    BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Scores [B·Hkv, blocks, G, WIDTH] of spans 0, 1, … of LEVEL for the blocks whose top level it is."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, _ = row_range(start, length, slots, tokens, b, LAYOUT)
    # What lies later sees more, and begins first.
    first += (tl.num_programs(0) - 1 - tl.program_id(0)) * (TILE // GROUP_PAD)
    score_top(
        q, nodes + b * stride_nb + h * stride_nh, scores, bh, b, h, low, high, offset, first,
        stride_qb, stride_qh, stride_qt, blocks, node_count,
        LEVEL, LEVELS, GROUP, GROUP_PAD, DIM, DIM_PAD, WINDOW, SINK, BLOCK, FANOUT, PER_SPAN, BEAM, QUERY_BLOCK,
        DENSE_END, WIDTH, TILE, PRECISION,
    )  # fmt: skip


@kernel(do_not_specialize=["slots", "tokens", "blocks", "first", "total_blocks", "node_count"])
def refine(
    q, nodes, start, length, spans, scores,
    stride_qb, stride_qh, stride_qt, stride_nb, stride_nh,
    slots, tokens, blocks, first, total_blocks, node_count,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, PER_SPAN: tl.constexpr,
    BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Scores of the children of the spans kept at LEVEL + 1, and of the cover's own spans behind them.

    Neighbouring blocks keep much the same spans: what any block of a tile keeps is read once for all of them.
    """
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, _ = row_range(start, length, slots, tokens, b, LAYOUT)
    score_below(
        q, nodes + b * stride_nb + h * stride_nh, spans, scores, bh, b, h, low, high, offset,
        first + tl.program_id(0) * (TILE // GROUP_PAD), stride_qb, stride_qh, stride_qt, blocks, total_blocks, node_count,
        LEVEL, LEVELS, GROUP, GROUP_PAD, DIM, DIM_PAD, WINDOW, SINK, BLOCK, FANOUT, PER_SPAN, BEAM, QUERY_BLOCK,
        DENSE_END, WIDTH, TILE, PRECISION,
    )  # fmt: skip


@kernel(do_not_specialize=["slots", "tokens", "blocks", "first", "total_blocks"])
def keep(
    start, length, spans, scores,
    slots, tokens, blocks, first, total_blocks, scale,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr,
    BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, FRESH: tl.constexpr, LAYOUT: tl.constexpr,
    REACH: tl.constexpr,
):  # fmt: skip
    """Writes the best BEAM spans of LEVEL, ascending, to ``spans`` [B·Hkv, total_blocks, BEAM].

    If ``spans`` is FRESH, what has no spans of LEVEL gets −1.
    """
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    keep_best(
        spans, scores, bh, low, high, first + tl.program_id(0), blocks, total_blocks, scale,
        LEVEL, LEVELS, GROUP, WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, DENSE_END, WIDTH, WIDTH_PAD, FRESH, REACH,
    )  # fmt: skip
