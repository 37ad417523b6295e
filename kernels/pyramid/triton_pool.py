"""Cells of a pyramid and their spreads, by Triton kernels.

    halve_levels      pairs alone, several levels in a launch: a program's tile is halved in registers
    pool_levels       members of any number, several levels in a launch: a program reads again what it has written
    pool_cells        cells of one level that new tokens complete
    measure_spreads   spreads of the first level's cells that new tokens complete

``grow_levels`` pools all levels of one row and head and measures spreads, in place, within kernels for a few new tokens.

Members are added one by one, and squares by neighbours: what a cell is does not depend on who computes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.launch import kernel


@kernel()
def halve_levels(
    x, cells, taps, start, stride_b, stride_h, stride_n, members, capacities, heads,
    FIRST: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, OFFSET: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """Writes ``LEVELS`` levels of [B, H, capacity, DIM], each of the pairs of the one before, the first of x."""
    bh = tl.program_id(1).to(tl.int64)
    origin = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if FIRST:
        origin += tl.load(start + bh // heads).to(tl.int32) + OFFSET
    dim = tl.arange(0, DIM_PAD)
    at = tl.minimum(origin, members - 1).to(tl.int64)
    line = x + bh // heads * stride_b + bh % heads * stride_h + at[:, None] * stride_n + dim[None]
    level = tl.load(line, mask=dim[None] < DIM, other=0.0)
    for i in tl.static_range(LEVELS):
        pairs = tl.permute(tl.reshape(level.to(tl.float32), [TILE >> (i + 1), 2, DIM_PAD]), (0, 2, 1))
        left, right = tl.split(pairs)
        if POOLING == "max":
            pooled = tl.maximum(left, right)
        elif POOLING == "mean":
            pooled = (left + right) * 0.5
        else:
            tap = taps[i] + (bh % heads * DIM + dim) * 2
            one = tl.load(tap, mask=dim < DIM, other=0.0).to(tl.float32)
            two = tl.load(tap + 1, mask=dim < DIM, other=0.0).to(tl.float32)
            pooled = one[None] * left + two[None] * right
        level = pooled.to(x.dtype.element_ty)
        cell = tl.program_id(0) * (TILE >> (i + 1)) + tl.arange(0, TILE >> (i + 1))
        tl.store(
            cells[i] + (bh * capacities[i] + cell[:, None]) * DIM + dim[None],
            level,
            mask=(cell[:, None] < capacities[i]) & (dim[None] < DIM),
        )


@triton.jit
def pool_tile(
    line, stride, origin, members, mask, tap, dim,
    RATIO: tl.constexpr, DIM: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """Pools the rows origin, origin + 1, … origin + RATIO − 1 of a line of ``members`` rows, [CELLS, DIM_PAD]."""
    at = tl.minimum(origin, members - 1).to(tl.int64)
    pooled = tl.load(line + at[:, None] * stride, mask=mask, other=0.0).to(tl.float32)
    if POOLING == "learned":
        pooled *= tl.load(tap, mask=dim < DIM, other=0.0).to(tl.float32)[None]
    for i in tl.static_range(1, RATIO):
        at = tl.minimum(origin + i, members - 1).to(tl.int64)
        member = tl.load(line + at[:, None] * stride, mask=mask, other=0.0).to(tl.float32)
        if POOLING == "max":
            pooled = tl.maximum(pooled, member)
        elif POOLING == "mean":
            pooled += member
        else:
            pooled += tl.load(tap + i, mask=dim < DIM, other=0.0).to(tl.float32)[None] * member
    if POOLING == "mean":
        if RATIO & (RATIO - 1):
            pooled = tl.div_rn(pooled, pooled * 0 + RATIO)
        else:
            pooled *= 1.0 / RATIO  # as exact, and less work
    return pooled


@triton.jit
def spread_tile(
    line, stride, origin, members, mask, middle,
    RATIO: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, HALVINGS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Mean squared distance by dim of the same rows from ``middle`` [CELLS, DIM_PAD].

    Neighbours are added in ``HALVINGS`` halvings: the order is the same wherever the tile lies in registers.
    """
    total = middle * 0.0
    for i in tl.static_range(RATIO):
        at = tl.minimum(origin + i, members - 1).to(tl.int64)
        member = tl.load(line + at[:, None] * stride, mask=mask, other=0.0).to(tl.float32)
        total += (member - middle) * (member - middle)
    for i in tl.static_range(HALVINGS):
        left, right = tl.split(tl.reshape(total, [CELLS, DIM_PAD >> (i + 1), 2]))
        total = left + right
    return tl.reshape(total, [CELLS]) / (RATIO * DIM)


