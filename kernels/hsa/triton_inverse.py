"""Which query blocks see a tile of keys: the lists of leaves, the other way round.

Tiles of KEYS keys cover the sinks first and then the leaves, LEAVES to a tile:

    tile 0 … SINKS−1 │ tile SINKS + m = leaves m·LEAVES … m·LEAVES + LEAVES−1

The blocks that see a tile as sinks, in their window, or because they are dense are one range, its *near*
blocks; those that listed a leaf of it are its entries, in ascending order:

    count_entries   first                     →  entries of each tile from each chunk of blocks
    write_entries   first, their running sum  →  entries
    count_steps     near blocks and entries   →  steps of each tile

An entry is block · 2³² + Σ when(leaf) · 256^leaf, where ``when`` is the row that chose the leaf first, 255 for
none. One program writes a chunk, block after block, so the order never depends on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.triton_select import covered_leaves, row_range


@triton.jit
def tile_keys(tile, SINK: tl.constexpr, KEYS: tl.constexpr):
    """(whether it holds sinks, first position, end) of a tile."""
    SINKS: tl.constexpr = (SINK + KEYS - 1) // KEYS
    sinks = tile < SINKS
    begin = tl.where(sinks, tile * KEYS, SINK + (tile - SINKS) * KEYS)
    return sinks, begin, tl.where(sinks, tl.minimum(begin + KEYS, SINK), begin + KEYS)


@triton.jit
def near_blocks(
    sinks, begin, end, low, high, WINDOW: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr
):
    """(number of the first near block, how many) for the queries low … high."""
    from_ = tl.maximum(begin, low) // QUERY_BLOCK
    to = tl.maximum((end + WINDOW - 2) // QUERY_BLOCK + 1, DENSE_END // QUERY_BLOCK)
    all_ = (high + QUERY_BLOCK - 1) // QUERY_BLOCK
    to = tl.where(sinks, all_, tl.minimum(to, all_))
    return from_, tl.maximum(to - from_, 0)


@triton.jit
def block_entries(
    spans, first, at, number,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr,
    BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    LEAVES: tl.constexpr,
):  # fmt: skip
    """(whether it is one, tile, entry) for the leaf candidates of a block, LEAVES at a time."""
    SINKS: tl.constexpr = (SINK + LEAVES * BLOCK - 1) // (LEAVES * BLOCK)
    candidate = tl.arange(0, WIDTH_PAD // LEAVES) * LEAVES
    entry = candidate.to(tl.int64) * 0 + (number.to(tl.int64) << 32)
    earliest = candidate * 0 + QUERY_BLOCK
    for leaf in tl.static_range(LEAVES):
        known = candidate + leaf < WIDTH
        when = tl.load(first + at * WIDTH + candidate + leaf, mask=known, other=QUERY_BLOCK).to(tl.int32)
        earliest = tl.minimum(earliest, when)
        entry += tl.where(when < QUERY_BLOCK, when, 255).to(tl.int64) << (8 * leaf)
    child = candidate < BEAM * FANOUT
    parent = tl.load(spans + at * BEAM + candidate // FANOUT, mask=child, other=0)
    edge = (covered_leaves(number * QUERY_BLOCK, WINDOW, SINK, BLOCK) // FANOUT).to(tl.int32)
    parent = tl.where(child, parent, edge)
    leaf = parent * FANOUT + tl.where(child, candidate % FANOUT, candidate - BEAM * FANOUT)
    return earliest < QUERY_BLOCK, SINKS + leaf // LEAVES, entry


@triton.jit
def count_entries(
    start, length, spans, first, counts,
    slots, tokens, blocks, total_blocks, tiles, chunks, per_chunk,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, LEAVES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Adds to ``counts`` [B·Hkv, tiles, chunks]."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    number = low // QUERY_BLOCK + i
    t0 = number * QUERY_BLOCK
    if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
        known, tile, _entry = block_entries(
            spans, first, bh * total_blocks + number, number,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH, WIDTH_PAD, LEAVES,
        )  # fmt: skip
        tl.atomic_add(counts + (bh * tiles + tile) * chunks + i // per_chunk, 1, mask=known, sem="relaxed")


@triton.jit
def write_entries(
    start, length, spans, first, places, entries,
    slots, tokens, blocks, total_blocks, tiles, chunks, per_chunk,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, LEAVES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``entries`` from ``places`` [B·Hkv, tiles, chunks] on, which moves on with them."""
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    for i in range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, blocks)):
        number = low // QUERY_BLOCK + i
        t0 = number * QUERY_BLOCK
        if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
            known, tile, entry = block_entries(
                spans, first, bh * total_blocks + number, number,
                WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH, WIDTH_PAD, LEAVES,
            )  # fmt: skip
            place = places + (bh * tiles + tile) * chunks + chunk
            at = tl.load(place, mask=known, other=0)
            tl.store(entries + at, entry, mask=known)
            tl.store(place, at + 1, mask=known)
            tl.debug_barrier()  # the next block's programs read what this one's wrote


@triton.jit
def count_steps(
    start, length, ends, steps,
    slots, tokens, blocks, tiles, chunks,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``steps`` [B·Hkv, tiles]; ``ends`` is the running sum of what ``count_entries`` counted."""
    tile = tl.program_id(0) * TILE + tl.arange(0, TILE)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    sinks, begin, end = tile_keys(tile, SINK, KEYS)
    _, near = near_blocks(sinks, begin, end, low, high, WINDOW, QUERY_BLOCK, DENSE_END)
    at = bh * tiles + tile
    known = tile < tiles
    end = tl.load(ends + (at + 1) * chunks - 1, mask=known, other=0)
    begin = tl.load(ends + at * chunks - 1, mask=known & (at > 0), other=0)
    tl.store(steps + at, (near + end - begin).to(tl.int32), mask=known)
