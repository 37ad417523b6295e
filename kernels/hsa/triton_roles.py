"""Attention of tiles on Hopper, where warps have roles.

    fetch     list                        →  queries of a tile; keys and values of one step after another, ahead of use
    attend    rows of half a tile, those  →  out, lse

What it computes is what ``attend_listed`` of ``triton_execute`` does, up to the last rounding. One warp fetches, and two groups of
four warps attend, each to HALF rows of a tile: while the values of a step are added, the scores of the next one are
computed and weighed. Queries, keys and values have each their own ring. A program that has done a tile takes the next one
that nobody has, for some take longer than others.

Tiles that end by DENSE_END see all keys up to themselves, which are gone through like a list without gaps. Nobody voted
there, so the highest score of their first step shifts the others.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from retrofit.kernels.hsa.triton_execute import LISTED, TAKEN
from retrofit.kernels.launch import Kernel
from retrofit.kernels.roles import (
    HALF,
    LOG2E,
    SLAB,
    await_slot,
    begin_scores,
    begin_slot,
    begin_values,
    bring,
    copy,
    finish,
    half_tile,
    number_beside,
    partial_sums,
    release,
    ring_of,
    rows_at,
    tell,
    told,
)


@gluon.jit
def tile_at(
    w, slots, tokens, blocks,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, QUERY_BLOCK: gl.constexpr,
):  # fmt: skip
    """(batch row, kv head, first head, position of the first row, number of the query block among all) of tile w."""
    PARTS: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    i, part = w % blocks, w // blocks
    bh = part // PARTS
    h = bh % KV_HEADS
    t0 = ((slots - tokens) // QUERY_BLOCK + i) * QUERY_BLOCK
    return bh // KV_HEADS, h, h * GROUP + part % PARTS * HEADS, t0, bh.to(gl.int64) * blocks + i


@gluon.jit
def window_begins(
    t0, WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr
):
    """First blocks of the windows of the first and of the last row, behind the sinks."""
    first = gl.maximum(gl.maximum(t0 + 1 - WINDOW, 0) // BLOCK, SINK // BLOCK)
    last = gl.maximum(gl.maximum(t0 + QUERY_BLOCK - WINDOW, 0) // BLOCK, SINK // BLOCK)
    return first, last


@gluon.jit
def window_ends(
    t0, WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr,
):  # fmt: skip
    """(first block of the window's right end, blocks of it, first block of its left end, blocks of both)."""
    first, last = window_begins(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    whole = gl.maximum(last, t0 // BLOCK)
    right = (t0 + QUERY_BLOCK + BLOCK - 1) // BLOCK - whole
    return whole, right, first, right + last - first


@gluon.jit
def steps_of(
    t0, most, WINDOW: gl.constexpr, SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr,
    DENSE_END: gl.constexpr, LEAVES: gl.constexpr,
):  # fmt: skip
    """(whether a tile is dense, steps of blocks that all its rows see whole, and then as ``window_ends``) of a tile that
    lists ``most`` blocks, if it is not dense."""
    dense = t0 + QUERY_BLOCK <= DENSE_END
    whole, right, first, edges = window_ends(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    before = t0 // BLOCK // LEAVES
    others = (t0 + QUERY_BLOCK + BLOCK - 1) // BLOCK - before * LEAVES
    return (
        dense,
        gl.where(dense, before, (most + LEAVES - 1) // LEAVES),
        gl.where(dense, before * LEAVES, whole),
        gl.where(dense, others, right),
        gl.where(dense, 0, first),
        gl.where(dense, others, edges),
    )


@gluon.jit
def edge_block(e, whole, right, first, edges, beyond):
    """Number of block e of the window's ends; ``beyond`` all keys if there is none."""
    return gl.where(e < edges, gl.where(e < right, whole + e, first + e - right), beyond)


@gluon.jit
def entries(listed, LEAVES: gl.constexpr):
    """LEAVES entries of a list, as a tuple."""
    if LEAVES == 1:
        return (gl.load(listed),)
    elif LEAVES == 2:
        return gl.load(listed), gl.load(listed + 1)
    else:
        return gl.load(listed), gl.load(listed + 1), gl.load(listed + 2), gl.load(listed + 3)


@gluon.jit
def tile_of(number_of_tile, queries, n):
    """Waits for the n-th tile of this program, and says which one it is; negative if there are no more."""
    await_slot(queries, n, 1)
    return told(number_of_tile)


@gluon.jit
def fetch(
    desc_q, desc_g, desc_k, desc_v, number_of_tile, queries, grads, keys, values, ordered, counts, taken,
    slots, tokens, blocks, tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
    LIST: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the warp that fetches; with queries come the gradients of their outputs, if there are any.

    ``taken`` counts the tiles that programs have taken besides their first ones.
    """
    LEAVES: gl.constexpr = KEYS // BLOCK
    SLABS: gl.constexpr = DIM // SLAB
    TILE_BYTES: gl.constexpr = HEADS * QUERY_BLOCK * DIM * 2
    beyond = (slots + BLOCK - 1) // BLOCK
    n, seen_tiles = 0, 0
    w = tiles - 1 - gl.program_id(0)  # what lies later sees more, and begins first
    while w >= 0:
        next_tile = tiles - 1 - gl.num_programs(0) - gl.atomic_add(taken, 1)
        b, h, head, t0, number = tile_at(w, slots, tokens, blocks, KV_HEADS, GROUP, HEADS, QUERY_BLOCK)
        if t0 < slots:
            listed = ordered + number * LIST
            following = entries(listed, LEAVES)
            most = gl.load(counts + number * QUERY_BLOCK + QUERY_BLOCK - 1)
            dense, before_edges, whole, right, first, edges = steps_of(
                t0, most, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, LEAVES
            )
            last_listed = gl.where(dense, 0, gl.maximum(before_edges - 1, 0))
            at = t0 - (slots - tokens)
            bring(desc_q, queries, seen_tiles, b, head, at, TILE_BYTES, SLABS, 1, QUERY_BLOCK, 1)
            tell(number_of_tile, w, queries)
            if grads is not None:
                bring(desc_g, grads, seen_tiles, b, head, at, TILE_BYTES, SLABS, 1, QUERY_BLOCK, 1)
            seen_tiles += 1
            for step in range(0, before_edges + (edges + LEAVES - 1) // LEAVES):
                own = following
                following = entries(listed + gl.minimum(step + 1, last_listed) * LEAVES, LEAVES)
                for which in gl.static_range(2):
                    ring = values if which else keys
                    begin_slot(ring, n, KEYS * DIM * 2, STAGES)
                    for u in gl.static_range(LEAVES):
                        edge = edge_block(
                            (step - before_edges) * LEAVES + u, whole, right, first, edges, beyond
                        )
                        seen_whole = gl.where(dense, step * LEAVES + u, own[u])
                        begin = gl.where(step < before_edges, seen_whole, edge) * BLOCK
                        for d in gl.static_range(SLABS):
                            copy(
                                desc_v if which else desc_k, [b, h, begin, d * SLAB], ring[1].index(n % STAGES),
                                ring[0].index((n % STAGES * SLABS + d) * LEAVES + u),
                            )  # fmt: skip
                n += 1
        w = next_tile
    begin_slot(queries, seen_tiles, 0, 1)
    tell(number_of_tile, w, queries)


@gluon.jit
def attend(
    SHARE: gl.constexpr, sinks, counts, shift, todo, out, lse, number_of_tile, queries, keys, values,
    slots, tokens, blocks, scale, limit,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group of warps that attends, to the SHARE-th HALF of a tile's rows."""
    LEAVES: gl.constexpr = KEYS // BLOCK
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    dtype: gl.constexpr = out.dtype.element_ty
    place = (SHARE * HALF + gl.arange(0, HALF, ROWS)) % QUERY_BLOCK
    column = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    low = slots - tokens
    beyond = (slots + BLOCK - 1) // BLOCK
    factor = scale * LOG2E
    n, seen_tiles = 0, 0
    w = tile_of(number_of_tile, queries, seen_tiles)
    while w >= 0:
        b, h, head0, t0, number = tile_at(w, slots, tokens, blocks, KV_HEADS, GROUP, HEADS, QUERY_BLOCK)
        row_b = b.to(gl.int64)
        head, t, new = rows_at(SHARE, h, head0, t0, low, slots, GROUP, QUERY_BLOCK, ROWS)
        at = (row_b * KV_HEADS * GROUP + head) * tokens + t - low
        # Not loaded a tile ahead: Triton 3.6 took ``most``, loaded so in this role, for the same in all tiles.
        top = gl.load(shift + at, mask=new, other=0.0)
        seen = gl.load(counts + number * QUERY_BLOCK + place)
        most = gl.load(counts + number * QUERY_BLOCK + QUERY_BLOCK - 1)
        dense, before_edges, whole, right, first, edges = steps_of(
            t0, most, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, LEAVES
        )
        seen = gl.where(dense, before_edges * LEAVES, seen)
        from_ = gl.where(dense, 0, gl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK)
        x = half_tile(queries, SHARE, HEADS * QUERY_BLOCK, DIM, gl.DotOperandLayout(0, SCORES, 2))
        release(queries, seen_tiles, 1)
        seen_tiles += 1

        # The first step has no values to add meanwhile.
        s = begin_scores(x, gl.zeros([HALF, KEYS], gl.float32, SCORES), keys, n, DIM, KEYS, STAGES)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        release(keys, n, STAGES)
        if dense:
            top = gl.max(gl.where(column[None] <= t[:, None], s, -float("inf")), 1) * factor
        if before_edges > 0:
            p = weigh_listed(s, 0, seen, top, factor, column, BLOCK, KEYS)
        else:
            p = weigh_edge(s, 0, t, from_, top, factor, column, whole, right, first, edges, beyond, BLOCK)
        total = partial_sums(p)
        p = gl.convert_layout(p.to(dtype), WEIGHTS)
        acc = gl.zeros([HALF, DIM], gl.float32, SUMS)
        for step in range(1, before_edges):
            n += 1
            s, acc = products(x, p, s, acc, keys, values, n, DIM, KEYS, STAGES)
            y = weigh_listed(s, step * LEAVES, seen, top, factor, column, BLOCK, KEYS)
            total += partial_sums(y)
            acc, p = finish(acc, p, gl.convert_layout(y.to(dtype), WEIGHTS), values, n - 1, STAGES)
        for step in range(gl.maximum(before_edges, 1), before_edges + (edges + LEAVES - 1) // LEAVES):
            n += 1
            s, acc = products(x, p, s, acc, keys, values, n, DIM, KEYS, STAGES)
            e = (step - before_edges) * LEAVES
            y = weigh_edge(s, e, t, from_, top, factor, column, whole, right, first, edges, beyond, BLOCK)
            total += partial_sums(y)
            acc, p = finish(acc, p, gl.convert_layout(y.to(dtype), WEIGHTS), values, n - 1, STAGES)
        acc = begin_values(p, acc, values, n, DIM, KEYS, STAGES)
        acc, p = finish(acc, p, p, values, n, STAGES)
        n += 1

        sums = gl.convert_layout(gl.sum(total, 1), ROWS)
        fits = sums <= limit
        if sinks is not None:
            sink = gl.load(sinks + head, mask=new, other=0.0).to(gl.float32) * LOG2E
            sums += gl.exp2(sink - top)
            fits &= sums < float("inf")
        gl.store(lse + at, gl.where(fits, (top + gl.log2(sums)) / LOG2E, float("nan")), mask=new)
        share = gl.convert_layout(1.0 / sums, gl.SliceLayout(1, SUMS))
        result = gl.convert_layout((acc * share[:, None]).to(dtype), WIDE)
        head, t, written = rows_at(
            SHARE, h, head0, t0, low, slots, GROUP, QUERY_BLOCK, gl.SliceLayout(1, WIDE)
        )
        at = ((row_b * tokens + t - low) * (KV_HEADS * GROUP) + head) * DIM
        dim = gl.arange(0, DIM, gl.SliceLayout(0, WIDE))
        gl.store(out + at[:, None] + dim[None], result, mask=written[:, None])
        if gl.max((new & (fits == 0)).to(gl.int32), 0) > 0:
            gl.store(todo + LISTED + gl.atomic_add(todo, 1), w)
        w = tile_of(number_of_tile, queries, seen_tiles)


@gluon.jit
def weigh_listed(s, u, seen, top, factor, column, BLOCK: gl.constexpr, KEYS: gl.constexpr):
    """Weights of scores s [HALF, KEYS] for the blocks u, u + 1, … of the list, of which rows see ``seen``."""
    added = gl.where(u < seen, -top, -float("inf"))[:, None]
    for v in gl.static_range(1, KEYS // BLOCK):
        own = gl.where(u + v < seen, -top, -float("inf"))
        added = gl.where((column // BLOCK == v)[None], own[:, None], added)
    return gl.exp2(s * factor + added)


@gluon.jit
def weigh_edge(s, e, t, from_, top, factor, column, whole, right, first, edges, beyond, BLOCK: gl.constexpr):
    """Weights of scores s [HALF, KEYS] for the blocks e, e + 1, … of the window's ends; rows at t see keys from
    ``from_`` on."""
    j = edge_block(e + column // BLOCK, whole, right, first, edges, beyond) * BLOCK + column % BLOCK
    visible = (j[None] <= t[:, None]) & (j[None] >= from_[:, None])
    return gl.where(visible, gl.exp2(s * factor - top[:, None]), 0.0)


@gluon.jit
def products(x, p, s, acc, keys, values, n, DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Begins the scores of the keys in place n and to add the values before them; waits for the scores."""
    s = begin_scores(x, s, keys, n, DIM, KEYS, STAGES)
    acc = begin_values(p, acc, values, n - 1, DIM, KEYS, STAGES)
    s = hopper.warpgroup_mma_wait(1, deps=[s])
    release(keys, n, STAGES)
    return s, acc


@Kernel
@gluon.jit(do_not_specialize=["slots", "tokens", "blocks", "tiles"])
def attend_by_roles(
    desc_q, desc_k, desc_v, sinks, ordered, counts, shift, todo, out, lse,
    slots, tokens, blocks, tiles, scale, limit,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
    LIST: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Writes ``out`` [B, T, Hq, DIM] and ``lse`` [B, Hq, T], as ``attend_listed`` does, and those of the dense start.

    Rows have all slots, and the queries are the last tokens. The descriptors' blocks are [1, HEADS, QUERY_BLOCK, SLAB] of
    q and [1, 1, BLOCK, SLAB] of k and v. A tile that has to be done again may stand on the list ``todo`` twice, once for
    each half.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    COPIES: gl.constexpr = DIM // SLAB * (KEYS // BLOCK)
    queries, number_of_tile = ring_of(desc_q, dtype, 1, DIM // SLAB, FILLS=2), number_beside()
    keys = ring_of(desc_k, dtype, STAGES, COPIES)
    values = ring_of(desc_v, dtype, STAGES, COPIES)
    gl.warp_specialize(
        [
            (attend, (
                gl.constexpr(0), sinks, counts, shift, todo, out, lse, number_of_tile, queries, keys, values,
                slots, tokens, blocks, scale, limit,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, STAGES,
            )),
            (attend, (
                gl.constexpr(1), sinks, counts, shift, todo, out, lse, number_of_tile, queries, keys, values,
                slots, tokens, blocks, scale, limit,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, STAGES,
            )),
            (fetch, (
                desc_q, None, desc_k, desc_v, number_of_tile, queries, None, keys, values, ordered, counts, todo + TAKEN,
                slots, tokens, blocks, tiles,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, LIST, KEYS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
