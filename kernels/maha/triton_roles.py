"""MAHA's attention on Hopper, where warps have roles.

    fetch     rows of a tile                      →  its queries; keys and values of one step after another, ahead of use
    attend    rows of half a tile, those, which   →  out, lse
              of a step's cells rows see

What it computes is what ``attend`` of ``triton_execute`` does, up to rounding. Tiles are the same, and the way of working
that of ``kernels/hsa/triton_roles.py``: one warp fetches, two groups of four warps attend, and rings of shared memory lie
between them.

The cells that some row of a tile sees are one run for each range. Its steps are KEYS cells one after another, so that a
copy is as large as a step; which of them a row sees are bits that the fetching warp leaves beside the keys. That warp has
a lane for each range, and the sinks are number SCALES.

The cells of all scales but the first are rows of one tensor: scale after scale, those of each kv head after another. A
step of a run that is shorter than it reads on behind the run, within the same head. That has to be finite numbers.
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
    await_slot,
    begin_scores,
    begin_slot,
    begin_values,
    bring,
    copy,
    finish,
    half_tile,
    layout_of,
    number_beside,
    partial_sums,
    release,
    ring_of,
    rows_at,
    tell,
    told,
)

RANGES = gl.constexpr(32)
"""Lanes of the fetching warp, one for each range."""
WORD = gl.constexpr(32)
"""Cells whose bits a word has."""
UNBOUNDED = gl.constexpr(2**30)


@gluon.constexpr_function
def bits_of(KEYS):
    """How [row, word, bit] is spread over threads so that each has the bits of its scores [HALF, KEYS]."""
    words = [[0, 1 << i, 0] for i in range((KEYS // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], *words],
        [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, KEYS // 32, 32],
    )


@gluon.jit
def tile_at(w, blocks, tiles, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr):
    """(batch row, kv head, first head, number of the query block) of tile w; the last query blocks have the most steps, and
    come first."""
    PARTS: gl.constexpr = (GROUP + HEADS - 1) // HEADS
    of_block = tiles // blocks
    part = w % of_block
    bh = part // PARTS
    h = bh % KV_HEADS
    return bh // KV_HEADS, h, h * GROUP + part % PARTS * HEADS, blocks - 1 - w // of_block


@gluon.jit
def rows_of(start, length, b, i, slots, tokens, QUERY_BLOCK: gl.constexpr):
    """(slot of batch row b's first token, position of its first query, of query block i, of the first and the last real
    query there)."""
    first = gl.load(start + b).to(gl.int32)
    end = gl.load(length + b).to(gl.int32)
    p0 = slots - tokens - first
    begin = (p0 & -QUERY_BLOCK) + i * QUERY_BLOCK
    t0 = gl.maximum(gl.maximum(begin, p0), 0)
    t1 = gl.minimum(gl.minimum(begin + QUERY_BLOCK, p0 + tokens), end) - 1
    return first, p0, begin, t0, t1


@gluon.jit
def first_cell(t, far, shift, least, LOG: gl.constexpr):
    """The first cell of 2**shift tokens that queries at t see, if they see ``far`` tokens back."""
    return gl.maximum(gl.maximum(t + 1 - far, 0) >> (shift + LOG) << LOG, least)


@gluon.jit
def end_cell(t, near, shift, most):
    """The cell behind the last one that queries at t see, if they see none of the last ``near`` tokens."""
    return gl.minimum(gl.maximum(t + 1 - near, 0) >> shift, most)


@gluon.jit
def ones(n):
    """A word whose first n bits are set, of all n."""
    n = gl.minimum(gl.maximum(n, 0), 32)
    return gl.where(n == 32, -1, (1 << (n & 31)) - 1)


@gluon.jit
def of_lane(x, lane, i):
    """What lane i has of x."""
    return gl.sum(gl.where(lane == i, x, 0), 0)


@gluon.jit
def leave(memory, value, HEADS: gl.constexpr, QUERY_BLOCK: gl.constexpr, WIDTH: gl.constexpr):
    """Leaves numbers [N, WIDTH] of a tile's first rows, which are those of the others too, in [N, rows]."""
    for u in gl.static_range(HEADS * QUERY_BLOCK // WIDTH):
        memory.slice(u * WIDTH, WIDTH, 1).store(value)


@gluon.jit
def copy_cells(desc, desc_cells, ring, slot, level, b, h, token, row, SLABS: gl.constexpr):
    """Copies the cells of a step to a slot of a ring: tokens, or rows of the cells of all other scales."""
    for d in gl.static_range(SLABS):
        memory, full = ring[0].index(slot * SLABS + d), ring[1].index(slot)
        if level == 0:
            copy(desc, [b, h, token, d * SLAB], full, memory)
        else:
            copy(desc_cells, [0, 0, row, d * SLAB], full, memory)


@gluon.jit
def fetch(
    desc_q, desc_k, desc_v, desc_keys, desc_values, start, length, queries, keys, values, words, levels, counts,
    slots, tokens, blocks, tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, QUERY_BLOCK: gl.constexpr,
    DIM: gl.constexpr, SCALES: gl.constexpr, LOG: gl.constexpr, SINK: gl.constexpr, REACHES: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of the warp that fetches."""
    SLABS: gl.constexpr = DIM // SLAB
    WORDS: gl.constexpr = KEYS // WORD
    WIDTH: gl.constexpr = QUERY_BLOCK if QUERY_BLOCK > 32 else 32
    BITS: gl.constexpr = gl.BlockedLayout([WORDS, WIDTH // 32], [1, 32], [1, 1], [1, 0])
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place = gl.arange(0, WIDTH, gl.SliceLayout(0, BITS)) % QUERY_BLOCK
    word = gl.arange(0, WORDS, gl.SliceLayout(1, BITS)) * WORD
    lane = gl.arange(0, RANGES, LANES)
    near, far, before = lane * 0, lane * 0 + UNBOUNDED, lane * 0
    heads = tiles // blocks // ((GROUP + HEADS - 1) // HEADS)
    for each in gl.static_range(SCALES):
        near = gl.where(lane == each, REACHES[each], near)
        far = gl.where(lane == each, REACHES[each + 1], far)
        if each > 0:
            before = gl.where(lane > each, before + heads * (slots >> (each * LOG)), before)
    shift = gl.where(lane < SCALES, lane * LOG, 0)
    least = gl.where(lane < SCALES, SINK >> shift, 0)
    most = gl.where(lane == SCALES, SINK, gl.where(lane < SCALES, UNBOUNDED, 0))
    n = 0
    for w in range(gl.program_id(0), tiles, gl.num_programs(0)):
        number = w // gl.num_programs(0)
        b, h, head0, i = tile_at(w, blocks, tiles, KV_HEADS, GROUP, HEADS)
        first, p0, begin, t0, t1 = rows_of(start, length, b, i, slots, tokens, QUERY_BLOCK)
        low = first_cell(t0, far, shift, least, LOG)
        cells = gl.where(t0 <= t1, gl.maximum(end_cell(t1, near, shift, most) - low, 0), 0)
        # A tile has a step though it sees nothing, so that those who attend need not know.
        steps = gl.maximum((cells + KEYS - 1) // KEYS, gl.where(lane == 0, 1, 0))
        rows = before + (b * KV_HEADS + h) * (slots >> shift) + low
        bring(
            desc_q, queries, number, b, head0, begin - p0, HEADS * QUERY_BLOCK * DIM * 2, SLABS, 1, QUERY_BLOCK, 1
        )  # fmt: skip
        tell(counts, gl.sum(steps, 0), queries)
        for of in range(0, SCALES + (SINK > 0)):
            level = of % SCALES
            own_low, row, own_shift = of_lane(low, lane, of), of_lane(rows, lane, of), level * LOG
            from_ = first_cell(
                begin + place, of_lane(far, lane, of), own_shift, of_lane(least, lane, of), LOG
            )
            to = end_cell(begin + place, of_lane(near, lane, of), own_shift, of_lane(most, lane, of))
            from_, to = from_ - own_low, to - own_low
            left = of_lane(cells, lane, of)
            for _step in range(0, of_lane(steps, lane, of)):
                slot = n % STAGES
                # The last copy ends where the run does: what lies behind is nobody's, or another head's.
                back = gl.minimum(gl.maximum(KEYS - left, 0), own_low)
                token = first + own_low - back
                begin_slot(keys, n, KEYS * DIM * 2, STAGES)
                copy_cells(desc_k, desc_keys, keys, slot, level, b, h, token, row - back, SLABS)
                seen = ones(to[None] + back - word[:, None])
                seen = seen & ~ones(gl.maximum(from_, 0)[None] + back - word[:, None])
                leave(words.index(slot), seen.to(gl.int32), HEADS, QUERY_BLOCK, WIDTH)
                leave(levels.index(slot), (place * 0 + level)[None].to(gl.int32), HEADS, QUERY_BLOCK, WIDTH)
                mbarrier.arrive(keys[1].index(slot))
                begin_slot(values, n, KEYS * DIM * 2, STAGES)
                copy_cells(desc_v, desc_values, values, slot, level, b, h, token, row - back, SLABS)
                own_low += KEYS
                row += KEYS
                from_ -= KEYS
                to -= KEYS
                left -= KEYS
                n += 1


@gluon.jit
def power(x):
    """2 to the power of x, 0 where that would be no normal number."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def beside_keys(
    words, levels, n, offsets, SHARE: gl.constexpr, LOG_RATIO: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """(bits of the cells in place n that rows see [HALF, words], what is added to the scores of rows [HALF])."""
    seen = words.index(n % STAGES).slice(SHARE * HALF, HALF, 1).permute((1, 0)).load(gl.SliceLayout(2, BITS))
    level = (
        levels.index(n % STAGES).slice(SHARE * HALF, HALF, 1).permute((1, 0)).load(gl.SliceLayout(2, BITS))
    )
    level = gl.convert_layout(gl.max(level, 1), ROWS)
    bias = gl.load(offsets + level).to(gl.float32) * LOG2E + level.to(gl.float32) * LOG_RATIO
    return seen, bias


@gluon.jit
def weigh(s, seen, bias, top, total, factor, bit, BITS: gl.constexpr):
    """A step of the online softmax: (weights, largest score so far, sums, factor on what was before)."""
    by_word = gl.convert_layout(gl.reshape(s, [HALF, s.shape[1] // WORD, WORD]), BITS)
    by_word = gl.where((seen[:, :, None] & bit[None, None]) != 0, by_word, -float("inf"))
    s = gl.convert_layout(gl.reshape(by_word, s.shape), layout_of(s))
    new_top = gl.maximum(top, gl.max(s, 1) * factor + bias)
    safe = gl.where(new_top == -float("inf"), 0.0, new_top)
    p = power(s * factor + (bias - safe)[:, None])
    old = power(top - safe)
    sums = partial_sums(p)
    total = total * gl.convert_layout(old, gl.SliceLayout(1, layout_of(sums)))[:, None] + sums
    return p, new_top, total, old


@gluon.jit
def attend(
    SHARE: gl.constexpr, start, length, offsets, out, lse, queries, keys, values, words, levels, counts,
    slots, tokens, blocks, tiles, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, QUERY_BLOCK: gl.constexpr,
    DIM: gl.constexpr, SCALES: gl.constexpr, LOG_RATIO: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The role of a group of warps that attends, to the SHARE-th HALF of a tile's rows."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    dtype: gl.constexpr = out.dtype.element_ty
    BITS: gl.constexpr = bits_of(KEYS)
    bit = 1 << gl.arange(0, WORD, gl.SliceLayout(0, gl.SliceLayout(1, BITS)))
    factor = scale * LOG2E
    n = 0
    for w in range(gl.program_id(0), tiles, gl.num_programs(0)):
        number = w // gl.num_programs(0)
        b, h, head0, i = tile_at(w, blocks, tiles, KV_HEADS, GROUP, HEADS)
        head = head0 + (SHARE * HALF + gl.arange(0, HALF, ROWS)) // QUERY_BLOCK
        own_offsets = offsets + gl.minimum(head, (h + 1) * GROUP - 1) * SCALES
        await_slot(queries, number, 1)
        steps = told(counts)
        x = half_tile(queries, SHARE, HEADS * QUERY_BLOCK, DIM, gl.DotOperandLayout(0, SCORES, 2))
        release(queries, number, 1)

        # The first step has no values to add meanwhile.
        top = gl.full([HALF], -float("inf"), gl.float32, ROWS)
        s = begin_scores(x, gl.zeros([HALF, KEYS], gl.float32, SCORES), keys, n, DIM, KEYS, STAGES)
        seen, bias = beside_keys(words, levels, n, own_offsets, SHARE, LOG_RATIO, STAGES, BITS, ROWS)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        release(keys, n, STAGES)
        total = partial_sums(gl.zeros([HALF, KEYS], gl.float32, SCORES))
        p, top, total, old = weigh(s, seen, bias, top, total, factor, bit, BITS)
        p = gl.convert_layout(p.to(dtype), WEIGHTS)
        acc = gl.zeros([HALF, DIM], gl.float32, SUMS)
        for _step in range(1, steps):
            n += 1
            s = begin_scores(x, s, keys, n, DIM, KEYS, STAGES)
            acc = begin_values(p, acc, values, n - 1, DIM, KEYS, STAGES)
            seen, bias = beside_keys(words, levels, n, own_offsets, SHARE, LOG_RATIO, STAGES, BITS, ROWS)
            s = hopper.warpgroup_mma_wait(1, deps=[s])
            release(keys, n, STAGES)
            y, top, total, old = weigh(s, seen, bias, top, total, factor, bit, BITS)
            acc, p = finish(acc, p, gl.convert_layout(y.to(dtype), WEIGHTS), values, n - 1, STAGES)
            acc = acc * gl.convert_layout(old, gl.SliceLayout(1, SUMS))[:, None]
        acc = begin_values(p, acc, values, n, DIM, KEYS, STAGES)
        acc, p = finish(acc, p, p, values, n, STAGES)
        n += 1

        _first, p0, begin, t0, t1 = rows_of(start, length, b, i, slots, tokens, QUERY_BLOCK)
        row_b = b.to(gl.int64) * KV_HEADS * GROUP
        head, t, new = rows_at(SHARE, h, head0, begin, p0, p0 + tokens, GROUP, QUERY_BLOCK, ROWS)
        real = (t >= t0) & (t <= t1)
        sums = gl.where(real, gl.convert_layout(gl.sum(total, 1), ROWS), 1.0)
        mass = gl.where(real, top + gl.log2(sums), -float("inf"))
        gl.store(lse + (row_b + head) * tokens + t - p0, mass, mask=new)
        # Padding has zeros, whatever it attended to.
        share = gl.convert_layout(gl.where(real, 1.0 / sums, -1.0), gl.SliceLayout(1, SUMS))[:, None]
        acc = gl.where(share < 0.0, 0.0, acc * share)
        result = gl.convert_layout(acc.to(dtype), WIDE)
        head, t, new = rows_at(
            SHARE, h, head0, begin, p0, p0 + tokens, GROUP, QUERY_BLOCK, gl.SliceLayout(1, WIDE)
        )
        at = ((row_b + head) * tokens + t - p0) * DIM
        dim = gl.arange(0, DIM, gl.SliceLayout(0, WIDE))
        gl.store(out + at[:, None] + dim[None], result, mask=new[:, None])


@Kernel
@gluon.jit(do_not_specialize=["slots", "tokens", "blocks", "tiles"])
def attend_by_roles(
    desc_q, desc_k, desc_v, desc_keys, desc_values, start, length, offsets, out, lse,
    slots, tokens, blocks, tiles, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, QUERY_BLOCK: gl.constexpr,
    DIM: gl.constexpr, SCALES: gl.constexpr, LOG: gl.constexpr, LOG_RATIO: gl.constexpr, SINK: gl.constexpr,
    REACHES: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Writes ``out`` [B, Hq, T, DIM] and ``lse`` [B, Hq, T], as ``attend`` does.

    The descriptors' blocks are [1, HEADS, QUERY_BLOCK, SLAB] of q and [1, 1, KEYS, SLAB] of the others, of which the
    cells are [1, 1, rows, DIM]; ``scale`` is positive.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    SLABS: gl.constexpr = DIM // SLAB
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # Beside queries stands the number of their tile's steps, and beside keys which of them rows see, and their scale.
    queries = ring_of(desc_q, dtype, 1, SLABS, FILLS=2)
    keys = ring_of(desc_k, dtype, STAGES, SLABS, FILLS=2)
    values = ring_of(desc_v, dtype, STAGES, SLABS)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS // WORD, HEADS * QUERY_BLOCK], PLAIN)
    levels = gl.allocate_shared_memory(gl.int32, [STAGES, 1, HEADS * QUERY_BLOCK], PLAIN)
    counts = number_beside()
    gl.warp_specialize(
        [
            (attend, (
                gl.constexpr(0), start, length, offsets, out, lse, queries, keys, values, words, levels, counts,
                slots, tokens, blocks, tiles, scale,
                KV_HEADS, GROUP, HEADS, QUERY_BLOCK, DIM, SCALES, LOG_RATIO, KEYS, STAGES,
            )),
            (attend, (
                gl.constexpr(1), start, length, offsets, out, lse, queries, keys, values, words, levels, counts,
                slots, tokens, blocks, tiles, scale,
                KV_HEADS, GROUP, HEADS, QUERY_BLOCK, DIM, SCALES, LOG_RATIO, KEYS, STAGES,
            )),
            (fetch, (
                desc_q, desc_k, desc_v, desc_keys, desc_values, start, length, queries, keys, values, words, levels, counts,
                slots, tokens, blocks, tiles,
                KV_HEADS, GROUP, HEADS, QUERY_BLOCK, DIM, SCALES, LOG, SINK, REACHES, KEYS, STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
