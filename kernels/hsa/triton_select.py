"""Selection on a GPU: the coarse spans of every query block, then who chooses which leaf first.

    top_scores   first queries of many blocks × the nodes that all of them share    →  scores of the top level
    refine       first query of a block × the nodes of its kept spans' children     →  scores of a lower level
    keep         scores  →  votes  →  the best ``beam`` spans
    choose       all queries of a block × the nodes of its leaf candidates          →  first
    list_leaves  first                                                              →  list, counts

Scores are products in float32 of the inputs as they are; what a query computes depends neither on its company
nor on how many tokens a call brings. Blocks are counted from the one that the row's first new query is in.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_range(start, length, slots, tokens, b):
    """(first position of a new query, tokens in the row, index among the queries of position 0)."""
    offset = tl.load(start + b) - (slots - tokens)
    return tl.maximum(-offset, 0), tl.load(length + b), offset


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
def among_best(keys, COUNT: tl.constexpr, COUNT_PAD: tl.constexpr):
    """Which keys [ROWS, WIDTH] ≥ −1 are among the largest COUNT of their row, ties to the lower index.

    Keys of −1 never are. COUNT_PAD is a power of two, at least COUNT, at most WIDTH.
    """
    largest = tl.topk(keys, COUNT_PAD)
    rank = tl.arange(0, COUNT_PAD)
    least = tl.max(tl.where(rank[None] == COUNT - 1, largest, -1), 1)[:, None]
    above = keys > least
    level = (keys == least) & (keys >= 0)
    room = COUNT - tl.sum(above.to(tl.int32), 1)
    if tl.max(tl.sum(level.to(tl.int32), 1) - room, 0) > 0:  # rare
        level = level & (tl.cumsum(level.to(tl.int32), 1) <= room[:, None])
    return above | level


@triton.jit
def top_scores(
    q, nodes, start, length, scores,
    stride_qb, stride_qh, stride_qt, stride_nb, stride_nh,
    slots, tokens, blocks, node_count,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, PER_SPAN: tl.constexpr,
    BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [B·Hkv, blocks, G, WIDTH] of spans 0, 1, … of LEVEL for the blocks whose top level it is."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset = row_range(start, length, slots, tokens, b)
    PER: tl.constexpr = TILE // GROUP_PAD
    row = tl.arange(0, TILE)
    group = row % GROUP_PAD
    i = tl.program_id(0) * PER + row // GROUP_PAD
    t = (low // QUERY_BLOCK + i) * QUERY_BLOCK
    covered = covered_leaves(t, WINDOW, SINK, BLOCK)
    mine = (i < blocks) & (t >= low) & (t < high) & (t + QUERY_BLOCK > DENSE_END) & (group < GROUP)
    mine &= top_level(covered, FANOUT, BEAM * FANOUT, LEVELS) == LEVEL
    SIZE: tl.constexpr = FANOUT**LEVEL
    end = tl.max(tl.where(mine, covered // SIZE, 0), 0)
    if end > 0:
        dim = tl.arange(0, DIM_PAD)
        at = b * stride_qb + (h * GROUP + group) * stride_qh + (t + offset) * stride_qt
        x = tl.load(q + at[:, None] + dim[None], mask=mine[:, None] & (dim[None] < DIM), other=0.0)
        STEP: tl.constexpr = 64 // PER_SPAN if PER_SPAN < 64 else 1
        # Column c is node c // STEP of span c % STEP: the nodes of a span lie in one thread's registers.
        column = tl.arange(0, STEP * PER_SPAN)
        node = column % STEP * PER_SPAN + column // STEP
        span = tl.arange(0, STEP)
        base = nodes + b * stride_nb + h * stride_nh
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
def refine(
    q, nodes, start, length, spans, scores,
    stride_qb, stride_qh, stride_qt, stride_nb, stride_nh,
    slots, tokens, blocks, total_blocks, node_count,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr,
    BLOCK: tl.constexpr, FANOUT: tl.constexpr, PER_SPAN: tl.constexpr, BEAM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the children of the spans kept at LEVEL + 1, and of the cover's own spans behind them."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset = row_range(start, length, slots, tokens, b)
    number = low // QUERY_BLOCK + i
    t = number * QUERY_BLOCK
    covered = covered_leaves(t, WINDOW, SINK, BLOCK)
    sparse = (t >= low) & (t < high) & (t + QUERY_BLOCK > DENSE_END)
    if sparse & (top_level(covered, FANOUT, BEAM * FANOUT, LEVELS) > LEVEL):
        group = tl.arange(0, TILE)
        dim = tl.arange(0, DIM_PAD)
        at = b * stride_qb + (h * GROUP + group) * stride_qh + (t + offset) * stride_qt
        x = tl.load(q + at[:, None] + dim[None], mask=(group[:, None] < GROUP) & (dim[None] < DIM), other=0.0)
        column = tl.arange(0, FANOUT * PER_SPAN)
        node = column % FANOUT * PER_SPAN + column // FANOUT
        child = tl.arange(0, FANOUT)
        base = nodes + b * stride_nb + h * stride_nh
        kept = spans + (bh * total_blocks + number) * BEAM
        out = scores + ((bh * blocks + i) * GROUP + group) * WIDTH
        edge = covered // FANOUT ** (LEVEL + 1)
        for j in range(0, BEAM + 1):
            parent = tl.load(kept + j, mask=j < BEAM, other=0).to(tl.int32)
            parent = tl.where(j < BEAM, parent, edge.to(tl.int32))
            if parent >= 0:
                n = parent.to(tl.int64) * (FANOUT * PER_SPAN) + node
                y = tl.load(
                    base + n[None] * DIM + dim[:, None],
                    mask=(n[None] < node_count) & (dim[:, None] < DIM), other=0.0,
                )  # fmt: skip
                s = tl.dot(x, y, input_precision=PRECISION)
                best = tl.max(tl.reshape(s, [TILE, PER_SPAN, FANOUT]), 1)
                place = j * FANOUT + child
                tl.store(
                    out[:, None] + place[None], best, mask=(group[:, None] < GROUP) & (place[None] < WIDTH)
                )


@triton.jit
def keep(
    start, length, spans, scores,
    slots, tokens, blocks, total_blocks, scale,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr,
    BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, BEAM_PAD: tl.constexpr,
):  # fmt: skip
    """Writes the best BEAM spans of LEVEL, ascending, to ``spans`` [B·Hkv, total_blocks, BEAM]."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _ = row_range(start, length, slots, tokens, bh // KV_HEADS)
    number = low // QUERY_BLOCK + i
    t = number * QUERY_BLOCK
    covered = covered_leaves(t, WINDOW, SINK, BLOCK)
    top = top_level(covered, FANOUT, BEAM * FANOUT, LEVELS)
    if (t >= low) & (t < high) & (t + QUERY_BLOCK > DENSE_END) & (top >= LEVEL):
        kept = spans + (bh * total_blocks + number) * BEAM
        place = tl.arange(0, WIDTH_PAD)
        count = covered // FANOUT**LEVEL
        is_child = place < BEAM * FANOUT
        parent = tl.load(kept + place // FANOUT, mask=is_child, other=-1).to(tl.int32)
        child = tl.where(parent >= 0, parent * FANOUT + place % FANOUT, -1)
        edge = covered // FANOUT ** (LEVEL + 1) * FANOUT + place - BEAM * FANOUT
        edge = tl.where((edge < count) & (place < BEAM * FANOUT + FANOUT - 1), edge, -1)
        below = tl.where(is_child, child, edge.to(tl.int32))
        ids = tl.where(top == LEVEL, tl.where(place < count, place, -1), below)
        votes = tl.zeros([WIDTH_PAD], tl.float32)
        base = scores + (bh * blocks + i) * GROUP * WIDTH
        for g in range(GROUP):
            s = tl.load(base + g * WIDTH + place, mask=(ids >= 0) & (place < WIDTH), other=-float("inf"))
            e = tl.exp2((s - tl.max(s, 0)) * (scale * LOG2E))
            votes += e / tl.sum(e, 0)
        keys = tl.where(ids >= 0, votes.to(tl.int32, bitcast=True), -1)
        keys2 = tl.reshape(keys, [1, WIDTH_PAD])
        chosen = among_best(keys2, BEAM, BEAM_PAD)
        slot = tl.reshape(tl.cumsum(chosen.to(tl.int32), 1), [WIDTH_PAD]) - 1
        picked = tl.reshape(chosen, [WIDTH_PAD])
        total = tl.sum(tl.reshape(chosen.to(tl.int32), [WIDTH_PAD]), 0)
        tl.debug_barrier()  # every thread has read the parents
        tl.store(kept + slot, ids, mask=picked)
        tl.store(kept + place, place * 0 - 1, mask=(place >= total) & (place < BEAM))


@triton.jit
def choose(
    q, nodes, start, length, spans, first, scratch,
    stride_qb, stride_qh, stride_qt, stride_nb, stride_nh,
    slots, tokens, blocks, total_blocks, node_count, tiles, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, PER_LEAF: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr, CHOICES: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    SPANS: tl.constexpr, CHOICES_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each new query chooses CHOICES leaves: lowers ``first`` [B·Hkv, total_blocks, WIDTH].

    HEADS of the group's heads meet the nodes of SPANS spans in one product; the scores of a block wait in
    ``scratch`` [programs, G, QUERY_BLOCK, WIDTH_PAD + FANOUT] until all are known.
    """
    ROWS: tl.constexpr = HEADS * QUERY_BLOCK
    STRIDE: tl.constexpr = WIDTH_PAD + FANOUT
    CHILDREN: tl.constexpr = BEAM * FANOUT
    LEAVES: tl.constexpr = SPANS * FANOUT
    EDGE_SPANS: tl.constexpr = (WIDTH - CHILDREN + FANOUT - 1) // FANOUT
    held = scratch + tl.program_id(0).to(tl.int64) * (GROUP * QUERY_BLOCK * STRIDE)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PAD)
    # Column c is node c // LEAVES of leaf c % LEAVES: the nodes of a leaf lie in one thread's registers.
    column = tl.arange(0, LEAVES * PER_LEAF)
    leaf = tl.arange(0, LEAVES)
    place = tl.arange(0, QUERY_BLOCK)
    candidate = tl.arange(0, WIDTH_PAD)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i = tile % blocks
        bh = (tile // blocks).to(tl.int64)
        b, h = bh // KV_HEADS, bh % KV_HEADS
        low, high, offset = row_range(start, length, slots, tokens, b)
        number = low // QUERY_BLOCK + i
        t0 = number * QUERY_BLOCK
        if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
            base = nodes + b * stride_nb + h * stride_nh
            kept = spans + (bh * total_blocks + number) * BEAM
            edge = (covered_leaves(t0, WINDOW, SINK, BLOCK) // FANOUT).to(tl.int32)
            slot = tl.arange(0, WIDTH_PAD // FANOUT)
            used = tl.sum((tl.load(kept + slot, mask=slot < BEAM, other=-1) >= 0).to(tl.int32), 0)
            for h0 in range(0, GROUP, HEADS):
                g = h0 + row // QUERY_BLOCK
                t = t0 + row % QUERY_BLOCK
                at = b * stride_qb + (h * GROUP + g) * stride_qh + (t + offset) * stride_qt
                new = (t >= low) & (t < high) & (g < GROUP)
                x = tl.load(q + at[:, None] + dim[None], mask=new[:, None] & (dim[None] < DIM), other=0.0)
                out = held + (g * QUERY_BLOCK + row % QUERY_BLOCK) * STRIDE
                covered = covered_leaves(t, WINDOW, SINK, BLOCK).to(tl.int32)
                top = tl.full([ROWS], -1e30, tl.float32)
                total = tl.zeros([ROWS], tl.float32)
                for j in range(0, used + EDGE_SPANS, SPANS):
                    index = j + column % LEAVES // FANOUT
                    parent = tl.load(kept + index, mask=index < used, other=0)
                    parent = tl.where(index < used, parent, edge + index - used).to(tl.int64)
                    n = (parent * FANOUT + column % FANOUT) * PER_LEAF + column // LEAVES
                    y = tl.load(
                        base + n[None] * DIM + dim[:, None],
                        mask=(n[None] < node_count) & (dim[:, None] < DIM), other=0.0,
                    )  # fmt: skip
                    s = tl.dot(x, y, input_precision=PRECISION)
                    best = tl.max(tl.reshape(s, [ROWS, PER_LEAF, LEAVES]), 1) * (scale * LOG2E)
                    at_span = j + leaf // FANOUT
                    late = at_span >= used
                    behind = (edge + at_span - used) * FANOUT + leaf % FANOUT
                    best = tl.where(late[None] & (behind[None] >= covered[:, None]), -float("inf"), best)
                    new_top = tl.maximum(top, tl.max(best, 1))
                    total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(best - new_top[:, None]), 1)
                    top = new_top
                    at_leaf = tl.where(late, BEAM - used, 0) * FANOUT + j * FANOUT + leaf
                    stored = (g < GROUP)[:, None] & (at_leaf < WIDTH_PAD)[None]
                    tl.store(out[:, None] + at_leaf[None], best, mask=stored)
                tl.store(out + WIDTH_PAD, top + tl.log2(tl.maximum(total, 1e-30)), mask=g < GROUP)
            tl.debug_barrier()

            t = t0 + place
            new = (t >= low) & (t < high)
            behind = edge * FANOUT + candidate - CHILDREN
            open_ = behind[None] < covered_leaves(t, WINDOW, SINK, BLOCK)[:, None]
            open_ = open_ & ((candidate >= CHILDREN) & (candidate < WIDTH))[None]
            open_ = open_ | (candidate < used * FANOUT)[None]
            votes = tl.zeros([QUERY_BLOCK, WIDTH_PAD], tl.float32)
            for g in range(GROUP):
                at_row = held + (g * QUERY_BLOCK + place) * STRIDE
                lse = tl.load(at_row + WIDTH_PAD)[:, None]
                s = tl.load(at_row[:, None] + candidate[None], mask=open_, other=-float("inf"))
                votes += tl.exp2(s - lse)
            keys = tl.where(open_, votes.to(tl.int32, bitcast=True), -1)
            chosen = among_best(keys, CHOICES, CHOICES_PAD) & new[:, None]
            when = tl.min(tl.where(chosen, place[:, None], QUERY_BLOCK), 0)
            held_first = first + (bh * total_blocks + number) * WIDTH + candidate
            before = tl.load(held_first, mask=candidate < WIDTH, other=0).to(tl.int32)
            tl.store(held_first, tl.minimum(before, when).to(tl.uint8), mask=candidate < WIDTH)
            tl.debug_barrier()


@triton.jit
def list_leaves(
    start, length, spans, first, ordered, counts,
    slots, tokens, blocks, total_blocks,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """The chosen leaves of each block by (first row, leaf), and how many of them each row sees.

    Writes ``ordered`` [B·Hkv, blocks, WIDTH] and ``counts`` [B·Hkv, blocks, QUERY_BLOCK].
    """
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _ = row_range(start, length, slots, tokens, bh // KV_HEADS)
    number = low // QUERY_BLOCK + i
    t0 = number * QUERY_BLOCK
    if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
        candidate = tl.arange(0, WIDTH_PAD)
        place = tl.arange(0, QUERY_BLOCK)
        at = bh * total_blocks + number
        when = tl.load(first + at * WIDTH + candidate, mask=candidate < WIDTH, other=QUERY_BLOCK).to(tl.int32)
        seen = tl.sum((when[None] <= place[:, None]).to(tl.int32), 1)
        tl.store(counts + (bh * blocks + i) * QUERY_BLOCK + place, seen)
        order = tl.sort(when * WIDTH_PAD + candidate)
        which = order % WIDTH_PAD
        child = which < BEAM * FANOUT
        parent = tl.load(spans + at * BEAM + which // FANOUT, mask=child, other=0).to(tl.int32)
        edge = (covered_leaves(t0, WINDOW, SINK, BLOCK) // FANOUT).to(tl.int32)
        leaf = tl.where(child, parent * FANOUT + which % FANOUT, edge * FANOUT + which - BEAM * FANOUT)
        known = (order // WIDTH_PAD < QUERY_BLOCK) & (candidate < WIDTH)
        tl.store(ordered + (bh * blocks + i) * WIDTH + candidate, leaf, mask=known)
