"""Gradients of keys and values on Hopper, where warps have roles.

    recall    steps of a part of a tile              →  its keys and values; queries, gradients of their outputs
    weigh     keys × queries of one step and another  →  weights, and grad_v or a part of it
    descend   values × gradients, weights             →  grad_k or a part of it

It is ``key_gradients`` of ``triton_gradients`` in the way of ``triton_roles``, for leaves that are chosen whole. KEYS keys
are the rows of all products and the queries of a step their columns, so that weights and slopes are operands as they are.
While what one step adds is computed, a group of warps makes what the next one will add; weights go from one to the other
through a ring of their own.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from retrofit.kernels.launch import Kernel
from retrofit.kernels.roles import (
    HALF,
    LOG2E,
    SLAB,
    await_room,
    await_slot,
    barriers,
    begin_scores,
    begin_values,
    bring,
    finish,
    matrices,
    release,
    ring_of,
)

KEYS = HALF
"""Keys of a tile."""
HANDED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
"""How weights lie that one group hands to the other: 8 rows of 8 columns are in banks of their own."""


@gluon.jit
def part_at(
    w, ends, steps, parts, part_ends, owners, size, slots, tokens, tiles, chunks, all_tiles, all_parts,
    WINDOW: gl.constexpr, SINK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
):  # fmt: skip
    """(whether there is one, tile among all, whether it is sinks, first key, end of its keys, first near block, near
    blocks, first step, end of the steps, entries before the first step) of part w; tiles and near blocks are those of
    ``tile_keys`` and ``near_blocks`` of ``triton_inverse``."""
    split = w < all_parts
    which = gl.where(split, gl.load(owners + w, mask=split, other=0), w - all_parts)
    known = which < all_tiles
    count = gl.load(parts + which, mask=known, other=0)
    known = gl.where(split, known, count == 1)
    tile = (which % tiles).to(gl.int32)
    SINKS: gl.constexpr = (SINK + KEYS - 1) // KEYS
    sinks = tile < SINKS
    begin = gl.where(sinks, tile * KEYS, SINK + (tile - SINKS) * KEYS)
    end = gl.where(sinks, gl.minimum(begin + KEYS, SINK), begin + KEYS)

    from_ = gl.maximum(begin, slots - tokens) // QUERY_BLOCK
    to = gl.maximum((end + WINDOW - 2) // QUERY_BLOCK + 1, DENSE_END // QUERY_BLOCK)
    every = (slots + QUERY_BLOCK - 1) // QUERY_BLOCK
    near = gl.maximum(gl.where(sinks, every, gl.minimum(to, every)) - from_, 0)

    most = gl.load(size).to(gl.int32)
    before = gl.load(part_ends + which, mask=split & known, other=0) - count
    first = gl.where(split, w - before, 0).to(gl.int32) * most
    last = gl.minimum(first + most, gl.load(steps + which, mask=known, other=0))
    listed = gl.load(ends + which * chunks - 1, mask=known & (which > 0), other=0) - near
    return known, which, sinks, begin, end, from_, near, first, last, listed


@gluon.jit
def entry_at(entries, listed, e, near, last):
    """The entry of block e; 0 for near blocks and behind the last one."""
    return gl.load(entries + (listed + e), mask=(e >= near) & (e < last), other=0)


@gluon.jit
def block_of(entry, e, near, from_):
    """Number of the query block of block e of a tile."""
    return gl.where(e < near, from_ + e, (entry >> 32).to(gl.int32))


@gluon.jit
def recall(
    desc_q, desc_g, desc_k, desc_v, queries, grads, keys, values,
    entries, ends, steps, parts, part_ends, owners, size, slots, tokens, tiles, chunks, all_tiles, all_parts,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the warp that fetches."""
    PARTS: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    LEAVES: gl.constexpr = KEYS // BLOCK
    SLABS: gl.constexpr = DIM // SLAB
    w = gl.program_id(0).to(gl.int64)
    known, which, _sinks, begin, _end, from_, near, first, last, listed = part_at(
        w, ends, steps, parts, part_ends, owners, size, slots, tokens, tiles, chunks, all_tiles, all_parts,
        WINDOW, SINK, QUERY_BLOCK, DENSE_END,
    )  # fmt: skip
    if known:
        bh = (which // tiles).to(gl.int32)
        b, h = bh // KV_HEADS, bh % KV_HEADS
        bring(desc_k, keys, 0, b, h, begin, KEYS * DIM * 2, SLABS, LEAVES, BLOCK, 1)
        bring(desc_v, values, 0, b, h, begin, KEYS * DIM * 2, SLABS, LEAVES, BLOCK, 1)
        following = entry_at(entries, listed, first, near, last)
        for n in range(0, (last - first) * PARTS):
            e, part = first + n // PARTS, n % PARTS
            entry = following
            following = entry_at(entries, listed, first + (n + 1) // PARTS, near, last)
            at = block_of(entry, e, near, from_) * QUERY_BLOCK - (slots - tokens)
            head = h * GROUP + part * HEADS
            bring(desc_q, queries, n, b, head, at, HALF * DIM * 2, SLABS, 1, QUERY_BLOCK, STAGES)
            bring(desc_g, grads, n, b, head, at, HALF * DIM * 2, SLABS, 1, QUERY_BLOCK, STAGES)


@gluon.jit
def of_rows(sums, head, t, low, slots, tokens, group_end, other):
    """``sums`` [heads, tokens] of queries at t; ``other`` for what is no new query."""
    new = (t >= low) & (t < slots) & (head < group_end)
    return gl.load(sums + head.to(gl.int64) * tokens + t - low, mask=new, other=other)


@gluon.jit
def seen_by(
    entry, e, number, near, sinks, begin, key, place,
    WINDOW: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
):  # fmt: skip
    """Which places of a query block see which keys: from a key's own on, or from that on which chose its leaf, while it is
    in their window."""
    LEAVES: gl.constexpr = KEYS // BLOCK
    BITS: gl.constexpr = 32 // LEAVES
    t0, leaf, rows = number * QUERY_BLOCK, key // BLOCK, entry.to(gl.int32)
    chosen = (rows >> BITS * leaf) & ((1 << BITS) - 1) if LEAVES > 1 else rows + leaf * 0
    from_ = gl.where(e < near, begin + key - t0, chosen)
    whole = sinks | (number < DENSE_END // QUERY_BLOCK) | (e >= near)
    to = gl.where(whole, QUERY_BLOCK, begin + (leaf + 1) * BLOCK + WINDOW - 1 - t0)
    return (place[None] >= from_[:, None]) & (place[None] < to[:, None])


@gluon.jit
def hand(weights, n, y):
    """Puts the weights of step n where the other group takes them from."""
    memory, full, _empty = weights
    await_room(weights, n, 2)
    memory.index(n % 2).store(y)
    mbarrier.arrive(full.index(n % 2))


@gluon.jit
def taken(weights, n, LAYOUT: gl.constexpr):
    """The weights of step n."""
    await_slot(weights, n, 2)
    y = weights[0].index(n % 2).load(LAYOUT)
    release(weights, n, 2)
    return y


@gluon.jit
def own_rows(ring, TWICE: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """The tile's keys or values as the left operand of products: in registers if there are enough of them."""
    await_slot(ring, 0, 1)
    rows = matrices(ring[0], KEYS, DIM).index(0)
    if TWICE:
        return rows
    else:
        return rows.load(gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def put(
    acc, grad, held, w, all_parts, b, h, begin, end, slots, stride_b, stride_h, stride_t,
    DIM: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Writes sums [KEYS, DIM] of part w to ``held``, [parts, KEYS, 2·DIM] from there on, or else to the gradient."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    if w < all_parts:
        row = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
        dim = gl.arange(0, DIM, gl.SliceLayout(0, LAYOUT))
        gl.store(held + (w * KEYS + row)[:, None] * (2 * DIM) + dim[None], acc)
    else:
        own = begin + gl.arange(0, KEYS, gl.SliceLayout(1, WIDE))
        dim_w = gl.arange(0, DIM, gl.SliceLayout(0, WIDE))
        at = grad + b * stride_b + h * stride_h + own.to(gl.int64)[:, None] * stride_t + dim_w[None]
        sums = gl.convert_layout(acc.to(grad.dtype.element_ty), WIDE)
        gl.store(at, sums, mask=((own < end) & (own < slots))[:, None])


@gluon.jit
def weigh(
    lse, grad_v, held, queries, grads, keys, weights, entries, ends, steps, parts, part_ends, owners, size,
    stride_yb, stride_yh, stride_yt, slots, tokens, tiles, chunks, all_tiles, all_parts, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
    STAGES: gl.constexpr, TWICE: gl.constexpr,
):  # fmt: skip
    """The role of the warps that weigh keys, and add up the gradients of values."""
    PARTS: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = grad_v.dtype.element_ty
    w = gl.program_id(0).to(gl.int64)
    known, which, sinks, begin, end, from_, near, first, last, listed = part_at(
        w, ends, steps, parts, part_ends, owners, size, slots, tokens, tiles, chunks, all_tiles, all_parts,
        WINDOW, SINK, QUERY_BLOCK, DENSE_END,
    )  # fmt: skip
    if known:
        b, h = which // tiles // KV_HEADS, (which // tiles % KV_HEADS).to(gl.int32)
        low, group_end = slots - tokens, (h + 1) * GROUP
        sums = lse + b * KV_HEADS * GROUP * tokens
        key = gl.arange(0, KEYS, gl.SliceLayout(1, SCORES))
        place = gl.arange(0, HALF, COLUMNS) % QUERY_BLOCK
        line = gl.arange(0, HALF, LINE)
        head, beside = h * GROUP + line // QUERY_BLOCK, line % QUERY_BLOCK
        factor = scale * LOG2E
        inf: gl.constexpr = float("inf")
        entry = entry_at(entries, listed, first, near, last)
        number = block_of(entry, first, near, from_)
        top = of_rows(sums, head, number * QUERY_BLOCK + beside, low, slots, tokens, group_end, inf)
        own = own_rows(keys, TWICE, DIM, SCORES)

        # The first step has no weights to add meanwhile. What a step needs of its rows is loaded in the one before.
        s = begin_scores(own, gl.zeros([KEYS, HALF], gl.float32, SCORES), queries, 0, DIM, HALF, STAGES)
        following = entry_at(entries, listed, first + 1 // PARTS, near, last)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        release(queries, 0, STAGES)
        seen = seen_by(
            entry, first, number, near, sinks, begin, key, place, WINDOW, BLOCK, QUERY_BLOCK, DENSE_END
        )
        y = gl.where(seen, gl.exp2(s * factor - gl.convert_layout(top * LOG2E, COLUMNS)[None]), 0.0)
        hand(weights, 0, y)
        p = gl.convert_layout(y.to(dtype), WEIGHTS)
        acc = gl.zeros([KEYS, DIM], gl.float32, SUMS)
        number = block_of(following, first + 1 // PARTS, near, from_)
        t = number * QUERY_BLOCK + beside
        top = of_rows(sums, head + 1 % PARTS * HEADS, t, low, slots, tokens, group_end, inf)
        many = (last - first) * PARTS
        for n in range(1, many):
            e, after = first + n // PARTS, first + (n + 1) // PARTS
            entry = following
            s = begin_scores(own, s, queries, n, DIM, HALF, STAGES)
            acc = begin_values(p, acc, grads, n - 1, DIM, HALF, STAGES)
            following = entry_at(entries, listed, after, near, last)
            tops = gl.convert_layout(top * LOG2E, COLUMNS)
            s = hopper.warpgroup_mma_wait(1, deps=[s])
            release(queries, n, STAGES)
            number = block_of(entry, e, near, from_)
            seen = seen_by(
                entry, e, number, near, sinks, begin, key, place, WINDOW, BLOCK, QUERY_BLOCK, DENSE_END
            )
            y = gl.where(seen, gl.exp2(s * factor - tops[None]), 0.0)
            hand(weights, n, y)
            t = block_of(following, after, near, from_) * QUERY_BLOCK + beside
            top = of_rows(sums, head + (n + 1) % PARTS * HEADS, t, low, slots, tokens, group_end, inf)
            acc, p = finish(acc, p, gl.convert_layout(y.to(dtype), WEIGHTS), grads, n - 1, STAGES)
        acc = begin_values(p, acc, grads, many - 1, DIM, HALF, STAGES)
        acc, p = finish(acc, p, p, grads, many - 1, STAGES)
        put(
            acc, grad_v, held + DIM, w, all_parts, b, h, begin, end, slots, stride_yb, stride_yh, stride_yt, DIM, SUMS
        )  # fmt: skip


@gluon.jit
def descend(
    delta, grad_k, held, queries, grads, values, weights, entries, ends, steps, parts, part_ends, owners, size,
    stride_xb, stride_xh, stride_xt, slots, tokens, tiles, chunks, all_tiles, all_parts, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr, STAGES: gl.constexpr,
    TWICE: gl.constexpr,
):  # fmt: skip
    """The role of the warps that take weights, and add up the gradients of keys."""
    PARTS: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    SLOPES: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = grad_k.dtype.element_ty
    w = gl.program_id(0).to(gl.int64)
    known, which, _sinks, begin, end, from_, near, first, last, listed = part_at(
        w, ends, steps, parts, part_ends, owners, size, slots, tokens, tiles, chunks, all_tiles, all_parts,
        WINDOW, SINK, QUERY_BLOCK, DENSE_END,
    )  # fmt: skip
    if known:
        b, h = which // tiles // KV_HEADS, (which // tiles % KV_HEADS).to(gl.int32)
        low, group_end = slots - tokens, (h + 1) * GROUP
        sums = delta + b * KV_HEADS * GROUP * tokens
        line = gl.arange(0, HALF, LINE)
        head, beside = h * GROUP + line // QUERY_BLOCK, line % QUERY_BLOCK
        entry = entry_at(entries, listed, first, near, last)
        t = block_of(entry, first, near, from_) * QUERY_BLOCK + beside
        mean = of_rows(sums, head, t, low, slots, tokens, group_end, 0.0)
        own = own_rows(values, TWICE, DIM, SCORES)

        # As in ``weigh``.
        s = begin_scores(own, gl.zeros([KEYS, HALF], gl.float32, SCORES), grads, 0, DIM, HALF, STAGES)
        following = entry_at(entries, listed, first + 1 // PARTS, near, last)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        release(grads, 0, STAGES)
        y = taken(weights, 0, SCORES) * (s - gl.convert_layout(mean, COLUMNS)[None])
        slopes = gl.convert_layout(y.to(dtype), SLOPES)
        acc = gl.zeros([KEYS, DIM], gl.float32, SUMS)
        t = block_of(following, first + 1 // PARTS, near, from_) * QUERY_BLOCK + beside
        mean = of_rows(sums, head + 1 % PARTS * HEADS, t, low, slots, tokens, group_end, 0.0)
        many = (last - first) * PARTS
        for n in range(1, many):
            after = first + (n + 1) // PARTS
            s = begin_scores(own, s, grads, n, DIM, HALF, STAGES)
            acc = begin_values(slopes, acc, queries, n - 1, DIM, HALF, STAGES)
            following = entry_at(entries, listed, after, near, last)
            means = gl.convert_layout(mean, COLUMNS)
            s = hopper.warpgroup_mma_wait(1, deps=[s])
            release(grads, n, STAGES)
            y = taken(weights, n, SCORES) * (s - means[None])
            t = block_of(following, after, near, from_) * QUERY_BLOCK + beside
            mean = of_rows(sums, head + (n + 1) % PARTS * HEADS, t, low, slots, tokens, group_end, 0.0)
            acc, slopes = finish(acc, slopes, gl.convert_layout(y.to(dtype), SLOPES), queries, n - 1, STAGES)
        acc = begin_values(slopes, acc, queries, many - 1, DIM, HALF, STAGES)
        acc, slopes = finish(acc, slopes, slopes, queries, many - 1, STAGES)
        put(
            acc * scale, grad_k, held, w, all_parts, b, h, begin, end, slots, stride_xb, stride_xh, stride_xt, DIM, SUMS
        )  # fmt: skip


@Kernel
@gluon.jit(do_not_specialize=["slots", "tokens", "tiles", "all_tiles", "all_parts"])
def key_gradients_by_roles(
    desc_q, desc_g, desc_k, desc_v, lse, delta, entries, ends, steps, parts, part_ends, owners, size,
    grad_k, grad_v, held, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt,
    slots, tokens, tiles, chunks, all_tiles, all_parts, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
    STAGES: gl.constexpr, TWICE: gl.constexpr,
):  # fmt: skip
    """Writes ``grad_k`` and ``grad_v`` as k and v, or a part to ``held`` [parts, KEYS, 2·DIM], as ``key_gradients`` does.

    Rows have all slots, and the queries are the last tokens. The descriptors' blocks are [1, HEADS, QUERY_BLOCK, SLAB] of q
    and of the output's gradient, HALF rows, and [1, 1, BLOCK, SLAB] of k and v. TWICE is for two programs to a multiprocessor.
    """
    SLABS: gl.constexpr = DIM // SLAB
    dtype: gl.constexpr = grad_k.dtype.element_ty
    queries = ring_of(desc_q, dtype, STAGES, SLABS, 2)
    grads = ring_of(desc_g, dtype, STAGES, SLABS, 2)
    keys = ring_of(desc_k, dtype, 1, SLABS * (KEYS // BLOCK), 1)
    values = ring_of(desc_v, dtype, 1, SLABS * (KEYS // BLOCK), 1)
    weights_full, weights_empty = barriers(2, 1)
    weights = gl.allocate_shared_memory(gl.float32, [2, KEYS, HALF], HANDED), weights_full, weights_empty
    gl.warp_specialize(
        [
            (weigh, (
                lse, grad_v, held, queries, grads, keys, weights, entries, ends, steps, parts, part_ends, owners, size,
                stride_yb, stride_yh, stride_yt, slots, tokens, tiles, chunks, all_tiles, all_parts, scale,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, STAGES, TWICE,
            )),
            (descend, (
                delta, grad_k, held, queries, grads, values, weights, entries, ends, steps, parts, part_ends, owners, size,
                stride_xb, stride_xh, stride_xt, slots, tokens, tiles, chunks, all_tiles, all_parts, scale,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, QUERY_BLOCK, DENSE_END, STAGES, TWICE,
            )),
            (recall, (
                desc_q, desc_g, desc_k, desc_v, queries, grads, keys, values,
                entries, ends, steps, parts, part_ends, owners, size,
                slots, tokens, tiles, chunks, all_tiles, all_parts,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, STAGES,
            )),
        ],
        [4, 1],
        [104 if TWICE else 240, 24],
    )  # fmt: skip
