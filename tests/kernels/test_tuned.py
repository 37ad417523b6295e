"""The table of launch settings: its rows fit the GPUs they are for, and change nothing about results."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from retrofit.errors import ConfigError

pytest.importorskip("triton")

from retrofit.kernels import tuned

SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""KiB of shared memory that a program can have, by compute capability."""
TENSOR_COLUMNS = 512
"""Of a multiprocessor's tensor memory."""
KERNELS = {
    "hsa": {"top_scores", "refine", "keep", "vote", "settle", "attend_listed", "attend_run"},
    "hsa_backward": {
        *("list_blocks", "query_gradients", "key_gradients", "join_gradients"),
        *("count_entries", "write_entries", "count_steps", "split_tiles", "own_parts"),
    },
    "decode": {"advance", "vote_parts", "settle", "attend_parts", "join_parts"},
    "maha": {"attend", "query_gradients", "key_gradients"},
    "pyramid": {"halve_levels", "pool_levels", "pool_cells", "measure_spreads", "pool_gradients"},
    "rotary": {"rotate"},
}

# Compiles every kernel that calls launch, as on a GPU of the given compute capability; runs none.
COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from retrofit.configs import HSAConfig
from retrofit.kernels.hsa import triton as hsa, triton_decode
from retrofit.kernels.maha import triton as maha
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.pyramid import triton as pyramid
from retrofit.kernels.rotary import triton as rotary
from retrofit.targets.hsa import geometry_of

capability, dtype, dim, heads = int(sys.argv[1]), getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])

