"""Gradients of the queries on Hopper, where warps have roles.

    fetch     list                        →  queries of a tile and the gradients of their outputs; keys, values
    descend   rows of half a tile, those  →  grad_q, delta

It is ``query_gradients`` of ``triton_gradients`` in the way of ``triton_roles``: while the slopes of a step meet its keys
once more, the scores of the next one are computed and weighed. Keys stay in their ring until then.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from retrofit.kernels.hsa.triton_roles import (
    fetch,
    steps_of,
    tile_at,
    tile_of,
    weigh_edge,
    weigh_listed,
)
from retrofit.kernels.launch import Kernel
from retrofit.kernels.roles import (
    HALF,
    LOG2E,
    SLAB,
    await_slot,
    begin_scores,
    begin_values,
    finish,
    half_tile,
    number_beside,
    release,
    ring_of,
    rows_at,
)


@gluon.jit
def begin_step(
    x, dy, ds, s, products, acc, keys, values, n, DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr
):
    """Begins the scores of step n and ⟨gradient, value⟩, and adds the slopes of the step before; waits for all but the
    last."""
    s = begin_scores(x, s, keys, n, DIM, KEYS, STAGES)
    products = begin_scores(dy, products, values, n, DIM, KEYS, STAGES)
    acc = begin_values(ds, acc, keys, n - 1, DIM, KEYS, STAGES)
    s, products = hopper.warpgroup_mma_wait(1, deps=[s, products])
    release(values, n, STAGES)
    return s, products, acc


@gluon.jit
def descend(
    SHARE: gl.constexpr, counts, lse, out, delta, grad_q, number_of_tile, queries, grads, keys, values,
    stride_ob, stride_oh, stride_ot, stride_xb, stride_xh, stride_xt,
    slots, tokens, blocks, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group of warps that goes back through the SHARE-th HALF of a tile's rows."""
    LEAVES: gl.constexpr = KEYS // BLOCK
    TILE: gl.constexpr = HEADS * QUERY_BLOCK
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    SLOPES: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
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
        top = gl.load(lse + at, mask=new, other=float("inf")) * LOG2E
        seen = gl.load(counts + number * QUERY_BLOCK + place)
        most = gl.load(counts + number * QUERY_BLOCK + QUERY_BLOCK - 1)
        dense, before_edges, whole, right, first, edges = steps_of(
            t0, most, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, LEAVES
        )
        seen = gl.where(dense, before_edges * LEAVES, seen)
        from_ = gl.where(dense, 0, gl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK)

        head_w, t_w, new_w = rows_at(
            SHARE, h, head0, t0, low, slots, GROUP, QUERY_BLOCK, gl.SliceLayout(1, WIDE)
        )
        dim_w = gl.arange(0, DIM, gl.SliceLayout(0, WIDE))
        at_w = row_b * stride_ob + head_w.to(gl.int64) * stride_oh + (t_w - low).to(gl.int64) * stride_ot
        y = gl.load(out + at_w[:, None] + dim_w[None], mask=new_w[:, None], other=0.0)
        await_slot(grads, seen_tiles, 1)
        dy = half_tile(grads, SHARE, TILE, DIM, WIDE)
        mean = gl.convert_layout(gl.sum(dy.to(gl.float32) * y.to(gl.float32), 1), ROWS)
        gl.store(delta + at, mean, mask=new)
        x = half_tile(queries, SHARE, TILE, DIM, OPERAND)
        dy = half_tile(grads, SHARE, TILE, DIM, OPERAND)
        release(queries, seen_tiles, 1)
        release(grads, seen_tiles, 1)
        seen_tiles += 1

        # The first step has no slopes to add meanwhile.
        zeros = gl.zeros([HALF, KEYS], gl.float32, SCORES)
        s = begin_scores(x, zeros, keys, n, DIM, KEYS, STAGES)
        products = begin_scores(dy, zeros, values, n, DIM, KEYS, STAGES)
        s, products = hopper.warpgroup_mma_wait(0, deps=[s, products])
        release(values, n, STAGES)
        if before_edges > 0:
            p = weigh_listed(s, 0, seen, top, factor, column, BLOCK, KEYS)
        else:
            p = weigh_edge(s, 0, t, from_, top, factor, column, whole, right, first, edges, beyond, BLOCK)
        ds = gl.convert_layout((p * (products - mean[:, None])).to(dtype), SLOPES)
        acc = gl.zeros([HALF, DIM], gl.float32, SUMS)
        for step in range(1, before_edges):
            n += 1
            s, products, acc = begin_step(x, dy, ds, s, products, acc, keys, values, n, DIM, KEYS, STAGES)
            p = weigh_listed(s, step * LEAVES, seen, top, factor, column, BLOCK, KEYS)
            following = gl.convert_layout((p * (products - mean[:, None])).to(dtype), SLOPES)
            acc, ds = finish(acc, ds, following, keys, n - 1, STAGES)
        for step in range(gl.maximum(before_edges, 1), before_edges + (edges + LEAVES - 1) // LEAVES):
            n += 1
            s, products, acc = begin_step(x, dy, ds, s, products, acc, keys, values, n, DIM, KEYS, STAGES)
            e = (step - before_edges) * LEAVES
            p = weigh_edge(s, e, t, from_, top, factor, column, whole, right, first, edges, beyond, BLOCK)
            following = gl.convert_layout((p * (products - mean[:, None])).to(dtype), SLOPES)
            acc, ds = finish(acc, ds, following, keys, n - 1, STAGES)
        acc = begin_values(ds, acc, keys, n, DIM, KEYS, STAGES)
        acc, ds = finish(acc, ds, ds, keys, n, STAGES)
        n += 1

        at_w = row_b * stride_xb + head_w.to(gl.int64) * stride_xh + (t_w - low).to(gl.int64) * stride_xt
        result = gl.convert_layout((acc * scale).to(dtype), WIDE)
        gl.store(grad_q + at_w[:, None] + dim_w[None], result, mask=new_w[:, None])
        w = tile_of(number_of_tile, queries, seen_tiles)


@Kernel
@gluon.jit(do_not_specialize=["slots", "tokens", "blocks", "tiles"])
def query_gradients_by_roles(
    desc_q, desc_g, desc_k, desc_v, ordered, counts, taken, lse, out, delta, grad_q,
    stride_ob, stride_oh, stride_ot, stride_xb, stride_xh, stride_xt,
    slots, tokens, blocks, tiles, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, WINDOW: gl.constexpr,
    SINK: gl.constexpr, BLOCK: gl.constexpr, QUERY_BLOCK: gl.constexpr, DENSE_END: gl.constexpr,
    LIST: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Writes ``grad_q`` as q and ``delta`` [B, Hq, T], as ``query_gradients`` does.

    Descriptors are those of ``attend_by_roles``, of the output's gradient as of q. ``taken`` [1] is 0.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    COPIES: gl.constexpr = DIM // SLAB * (KEYS // BLOCK)
    queries, number_of_tile = ring_of(desc_q, dtype, 1, DIM // SLAB, FILLS=2), number_beside()
    grads = ring_of(desc_g, dtype, 1, DIM // SLAB)
    keys = ring_of(desc_k, dtype, STAGES, COPIES)
    values = ring_of(desc_v, dtype, STAGES, COPIES)
    gl.warp_specialize(
        [
            (descend, (
                gl.constexpr(0), counts, lse, out, delta, grad_q, number_of_tile, queries, grads, keys, values,
                stride_ob, stride_oh, stride_ot, stride_xb, stride_xh, stride_xt, slots, tokens, blocks, scale,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, STAGES,
            )),
            (descend, (
                gl.constexpr(1), counts, lse, out, delta, grad_q, number_of_tile, queries, grads, keys, values,
                stride_ob, stride_oh, stride_ot, stride_xb, stride_xh, stride_xt, slots, tokens, blocks, scale,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, KEYS, STAGES,
            )),
            (fetch, (
                desc_q, desc_g, desc_k, desc_v, number_of_tile, queries, grads, keys, values, ordered, counts, taken,
                slots, tokens, blocks, tiles,
                KV_HEADS, GROUP, HEADS, DIM, WINDOW, SINK, BLOCK, QUERY_BLOCK, DENSE_END, LIST, KEYS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
