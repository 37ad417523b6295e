"""Gradients of exact attention to sinks, window and listed leaves on a GPU.

With p = exp(score − lse), the weights, and δ = ⟨gradient, output⟩, the slopes of the scores are
p · (⟨gradient, value⟩ − δ):

    query_gradients   a query block × all keys it sees            →  grad_q, δ
    key_gradients     a tile of keys × all query blocks that do   →  grad_k, grad_v, or a part of them
    join_gradients    parts of the tiles that many blocks see     →  grad_k, grad_v

No two programs write to one place: the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.triton_choose import WHOLE
from retrofit.kernels.hsa.triton_execute import listed_keys, listed_shares, load_values, near_edges, settled
from retrofit.kernels.hsa.triton_inverse import near_blocks, tile_keys, unpack_entry
from retrofit.kernels.hsa.triton_select import LOG2E, in_reach, row_range
from retrofit.kernels.launch import kernel


@triton.jit
def scores_and_products(x, slope, keys, values, lse, factor, PRECISION: tl.constexpr):
    """Weights [M, N] of queries x [M, D] for keys [D, N], and ⟨gradient, value⟩.

    ``lse`` [M, 1] or [M, N] is in powers of two; where it is infinite, weights are 0.
    """
    s = tl.dot(x, keys, input_precision=PRECISION)
    products = tl.dot(slope, values, input_precision=PRECISION)
    return tl.exp2(s * factor - lse), products


@kernel()
def query_gradients(
    q, k, v, out, grad, lse, start, length, ordered, shares, counts, grad_q, delta,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_xb, stride_xh, stride_xt,
    slots, tokens, blocks, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    DENSE_END: tl.constexpr, LIST: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, REACH: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``grad_q`` as q and ``delta`` [B, Hq, T] for the new queries; tiles are those of ``attend``."""
    ROWS: tl.constexpr = HEADS * QUERIES
    SPLIT: tl.constexpr = QUERY_BLOCK // QUERIES
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    i = tl.program_id(0) // SPLIT
    bh = (tl.program_id(1) // PARTS).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
    t0 = (low // QUERY_BLOCK + i) * QUERY_BLOCK
    if t0 < high:
        row = tl.arange(0, ROWS)
        place = tl.program_id(0) % SPLIT * QUERIES + row % QUERIES
        g = tl.program_id(1) % PARTS * HEADS + row // QUERIES
        t = t0 + place
        new = (t >= low) & (t < high) & (g < GROUP)
        head, at = h * GROUP + g, (t + offset).to(tl.int64)
        dim = tl.arange(0, DIM_PAD)
        value_dim = tl.arange(0, VALUE_PAD)
        has_dim, has_value = (dim < DIM)[None], (value_dim < VALUE_DIM)[None]
        at_q = b * stride_qb + head * stride_qh + at * stride_qt
        at_out = b * stride_ob + head * stride_oh + at * stride_ot
        at_grad = b * stride_gb + head * stride_gh + at * stride_gt
        x = tl.load(q + at_q[:, None] + dim[None], mask=new[:, None] & has_dim, other=0.0)
        y = tl.load(out + at_out[:, None] + value_dim[None], mask=new[:, None] & has_value, other=0.0)
        dy = tl.load(grad + at_grad[:, None] + value_dim[None], mask=new[:, None] & has_value, other=0.0)
        mean = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
        slot = (b * KV_HEADS * GROUP + head) * tokens + at
        tl.store(delta + slot, mean, mask=new)
        top = tl.load(lse + slot, mask=new, other=float("inf"))[:, None] * LOG2E

        keys = k + b * stride_kb + h * stride_kh + begin.to(tl.int64) * stride_kt
        values = v + b * stride_vb + h * stride_vh + begin.to(tl.int64) * stride_vt
        key = tl.arange(0, KEYS)
        factor = scale * LOG2E
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        first, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
        from_ = tl.maximum(t + 1 - WINDOW, 0) // BLOCK * BLOCK
        if t0 + QUERY_BLOCK > DENSE_END:
            listed, weights = ordered + (bh * blocks + i) * LIST, shares + (bh * blocks + i) * LIST
            seen_by = counts + (bh * blocks + i) * QUERY_BLOCK
            seen = tl.load(seen_by + place)
            for u in range(0, tl.load(seen_by + QUERY_BLOCK - 1), KEYS // BLOCK):
                j = listed_keys(listed, u, KEYS, BLOCK)
                a = load_values(keys, j, stride_kt, None, DIM, DIM_PAD)
                c = load_values(values, j, stride_vt, None, VALUE_DIM, VALUE_PAD)
                p, products = scores_and_products(x, dy, tl.trans(a), tl.trans(c), top, factor, PRECISION)
                share = listed_shares(weights, u, KEYS, BLOCK)
                p *= tl.where((u + key // BLOCK)[None] < seen[:, None], share[None], 0.0)
                if REACH:
                    p = tl.where(in_reach(j[None], t[:, None], REACH), p, 0.0)
                ds = p * (products - mean[:, None])
                acc = settled(tl.dot(ds.to(a.dtype), a, acc, input_precision=PRECISION))
        else:
            first, last, whole, from_ = first * 0, last * 0, whole * 0, from_ * 0
        right = t0 + QUERY_BLOCK - whole
        for n in range(0, right + last - first, KEYS):
            j = n + key + tl.where(n + key < right, whole, first - right)
            inside = (n + key < right + last - first) & (j < high)
            a = load_values(keys, j, stride_kt, inside, DIM, DIM_PAD)
            c = load_values(values, j, stride_vt, inside, VALUE_DIM, VALUE_PAD)
            p, products = scores_and_products(x, dy, tl.trans(a), tl.trans(c), top, factor, PRECISION)
            p = tl.where(inside[None] & (j[None] <= t[:, None]) & (j[None] >= from_[:, None]), p, 0.0)
            if REACH:
                p = tl.where(in_reach(j[None], t[:, None], REACH), p, 0.0)
            ds = p * (products - mean[:, None])
            acc = settled(tl.dot(ds.to(a.dtype), a, acc, input_precision=PRECISION))

        at_x = b * stride_xb + head * stride_xh + at * stride_xt
        tl.store(
            grad_q + at_x[:, None] + dim[None],
            (acc * scale).to(grad_q.dtype.element_ty),
            mask=new[:, None] & has_dim,
        )


@kernel()
def key_gradients(
    q, k, v, grad, lse, delta, start, length, entries, ends, steps, parts, part_ends, owners, size,
    grad_k, grad_v, held,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt,
    slots, tokens, blocks, tiles, chunks, all_tiles, all_parts, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    KEYS: tl.constexpr, WHOLE_LEAVES: tl.constexpr, PRECISION: tl.constexpr, REACH: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``grad_k`` and ``grad_v`` as k and v, or a part to ``held`` [parts, KEYS, DIM + VALUE_DIM].

    The first programs do a part of a tile each, at most ``size`` steps; the others do the tiles of one part.
    """
    ROWS: tl.constexpr = HEADS * QUERY_BLOCK
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    LEAVES: tl.constexpr = KEYS // BLOCK
    w = tl.program_id(0).to(tl.int64)
    split = w < all_parts
    owner = tl.load(owners + w, mask=split, other=0)
    which = tl.where(split, owner, w - all_parts)
    count = tl.load(parts + which, mask=which < all_tiles, other=0)
    if tl.where(split, which < all_tiles, count == 1):
        bh, tile = which // tiles, (which % tiles).to(tl.int32)
        b, h = bh // KV_HEADS, bh % KV_HEADS
        low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
        sinks, tile_begin, tile_end = tile_keys(tile, SINK, KEYS)
        near_from, near = near_blocks(
            sinks, tile_begin, tile_end, low, high, WINDOW, QUERY_BLOCK, DENSE_END
        )  # fmt: skip
        most = tl.load(size).to(tl.int32)
        step = tl.where(split, w - (tl.load(part_ends + which) - count), 0).to(tl.int32) * most
        last = tl.minimum(step + most, tl.load(steps + which))
        listed = entries - near + tl.load(ends + which * chunks - 1, mask=which > 0, other=0)

        key = tl.arange(0, KEYS)
        j = tile_begin + key
        inside = ((j < tile_end) & (j < high))[:, None]
        dim = tl.arange(0, DIM_PAD)
        value_dim = tl.arange(0, VALUE_PAD)
        has_dim, has_value = (dim < DIM)[None], (value_dim < VALUE_DIM)[None]
        at_key = (begin + j)[:, None].to(tl.int64)
        keys = k + b * stride_kb + h * stride_kh
        values = v + b * stride_vb + h * stride_vh
        # Transposed here, they are put where products read them once for all steps.
        a = tl.trans(tl.load(keys + at_key * stride_kt + dim[None], mask=inside & has_dim, other=0.0))
        c = tl.trans(
            tl.load(values + at_key * stride_vt + value_dim[None], mask=inside & has_value, other=0.0)
        )

        row = tl.arange(0, ROWS)
        place = row % QUERY_BLOCK
        above = (row // QUERY_BLOCK).to(tl.int64)
        row_q = above * stride_qh + place * stride_qt
        row_grad = above * stride_gh + place * stride_gt
        row_lse = above * tokens + place
        leaf = tl.arange(0, LEAVES)
        leaf_end = tile_begin + (leaf + 1) * BLOCK
        factor = scale * LOG2E
        acc_k = tl.zeros([DIM_PAD, KEYS], tl.float32)
        acc_v = tl.zeros([VALUE_PAD, KEYS], tl.float32)
        following = tl.load(listed + step, mask=step >= near, other=0)
        for s in range(step * PARTS, last * PARTS):
            # What the step after this one needs is on its way while this one computes.
            e, part = s // PARTS, s % PARTS
            entry = following
            following = tl.load(
                listed + (s + 1) // PARTS, mask=((s + 1) // PARTS >= near) & (s + 1 < last * PARTS), other=0
            )
            is_near = e < near
            number = tl.where(is_near, near_from + e, (entry >> 32).to(tl.int32))
            t0 = number * QUERY_BLOCK
            # The places of the block that see a leaf: from the one that chose it, or while it is in their
            # window; then those that see any.
            when, rise = unpack_entry(entry, QUERY_BLOCK, LEAVES, WHOLE_LEAVES)
            whole = sinks | (number < DENSE_END // QUERY_BLOCK) | (is_near == 0)
            from_ = tl.where(is_near, tile_begin - t0, when)
            to = tl.where(whole, QUERY_BLOCK, leaf_end + WINDOW - 1 - t0)
            new = (place >= tl.maximum(tl.min(from_, 0), low - t0)) & (
                place < tl.minimum(tl.max(to, 0), high - t0)
            )
            new &= part * HEADS + row // QUERY_BLOCK < GROUP
            head, at = h * GROUP + part * HEADS, (t0 + offset).to(tl.int64)
            x = tl.load(
                q + (b * stride_qb + head * stride_qh + at * stride_qt) + row_q[:, None] + dim[None],
                mask=new[:, None] & has_dim, other=0.0,
            )  # fmt: skip
            dy = tl.load(
                grad + (b * stride_gb + head * stride_gh + at * stride_gt) + row_grad[:, None] + value_dim[None],
                mask=new[:, None] & has_value, other=0.0,
            )  # fmt: skip
            slot = (b * KV_HEADS * GROUP + head) * tokens + at
            top = tl.load(lse + slot + row_lse, mask=new, other=float("inf"))[:, None] * LOG2E
            if WHOLE_LEAVES == 0:
                top -= tl.where(is_near, 0.0, tl.log2(rise.to(tl.float32) / WHOLE))
            mean = tl.load(delta + slot + row_lse, mask=new, other=0.0)
            if LEAVES > 1:
                seen = (place[:, None] >= from_[None]) & (place[:, None] < to[None])
                top = tl.broadcast_to(tl.where(seen, top, float("inf"))[:, :, None], [ROWS, LEAVES, BLOCK])
                top = tl.reshape(top, [ROWS, KEYS])
            p, products = scores_and_products(x, dy, a, c, top, factor, PRECISION)
            p = tl.where(key[None] <= (t0 - tile_begin + place)[:, None], p, 0.0)
            if REACH:
                p = tl.where(in_reach(j[None], (t0 + place)[:, None], REACH), p, 0.0)
            ds = p * (products - mean[:, None])
            acc_v = tl.dot(tl.trans(dy), p.to(dy.dtype), acc_v, input_precision=PRECISION)
            acc_k = tl.dot(tl.trans(x), ds.to(x.dtype), acc_k, input_precision=PRECISION)

        dk, dv = tl.trans(acc_k) * scale, tl.trans(acc_v)
        if split:
            at_part = held + (w * KEYS + key)[:, None] * (DIM + VALUE_DIM)
            tl.store(at_part + dim[None], dk, mask=inside & has_dim)
            tl.store(at_part + DIM + value_dim[None], dv, mask=inside & has_value)
        else:
            to_k = grad_k + b * stride_xb + h * stride_xh + at_key * stride_xt + dim[None]
            to_v = grad_v + b * stride_yb + h * stride_yh + at_key * stride_yt + value_dim[None]
            tl.store(to_k, dk.to(grad_k.dtype.element_ty), mask=inside & has_dim)
            tl.store(to_v, dv.to(grad_v.dtype.element_ty), mask=inside & has_value)


@kernel()
def join_gradients(
    held, start, length, parts, part_ends, grad_k, grad_v,
    stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, tiles,
    KV_HEADS: tl.constexpr, SINK: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Sums the parts of each tile that has several, in order."""
    which = tl.program_id(0).to(tl.int64)
    count = tl.load(parts + which)
    if count > 1:
        bh, tile = which // tiles, (which % tiles).to(tl.int32)
        b, h = bh // KV_HEADS, bh % KV_HEADS
        _, tile_begin, tile_end = tile_keys(tile, SINK, KEYS)
        key = tl.arange(0, KEYS)
        j = tile_begin + key
        inside = ((j < tile_end) & (j < tl.load(length + b)))[:, None]
        at_key = (tl.load(start + b) + j)[:, None]
        dim = tl.arange(0, DIM_PAD)
        value_dim = tl.arange(0, VALUE_PAD)
        of_key, of_value = inside & (dim < DIM)[None], inside & (value_dim < VALUE_DIM)[None]
        dk = tl.zeros([KEYS, DIM_PAD], tl.float32)
        dv = tl.zeros([KEYS, VALUE_PAD], tl.float32)
        end = tl.load(part_ends + which)
        for w in range(end - count, end):
            at_part = held + (tl.cast(w, tl.int64) * KEYS + key)[:, None] * (DIM + VALUE_DIM)
            dk += tl.load(at_part + dim[None], mask=of_key, other=0.0)
            dv += tl.load(at_part + DIM + value_dim[None], mask=of_value, other=0.0)
        to_k = grad_k + b * stride_xb + h * stride_xh + at_key * stride_xt + dim[None]
        to_v = grad_v + b * stride_yb + h * stride_yh + at_key * stride_yt + value_dim[None]
        tl.store(to_k, dk.to(grad_k.dtype.element_ty), mask=of_key)
        tl.store(to_v, dv.to(grad_v.dtype.element_ty), mask=of_value)
