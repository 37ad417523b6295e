"""Which query blocks see a tile of keys: the lists of leaves, the other way round.

Tiles of KEYS keys cover the sinks first and then the leaves, LEAVES to a tile:

    tile 0 … SINKS−1 │ tile SINKS + m = leaves m·LEAVES … m·LEAVES + LEAVES−1

The blocks that see a tile as sinks, in their window, or because they are dense are one range, its *near*
blocks; their choices of leaves in it are its entries, in ascending order:

    count_entries   choices                     →  entries of each tile from each chunk of blocks; choosers
    write_entries   choices, their running sum  →  entries
    count_steps     near blocks and entries     →  steps of each tile
    split_tiles     steps                       →  parts of each tile, of so many steps
    own_parts       parts                       →  the tile of each part

An entry stands for QUERIES of a block, which are what its number counts. Where leaves are chosen whole, it is number · 2³² +
the rows from which on they see the tile's leaves, one after another in 32 / LEAVES bits each, all of which are ones for a
leaf that none sees; ``choosers`` has the rows that chose each candidate. Where leaves fade in, each choice is an entry,
number · 2³² + leaf of the tile · 2²⁴ + rise · 2⁸ + row. Near blocks are of as many queries as entries.

One program writes a chunk, block after block and part after part, and counts which of a tile's entries comes first, so the order never
depends on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.triton_choose import NONE, SOME, WHOLE, chosen_leaf, unpack
from retrofit.kernels.hsa.triton_select import row_range
from retrofit.kernels.launch import kernel


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
def unpack_entry(entry, QUERY_BLOCK: tl.constexpr, LEAVES: tl.constexpr, WHOLE_LEAVES: tl.constexpr):
    """(row from which on each of the tile's leaves [LEAVES] is seen, QUERY_BLOCK or more for never; rise)."""
    leaf = tl.arange(0, LEAVES)
    low = entry.to(tl.int32)
    if WHOLE_LEAVES:
        BITS: tl.constexpr = 32 // LEAVES
        row = (low >> BITS * leaf) & ((1 << BITS) - 1) if LEAVES > 1 else low + leaf
        return row, tl.full([], WHOLE, tl.int32)
    else:
        return tl.where(leaf == low >> 24, low & 255, QUERY_BLOCK), (low >> 8) & 0xFFFF


@triton.jit
def write_choosers(
    choosers, choices,
    QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Writes ``choosers`` [WIDTH_PAD] of a block: the row that chose each candidate, −1 where none did."""
    tl.store(choosers + tl.arange(0, WIDTH_PAD), tl.full([WIDTH_PAD], -1, tl.int16))
    tl.debug_barrier()
    for n in range(0, CHOICES, SOME):
        at = n + tl.arange(0, SOME)
        choice = tl.load(choices + at, mask=at < CHOICES, other=NONE)
        row, candidate, _rise = unpack(choice, QUERY_BLOCK, WIDTH)
        tl.store(choosers + candidate, row.to(tl.int16), mask=choice < NONE)
    tl.debug_barrier()  # every thread has written what others read


@triton.jit
def whole_entries(
    kept, choosers, number, part,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, WIDTH_PAD: tl.constexpr, LEAVES: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """(whether it is one, tile, entry) for LEAVES candidates at a time of QUERIES of a block, the part-th ones; no two are
    of one tile."""
    SINKS: tl.constexpr = (SINK + LEAVES * BLOCK - 1) // (LEAVES * BLOCK)
    BITS: tl.constexpr = 32 // LEAVES
    candidate = tl.arange(0, WIDTH_PAD // LEAVES) * LEAVES
    leaf = tl.arange(0, LEAVES)
    row = tl.load(choosers + candidate[:, None] + leaf[None]).to(tl.int64)
    row = tl.where((row >= 0) & (row < (part + 1) * QUERIES), tl.maximum(row - part * QUERIES, 0), -1)
    rows = tl.sum((row & ((1 << BITS) - 1)) << BITS * leaf[None], 1)
    first = chosen_leaf(kept, candidate, number * QUERY_BLOCK, WINDOW, SINK, BLOCK, FANOUT, BEAM)
    own = number.to(tl.int64) * (QUERY_BLOCK // QUERIES) + part
    return tl.max(row, 1) >= 0, SINKS + first // LEAVES, (own << 32) + rows


@triton.jit
def block_entries(
    kept, choices, number, part, n,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, LEAVES: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """(whether it is one, tile, entry, whether there may be more) for the choices n … n + SOME of a block, of leaves that
    fade in, and QUERIES of it, the part-th ones."""
    SINKS: tl.constexpr = (SINK + LEAVES * BLOCK - 1) // (LEAVES * BLOCK)
    at = n + tl.arange(0, SOME)
    choice = tl.load(choices + at, mask=at < CHOICES, other=NONE)
    row, candidate, rise = unpack(choice, QUERY_BLOCK, WIDTH)
    leaf = chosen_leaf(kept, candidate, number * QUERY_BLOCK, WINDOW, SINK, BLOCK, FANOUT, BEAM)
    own = number.to(tl.int64) * (QUERY_BLOCK // QUERIES) + part
    entry = (own << 32) + ((leaf % LEAVES << 24) + (rise << 8) + tl.maximum(row - part * QUERIES, 0)).to(
        tl.int64
    )
    known = (choice < NONE) & (row < (part + 1) * QUERIES)
    return known, SINKS + leaf // LEAVES, entry, tl.min((choice < NONE).to(tl.int32), 0)


@kernel()
def count_entries(
    start, length, spans, choices, choosers, counts,
    slots, tokens, blocks, total_blocks, tiles, chunks, per_chunk,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr, LEAVES: tl.constexpr,
    WHOLE_LEAVES: tl.constexpr, QUERIES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Adds to ``counts`` [B·Hkv, tiles, chunks], and writes ``choosers`` [B·Hkv, blocks, WIDTH_PAD] if leaves are whole."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    number = low // QUERY_BLOCK + i
    t0 = number * QUERY_BLOCK
    if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
        at = bh * total_blocks + number
        to = counts + bh * tiles * chunks + i // per_chunk
        own = choosers + (bh * blocks + i) * WIDTH_PAD
        if WHOLE_LEAVES:
            write_choosers(own, choices + at * CHOICES, QUERY_BLOCK, WIDTH, WIDTH_PAD, CHOICES)
        for part in range(QUERY_BLOCK // QUERIES):
            if WHOLE_LEAVES:
                known, tile, _entry = whole_entries(
                    spans + at * BEAM, own, number, part,
                    WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH_PAD, LEAVES, QUERIES,
                )  # fmt: skip
                tl.atomic_add(to + tile.to(tl.int64) * chunks, 1, mask=known, sem="relaxed")
            else:
                n, more = i * 0, i * 0 + 1
                while more > 0:
                    known, tile, _entry, more = block_entries(
                        spans + at * BEAM, choices + at * CHOICES, number, part, n,
                        WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH, CHOICES, LEAVES, QUERIES,
                    )  # fmt: skip
                    tl.atomic_add(to + tile.to(tl.int64) * chunks, 1, mask=known, sem="relaxed")
                    n += SOME


@kernel()
def write_entries(
    start, length, spans, choices, choosers, counts, ends, entries,
    slots, tokens, blocks, total_blocks, tiles, chunks, per_chunk,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr, LEAVES: tl.constexpr,
    WHOLE_LEAVES: tl.constexpr, QUERIES: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``entries``; of each tile and chunk they end where the running sum of ``counts`` [B·Hkv, tiles, chunks] does,
    ``ends``. Counts down to 0."""
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    SPLIT: tl.constexpr = QUERY_BLOCK // QUERIES
    for piece in range(chunk * per_chunk * SPLIT, tl.minimum((chunk + 1) * per_chunk, blocks) * SPLIT):
        i, part = piece // SPLIT, piece % SPLIT
        number = low // QUERY_BLOCK + i
        t0 = number * QUERY_BLOCK
        if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
            at = bh * total_blocks + number
            if WHOLE_LEAVES:
                known, tile, entry = whole_entries(
                    spans + at * BEAM, choosers + (bh * blocks + i) * WIDTH_PAD, number, part,
                    WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH_PAD, LEAVES, QUERIES,
                )  # fmt: skip
                place = (bh * tiles + tile) * chunks + chunk
                left = tl.load(counts + place, mask=known, other=0)
                to = tl.load(ends + place, mask=known, other=0) - left
                tl.store(entries + to, entry, mask=known)
                tl.store(counts + place, left - 1, mask=known)
                tl.debug_barrier()  # the next piece goes on from there
            else:
                n, more = i * 0, i * 0 + 1
                while more > 0:
                    known, tile, entry, more = block_entries(
                        spans + at * BEAM, choices + at * CHOICES, number, part, n,
                        WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH, CHOICES, LEAVES, QUERIES,
                    )  # fmt: skip
                    # A leaf that rises twice, or another one of the tile, comes behind the earlier choice.
                    which = tl.arange(0, SOME)
                    same = (tile[:, None] == tl.reshape(tile, [1, SOME])) & tl.reshape(known, [1, SOME])
                    earlier = tl.sum((same & (which[None] < which[:, None])).to(tl.int32), 1)
                    place = (bh * tiles + tile) * chunks + chunk
                    left = tl.load(counts + place, mask=known, other=0) - earlier
                    to = tl.load(ends + place, mask=known, other=0) - left
                    tl.store(entries + to, entry, mask=known)
                    tl.debug_barrier()  # every thread has read where its entries go
                    tl.atomic_min(counts + place, left - 1, mask=known, sem="relaxed")
                    tl.debug_barrier()
                    n += SOME


@kernel()
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


@kernel()
def split_tiles(
    steps, parts, part_ends, size, tiles, room,
    SHORTEST: tl.constexpr, SIZES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How tiles are split into parts of ``size`` steps, the first of SHORTEST, 2·SHORTEST, … for which those that are
    split have at most ``room`` parts together. One program does it.

    Writes ``parts`` [tiles], the running sum ``part_ends`` [tiles] of those of tiles that have several, and ``size`` [1].
    """
    place = tl.arange(0, TILE)
    sizes = SHORTEST << tl.arange(0, SIZES)
    sums = tl.zeros([SIZES], tl.int32)
    for n in range(0, tiles, TILE):
        count = tl.load(steps + n + place, mask=n + place < tiles, other=0)
        count = (count[None] + sizes[:, None] - 1) // sizes[:, None]
        sums += tl.sum(tl.where(count > 1, count, 0), 1)
    most = tl.min(tl.where(sums <= room, sizes, SHORTEST << (SIZES - 1)), 0)
    tl.store(size, most)
    before = tl.full([], 0, tl.int32)
    for n in range(0, tiles, TILE):
        count = (tl.load(steps + n + place, mask=n + place < tiles, other=0) + most - 1) // most
        several = tl.where(count > 1, count, 0)
        tl.store(parts + n + place, count, mask=n + place < tiles)
        tl.store(part_ends + n + place, before + tl.cumsum(several, 0), mask=n + place < tiles)
        before += tl.sum(several, 0)


@kernel()
def own_parts(part_ends, owners, tiles, room, TILE: tl.constexpr):
    """Writes ``owners`` [room]: the tile that each part belongs to, of tiles that have several, one tile after another; the
    number of tiles behind the last part."""
    part = tl.program_id(0) * TILE + tl.arange(0, TILE)
    low, high = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32) + tiles
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        before = (low < high) & (tl.load(part_ends + middle, mask=low < high, other=0) <= part)
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    tl.store(owners + part, low, mask=part < room)
