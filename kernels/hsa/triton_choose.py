"""The leaf step of the selection on a GPU: which leaf is chosen by whom, and the list of what a block executes.

settle         votes        →  choices, list, shares, counts
list_blocks    choices      →  list, shares, counts
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.hsa.geometry import FADE, RISE_BITS, UNUSED
from retrofit.kernels.hsa.triton_execute import near_edges
from retrofit.kernels.hsa.triton_select import covered_leaves, in_reach, row_range
from retrofit.kernels.hsa.triton_vote import spans_kept
from retrofit.kernels.launch import INTERPRETED, kernel

WHOLE, NONE = tl.constexpr(FADE), tl.constexpr(UNUSED)
SHIFT, RISES = tl.constexpr(RISE_BITS), tl.constexpr(2**RISE_BITS - 1)
PAIR = tl.constexpr(0x10001)
"""A 16-bit number times this is a pair of it in one register."""
SIGNS = tl.constexpr(-0x7FFF8000)
"""The highest bits of a pair. Where they are flipped, 0x8000 is added."""
ABOVE = tl.constexpr(0x3E00)
"""What is added to 16-bit votes: the middle of the integers that look like 16-bit floats above 0. No vote is as far
from 0."""
MOST_KEYS = tl.constexpr(128)
"""Keys in a step of any kernel, at most."""
CHOICES_AT_ONCE = tl.constexpr(32)
"""Choices that are counted at a time where leaves fade in."""
FEW = tl.constexpr(64)
"""New choices of a block that are sorted in least time, at most."""
AT_ONCE = tl.constexpr(128)
"""Choices of a block that are listed at a time."""
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

    The numbers are below 0x7C00 and that one is above 0. There, integers have the order of the 16-bit floats they look
    like, which are compared two at a time.
    """
    if INTERPRETED:
        left, right = (pairs << 16) >= (both << 16), (pairs >> 16) >= (both >> 16)
        return tl.where(left, 0xFFFF, 0) - tl.where(right, 0x10000, 0)
    else:
        compare: tl.constexpr = "set.ge.u32.f16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(compare, "=r,r,r", [pairs, both], tl.int32, True, 1)


@triton.jit
def count_halves(which):
    """How many halves of ``which`` have all bits, the others having none: so many 2^16, and less than 2^16 more.

    Of left and right, 0 or 1 each, what ``which`` holds is -(left + ((right - left) << 16)), and it becomes
    ((left + right) << 16) + left.
    """
    return tl.sum(which * -0x20001, 0)


