"""Votes of queries for leaves on Hopper, where warps have roles.

    bring    spans of a tile                  →  keys of sinks and window, nodes of a step's spans after others'
    ballot   queries of half a tile, those    →  votes, shift

It is ``vote`` of ``triton_vote`` in the way of ``triton_roles``, to the bit: while the scores of a step are made into
votes, those of the next one are computed. A group of warps has half of the query block's places, for all heads of
their group.

The columns of a step are, of each of its one or two spans, (node of a leaf, leaf): where an accumulator has columns
0 1 8 9 16 17 … in one thread's registers, a leaf's nodes are 8 columns apart.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from retrofit.kernels.hsa.triton_roles import (
    HALF,
    LOG2E,
    SLAB,
    barriers,
    begin_scores,
    copy,
    reinterpreted,
    window_begins,
)
from retrofit.kernels.launch import Kernel


@gluon.constexpr_function
def layout_of(x):
    """How a tensor is spread over threads."""
    return x.type.layout


@gluon.jit
def rounded(x):
    """As ``rounded`` of ``triton_vote``."""
    return (x + 12582912.0).to(gl.int32, bitcast=True) - 0x4B400000


@gluon.jit
def near_keys(t0, WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr):
    """(first block of the last row's window, blocks from there on, first block of the first row's, blocks of all with
    the sinks')."""
    first, last = window_begins(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    right = (t0 + QUERY_BLOCK) // BLOCK - last
    return last, right, first, SINK // BLOCK + right + last - first


@gluon.jit
def near_block(e, last, right, first, many, beyond, SINK: gl.constexpr, BLOCK: gl.constexpr):
    """Number of block e of sinks, window and what only the first rows see of it; ``beyond`` all keys for none."""
    SINKS: gl.constexpr = SINK // BLOCK
    window = gl.where(e < SINKS + right, last + e - SINKS, first + e - SINKS - right)
    return gl.where(e < many, gl.where(e < SINKS, e, window), beyond)


@gluon.jit
def spans_kept(kept, BEAM: gl.constexpr, PLACES: gl.constexpr, WARPS: gl.constexpr):
    """How many of the BEAM places hold a span."""
    place = gl.arange(0, PLACES, gl.BlockedLayout([1], [32], [WARPS], [0]))
    return gl.sum((gl.load(kept + place, mask=place < BEAM, other=-1) >= 0).to(gl.int32), 0)


@gluon.jit
def span_at(kept, index, used, edge):
    """Number of the span in place ``index``: kept ones, then those of the cover's edge."""
    return gl.where(index < used, gl.load(kept + index, mask=index < used, other=0), edge + index - used)


@gluon.jit
def first_edge(t0, WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr, FANOUT: gl.constexpr):
    """The first span of the cover's edge of the query block at t0."""
    begin = gl.maximum(t0 + 1 - WINDOW, 0) // BLOCK * BLOCK
    return gl.maximum(begin - SINK, 0) // BLOCK // FANOUT


@gluon.jit
def bring(
    desc_k, desc_n, ring, full, empty, spans, slots, tokens, blocks, total_blocks, first_tile, end,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr,
    FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr, QUERY_BLOCK: gl.constexpr,
    DENSE_END: gl.constexpr, WIDTH: gl.constexpr, WIDTH_PAD: gl.constexpr, KEYS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The role of the warp that brings keys and nodes."""
    BLOCKS: gl.constexpr = KEYS // BLOCK
    SLABS: gl.constexpr = DIM // SLAB
    SPANS: gl.constexpr = KEYS // (FANOUT * PER_LEAF)
    EDGE_SPANS: gl.constexpr = (WIDTH - BEAM * FANOUT + FANOUT - 1) // FANOUT
    beyond = (slots + BLOCK - 1) // BLOCK
    LAYOUT: gl.constexpr = desc_n.layout
    nodes = reinterpreted(ring, [SLOTS * SLABS * SPANS, 1, PER_LEAF, FANOUT, SLAB], LAYOUT)
    n = 0
    for tile in range(first_tile + gl.program_id(0), end, gl.num_programs(0)):
        bh, number = tile // blocks, (slots - tokens) // QUERY_BLOCK + tile % blocks
        t0 = number * QUERY_BLOCK
        if (t0 < slots) & (t0 + QUERY_BLOCK > DENSE_END):
            last, right, first, many = near_keys(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
            for step in range(0, (many + BLOCKS - 1) // BLOCKS):
                slot = n % SLOTS
                mbarrier.wait(empty.index(slot), n // SLOTS & 1 ^ 1)
                mbarrier.expect(full.index(slot), KEYS * DIM * 2)
                for u in gl.static_range(BLOCKS):
                    at = near_block(step * BLOCKS + u, last, right, first, many, beyond, SINK, BLOCK) * BLOCK
                    for d in gl.static_range(SLABS):
                        copy(
                            desc_k, [bh // KV_HEADS, bh % KV_HEADS, at, d * SLAB],
                            full.index(slot), ring.index((slot * SLABS + d) * BLOCKS + u),
                        )  # fmt: skip
                n += 1
            kept = spans + (bh.to(gl.int64) * total_blocks + number) * BEAM
            used = spans_kept(kept, BEAM, WIDTH_PAD // FANOUT, 1)
            edge = first_edge(t0, WINDOW, SINK, BLOCK, FANOUT)
            for index in range(0, used + EDGE_SPANS, SPANS):
                slot = n % SLOTS
                mbarrier.wait(empty.index(slot), n // SLOTS & 1 ^ 1)
                mbarrier.expect(full.index(slot), KEYS * DIM * 2)
                for u in gl.static_range(SPANS):
                    at = span_at(kept, index + u, used, edge) * FANOUT
                    for d in gl.static_range(SLABS):
                        copy(
                            desc_n, [bh, 0, at, d * SLAB],
                            full.index(slot), nodes.index((slot * SLABS + d) * SPANS + u),
                        )  # fmt: skip
                n += 1


@gluon.jit
def query_at(row, begin, low, slots, GROUP: gl.constexpr, LOW: gl.constexpr, HIGH: gl.constexpr):
    """(position, head of the group, whether it is a new query) of rows whose places count from ``begin``, which are as
    ``place_and_head`` of ``triton_vote`` says."""
    t = begin + row // (8 * HIGH) * (8 // LOW) + row // LOW % (8 // LOW)
    above = row // 8 % HIGH * LOW + row % LOW
    return t, above, (t >= low) & (t < slots) & (above < GROUP)


@gluon.jit
def load_queries(
    group, row, dim, begin, low, slots, stride_qh, stride_qt,
    GROUP: gl.constexpr, LOW: gl.constexpr, HIGH: gl.constexpr,
):  # fmt: skip
    """The queries of rows, in the layout of row and dim."""
    t, above, new = query_at(row, begin, low, slots, GROUP, LOW, HIGH)
    at = above.to(gl.int64) * stride_qh + (t - low).to(gl.int64) * stride_qt
    return gl.load(group + at[:, None] + dim[None], mask=new[:, None], other=0.0)


@gluon.jit
def weigh(top, total, s, factor):
    """As ``weigh`` of ``triton_vote``."""
    new_top = gl.maximum(top, gl.max(s, 1) * factor)
    safe = gl.where(new_top == -float("inf"), 0.0, new_top)
    return new_top, total * gl.exp2(top - safe) + gl.sum(gl.exp2(s * factor - safe[:, None]), 1)


@gluon.jit
def take(s, empty, n, SLOTS: gl.constexpr):
    """The scores of place n of the ring, whose slot is free then."""
    s = hopper.warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(n % SLOTS))
    return s


@gluon.jit
def spreads_of(
    spreads, kept, index, used, edge, column, leaves, FANOUT: gl.constexpr, PER_LEAF: gl.constexpr
):
    """Spreads of the nodes in the columns of a step, from [PER_LEAF, leaves]."""
    MANY: gl.constexpr = FANOUT * PER_LEAF
    span = span_at(kept, index, used, edge)
    if column.shape[0] > MANY:
        span = gl.where(column < MANY, span, span_at(kept, index + 1, used, edge))
    leaf = span * FANOUT + column % FANOUT
    return gl.load(spreads + column % MANY // FANOUT * leaves + gl.minimum(leaf, leaves - 1))


@gluon.jit
def cast(
    s, apart, second, near, held, index, used, factor,
    FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr, PLACES: gl.constexpr, LOW: gl.constexpr,
    HIGH: gl.constexpr, WIDTH_PAD: gl.constexpr, STEPS: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """Writes the votes for the leaves of the spans from ``index`` on, by scores s [HALF, …]."""
    SPANS: gl.constexpr = s.shape[1] // (FANOUT * PER_LEAF)
    LEAVES: gl.constexpr = SPANS * FANOUT
    s = s + second[:, None] * apart[None]
    best = gl.max(gl.reshape(s, [HALF, SPANS, PER_LEAF, FANOUT]), 2)
    best = gl.reshape(best, [HALF, LEAVES])
    near = gl.convert_layout(near, gl.SliceLayout(1, layout_of(best)))
    weight = best * (factor * STEPS) - near[:, None]
    weight = gl.max(gl.reshape(weight, [PLACES * LOW // 8, HIGH, 8, LEAVES]), 1)
    weight = gl.max(gl.reshape(weight, [PLACES, LOW, LEAVES]), 1)
    weight = gl.minimum(gl.maximum(weight, -MOST), MOST)
    vote = rounded(weight)
    place = gl.arange(0, PLACES, gl.SliceLayout(1, layout_of(vote)))
    leaf = gl.arange(0, LEAVES, gl.SliceLayout(0, layout_of(vote)))
    at = gl.where(index + leaf // FANOUT >= used, BEAM - used, 0) * FANOUT + index * FANOUT + leaf
    gl.store(
        held + place[:, None] * (WIDTH_PAD + FANOUT) + at[None],
        vote.to(held.dtype.element_ty),
        mask=(at < WIDTH_PAD)[None],
    )


@gluon.jit
def turn(
    x, own, free, apart, second, near, held, spreads, kept, index, used, edge, column, leaves, factor, ring, full, empty, n,
    DIM: gl.constexpr, FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr, PLACES: gl.constexpr,
    LOW: gl.constexpr, HIGH: gl.constexpr, WIDTH_PAD: gl.constexpr, KEYS: gl.constexpr, STEPS: gl.constexpr,
    MOST: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Makes the scores ``own`` of the step in place n into votes, while those of the next one are computed into the
    registers ``free``; returns these and the spreads that belong to them."""
    SPANS: gl.constexpr = KEYS // (FANOUT * PER_LEAF)
    ahead = begin_scores(x, free, ring, full, n + 1, DIM, KEYS, SLOTS)
    following = spreads_of(spreads, kept, index + SPANS, used, edge, column, leaves, FANOUT, PER_LEAF)
    cast(
        own, apart, second, near, held, index, used, factor,
        FANOUT, PER_LEAF, BEAM, PLACES, LOW, HIGH, WIDTH_PAD, STEPS, MOST,
    )  # fmt: skip
    return take(ahead, empty, n + 1, SLOTS), following


@gluon.jit
def ballot(
    SHARE: gl.constexpr, q, spreads, sinks, spans, votes, shift, ring, full, empty,
    stride_qb, stride_qh, stride_qt, slots, tokens, blocks, total_blocks, leaves, first_tile, end, scale, spread,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr, WIDTH: gl.constexpr, WIDTH_PAD: gl.constexpr,
    KEYS: gl.constexpr, STEPS: gl.constexpr, MOST: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The role of a group of warps that votes, for the SHARE-th half of a query block's places."""
    BLOCKS: gl.constexpr = KEYS // BLOCK
    SPANS: gl.constexpr = KEYS // (FANOUT * PER_LEAF)
    PLACES: gl.constexpr = QUERY_BLOCK // 2
    LOW: gl.constexpr = HEADS // 2 if HEADS > 1 else 1
    HIGH: gl.constexpr = 2 if HEADS > 1 else 1
    EDGE_SPANS: gl.constexpr = (WIDTH - BEAM * FANOUT + FANOUT - 1) // FANOUT
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row = gl.arange(0, HALF, ROWS)
    row_x = gl.arange(0, HALF, gl.SliceLayout(1, OPERAND))
    dim_x = gl.arange(0, DIM, gl.SliceLayout(0, OPERAND))
    row_w = gl.arange(0, HALF, gl.SliceLayout(1, WIDE))
    dim_w = gl.arange(0, DIM, gl.SliceLayout(0, WIDE))
    column = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    low = slots - tokens
    beyond = (slots + BLOCK - 1) // BLOCK
    factor = scale * LOG2E
    n = 0
    for tile in range(first_tile + gl.program_id(0), end, gl.num_programs(0)):
        bh, number = tile // blocks, (slots - tokens) // QUERY_BLOCK + tile % blocks
        t0 = number * QUERY_BLOCK
        if (t0 < slots) & (t0 + QUERY_BLOCK > DENSE_END):
            b, h = (bh // KV_HEADS).to(gl.int64), (bh % KV_HEADS).to(gl.int64)
            begin = t0 + SHARE * PLACES
            t, above, new = query_at(row, begin, low, slots, GROUP, LOW, HIGH)
            head = h * GROUP + above
            group = q + b * stride_qb + h * GROUP * stride_qh
            x = load_queries(group, row_x, dim_x, begin, low, slots, stride_qh, stride_qt, GROUP, LOW, HIGH)
            wide = load_queries(
                group, row_w, dim_w, begin, low, slots, stride_qh, stride_qt, GROUP, LOW, HIGH
            )
            wide = wide.to(gl.float32)
            second = gl.convert_layout(gl.sum(wide * wide, 1), ROWS) * (0.5 * spread * scale)
            kept = spans + (bh.to(gl.int64) * total_blocks + number) * BEAM
            used = spans_kept(kept, BEAM, WIDTH_PAD // FANOUT, 4)
            edge = first_edge(t0, WINDOW, SINK, BLOCK, FANOUT)
            from_ = gl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK

            top = gl.full([HALF], -float("inf"), gl.float32, ROWS)
            total = gl.zeros([HALF], gl.float32, ROWS)
            even = gl.zeros([HALF, KEYS], gl.float32, SCORES)
            last, right, first, many = near_keys(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
            for step in range(0, (many + BLOCKS - 1) // BLOCKS):
                even = take(begin_scores(x, even, ring, full, n, DIM, KEYS, SLOTS), empty, n, SLOTS)
                e = step * BLOCKS + column // BLOCK
                j = near_block(e, last, right, first, many, beyond, SINK, BLOCK) * BLOCK + column % BLOCK
                visible = (j[None] <= t[:, None]) & ((j < SINK)[None] | (j[None] >= from_[:, None]))
                top, total = weigh(top, total, gl.where(visible, even, -float("inf")), factor)
                n += 1
            near = top + gl.log2(total)
            gl.store(shift + (b * KV_HEADS * GROUP + head) * tokens + t - low, top, mask=new)
            if sinks is not None:
                sink = gl.load(sinks + head, mask=new, other=0.0).to(gl.float32) * LOG2E
                more = gl.maximum(near, sink)
                near = more + gl.log2(gl.exp2(near - more) + gl.exp2(sink - more))
            near = gl.where(new, near * STEPS, float("inf"))

            held = votes + ((tile - first_tile).to(gl.int64) * QUERY_BLOCK + SHARE * PLACES) * (
                WIDTH_PAD + FANOUT
            )
            spread_rows = spreads + bh.to(gl.int64) * PER_LEAF * leaves
            even = begin_scores(x, even, ring, full, n, DIM, KEYS, SLOTS)
            apart = spreads_of(spread_rows, kept, 0, used, edge, column, leaves, FANOUT, PER_LEAF)
            even = take(even, empty, n, SLOTS)
            odd, following = even, apart
            index = 0
            others = (used + EDGE_SPANS + SPANS - 1) // SPANS - 1
            for _ in range(0, others // 2):
                odd, following = turn(
                    x, even, odd, apart, second, near, held, spread_rows, kept, index, used, edge,
                    column, leaves, factor, ring, full, empty, n,
                    DIM, FANOUT, PER_LEAF, BEAM, PLACES, LOW, HIGH, WIDTH_PAD, KEYS, STEPS, MOST, SLOTS,
                )  # fmt: skip
                even, apart = turn(
                    x, odd, even, following, second, near, held, spread_rows, kept, index + SPANS, used, edge,
                    column, leaves, factor, ring, full, empty, n + 1,
                    DIM, FANOUT, PER_LEAF, BEAM, PLACES, LOW, HIGH, WIDTH_PAD, KEYS, STEPS, MOST, SLOTS,
                )  # fmt: skip
                n += 2
                index += 2 * SPANS
            if others % 2 > 0:
                even, apart = turn(
                    x, even, odd, apart, second, near, held, spread_rows, kept, index, used, edge,
                    column, leaves, factor, ring, full, empty, n,
                    DIM, FANOUT, PER_LEAF, BEAM, PLACES, LOW, HIGH, WIDTH_PAD, KEYS, STEPS, MOST, SLOTS,
                )  # fmt: skip
                n += 1
                index += SPANS
            cast(
                even, apart, second, near, held, index, used, factor,
                FANOUT, PER_LEAF, BEAM, PLACES, LOW, HIGH, WIDTH_PAD, STEPS, MOST,
            )  # fmt: skip
            n += 1


@Kernel
@gluon.jit(do_not_specialize=["slots", "tokens", "blocks", "total_blocks", "leaves", "first", "end"])
def vote_by_roles(
    desc_k, desc_n, q, spreads, sinks, spans, votes, shift, todo, stride_qb, stride_qh, stride_qt,
    slots, tokens, blocks, total_blocks, leaves, first, end, scale, spread,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr, WIDTH: gl.constexpr, WIDTH_PAD: gl.constexpr,
    KEYS: gl.constexpr, STEPS: gl.constexpr, MOST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Votes of the query blocks number ``first`` … ``end`` of [B·Hkv, blocks], as those of ``vote``.

    Rows have all slots, and the queries are the last tokens. ``spreads`` is [B·Hkv, PER_LEAF, leaves]; the descriptors'
    blocks are [1, 1, BLOCK, SLAB] of k, and [1, PER_LEAF, FANOUT, SLAB] of the nodes as [B·Hkv, PER_LEAF, leaves, DIM].
    """
    SLABS: gl.constexpr = DIM // SLAB
    SLOTS: gl.constexpr = STAGES
    ring = gl.allocate_shared_memory(
        q.dtype.element_ty, [SLOTS * SLABS * (KEYS // BLOCK), 1, 1, BLOCK, SLAB], desc_k.layout
    )
    full, empty = barriers(SLOTS)
    if gl.program_id(0) == 0:
        gl.store(todo, 0)
    gl.warp_specialize(
        [
            (ballot, (
                gl.constexpr(0), q, spreads, sinks, spans, votes, shift, ring, full, empty, stride_qb, stride_qh, stride_qt,
                slots, tokens, blocks, total_blocks, leaves, first, end, scale, spread,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK, DENSE_END,
                WIDTH, WIDTH_PAD, KEYS, STEPS, MOST, SLOTS,
            )),
            (ballot, (
                gl.constexpr(1), q, spreads, sinks, spans, votes, shift, ring, full, empty, stride_qb, stride_qh, stride_qt,
                slots, tokens, blocks, total_blocks, leaves, first, end, scale, spread,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK, DENSE_END,
                WIDTH, WIDTH_PAD, KEYS, STEPS, MOST, SLOTS,
            )),
            (bring, (
                desc_k, desc_n, ring, full, empty, spans, slots, tokens, blocks, total_blocks, first, end,
                KV_HEADS, DIM, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK, DENSE_END,
                WIDTH, WIDTH_PAD, KEYS, SLOTS,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
