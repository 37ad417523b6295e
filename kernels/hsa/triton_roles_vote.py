"""Votes of queries for leaves on Hopper, where warps have roles.

    supply   spans of a tile           →  its queries; keys of sinks and window, nodes of some spans after others' and their spreads
    ballot   half of its rows, those   →  votes, shift

It is ``vote`` of ``triton_vote`` in the way of ``triton_roles``, to the bit. A group of warps has half of the query
block's places, for all heads of their group. A multiprocessor has two programs: while some of its four groups weigh the
keys near a tile or make scores into votes, the products of the others are computed.

The columns of a step are, of each of its spans, (node of a leaf, leaf): where an accumulator has columns 0 1 8 9 16 17 …
in one thread's registers, a leaf's nodes are 8 columns apart.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from retrofit.kernels.hsa.triton_execute import LISTED
from retrofit.kernels.hsa.triton_roles import window_begins
from retrofit.kernels.launch import Kernel
from retrofit.kernels.roles import (
    HALF,
    LOG2E,
    SLAB,
    await_slot,
    begin_scores,
    begin_slot,
    copy,
    layout_of,
    matrices,
    number_beside,
    reinterpreted,
    release,
    ring_of,
    tell,
    told,
)


@gluon.constexpr_function
def by_leaf(SPANS, FANOUT, PER_LEAF):
    """How [span, leaf, node] is spread over threads so that each has the columns of its scores: even leaves and the next
    ones with all their nodes, which lie together in memory."""
    nodes = [[0, 0, 1 << i] for i in range(PER_LEAF.bit_length() - 1)]
    leaves = [[0, 1 << i, 0] for i in range(FANOUT.bit_length() - 1)]
    spans = [[1 << i, 0, 0] for i in range(SPANS.bit_length() - 1)]
    held = [*nodes, leaves[0], *leaves[3:], *spans]
    alike = [0, 0, 0]
    return gl.DistributedLinearLayout(
        held, [*leaves[1:3], alike, alike, alike], [alike, alike], [], [SPANS, FANOUT, PER_LEAF]
    )


@gluon.constexpr_function
def by_head(HEADS, DIM):
    """How [head and place, dim] of half a tile is spread over threads so that ``in_order`` makes an operand of it.

    Of the rows of an operand a thread has two 8 apart, neighbouring threads have neighbours, and warps 16 each.
    """
    places = 64 // HEADS
    rows = [places << i for i in range(HEADS.bit_length() - 1)] + [
        1 << i for i in range(places.bit_length() - 1)
    ]
    if HEADS > 1:  # the highest bit of the head is that of 8 rows
        rows.insert(3, rows.pop(HEADS.bit_length() - 2))
    row = [[step, 0] for step in rows]
    dim = [[0, 1 << i] for i in range(DIM.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [dim[0], row[3], *dim[3:]], [*dim[1:3], *row[:3]], row[4:], [], [64, DIM]
    )


@gluon.jit
def in_order(x, LOW: gl.constexpr, HIGH: gl.constexpr, DIM: gl.constexpr):
    """Rows of half a tile by head and place, [HALF, DIM] → in the order of ``query_at``."""
    parts = gl.reshape(x, [HIGH, LOW, HALF // (8 * HIGH), 8 // LOW, DIM])
    return gl.reshape(gl.permute(parts, (2, 0, 3, 1, 4)), [HALF, DIM])


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


@gluon.constexpr_function
def near_slots(WINDOW, SINK, BLOCK, QUERY_BLOCK, KEYS):
    """How many steps of so many keys they take, at most."""
    blocks = SINK // BLOCK + (WINDOW + QUERY_BLOCK + BLOCK - 2) // BLOCK
    return -(-blocks * BLOCK // KEYS)


@gluon.jit
def near_block(e, last, right, first, many, beyond, SINK: gl.constexpr, BLOCK: gl.constexpr):
    """Number of block e of sinks, window and what only the first rows see of it; ``beyond`` all keys for none."""
    SINKS: gl.constexpr = SINK // BLOCK
    window = gl.where(e < SINKS + right, last + e - SINKS, first + e - SINKS - right)
    return gl.where(e < many, gl.where(e < SINKS, e, window), beyond)


@gluon.jit
def spans_kept(kept, BEAM: gl.constexpr, PLACES: gl.constexpr):
    """How many of the BEAM places hold a span."""
    place = gl.arange(0, PLACES, gl.BlockedLayout([1], [32], [1], [0]))
    return gl.sum((gl.load(kept + place, mask=place < BEAM, other=-1) >= 0).to(gl.int32), 0)


@gluon.jit
def spans_at(kept, index, used, edge, BEAM: gl.constexpr, SPANS: gl.constexpr):
    """Numbers of the SPANS spans from place ``index`` on, as a tuple: kept ones, then those of the cover's edge."""
    found = ()
    for u in gl.static_range(SPANS):
        place = index + u
        span = gl.load(kept + gl.minimum(place, BEAM - 1))
        found += (gl.where(place < used, span, edge + place - used),)
    return found


