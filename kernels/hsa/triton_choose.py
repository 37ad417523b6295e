"""The leaf step of the selection on a GPU: which leaf is chosen by whom, and the list of what a block executes.

settle         votes        →  choices, list, shares, counts
list_blocks    choices      →  list, shares, counts
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.geometry import FADE, RISE_BITS, UNUSED
from retrofit.kernels.hsa.triton_execute import INTERPRETED, near_edges
from retrofit.kernels.hsa.triton_select import covered_leaves, in_reach, row_range
from retrofit.kernels.hsa.triton_vote import spans_kept
from retrofit.kernels.launch import kernel

WHOLE, NONE = tl.constexpr(FADE), tl.constexpr(UNUSED)
SHIFT, RISES = tl.constexpr(RISE_BITS), tl.constexpr(2**RISE_BITS - 1)
ABOVE = tl.constexpr(0x3E00)
"""What is added to 16-bit votes: the middle of the integers that look like positive 16-bit floats. No vote is farther
from 0."""
MOST_KEYS = tl.constexpr(128)
"""Keys in a step of any kernel, at most."""
CHOICES_AT_ONCE = tl.constexpr(32)
"""Choices that are counted at a time where leaves fade in."""
SOME = tl.constexpr(64)
"""Choices of a block that its entries are made of at a time."""


@triton.jit
def highest_left(above, ROOM: tl.constexpr, BITS: tl.constexpr):
    """The highest of the numbers [N], each of at most BITS bits, for which there is no room; 0 where there is room
    for all above 0. Found bit by bit."""
    found = tl.full([], 0, tl.int32)
    step = tl.full([], 1, tl.int32) << BITS
    for _ in range(BITS):
        step = step // 2
        higher = found + step
        count = tl.sum((above >= higher).to(tl.int32), 0)
        found = tl.where(count > ROOM, higher, found)
    return found


@triton.jit
def pair_up(x):
    """Integers [N] → [N / 2], the low 16 bits of two to a register."""
    left, right = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
    return (left & 0xFFFF) + (right << 16)


@triton.jit
def at_least(pairs, both):
    """Which numbers of ``pairs`` are at least the one that ``both`` is a pair of: all bits of their halves.

    ``both`` is of 1 … 0x7BFF: there, and among those below, 16-bit floats have the order of the integers they look
    like, and are compared two at a time.
    """
    if INTERPRETED:
        left, right = (pairs << 16) >= (both << 16), (pairs >> 16) >= (both >> 16)
        return tl.where(left, 0xFFFF, 0) - tl.where(right, 0x10000, 0)
    else:
        return tl.inline_asm_elementwise(
            "set.ge.u32.f16x2 $0, $1, $2;", "=r,r,r", [pairs, both], tl.int32, True, 1
        )


@triton.jit
def count_halves(which):
    """How many halves of ``which``, each of no bits or all, are of all.

    Of so many left and right, -(sum) is left + ((right - left) << 16).
    """
    return (tl.sum(which, 0) * -0x20001) >> 16


@triton.jit
def unpack(choice, QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(row, candidate, rise) of choices; (QUERY_BLOCK, 0, 0) where there is none."""
    used, place = choice < NONE, choice >> SHIFT
    return (
        tl.where(used, place // WIDTH, QUERY_BLOCK),
        tl.where(used, place % WIDTH, 0),
        tl.where(used, choice & RISES, 0),
    )


@triton.jit
def read_choices(
    choices, candidate, some,
    QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """How many choices there are, and how far each candidate has risen by them; nothing is read unless ``some``."""
    MANY: tl.constexpr = CHOICES_AT_ONCE if PARTS < WHOLE else triton.next_power_of_2(CHOICES)
    place = tl.arange(0, MANY)
    risen = candidate * 0
    count = tl.full([], 0, tl.int32)
    more = tl.full([], 0, tl.int32) + some
    while more > 0:
        choice = tl.load(choices + count + place, mask=count + place < CHOICES, other=NONE)
        used = choice < NONE
        _row, which, rise = unpack(choice, QUERY_BLOCK, WIDTH)
        if PARTS == WHOLE:
            risen += tl.histogram(which, WIDTH_PAD, mask=used) * WHOLE
        else:
            risen += tl.sum(tl.where(which[:, None] == candidate[None], rise[:, None], 0), 0)
        count += tl.sum(used.to(tl.int32), 0)
        more = tl.min(used.to(tl.int32), 0)
    return count, risen


@triton.jit
def choose_leaves(
    kept, choices, held, t0, low, high, least,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    CHOICES: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, REACH: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Each new query of the block at t0 chooses by the votes ``held``, one after another: adds to ``choices``
    [CHOICES] what it wants and nobody before it did.

    If ``choices`` is FRESH, the places behind the last one get NONE.
    """
    candidate = tl.arange(0, WIDTH_PAD)
    leaf = chosen_leaf(kept, candidate, t0, WINDOW, SINK, BLOCK, FANOUT, BEAM)
    used = spans_kept(kept, BEAM, WIDTH_PAD // FANOUT)
    count, reached = read_choices(choices, candidate, low > t0, QUERY_BLOCK, WIDTH, WIDTH_PAD, CHOICES, PARTS)
    first, last = tl.maximum(low - t0, 0), tl.minimum(high - t0, QUERY_BLOCK) - 1
    if PARTS == WHOLE:
        chosen_by = choose_whole(
            leaf, used, reached, held, t0, first, last, least,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, ROOM, WIDTH, WIDTH_PAD, BITS, REACH,
        )  # fmt: skip
        is_new = chosen_by < QUERY_BLOCK
        choice = tl.sort(tl.where(is_new, ((chosen_by * WIDTH + candidate) << SHIFT) + WHOLE, NONE))
        tl.store(choices + count + candidate, choice, mask=(choice < NONE) & (count + candidate < CHOICES))
        count += tl.sum(is_new.to(tl.int32), 0)
    else:
        following = tl.load(held + first * (WIDTH_PAD + FANOUT) + candidate)
        for row in range(first, last + 1):
            vote = following  # of leaves that are not open it is whatever was in memory
            following = tl.load(held + tl.minimum(row + 1, last) * (WIDTH_PAD + FANOUT) + candidate)
            open_ = is_open(leaf, candidate, used, t0 + row, WINDOW, SINK, BLOCK, FANOUT, BEAM, WIDTH, REACH)
            level = tl.maximum(tl.where(open_, vote - least, 0), 0)
            if tl.max(tl.where(reached < WHOLE, level, 0), 0) > 0:  # else all it wants is there
                if tl.sum((level > 0).to(tl.int32), 0) > ROOM:
                    level -= highest_left(level, ROOM, BITS)
                level = tl.minimum(tl.maximum(level, 0) * PARTS, WHOLE)
                rise = tl.maximum(level - reached, 0)
                if tl.max(rise, 0) > 0:
                    is_one = (rise > 0).to(tl.int32)
                    to = count + tl.cumsum(is_one, 0) - 1
                    choice = ((row * WIDTH + candidate) << SHIFT) + rise
                    tl.store(choices + to, choice, mask=(rise > 0) & (to < CHOICES))
                    count += tl.sum(is_one, 0)
                reached = tl.maximum(reached, level)
    if FRESH:
        leave_unused(choices, count, candidate, CHOICES, WIDTH_PAD)


@triton.jit
def choose_whole(
    leaf, used, reached, held, t0, first, last, least,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    BITS: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """The row of ``first`` … ``last`` that chooses a candidate first, [WIDTH_PAD]; QUERY_BLOCK where none does or it
    is ``reached`` already.

    Votes stand two to a register from memory on, with ABOVE added.
    """
    PAIRS: tl.constexpr = (WIDTH_PAD + FANOUT) // 2
    candidate = tl.arange(0, WIDTH_PAD)
    at = held.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, WIDTH_PAD // 2)
    taken = pair_up(tl.where(reached > 0, -1, 0))
    rows_taken = taken * (last + 1 - first)  # so that those that were taken before end at 0
    covered = tl.full([], -1, tl.int32)
    closed = taken
    following = tl.load(at + first * PAIRS)
    for row in range(first, last + 1):
        now = covered_leaves(t0 + row, WINDOW, SINK, BLOCK)
        if REACH or (now > covered):
            open_ = is_open(leaf, candidate, used, t0 + row, WINDOW, SINK, BLOCK, FANOUT, BEAM, WIDTH, REACH)
            closed = pair_up(tl.where(open_, 0, -1))
            covered = now
        # Of leaves that are not open, votes are whatever was in memory; now they are below 0.
        votes = ((following ^ -0x7FFF8000) | closed) - (0x8000 - ABOVE) * 0x10001
        following = tl.load(at + tl.minimum(row + 1, last) * PAIRS)
        wanted = at_least(votes, (least + ABOVE + 1) * 0x10001)
        if count_halves(wanted) > ROOM:
            found = (least + ABOVE) * 0x10001
            for bit in tl.static_range(BITS):
                higher = found + (2 ** (BITS - 1 - bit)) * 0x10001
                found = tl.where(count_halves(at_least(votes, higher)) > ROOM, higher, found)
            wanted = at_least(votes, found + 0x10001)
        taken |= wanted
        rows_taken -= taken
    left = rows_taken & 0xFFFF
    rows_taken = tl.reshape(tl.join(left, (rows_taken >> 16) + left), [WIDTH_PAD])
    return tl.where(rows_taken > 0, last + 1 - rows_taken, QUERY_BLOCK)


@triton.jit
def is_open(
    leaf, candidate, used, t,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr,
    WIDTH: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Which candidates the query at t may choose; ``used`` spans are kept."""
    is_edge = (candidate >= BEAM * FANOUT) & (candidate < WIDTH)
    open_ = (candidate < used * FANOUT) | (is_edge & (leaf < covered_leaves(t, WINDOW, SINK, BLOCK)))
    if REACH:
        open_ &= in_reach(SINK + (leaf + 1) * BLOCK - 1, t, REACH)
    return open_


@triton.jit
def leave_unused(choices, count, candidate, CHOICES: tl.constexpr, WIDTH_PAD: tl.constexpr):
    """Marks the places of ``choices`` from ``count`` on as unused."""
    for n in range(0, CHOICES, WIDTH_PAD):
        place = n + candidate
        tl.store(choices + place, place * 0 + NONE, mask=(place >= count) & (place < CHOICES))


@triton.jit
def chosen_leaf(kept, candidate, t0, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
                FANOUT: tl.constexpr, BEAM: tl.constexpr):  # fmt: skip
    """Numbers of the leaves that are the candidates of the query block at t0."""
    child = candidate < BEAM * FANOUT
    parent = tl.load(kept + candidate // FANOUT, mask=child, other=0)
    edge = covered_leaves(t0, WINDOW, SINK, BLOCK) // FANOUT
    return tl.where(child, parent * FANOUT + candidate % FANOUT, edge * FANOUT + candidate - BEAM * FANOUT)


@triton.jit
def list_block(
    kept, choices, listed, shares, seen_by, t0,
    WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr, BEAM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """What ``triton_execute`` calls the list of the query block at t0, and how many of it each of its rows sees.

    Writes ``listed`` [LIST], by position / BLOCK, ``shares`` [LIST], and ``seen_by`` [QUERY_BLOCK]; behind the last,
    as many places as one step may read are block 0, of share 0.
    """
    NEAR: tl.constexpr = triton.next_power_of_2((SINK + WINDOW) // BLOCK + 1)
    MANY: tl.constexpr = triton.next_power_of_2(CHOICES + MOST_KEYS // BLOCK)
    _, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    near = (SINK + whole - last) // BLOCK
    place = tl.arange(0, NEAR)
    block = place + tl.where(place < SINK // BLOCK, 0, (last - SINK) // BLOCK)
    tl.store(listed + place, block, mask=place < near)
    tl.store(shares + place, place * 0.0 + 1.0, mask=place < near)
    number = tl.arange(0, MANY)
    choice = tl.load(choices + number, mask=number < CHOICES, other=NONE)
    used = choice < NONE
    row, candidate, rise = unpack(choice, QUERY_BLOCK, WIDTH)
    leaf = chosen_leaf(kept, candidate, t0, WINDOW, SINK, BLOCK, FANOUT, BEAM)
    tl.store(listed + near + number, tl.where(used, SINK // BLOCK + leaf, 0), mask=near + number < LIST)
    tl.store(shares + near + number, rise.to(tl.float32) / WHOLE, mask=near + number < LIST)
    seen = near + tl.cumsum(tl.histogram(row, QUERY_BLOCK, mask=used), 0)
    tl.store(seen_by + tl.arange(0, QUERY_BLOCK), seen)


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks", "first"])
def settle(
    start, length, spans, choices, votes, ordered, shares, counts,
    slots, tokens, blocks, total_blocks, first, least,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    ROOM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr,
    LIST: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, REACH: tl.constexpr, FRESH: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Each new query of a block chooses the leaves that weigh enough, ROOM at most; then lists what the block executes.

    The blocks are number ``first`` and following of [B·Hkv, blocks], whose ``votes`` are as in ``triton_vote``; those
    count that are above ``least``. Adds to ``choices`` [B·Hkv, total_blocks, CHOICES]; if these are FRESH, unused places
    get NONE. The lists are those of ``list_blocks``.
    """
    tile = first + tl.program_id(0)
    bh = (tile // blocks).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    number = low // QUERY_BLOCK + tile % blocks
    t0 = number * QUERY_BLOCK
    made = choices + (bh * total_blocks + number) * CHOICES
    if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
        kept = spans + (bh * total_blocks + number) * BEAM
        choose_leaves(
            kept, made, votes + tl.program_id(0).to(tl.int64) * (QUERY_BLOCK * (WIDTH_PAD + FANOUT)),
            t0, low, high, least,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, ROOM, WIDTH, WIDTH_PAD, CHOICES, PARTS, BITS, REACH,
            FRESH,
        )  # fmt: skip
        tl.debug_barrier()  # every thread has written its choices
        at = tile.to(tl.int64)
        list_block(
            kept, made, ordered + at * LIST, shares + at * LIST, counts + at * QUERY_BLOCK, t0,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH, CHOICES, LIST,
        )  # fmt: skip
    elif FRESH:
        leave_unused(
            made, tl.where(number < total_blocks, 0, CHOICES), tl.arange(0, WIDTH_PAD), CHOICES, WIDTH_PAD
        )


@kernel(do_not_specialize=["slots", "tokens", "blocks", "total_blocks"])
def list_blocks(
    start, length, spans, choices, ordered, shares, counts,
    slots, tokens, blocks, total_blocks,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
    FANOUT: tl.constexpr, BEAM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DENSE_END: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, CHOICES: tl.constexpr, LIST: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Writes ``ordered`` and ``shares`` [B·Hkv, blocks, LIST] and ``counts`` [B·Hkv, blocks, QUERY_BLOCK], as
    ``list_block`` says."""
    i = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    low, high, _, _ = row_range(start, length, slots, tokens, bh // KV_HEADS, LAYOUT)
    number = low // QUERY_BLOCK + i
    t0 = number * QUERY_BLOCK
    if (t0 + QUERY_BLOCK > DENSE_END) & (t0 < high):
        at, to = bh * total_blocks + number, bh * blocks + i
        list_block(
            spans + at * BEAM, choices + at * CHOICES, ordered + to * LIST, shares + to * LIST,
            counts + to * QUERY_BLOCK, t0,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, WIDTH, CHOICES, LIST,
        )  # fmt: skip