@kernel(do_not_specialize=["members"])
def pool_levels(
    x, cells, taps, start, stride_b, stride_h, stride_n, members, capacities, heads, spreads,
    FIRST: tl.constexpr, LEVELS: tl.constexpr, RATIOS: tl.constexpr, SPAN: tl.constexpr, CELLS: tl.constexpr,
    HALVINGS: tl.constexpr, OFFSET: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """Writes ``LEVELS`` levels of [B, H, capacity, DIM], the first from x; each program ``SPAN`` cells of it, and what
    becomes of them. If there are ``spreads`` [B, H, capacity], writes those of the first level's cells."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    dim = tl.arange(0, DIM_PAD)
    line = x + b * stride_b + h * stride_h + dim[None]
    stride, rows, origin = stride_n.to(tl.int64), members.to(tl.int64), tl.full([], 0, tl.int64)
    if FIRST:
        origin += tl.load(start + b) + OFFSET
    before, count = tl.program_id(0) * SPAN, tl.full([], SPAN, tl.int32)
    for level in tl.static_range(LEVELS):
        if level > 0:
            before, count = before // RATIOS[level], count // RATIOS[level]
        tap = x
        if POOLING == "learned":
            tap = taps[level] + (h * DIM + dim) * RATIOS[level]
        own = cells[level] + bh * capacities[level] * DIM + dim[None]
        after = tl.minimum(before + count, capacities[level])
        for at in range(before, after, CELLS):
            cell = at + tl.arange(0, CELLS)
            mask = (cell < after)[:, None] & (dim[None] < DIM)
            pooled = pool_tile(
                line, stride, origin + cell * RATIOS[level], rows, mask, tap, dim, RATIOS[level], DIM, POOLING
            )
            pooled = pooled.to(cells[level].dtype.element_ty)
            if level == 0 and spreads is not None:
                # Before anything is stored: the members are then read once for both.
                spread = spread_tile(
                    line, stride, origin + cell * RATIOS[level], rows, mask, pooled.to(tl.float32),
                    RATIOS[level], DIM, DIM_PAD, HALVINGS, CELLS,
                )  # fmt: skip
                tl.store(spreads + bh * capacities[0] + cell, spread, mask=cell < after)
            tl.store(own + cell[:, None] * DIM, pooled, mask=mask)
        tl.debug_barrier()  # the next level reads what has been written
        line, stride = own, tl.full([], DIM, tl.int64)
        rows, origin = tl.full([], capacities[level], tl.int64), tl.full([], 0, tl.int64)


@kernel()
def pool_cells(
    x, cells, taps, start, stride_b, stride_h, stride_n, members, capacity, count, heads, past,
    FIRST: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr, RATIO: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, POOLING: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Writes the ``count`` cells of each row of [B, H, capacity, DIM] that ``past`` tokens do not complete."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    begin = tl.load(start + b)
    number = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    cell = tl.maximum(past - begin, 0) // SIZE + number
    mine = (cell < capacity) & (number < count)
    origin = cell * RATIO
    if FIRST:
        origin += begin + OFFSET
    dim = tl.arange(0, DIM_PAD)
    mask = mine[:, None] & (dim[None] < DIM)
    line = x + b * stride_b + bh % heads * stride_h + dim[None]
    tap = taps
    if POOLING == "learned":
        tap = taps + (bh % heads * DIM + dim) * RATIO
    pooled = pool_tile(line, stride_n, origin, members, mask, tap, dim, RATIO, DIM, POOLING)
    out = cells + (bh * capacity + cell[:, None]) * DIM + dim[None]
    tl.store(out, pooled.to(cells.dtype.element_ty), mask=mask)


@kernel()
def measure_spreads(
    x, cells, spreads, start, stride_xb, stride_xh, stride_xn, stride_cb, stride_ch, stride_cn,
    tokens, capacity, count, heads, past,
    OFFSET: tl.constexpr, RATIO: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, HALVINGS: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """Writes ``spreads`` [B, H, capacity] of the ``count`` cells of each row that ``past`` tokens do not complete."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    begin = tl.load(start + b)
    number = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    cell = tl.maximum(past - begin, 0) // RATIO + number
    mine = (cell < capacity) & (number < count)
    dim = tl.arange(0, DIM_PAD)
    mask = mine[:, None] & (dim[None] < DIM)
    at = cells + b * stride_cb + h * stride_ch + cell[:, None] * stride_cn + dim[None]
    middle = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    line = x + b * stride_xb + h * stride_xh + dim[None]
    spread = spread_tile(
        line,
        stride_xn,
        begin + OFFSET + cell * RATIO,
        tokens,
        mask,
        middle,
        RATIO,
        DIM,
        DIM_PAD,
        HALVINGS,
        CELLS,
    )
    tl.store(spreads + bh * capacity + cell, spread, mask=mine)


@triton.jit
def grow_levels(
    x, cells, taps, spreads, bh, h, begin, before, after, stride, members, capacities,
    OFFSET: tl.constexpr, LEVELS: tl.constexpr, RATIOS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    HALVINGS: tl.constexpr, POOLING: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Writes the cells [B, H, capacity, DIM] of all levels, and the spreads [B, H, capacity] of those of the first, that
    the members from number ``before`` to ``after``, from ``OFFSET`` on, complete in the row and head ``bh``.

    x points to the first of a row's slots, of which it has ``members``; its first token is in slot ``begin``.
    """
    dim = tl.arange(0, DIM_PAD)
    line, rows = x + (begin + OFFSET) * stride + dim[None], members - OFFSET - begin
    for level in tl.static_range(LEVELS):
        tap = x
        if POOLING == "learned":
            tap = taps[level] + (h * DIM + dim) * RATIOS[level]
        after, before = after // RATIOS[level], before // RATIOS[level]
        own = cells[level] + bh * capacities[level] * DIM + dim[None]
        for at in range(before, after, CELLS):
            cell = at + tl.arange(0, CELLS)
            mine = cell < after
            mask = mine[:, None] & (dim[None] < DIM)
            pooled = pool_tile(
                line, stride, cell * RATIOS[level], rows, mask, tap, dim, RATIOS[level], DIM, POOLING
            )
            pooled = pooled.to(cells[level].dtype.element_ty)
            tl.store(own + cell[:, None] * DIM, pooled, mask=mask)
            if level == 0 and spreads is not None:
                middle = pooled.to(tl.float32)
                spread = spread_tile(
                    line, stride, cell * RATIOS[level], rows, mask, middle,
                    RATIOS[level], DIM, DIM_PAD, HALVINGS, CELLS,
                )  # fmt: skip
                tl.store(spreads + bh * capacities[0] + cell, spread, mask=mine)
        tl.debug_barrier()  # the next level reads what has been written
        line, stride, rows = own, tl.full([], DIM, tl.int64), tl.full([], capacities[level], tl.int64)
