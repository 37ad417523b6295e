"""Launch settings of the Triton kernels, by the compute capability of the GPU.

    device  →  settings  →  tiles of a kernel  →  tile for elements of 2 bytes and 128 dims

What a row of the table was measured on stands in it; the others fit (shared memory, registers) and are guesses of what
is fast. ``scripts/tune_kernels.py`` measures on the GPU at hand and prints the row for it.

A tile fits for the default sizes of HSA and MAHA. Leaves of more keys than a step has make the step longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from retrofit.errors import ConfigError

FULL_ROWS = 128
"""Rows from which a tile is compiled as its settings say, and not as one of ``few``."""
DIMS = (16, 32, 64, 128, 256)
"""Dims that a head is padded to."""


@dataclass(frozen=True)
class Tile:
    """The tile of one program of a kernel, and how it is compiled.

    Attributes:
        rows: Queries times heads, at most.
        keys: Keys of a step.
        warps: Warps of a program.
        stages: Steps of which something is in flight.
        registers: Registers of a thread, at most; None leaves that to the compiler.
        few: Warps and stages of tiles of fewer than ``FULL_ROWS`` rows; None for those of all others.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    few: tuple[int, int] | None = None

    def options(self, rows: int) -> dict[str, int]:
        """What the compiler is told of a tile that has so many rows."""
        if self.few is not None and rows < FULL_ROWS:
            return {"num_warps": self.few[0], "num_stages": self.few[1]}
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


Tiles = Mapping[tuple[int, int], Tile]
"""By bytes of an element and dims of a padded head; those that do not fit are missing."""


@dataclass(frozen=True)
class Pooling:
    """How the pyramid is pooled.

    Attributes:
        cells: Cells of a program that pools one level.
        many: Cells that a program pools at a time which goes on to further levels.
        members: Members of a program that halves several times.
        warps: Warps of a program.
        many_warps: The same of those for ``many`` cells.
    """

    cells: int
    many: int
    members: int
    warps: int
    many_warps: int


@dataclass(frozen=True, eq=False)
class Settings:
    """The settings for one compute capability.

    Attributes:
        measured: The GPU they were found on; None if they fit and were not measured.
        programs: Programs to a multiprocessor, of kernels whose programs take one tile after another.
        coarse: HSA's ``top_scores`` (rows) and ``refine``, and ``advance``, which has to see the same numbers.
        vote: HSA's ``vote`` and ``vote_parts``, which have to see the same numbers.
        attend: ``attend_listed`` and ``attend_run``.
        attend_by_roles: The kernel of this name, for heads of 64 or 128 dims in half precision that stand here; None if
            this is not for it. Its stages are slots of a ring.
        query_gradients_by_roles: As attend_by_roles, with tiles of as many rows.
        key_gradients_by_roles: As attend_by_roles, with tiles of 64 rows and 64 keys.
        vote_by_roles: As attend_by_roles.
        attend_parts: Attention of decoding; the rows are its least.
        query_gradients: HSA's kernel of this name.
        key_gradients: HSA's kernel of this name; its keys are those of a tile.
        maha_attend: MAHA's ``attend``.
        maha_attend_by_roles: As attend_by_roles, for tiles of 128 rows.
        maha_query_gradients: MAHA's kernel of this name.
        maha_key_gradients: MAHA's kernel of this name; its keys are those of a tile.
        pooling: The pyramid.
    """

    measured: str | None
    programs: int
    coarse: Tiles
    vote: Tiles
    attend: Tiles
    attend_by_roles: Tiles | None
    query_gradients_by_roles: Tiles | None
    key_gradients_by_roles: Tiles | None
    vote_by_roles: Tiles | None
    attend_parts: Tiles
    query_gradients: Tiles
    key_gradients: Tiles
    maha_attend: Tiles
    maha_attend_by_roles: Tiles | None
    maha_query_gradients: Tiles
    maha_key_gradients: Tiles
    pooling: Pooling


def tiles(listed: Mapping[tuple[int, int], Tile]) -> Tiles:
    """The tiles of every head, from those that are listed for heads of at most so many dims."""
    found = {}
    for size, most in sorted(listed, reverse=True):
        found.update({(size, dim): listed[size, most] for dim in DIMS if dim <= most})
    return found


