"""Gradients of a pyramid that was built from nothing, by a Triton kernel.

gradients of the cells of all levels  →  gradients of x and of the convolutions' taps

What reaches a cell is its own gradient and what its parent, of which it is a member, hands down. So levels are gone
through from the last to the first, as many in a launch as the forward pass makes in one, and each program has the cells
below its own. Where members tie for the largest, they share what reaches their cell.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.kernels.launch import kernel


@triton.jit
def hand_down(
    line, stride, rows, origin, below, cells, grads, above, tap, part, begin, end, heirs, dim,
    RATIO: tl.constexpr, CELLS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """Shares out what reaches the cells begin … end − 1 of a level among their members, and sums up the taps' part."""
    real = dim[None] < DIM
    for i in tl.static_range(RATIO):
        of_tap = tl.zeros([DIM_PAD], tl.float32)
        for at in range(begin, end, CELLS):
            cell = at + tl.arange(0, CELLS)
            mask = (cell < end)[:, None] & real
            place = cell[:, None] * DIM
            reaching = tl.load(grads + place, mask=mask, other=0.0).to(tl.float32)
            reaching += tl.load(above + place, mask=mask & (cell < heirs)[:, None], other=0.0)
            member = origin + cell * RATIO
            mine = (member + i).to(tl.int64)[:, None]
            inside = mask & (mine < rows)
            if POOLING == "mean":
                share = reaching / RATIO
            elif POOLING == "max":
                largest = tl.load(cells + place, mask=mask, other=0.0)
                count = tl.zeros([CELLS, DIM_PAD], tl.float32)
                for j in tl.static_range(RATIO):
                    other = tl.minimum(member + j, rows - 1).to(tl.int64)[:, None]
                    count += tl.load(line + other * stride, mask=mask, other=0.0) == largest
                value = tl.load(line + mine * stride, mask=inside, other=0.0)
                share = tl.where(value == largest, reaching / tl.maximum(count, 1.0), 0.0)
            else:
                share = reaching * tl.load(tap + i, mask=dim < DIM, other=0.0).to(tl.float32)[None]
                value = tl.load(line + mine * stride, mask=inside, other=0.0).to(tl.float32)
                of_tap += tl.sum(reaching * value, 0)
            tl.store(below + mine * DIM, share.to(below.dtype.element_ty), mask=inside)
        if POOLING == "learned":
            tl.store(part + i, of_tap, mask=dim < DIM)


@kernel(do_not_specialize=["members"])
def pool_gradients(
    x, cells, taps, start, grads, above, grad_x, parted, stride_b, stride_h, stride_n, members, capacities, heirs, heads,
    FIRST: tl.constexpr, LEVELS: tl.constexpr, RATIOS: tl.constexpr, SPANS: tl.constexpr, CELLS: tl.constexpr,
    MOST: tl.constexpr, OFFSET: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, POOLING: tl.constexpr,
):  # fmt: skip
    """Writes ``grad_x`` [B, H, N, DIM] where a cell has members, and parts of the taps' gradients.

    Args:
        x: Members of the first level, [B, H, members, DIM].
        cells: The levels of [B, H, capacity, DIM] in rows, as they were built.
        taps: Per level [H, DIM, ratio] if ``POOLING`` is learned.
        start: Index of each row's first token in x, if ``FIRST``.
        grads: Gradients of ``cells``.
        above: What parents have handed down, float32 as ``cells``; that of the last level is there already.
        grad_x: In rows.
        parted: float32 [LEVELS, programs, B, H, DIM, MOST].
        capacities: Cells of the levels.
        heirs: Of those, how many from the first one on have a parent.
        SPANS: Cells of a program, per level.
        MOST: The largest ratio of all levels.
    """
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    dim = tl.arange(0, DIM_PAD)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        begin = tl.program_id(0) * SPANS[level]
        end = tl.minimum(begin + SPANS[level], capacities[level])
        if level > 0:
            line, stride = (
                cells[level - 1] + bh * capacities[level - 1] * DIM + dim[None],
                tl.full([], DIM, tl.int64),
            )
            rows, origin = tl.full([], capacities[level - 1], tl.int64), tl.full([], 0, tl.int64)
            below = above[level - 1] + bh * rows * DIM + dim[None]
        else:
            line, stride = x + b * stride_b + h * stride_h + dim[None], stride_n.to(tl.int64)
            rows, origin = members.to(tl.int64), tl.full([], 0, tl.int64)
            below = grad_x + bh * rows * DIM + dim[None]
            if FIRST:
                origin += tl.load(start + b) + OFFSET
        own = bh * capacities[level] * DIM + dim[None]
        tap, part = x, parted
        if POOLING == "learned":
            tap = taps[level] + (h * DIM + dim) * RATIOS[level]
            number = (level * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + bh
            part = parted + (number * DIM + dim) * MOST
        hand_down(
            line, stride, rows, origin, below, cells[level] + own, grads[level] + own, above[level] + own, tap, part,
            begin, end, heirs[level], dim, RATIOS[level], CELLS, DIM, DIM_PAD, POOLING,
        )  # fmt: skip
        tl.debug_barrier()  # the next level reads what has been handed down
