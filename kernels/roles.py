"""What kernels on Hopper share whose warps have roles: operands that one warp fetches and groups of four warps use.

Fetched operands stand in rings, (memory, full, empty): of each slot ``full`` says that its operand is there, and
``empty`` that all groups have done with it.

This is Gluon, the language below Triton, which has no interpreter.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

LOG2E = gl.constexpr(1.4426950408889634)
HALF = gl.constexpr(64)
"""Rows of a group of warps."""
SLAB = gl.constexpr(64)
"""Dims that one copy brings: 128 bytes, within which rows are swizzled."""
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))

# Triton 3.7 and later have new names.
copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.constexpr_function
def layout_of(x):
    """How a tensor is spread over threads."""
    return x.type.layout


@gluon.jit
def barriers(SLOTS: gl.constexpr, GROUPS: gl.constexpr, FILLS: gl.constexpr = 1):
    """``full`` and ``empty`` of a ring that FILLS arrivals fill, and GROUPS empty."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=FILLS)
        mbarrier.init(empty.index(slot), count=GROUPS)
    return full, empty


@gluon.jit
def ring_of(
    desc, dtype: gl.constexpr, SLOTS: gl.constexpr, COPIES: gl.constexpr, GROUPS: gl.constexpr = 2,
    FILLS: gl.constexpr = 1,
):  # fmt: skip
    """A ring whose slots have room for so many copies each."""
    SHAPE: gl.constexpr = desc.block_shape
    memory = gl.allocate_shared_memory(
        dtype, [SLOTS * COPIES, SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3]], desc.layout
    )
    full, empty = barriers(SLOTS, GROUPS, FILLS)
    return memory, full, empty


@gluon.jit
def await_room(ring, n, SLOTS: gl.constexpr):
    """Waits until the slot of place n of a ring is empty."""
    _memory, _full, empty = ring
    mbarrier.wait(empty.index(n % SLOTS), n // SLOTS & 1 ^ 1)


@gluon.jit
def begin_slot(ring, n, BYTES: gl.constexpr, SLOTS: gl.constexpr):
    """Waits until the slot of place n of a ring is empty, and announces what will be there."""
    await_room(ring, n, SLOTS)
    mbarrier.expect(ring[1].index(n % SLOTS), BYTES)


@gluon.jit
def await_slot(ring, n, SLOTS: gl.constexpr):
    """Waits until place n of a ring is there."""
    _memory, full, _empty = ring
    mbarrier.wait(full.index(n % SLOTS), n // SLOTS & 1)


@gluon.jit
def release(ring, n, SLOTS: gl.constexpr):
    """Says that this group has done with place n of a ring."""
    _memory, _full, empty = ring
    mbarrier.arrive(empty.index(n % SLOTS))


@gluon.jit
def number_beside():
    """Room for a number that comes with what the only slot of a ring holds."""
    return gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def tell(number, x, ring):
    """Leaves x beside what is copied to the only slot of a ring, which it fills as well; for one warp."""
    number.store(gl.full([1], x, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(ring[1].index(0))


@gluon.jit
def told(number):
    """What was left there; for a group of four warps that has waited for the slot."""
    return gl.sum(number.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def reinterpreted(pieces, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory in another shape."""
    if REINTERPRETS:
        return pieces.reinterpret(pieces.dtype, SHAPE, LAYOUT)
    else:
        return pieces._reinterpret(pieces.dtype, SHAPE, LAYOUT)


@gluon.jit
def matrices(pieces, ROWS: gl.constexpr, DIM: gl.constexpr):
    """What copies have brought as [..., ROWS, DIM]."""
    return reinterpreted(pieces, [pieces.numel // (ROWS * DIM), ROWS, DIM], SWIZZLED)


@gluon.jit
def half_tile(tiles, SHARE: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """The SHARE-th HALF of the ROWS of a tile, of a ring of one slot."""
    return matrices(tiles[0], ROWS, DIM).index(0).slice(SHARE * HALF, HALF).load(LAYOUT)


@gluon.jit
def rows_at(
    SHARE: gl.constexpr, h, head0, t0, low, slots, GROUP: gl.constexpr, QUERY_BLOCK: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """(head, position, whether it is a new query) of the SHARE-th HALF of a tile's rows."""
    row = SHARE * HALF + gl.arange(0, HALF, LAYOUT)
    head, t = head0 + row // QUERY_BLOCK, t0 + row % QUERY_BLOCK
    return head, t, (t >= low) & (t < slots) & (head < (h + 1) * GROUP)


@gluon.jit
def bring(
    desc, ring, n, b, h, at, BYTES: gl.constexpr, SLABS: gl.constexpr, MANY: gl.constexpr, SIZE: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """Brings MANY blocks of SIZE tokens from ``at`` on to place n of a ring."""
    memory, full, _empty = ring
    begin_slot(ring, n, BYTES, SLOTS)
    for u in gl.static_range(MANY):
        for d in gl.static_range(SLABS):
            place = [b, h, at + u * SIZE, d * SLAB]
            copy(desc, place, full.index(n % SLOTS), memory.index((n % SLOTS * SLABS + d) * MANY + u))


@gluon.jit
def begin_scores(x, s, keys, n, DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Begins the product of queries with the keys in place n; takes the registers of s."""
    await_slot(keys, n, STAGES)
    transposed = matrices(keys[0], KEYS, DIM).index(n % STAGES).permute((1, 0))
    return hopper.warpgroup_mma(x, transposed, s, use_acc=False, is_async=True)


@gluon.jit
def begin_values(p, acc, values, n, DIM: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Begins to add the product of weights with the values in place n."""
    await_slot(values, n, STAGES)
    return hopper.warpgroup_mma(p, matrices(values[0], KEYS, DIM).index(n % STAGES), acc, is_async=True)


@gluon.jit
def finish(acc, p, following, ring, n, STAGES: gl.constexpr):
    """Waits until the product of p with place n of a ring is added; returns the sum, and what follows p."""
    acc, _p, following = hopper.warpgroup_mma_wait(0, deps=[acc, p, following])
    release(ring, n, STAGES)
    return acc, following


@gluon.jit
def partial_sums(p):
    """Sums of rows in 8 columns, which need not be joined in every step."""
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), 1)