SM_90 = Settings(
    measured="NVIDIA H200, 32/8 heads of 128 dims and 9/3 of 64 in bfloat16",
    programs=2,
    coarse=tiles({(2, 256): Tile(64, 64, 4, 3), (4, 128): Tile(64, 64, 4, 3), (4, 256): Tile(16, 64, 4, 1)}),
    vote=tiles(
        {
            (2, 64): Tile(128, 64, 8, 3, 128, few=(4, 2)),
            (2, 128): Tile(128, 64, 8, 2, 128, few=(4, 2)),
            (2, 256): Tile(64, 32, 8, 2, 128, few=(4, 2)),
            (4, 64): Tile(128, 64, 8, 2, 128, few=(4, 2)),
            (4, 128): Tile(128, 32, 8, 2, 128, few=(4, 2)),
            (4, 256): Tile(64, 32, 8, 2, 128, few=(4, 2)),
        }
    ),
    attend=tiles(
        {
            (2, 64): Tile(128, 64, 8, 5, 128, few=(4, 2)),
            (2, 128): Tile(128, 64, 8, 2, 128, few=(4, 2)),
            (2, 256): Tile(64, 32, 8, 2, 128, few=(4, 2)),
            (4, 64): Tile(128, 64, 8, 2, 128, few=(4, 2)),
            (4, 128): Tile(128, 32, 8, 2, 128, few=(4, 2)),
            (4, 256): Tile(64, 32, 8, 2, 128, few=(4, 2)),
        }
    ),
    attend_by_roles={(2, 64): Tile(128, 64, 4, 8), (2, 128): Tile(128, 64, 4, 5)},
    query_gradients_by_roles={(2, 64): Tile(128, 64, 4, 6), (2, 128): Tile(128, 64, 4, 4)},
    key_gradients_by_roles={(2, 64): Tile(64, 64, 4, 3, 80), (2, 128): Tile(64, 64, 4, 4)},
    vote_by_roles={(2, 64): Tile(128, 64, 4, 8, 80), (2, 128): Tile(128, 64, 4, 4, 80)},
    attend_parts=tiles(
        {
            (2, 128): Tile(16, 64, 4, 3),
            (2, 256): Tile(16, 32, 4, 3),
            (4, 64): Tile(16, 64, 4, 3),
            (4, 256): Tile(16, 32, 4, 3),
        }
    ),
    query_gradients=tiles(
        {
            (2, 128): Tile(128, 32, 8, 2, 128, few=(4, 1)),
            (2, 256): Tile(64, 32, 8, 1),
            (4, 64): Tile(128, 32, 8, 2, 128, few=(4, 1)),
            (4, 256): Tile(64, 32, 8, 1),
        }
    ),
    key_gradients=tiles(
        {
            (2, 128): Tile(64, 32, 4, 2),
            (2, 256): Tile(32, 32, 8, 1),
            (4, 64): Tile(32, 32, 4, 2),
            (4, 256): Tile(32, 32, 8, 1),
        }
    ),
    maha_attend=tiles(
        {
            (2, 128): Tile(128, 64, 8, 2, 128, few=(4, 2)),
            (2, 256): Tile(64, 32, 4, 2),
            (4, 32): Tile(128, 64, 8, 2, 128, few=(4, 2)),
            (4, 64): Tile(64, 32, 4, 2),
            (4, 128): Tile(32, 16, 4, 2),
            (4, 256): Tile(16, 16, 4, 2),
        }
    ),
    maha_attend_by_roles={(2, 64): Tile(128, 64, 4, 6), (2, 128): Tile(128, 64, 4, 5)},
    maha_query_gradients=tiles(
        {
            (2, 128): Tile(64, 64, 4, 2),
            (2, 256): Tile(32, 32, 4, 2),
            (4, 32): Tile(64, 64, 4, 2),
            (4, 64): Tile(32, 32, 4, 2),
            (4, 256): Tile(16, 16, 4, 2),
        }
    ),
    maha_key_gradients=tiles(
        {
            (2, 128): Tile(64, 64, 8, 2),
            (2, 256): Tile(32, 32, 8, 2),
            (4, 32): Tile(64, 64, 8, 2),
            (4, 64): Tile(32, 32, 8, 2),
            (4, 256): Tile(16, 16, 8, 2),
        }
    ),
    pooling=Pooling(cells=32, many=64, members=64, warps=4, many_warps=8),
)

