"""What a few new tokens complete and begin, on a GPU: cells of the pyramid, and query blocks with the spans they keep.

    advance   k  →  nodes of all levels, spreads;  q of the first tokens of blocks × nodes  →  spans

A program does this for a row and kv head, by the functions of the kernels for whole sequences, in their order. For most
tokens there is nothing to do.
"""

from __future__ import annotations

import triton.language as tl

from retrofit.kernels.hsa.triton_select import keep_best, row_range, score_below, score_top
from retrofit.kernels.launch import kernel
from retrofit.kernels.pyramid.triton_pool import grow_levels


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks"])
def advance(
    q, k, nodes, taps, spreads, start, length, spans, scores,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    slots, tokens, blocks, total_blocks, capacities, scale,
    COARSE: tl.constexpr, LEVELS: tl.constexpr, RATIOS: tl.constexpr, POOLING: tl.constexpr, CELLS: tl.constexpr,
    HALVINGS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, PER_SPAN: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    DENSE_END: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, REACH: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Brings ``nodes``, a tuple of [B, Hkv, capacity, DIM], and ``spreads`` [B, Hkv, capacity] up to the new tokens, and
    ``spans`` [B·Hkv, total_blocks, BEAM] to the blocks that they begin.

    There are coarse steps of the levels COARSE to 1; ``scores``, float32 [B·Hkv, blocks, G, WIDTH], has room for one.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // KV_HEADS, bh % KV_HEADS
    low, high, offset, begin = row_range(start, length, slots, tokens, b, LAYOUT)
    before, after = tl.maximum(low - SINK, 0).to(tl.int64), tl.maximum(high - SINK, 0).to(tl.int64)
    if after // RATIOS[0] > before // RATIOS[0]:
        grow_levels(
            k + b * stride_kb + h * stride_kh, nodes, taps, spreads, bh, h, begin.to(tl.int64), before, after,
            stride_kt.to(tl.int64), slots.to(tl.int64), capacities,
            SINK, LEVELS, RATIOS, DIM, DIM_PAD, HALVINGS, POOLING, CELLS,
        )  # fmt: skip
    last = (high - 1) // QUERY_BLOCK * QUERY_BLOCK
    if (COARSE > 0) & (last >= low) & (last + QUERY_BLOCK > DENSE_END):
        for step in tl.static_range(COARSE):
            count = capacities[COARSE - step]
            base = nodes[COARSE - step] + bh * count * DIM
            for first in range(0, blocks, TILE // GROUP_PAD):
                score_top(
                    q, base, scores, bh, b, h, low, high, offset, first, stride_qb, stride_qh, stride_qt,
                    blocks, count,
                    COARSE - step, LEVELS, GROUP, GROUP_PAD, DIM, DIM_PAD, WINDOW, SINK, BLOCK, FANOUT, PER_SPAN, BEAM,
                    QUERY_BLOCK, DENSE_END, WIDTH, TILE, PRECISION,
                )  # fmt: skip
                if step > 0:
                    score_below(
                        q, base, spans, scores, bh, b, h, low, high, offset, first, stride_qb, stride_qh, stride_qt,
                        blocks, total_blocks, count,
                        COARSE - step, LEVELS, GROUP, GROUP_PAD, DIM, DIM_PAD, WINDOW, SINK, BLOCK, FANOUT, PER_SPAN, BEAM,
                        QUERY_BLOCK, DENSE_END, WIDTH, TILE, PRECISION,
                    )  # fmt: skip
            tl.debug_barrier()  # all scores have been written
            for i in range(0, blocks):
                keep_best(
                    spans, scores, bh, low, high, i, blocks, total_blocks, scale,
                    COARSE - step, LEVELS, GROUP, WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, DENSE_END, WIDTH,
                    WIDTH_PAD, False, REACH,
                )  # fmt: skip
            tl.debug_barrier()  # all spans have been written, and all scores read