@triton.jit
def narrow(votes, found, cut, above, ROOM: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """The bits below FROM, down to TO, of the highest vote for which there is no room: (found, cut, above).

    There is no room for all that are at least ``found``; there is for those that are at least ``cut``, which ``above``
    counts as ``count_halves`` does. If these are ROOM, that is the cut, and nothing changes.
    """
    if above < ROOM << 16:
        for bit in tl.static_range(FROM - 1, TO - 1, -1):
            higher = found + 2**bit * PAIR
            count = count_halves(at_least(votes, higher))
            fits = count < (ROOM + 1) << 16
            found = tl.where(fits, found, higher)
            above = tl.where(fits, count, above)
        cut = found + 2**TO * PAIR
    return found, cut, above


@triton.jit
def cut_at(votes, least, ROOM: tl.constexpr, BITS: tl.constexpr):
    """A vote such that there is room for all that are at least as high, but not for any more of them.

    ``votes`` and ``least``, for all above which there is no room, are pairs. Found bit by bit; the first three are
    skipped where they are 0, which is usual, and the last six, by threes, where those before them suffice.
    """
    HIGH: tl.constexpr = max(BITS - 3, 0)
    found, cut = least, least + 2**HIGH * PAIR
    above = count_halves(at_least(votes, cut))
    if above >= (ROOM + 1) << 16:
        found, cut, above = narrow(votes, found, cut, 0, ROOM, BITS, HIGH)
    found, cut, above = narrow(votes, found, cut, above, ROOM, HIGH, min(HIGH, 6))
    found, cut, above = narrow(votes, found, cut, above, ROOM, min(HIGH, 6), min(HIGH, 3))
    found, cut, above = narrow(votes, found, cut, above, ROOM, min(HIGH, 3), 0)
    return cut


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
        left, right = choose_whole(
            leaf, used, reached, held, t0, first, last, least,
            WINDOW, SINK, BLOCK, FANOUT, BEAM, QUERY_BLOCK, ROOM, WIDTH, WIDTH_PAD, BITS, REACH,
        )  # fmt: skip
        used = (left < NONE).to(tl.int32)
        both = used + (right < NONE).to(tl.int32)
        to = count + tl.cumsum(both, 0) - both
        tl.store(choices + to, left, mask=(left < NONE) & (to < CHOICES))
        tl.store(choices + to + used, right, mask=(right < NONE) & (to + used < CHOICES))
        more = tl.sum(both, 0)
        if first < last:  # else they are in order
            tl.debug_barrier()  # every thread has written its choices
            sort_choices(choices + count, tl.minimum(more, CHOICES - count), WIDTH_PAD)
        count += more
    else:
        following = tl.load(held + first * (WIDTH_PAD + FANOUT) + candidate)
        for row in range(first, last + 1):
            vote = following.to(tl.int32)  # of leaves that are not open it is whatever was in memory
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
    """The choices of the rows ``first`` … ``last`` among the even candidates, [WIDTH_PAD / 2], and among the odd: by the
    first row that wants it, NONE where none does or it is ``reached`` already.

    What a row wants follows from its votes alone. These stand two to a register from memory on, with ABOVE added.
    """
    STRIDE: tl.constexpr = (WIDTH_PAD + FANOUT) // 2
    candidate = tl.arange(0, WIDTH_PAD)
    at = held.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, WIDTH_PAD // 2)
    taken = pair_up(tl.where(reached > 0, -1, 0))
    rows_taken = taken * tl.maximum(last + 1 - first, 0)  # so that those that were taken before end at 0
    closed = taken
    following = tl.load(at + first * STRIDE)
    for row in range(first, last + 1):
        # Without a reach, leaves open only where a block leaves the window.
        if REACH or (row == first) | ((t0 + row + 1) % BLOCK == 0):
            open_ = is_open(leaf, candidate, used, t0 + row, WINDOW, SINK, BLOCK, FANOUT, BEAM, WIDTH, REACH)
            closed = pair_up(tl.where(open_, 0, -1))
        # Of leaves that are not open, votes are whatever was in memory; now they are below 0.
        votes = ((following ^ SIGNS) | closed) - (0x8000 - ABOVE) * PAIR
        following = tl.load(at + tl.minimum(row + 1, last) * STRIDE)
        wanted = at_least(votes, (least + ABOVE + 1) * PAIR)
        if count_halves(wanted) >= (ROOM + 1) << 16:
            wanted = at_least(votes, cut_at(votes, (least + ABOVE) * PAIR, ROOM, BITS))
        taken |= wanted
        rows_taken -= taken
    left = rows_taken & 0xFFFF
    right = (rows_taken >> 16) + left
    place = (last + 1) * WIDTH + 2 * tl.arange(0, WIDTH_PAD // 2)
    return (
        tl.where(left > 0, ((place - left * WIDTH) << SHIFT) + WHOLE, NONE),
        tl.where(right > 0, ((place - right * WIDTH + 1) << SHIFT) + WHOLE, NONE),
    )


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
def sort_choices(choices, count, MOST: tl.constexpr):
    """Sorts ``count`` choices, MOST at most; that takes the less, the fewer they are."""
    if count <= FEW:
        sort_padded(choices, count, min(FEW, MOST))
    elif count <= 2 * FEW:
        sort_padded(choices, count, min(2 * FEW, MOST))
    else:
        sort_padded(choices, count, MOST)


@triton.jit
def sort_padded(choices, count, MANY: tl.constexpr):
    """Sorts ``count`` choices as MANY."""
    place = tl.arange(0, MANY)
    choice = tl.load(choices + place, mask=place < count, other=NONE)
    tl.debug_barrier()  # every thread has read its choices
    tl.store(choices + place, tl.sort(choice), mask=place < count)


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
    BEHIND: tl.constexpr = max(MOST_KEYS // BLOCK, 1)
    _, last, whole = near_edges(t0, WINDOW, SINK, BLOCK, QUERY_BLOCK)
    near = (SINK + whole - last) // BLOCK
    place = tl.arange(0, NEAR)
    block = place + tl.where(place < SINK // BLOCK, 0, (last - SINK) // BLOCK)
    tl.store(listed + place, block, mask=place < near)
    tl.store(shares + place, place * 0.0 + 1.0, mask=place < near)
    seen = tl.zeros([QUERY_BLOCK], tl.int32) + near
    n = tl.full([], 0, tl.int32)
    more = tl.full([], 1, tl.int32)
    while more > 0:
        number = n + tl.arange(0, AT_ONCE)
        choice = tl.load(choices + number, mask=number < CHOICES, other=NONE)
        used = choice < NONE
        row, candidate, rise = unpack(choice, QUERY_BLOCK, WIDTH)
        leaf = chosen_leaf(kept, candidate, t0, WINDOW, SINK, BLOCK, FANOUT, BEAM)
        to = near + number
        tl.store(listed + to, tl.where(used, SINK // BLOCK + leaf, 0), mask=to < LIST)
        tl.store(shares + to, rise.to(tl.float32) / WHOLE, mask=to < LIST)
        seen += tl.cumsum(tl.histogram(row, QUERY_BLOCK, mask=used), 0)
        n += AT_ONCE
        more = tl.max((used & (number >= n - BEHIND)).to(tl.int32), 0)
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