@gluon.jit
def first_edge(t0, WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr, FANOUT: gl.constexpr):
    """The first span of the cover's edge of the query block at t0."""
    begin = gl.maximum(t0 + 1 - WINDOW, 0) // BLOCK * BLOCK
    return gl.maximum(begin - SINK, 0) // BLOCK // FANOUT


@gluon.constexpr_function
def in_banks(PER_LEAF):
    """How spreads [SPANS, FANOUT, PER_LEAF] lie in shared memory, so that what threads with ``by_leaf`` read at a time, of
    leaves 0, 2, 4 and 6, lies in different banks."""
    return gl.SwizzledSharedLayout(min(4, PER_LEAF), max(1, 32 // PER_LEAF), max(1, PER_LEAF // 4), [2, 1, 0])


@gluon.constexpr_function
def of_node(SPANS, PER_LEAF):
    """How spreads [SPANS, FANOUT, PER_LEAF] are spread over the threads of a warp."""
    spans = min(2, SPANS)
    nodes = 4 // spans
    return gl.BlockedLayout(
        [SPANS // spans, 1, max(1, PER_LEAF // nodes)], [spans, 8, nodes], [1, 1, 1], [2, 1, 0]
    )


@gluon.jit
def spreads_of(
    spreads, span, leaves, FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Spreads [SPANS, FANOUT, PER_LEAF] of the nodes of a tuple of spans, from [nodes]; 0 behind the last leaf."""
    which = gl.arange(0, len(span), gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    leaf = gl.arange(0, FANOUT, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    node = gl.arange(0, PER_LEAF, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    number = which * 0
    for u in gl.static_range(len(span)):
        number = gl.where(which == u, span[u], number)
    leaf = gl.expand_dims(gl.expand_dims(number, 1), 2) * FANOUT + gl.expand_dims(gl.expand_dims(leaf, 0), 2)
    at = leaf * PER_LEAF + gl.expand_dims(gl.expand_dims(node, 0), 1)
    return gl.load(spreads + at, mask=at < leaves * PER_LEAF, other=0.0)


@gluon.jit
def supply(
    desc_q, desc_k, desc_n, queries, many, ring, apart, spreads, spans, stride_sb, stride_sh,
    slots, tokens, blocks, total_blocks, leaves, first_tile, end,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr,
    FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr, QUERY_BLOCK: gl.constexpr,
    DENSE_END: gl.constexpr, WIDTH: gl.constexpr, WIDTH_PAD: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the warp that brings queries, keys, nodes and spreads, and says how ``many`` spans a tile has."""
    SPANS: gl.constexpr = KEYS // (FANOUT * PER_LEAF)
    BLOCKS: gl.constexpr = KEYS // BLOCK
    SLABS: gl.constexpr = DIM // SLAB
    NEAR_SLOTS: gl.constexpr = near_slots(WINDOW, SINK, BLOCK, QUERY_BLOCK, KEYS)
    OF_NODE: gl.constexpr = of_node(SPANS, PER_LEAF)
    EDGE_SPANS: gl.constexpr = (WIDTH - BEAM * FANOUT + FANOUT - 1) // FANOUT
    beyond = (slots + BLOCK - 1) // BLOCK
    memory, full, _empty = ring
    LAYOUT: gl.constexpr = desc_n.layout
    nodes = reinterpreted(memory, [STAGES * SLABS * SPANS, 1, PER_LEAF, FANOUT, SLAB], LAYOUT)
    PLACES: gl.constexpr = QUERY_BLOCK // 2
    n, seen_tiles = 0, 0
    for tile in range(first_tile + gl.program_id(0), end, gl.num_programs(0)):
        bh, number = tile // blocks, (slots - tokens) // QUERY_BLOCK + tile % blocks
        t0 = number * QUERY_BLOCK
        if (t0 < slots) & (t0 + QUERY_BLOCK > DENSE_END):
            begin_slot(queries, seen_tiles, 2 * HALF * DIM * 2, 1)
            for u in gl.static_range(2):
                for d in gl.static_range(SLABS):
                    at = t0 + u * PLACES - (slots - tokens)
                    place = [bh // KV_HEADS, bh % KV_HEADS * GROUP, at, d * SLAB]
                    copy(desc_q, place, queries[1].index(0), queries[0].index(u * SLABS + d))
            # What a step needs is loaded two steps before, its spreads one step before.
            kept = spans + (bh.to(gl.int64) * total_blocks + number) * BEAM
            used = spans_kept(kept, BEAM, WIDTH_PAD // FANOUT)
            tell(many, used, queries)
            seen_tiles += 1
            edge = first_edge(t0, WINDOW, SINK, BLOCK, FANOUT)
            own = (
                spreads + (bh // KV_HEADS).to(gl.int64) * stride_sb + (bh % KV_HEADS).to(gl.int64) * stride_sh
            )
            following = spans_at(kept, 0, used, edge, BEAM, SPANS)
            later = spans_at(kept, SPANS, used, edge, BEAM, SPANS)
            next_spreads = spreads_of(own, following, leaves, FANOUT, PER_LEAF, OF_NODE)
            last, right, first, near = near_keys(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
            for turn in range(0, NEAR_SLOTS):
                slot = n % STAGES
                begin_slot(ring, n, KEYS * DIM * 2, STAGES)
                for u in gl.static_range(BLOCKS):
                    at = near_block(turn * BLOCKS + u, last, right, first, near, beyond, SINK, BLOCK) * BLOCK
                    for d in gl.static_range(SLABS):
                        place = [bh // KV_HEADS, bh % KV_HEADS, at, d * SLAB]
                        copy(desc_k, place, full.index(slot), memory.index((slot * SLABS + d) * BLOCKS + u))
                mbarrier.arrive(full.index(slot))
                n += 1
            for index in range(0, used + EDGE_SPANS, SPANS):
                slot = n % STAGES
                span, found = following, next_spreads
                following = later
                later = spans_at(kept, index + 2 * SPANS, used, edge, BEAM, SPANS)
                next_spreads = spreads_of(own, following, leaves, FANOUT, PER_LEAF, OF_NODE)
                begin_slot(ring, n, KEYS * DIM * 2, STAGES)
                for u in gl.static_range(SPANS):
                    for d in gl.static_range(SLABS):
                        place = [bh, 0, span[u] * FANOUT, d * SLAB]
                        copy(desc_n, place, full.index(slot), nodes.index((slot * SLABS + d) * SPANS + u))
                apart.index(slot).store(found)
                mbarrier.arrive(full.index(slot))
                n += 1


@gluon.jit
def query_at(row, begin, low, slots, GROUP: gl.constexpr, LOW: gl.constexpr, HIGH: gl.constexpr):
    """(position, head of the group, whether it is a new query) of rows whose places count from ``begin``, which are as
    ``place_and_head`` of ``triton_vote`` says."""
    t = begin + row // (8 * HIGH) * (8 // LOW) + row // LOW % (8 // LOW)
    above = row // 8 % HIGH * LOW + row % LOW
    return t, above, (t >= low) & (t < slots) & (above < GROUP)


@gluon.jit
def weigh(top, total, s, factor):
    """As ``weigh`` of ``triton_vote``."""
    new_top = gl.maximum(top, gl.max(s, 1) * factor)
    safe = gl.where(new_top == -float("inf"), 0.0, new_top)
    return new_top, total * gl.exp2(top - safe) + gl.sum(gl.exp2(s * factor - safe[:, None]), 1)


@gluon.jit
def cast(
    s, apart, second, near, held, index, used, factor,
    FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr, PLACES: gl.constexpr, LOW: gl.constexpr,
    HIGH: gl.constexpr, WIDTH_PAD: gl.constexpr, STEPS: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """Writes the votes for the leaves of the spans from ``index`` on, by scores s [HALF, columns]."""
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
def weigh_near(
    top, total, s, turn: gl.constexpr, t, from_, t0, slots, factor, column,
    WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Adds the scores s [HALF, KEYS] of the turn-th slot of near keys, as ``weigh_near`` of ``triton_vote`` does."""
    last, right, first, many = near_keys(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    beyond = (slots + BLOCK - 1) // BLOCK
    WHOLE: gl.constexpr = SINK + (WINDOW - QUERY_BLOCK if WINDOW > QUERY_BLOCK else 0)
    if (turn + 1) * KEYS <= WHOLE:  # all rows see these keys
        top, total = weigh(top, total, s, factor)
    else:
        e = turn * (KEYS // BLOCK) + column // BLOCK
        j = near_block(e, last, right, first, many, beyond, SINK, BLOCK) * BLOCK + column % BLOCK
        visible = (j[None] <= t[:, None]) & ((j < SINK)[None] | (j[None] >= from_[:, None]))
        top, total = weigh(top, total, gl.where(visible, s, -float("inf")), factor)
    return top, total


@gluon.jit
def ballot(
    SHARE: gl.constexpr, sinks, votes, shift, queries, many, ring, apart, slots, tokens, blocks, first_tile, end, scale, spread,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr, WIDTH: gl.constexpr, WIDTH_PAD: gl.constexpr,
    KEYS: gl.constexpr, STEPS: gl.constexpr, MOST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group of warps that votes, for the SHARE-th half of a query block's places."""
    PLACES: gl.constexpr = QUERY_BLOCK // 2
    LOW: gl.constexpr = HEADS // 2 if HEADS > 1 else 1
    HIGH: gl.constexpr = 2 if HEADS > 1 else 1
    EDGE_SPANS: gl.constexpr = (WIDTH - BEAM * FANOUT + FANOUT - 1) // FANOUT
    SPANS: gl.constexpr = KEYS // (FANOUT * PER_LEAF)
    BY_LEAF: gl.constexpr = by_leaf(SPANS, FANOUT, PER_LEAF)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    OF_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    row = gl.arange(0, HALF, OF_ROW)
    column = gl.arange(0, KEYS, OF_COLUMN)
    low = slots - tokens
    factor = scale * LOG2E
    n, seen_tiles = 0, 0
    for tile in range(first_tile + gl.program_id(0), end, gl.num_programs(0)):
        bh, number = tile // blocks, (slots - tokens) // QUERY_BLOCK + tile % blocks
        t0 = number * QUERY_BLOCK
        if (t0 < slots) & (t0 + QUERY_BLOCK > DENSE_END):
            b, h = (bh // KV_HEADS).to(gl.int64), (bh % KV_HEADS).to(gl.int64)
            t, above, new = query_at(row, t0 + SHARE * PLACES, low, slots, GROUP, LOW, HIGH)
            head = h * GROUP + above
            await_slot(queries, seen_tiles, 1)
            rows = matrices(queries[0], HALF, DIM).index(SHARE)
            wide = in_order(rows.load(WIDE), LOW, HIGH, DIM).to(gl.float32)
            second = gl.convert_layout(gl.sum(wide * wide, 1), OF_ROW) * (0.5 * spread * scale)
            x = gl.convert_layout(in_order(rows.load(by_head(HEADS, DIM)), LOW, HIGH, DIM), OPERAND)
            used = told(many)
            release(queries, seen_tiles, 1)
            seen_tiles += 1
            from_ = gl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK

            top = gl.full([HALF], -float("inf"), gl.float32, OF_ROW)
            total = gl.zeros([HALF], gl.float32, OF_ROW)
            s = gl.zeros([HALF, KEYS], gl.float32, SCORES)
            for turn in gl.static_range(near_slots(WINDOW, SINK, BLOCK, QUERY_BLOCK, KEYS)):
                s = begin_scores(x, s, ring, n, DIM, KEYS, STAGES)
                s = hopper.warpgroup_mma_wait(0, deps=[s])
                release(ring, n, STAGES)
                top, total = weigh_near(
                    top, total, s, turn, t, from_, t0, slots, factor, column,
                    WINDOW, SINK, BLOCK, QUERY_BLOCK, KEYS,
                )  # fmt: skip
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
            for index in range(0, used + EDGE_SPANS, SPANS):
                s = begin_scores(x, s, ring, n, DIM, KEYS, STAGES)
                found = apart.index(n % STAGES).load(BY_LEAF)
                found = gl.convert_layout(gl.reshape(gl.permute(found, (0, 2, 1)), [KEYS]), OF_COLUMN)
                s = hopper.warpgroup_mma_wait(0, deps=[s])
                release(ring, n, STAGES)
                cast(
                    s, found, second, near, held, index, used, factor,
                    FANOUT, PER_LEAF, BEAM, PLACES, LOW, HIGH, WIDTH_PAD, STEPS, MOST,
                )  # fmt: skip
                n += 1


@Kernel
@gluon.jit(do_not_specialize=["slots", "tokens", "blocks", "total_blocks", "leaves", "first", "end"])
def vote_by_roles(
    desc_q, desc_k, desc_n, spreads, sinks, spans, votes, shift, todo, stride_sb, stride_sh,
    slots, tokens, blocks, total_blocks, leaves, first, end, scale, spread,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, FANOUT: gl.constexpr, PER_LEAF: gl.constexpr, BEAM: gl.constexpr,
    QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr, WIDTH: gl.constexpr, WIDTH_PAD: gl.constexpr,
    KEYS: gl.constexpr, STEPS: gl.constexpr, MOST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Votes of the query blocks number ``first`` … ``end`` of [B·Hkv, blocks], as those of ``vote``.

    Rows have all slots, and the queries are the last tokens. The descriptors' blocks are [1, HEADS, QUERY_BLOCK / 2, SLAB]
    of q, [1, 1, BLOCK, SLAB] of k, and [1, PER_LEAF, FANOUT, SLAB] of the nodes as [B·Hkv, PER_LEAF, leaves, DIM].
    """
    # A slot is filled by copies and by what belongs to them: of a tile the number of its spans, of nodes their spreads.
    queries = ring_of(desc_q, desc_q.dtype, 1, 2 * (DIM // SLAB), FILLS=2)
    ring = ring_of(desc_k, desc_k.dtype, STAGES, DIM // SLAB * (KEYS // BLOCK), FILLS=2)
    many = number_beside()
    SPANS: gl.constexpr = KEYS // (FANOUT * PER_LEAF)
    apart = gl.allocate_shared_memory(gl.float32, [STAGES, SPANS, FANOUT, PER_LEAF], in_banks(PER_LEAF))
    if gl.program_id(0) == 0:
        for place in gl.static_range(LISTED):
            gl.store(todo + place, 0)
    gl.warp_specialize(
        [
            (ballot, (
                gl.constexpr(0), sinks, votes, shift, queries, many, ring, apart,
                slots, tokens, blocks, first, end, scale, spread,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK, DENSE_END,
                WIDTH, WIDTH_PAD, KEYS, STEPS, MOST, STAGES,
            )),
            (ballot, (
                gl.constexpr(1), sinks, votes, shift, queries, many, ring, apart,
                slots, tokens, blocks, first, end, scale, spread,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK, DENSE_END,
                WIDTH, WIDTH_PAD, KEYS, STEPS, MOST, STAGES,
            )),
            (supply, (
                desc_q, desc_k, desc_n, queries, many, ring, apart, spreads, spans, stride_sb, stride_sh,
                slots, tokens, blocks, total_blocks, leaves, first, end,
                KV_HEADS, GROUP, DIM, WINDOW, SINK, BLOCK, FANOUT, PER_LEAF, BEAM, QUERY_BLOCK, DENSE_END,
                WIDTH, WIDTH_PAD, KEYS, STAGES,
            )),
        ],
        [4, 1],
        [104, 32],
    )  # fmt: skip