# Without the matrix instructions of 9.0 operands stand in registers, and a limit on these costs spills. Float32 is
# multiplied outside of tensor cores: what a thread holds of a smaller tile fits into its registers.
SM_80 = replace(
    SM_90,
    measured=None,
    coarse=tiles({(2, 256): Tile(64, 64, 4, 3), (4, 64): Tile(64, 64, 4, 3), (4, 256): Tile(16, 64, 4, 1)}),
    attend_by_roles=None,
    query_gradients_by_roles=None,
    key_gradients_by_roles=None,
    vote_by_roles=None,
    maha_attend_by_roles=None,
    vote=tiles(
        {
            (2, 128): Tile(128, 64, 8, 2, few=(4, 2)),
            (2, 256): Tile(64, 32, 8, 2),
            (4, 64): Tile(64, 32, 8, 2),
            (4, 128): Tile(64, 32, 8, 1),
            (4, 256): Tile(32, 32, 8, 1),
        }
    ),
    attend=tiles(
        {
            (2, 128): Tile(128, 64, 8, 2, few=(4, 2)),
            (2, 256): Tile(64, 32, 8, 2),
            (4, 64): Tile(64, 32, 8, 2),
            (4, 128): Tile(32, 32, 8, 2),
            (4, 256): Tile(32, 32, 8, 1),
        }
    ),
    query_gradients=tiles(
        {
            (2, 128): Tile(128, 32, 8, 2, few=(4, 1)),
            (2, 256): Tile(64, 32, 8, 1),
            (4, 64): Tile(64, 32, 8, 1),
            (4, 256): Tile(32, 32, 8, 1),
        }
    ),
    maha_attend=tiles(
        {
            (2, 128): Tile(128, 64, 8, 2, few=(4, 2)),
            (2, 256): Tile(64, 32, 4, 2),
            (4, 64): Tile(64, 32, 8, 2, few=(4, 2)),
            (4, 128): Tile(32, 16, 4, 2),
            (4, 256): Tile(16, 16, 4, 2),
        }
    ),
)
SM_86 = replace(
    SM_80,
    coarse=tiles(
        {
            (2, 128): Tile(64, 64, 4, 3),
            (2, 256): Tile(64, 64, 4, 2),
            (4, 64): Tile(64, 64, 4, 3),
            (4, 128): Tile(16, 64, 4, 1),
        }
    ),
    vote=tiles(
        {
            (2, 128): Tile(128, 64, 8, 2, few=(4, 2)),
            (2, 256): Tile(64, 32, 4, 1),
            (4, 64): Tile(64, 32, 8, 2),
            (4, 128): Tile(64, 32, 8, 1),
        }
    ),
    key_gradients=tiles(
        {
            (2, 128): Tile(64, 32, 4, 2),
            (2, 256): Tile(32, 32, 8, 1),
            (4, 64): Tile(32, 32, 4, 2),
            (4, 256): Tile(32, 32, 8, 1),
        }
    ),
)
ROWS = {(8, 0): SM_80, (8, 6): SM_86, (8, 9): SM_86, (9, 0): SM_90, (10, 0): SM_80, (12, 0): SM_86}
"""By compute capability. 8.9 and 12.0 have the shared memory of 8.6; 10.0 has more than 8.0, and fits as it does."""
INTERPRETED = (9, 0)
"""The capability that the interpreter takes the settings of."""
_by_device: dict[torch.device, Settings] = {}


def settings(device: torch.device) -> Settings:
    """The settings for a GPU; where there is none, for what Triton compiles for or, in its interpreter, for 9.0."""
    found = _by_device.get(device)
    if found is None:
        if device.type != "cuda":
            return settings_for(_target())
        found = _by_device[device] = settings_for(torch.cuda.get_device_capability(device))
    return found


@contextmanager
def using(device: torch.device, row: Settings) -> Iterator[None]:
    """Has the kernels on a device take other settings."""
    before = _by_device.get(device)
    _by_device[device] = row
    try:
        yield
    finally:
        if before is None:
            del _by_device[device]
        else:
            _by_device[device] = before


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def settings_for(capability: tuple[int, int]) -> Settings:
    """The row of a compute capability that is in the table, or else of the nearest lower one.

    Raises:
        ConfigError: If all rows are of higher ones.
    """
    known = [row for row in ROWS if row <= capability]
    if not known:
        raise ConfigError(
            f"the Triton kernels need compute capability 8.0 or higher, got {capability[0]}.{capability[1]}; "
            "use implementation='blocked'"
        )
    return ROWS[max(known)]


def _target() -> tuple[int, int]:
    if triton.knobs.runtime.interpret:
        return INTERPRETED
    return divmod(triton.runtime.driver.active.get_current_target().arch, 10)