class Driver:
    def get_current_target(self): return GPUTarget("cuda", capability, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

triton.runtime.driver.set_active(Driver())
run, part = JITFunction.run, None
def warm(self, *args, grid, warmup, **options):
    found = run(self, *args, grid=grid, warmup=True, **options)
    assert len(found.asm["cubin"]) > 1000 and f"sm_{capability}" in found.asm["ptx"]
    columns = getattr(found.metadata, "tmem_size", 0)
    print(json.dumps([part, self.__name__, found.metadata.shared, columns]))
JITFunction.run = warm

def empty(heads, tokens): return torch.empty(1, heads, tokens, dim, dtype=dtype, device="meta")
slots = 2**18
at = torch.zeros(1, dtype=torch.int64, device="meta")
q, k, lse = empty(heads, slots), empty(2, slots), torch.empty(1, heads, slots, device="meta")
g = geometry_of(HSAConfig(), heads // 2)
nodes = [empty(2, slots // g.node_size(i)) for i in range(g.levels)]
spreads = torch.empty(nodes[0].shape[:3], device="meta")
spans, choices = g.selection(k, None, None)
part, options = "hsa", {"scale": 0.1, "padded": False, "geometry": g}
sinks = torch.zeros(heads, dtype=dtype, device="meta")
for given, options["sliding_window"] in ((None, 0), (sinks, 4096)) if dim == 64 else ((None, 0),):
    hsa.hsa_attention(
        q, k, k, at, at, nodes, spreads, [], None, None, None, given, causal=True, **options
    )
part = "hsa_backward"
hsa.hsa_attention_backward(q, q, k, k, at, at, nodes, [], spans, choices, q, lse, sinks, **options)
part, none = "decode", [None] * g.levels
for x in (k, k[:, :, :512]):
    triton_decode.hsa_decode(
        *(q[:, :, :1], x, x, at, at, nodes, spreads, spans, choices, sinks, none),
        **{"pooling": "mean", "ending": True, **options},
    )
part, bands = "maha", Bands((224,), None, 32, 2)
cells = [empty(2, slots // 2)]
maha.maha_attention_backward(
    q, q, k, k, at, at, cells, cells, torch.zeros(heads, 2, device="meta"),
    scale=0.1, bands=bands, aggregation="convex", regularizer="entropy",
)
part = "pyramid"
for ratios in ((2,), (4, 8)):
    taps = [torch.empty(2, dim, ratio, device="meta") for ratio in ratios]
    options = {"ratios": ratios, "offset": 0, "pooling": "learned", "weights": taps}
    pyramid.extend_pyramid(k, None, at, new=slots, **options)
    pyramid.build_with_spreads(k, at, **options)
    levels = pyramid.extend_pyramid(k.detach().requires_grad_(), None, at, new=slots, **options)
    torch.autograd.backward(levels, levels)
    if ratios == (2,):
        pyramid.extend_pyramid(k, cells, at, new=1, **options)
pyramid.extend_spreads(k, cells[0], None, at, new=slots, ratio=2, offset=0)
part, angles = "rotary", torch.empty(1, 1, slots, dim, dtype=dtype, device="meta")
rotary.rotary(q, k, angles, angles, dtype)
rotary.rotary_backward(q, k, angles, angles, dtype)
"""


def compiled(
    capability: tuple[int, int], dtype: str, dim: int, heads: int = 8
) -> list[tuple[str, str, int, int]]:
    """(part, kernel, bytes of shared memory, columns of tensor memory) of every kernel that is launched, for so many
    query heads to two of keys."""
    arguments = [str(10 * capability[0] + capability[1]), dtype, str(dim), str(heads)]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [tuple(json.loads(line)) for line in result.stdout.splitlines()]


def case(capability: tuple[int, int], dtype: str, dim: int, *marks: pytest.MarkDecorator) -> ParameterSet:
    return pytest.param(capability, dtype, dim, marks=marks, id=f"{capability}, {dtype}, {dim}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "dim"),
    [
        *(case(capability, "bfloat16", 128) for capability in tuned.ROWS if capability != (12, 0)),
        case((8, 6), "bfloat16", 64),
        *(case(capability, "bfloat16", 64, pytest.mark.thorough) for capability in ((9, 0), (10, 0))),
        *(
            case((8, 6), dtype, dim, pytest.mark.thorough)
            for dtype, dim in (("bfloat16", 256), ("float32", 128))
        ),
        case((12, 0), "bfloat16", 128, pytest.mark.thorough),
    ],
)
def test_every_kernel_compiles_and_fits(capability: tuple[int, int], dtype: str, dim: int) -> None:
    launched = compiled(capability, dtype, dim)
    names = {part: {kernel for of, kernel, *_ in launched if of == part} for part in KERNELS}
    expected = dict(KERNELS)
    if tuned.ROWS[capability].vote_by_roles and dim == 64:
        # Sliding windows have ``vote`` and ``attend_listed``.
        expected["hsa"] = KERNELS["hsa"] | {"vote_by_roles", "attend_by_roles"}
    if tuned.ROWS[capability].maha_attend_by_roles and dtype == "bfloat16" and dim in (64, 128):
        expected["maha"] = KERNELS["maha"] - {"attend"} | {"attend_by_roles"}
    if tuned.ROWS[capability].attend_by_roles and dim == 128:
        expected["hsa"] = KERNELS["hsa"] - {"vote", "attend_listed"} | {"vote_by_roles", "attend_by_roles"}
        replaced = {"query_gradients", "key_gradients"}
        by_roles = {f"{name}_by_roles" for name in replaced}
        expected["hsa_backward"] = KERNELS["hsa_backward"] - replaced | by_roles
    assert names == expected
    for part, kernel, shared, columns in launched:
        assert shared <= SHARED[capability] * 1024, f"{kernel} of {part}"
        assert columns <= TENSOR_COLUMNS, f"{kernel} of {part}"


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dtype", "dim"), [("bfloat16", 64), ("bfloat16", 256), ("float32", 64), ("float32", 128)]
)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=str)
@pytest.mark.parametrize("group", [1, 2])
def test_every_kernel_fits_for_heads_with_keys_of_their_own(
    capability: tuple[int, int], dtype: str, dim: int, group: int
) -> None:
    for part, kernel, shared, _ in compiled(capability, dtype, dim, heads=2 * group):
        assert shared <= SHARED[capability] * 1024, f"{kernel} of {part}"


@pytest.mark.parametrize(
    ("capability", "row"),
    [((8, 0), (8, 0)), ((8, 7), (8, 6)), ((9, 1), (9, 0)), ((10, 3), (10, 0)), ((12, 1), (12, 0))],
)
def test_the_nearest_lower_row_counts(capability: tuple[int, int], row: tuple[int, int]) -> None:
    assert tuned.settings_for(capability) is tuned.ROWS[row]


def test_a_gpu_below_all_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"need compute capability 8\.0 or higher, got 7\.5"):
        tuned.settings_for((7, 5))


@pytest.mark.interpreted
def test_the_interpreter_takes_the_row_that_was_measured() -> None:
    assert tuned.settings(torch.device("cpu")) is tuned.ROWS[9, 0]
    assert tuned.ROWS[9, 0].measured


@pytest.mark.gpu
def test_a_gpu_takes_its_own_row() -> None:
    device = torch.device("cuda", 0)
    row = tuned.settings_for(torch.cuda.get_device_capability(device))
    assert tuned.settings(device) is row
    assert tuned.settings(device) is row


def test_a_head_takes_the_tile_of_the_fewest_dims_that_are_enough() -> None:
    narrow, wide = tuned.Tile(128, 64, 8, 2), tuned.Tile(64, 32, 4, 1)
    found = tuned.tiles({(2, 64): narrow, (2, 256): wide, (4, 64): wide})
    assert [found[2, dim] for dim in tuned.DIMS] == [narrow, narrow, narrow, wide, wide]
    assert [(4, dim) in found for dim in tuned.DIMS] == [True, True, True, False, False]


def test_few_rows_are_compiled_in_another_way() -> None:
    tile = tuned.Tile(128, 64, 8, 2, 128, few=(4, 1))
    assert tile.options(128) == {"num_warps": 8, "num_stages": 2, "maxnreg": 128}
    assert tile.options(64) == {"num_warps": 4, "num_stages": 1}
