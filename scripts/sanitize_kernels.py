"""Runs every Triton kernel on small inputs under compute-sanitizer.

    python scripts/sanitize_kernels.py --jobs 16
    python scripts/sanitize_kernels.py --tools racecheck --cases "hsa, roles"

memcheck looks for accesses beyond allocated memory, racecheck for accesses of shared memory that nothing orders, synccheck
for barriers that not all reach. PyTorch allocates each tensor by itself meanwhile, so that what lies behind one is nobody's.
Exits with 1 if a tool found something. None of them sees global memory that threads of a program hand to each other: that
the results are the same bits each time, tests/kernels has to show.

racecheck 2025.3 does not know that an mbarrier orders what comes before and behind it. On Hopper warps that have roles
have nothing else between them. So racecheck is shown a kernel of ten lines first, in which an mbarrier orders a write and a
read; if it calls that a race, it is not asked about kernels by roles. Who releases memory too early there, or waits for
what never comes, tests/kernels/gluon_machine.py finds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from retrofit.attention_call import AttentionCall, unpadded
from retrofit.cache import RetrofitLayer
from retrofit.configs import HSAConfig, MAHAConfig
from retrofit.kernels.rotary.ops import rotary
from retrofit.targets.hsa import HSAAttention
from retrofit.targets.maha import MAHAAttention

TOOLS = ("memcheck", "racecheck", "synccheck")
DEEP = HSAConfig(window=32, sink=16, budget=64, block=16, node=2, nodes_per_span=8, beam=2, dense_until=0)
"""Needs few tokens for several coarse steps."""
MAHA = MAHAConfig(scales=4, widths=(64, 96, 128))
MOST_SHOWN = 4_000
"""Characters of what a tool says, at most: its end."""
BY_ROLES = "_by_roles"
"""Of the names of kernels whose warps have roles."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases under each tool; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--jobs", type=int, default=4, help="cases that run side by side")
    parser.add_argument("--inside", choices=[*CASES, ORDERED], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside is not None:
        {**CASES, ORDERED: order}[options.inside]()
        torch.cuda.synchronize()
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH; it comes with CUDA's toolkit", file=sys.stderr)
        return 2
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(tool: str, case: str) -> subprocess.CompletedProcess[str]:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *options_of.get(tool, ())]
        command += [sys.executable, __file__, "--inside", case]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    options_of: dict[str, list[str]] = {}
    if "racecheck" in options.tools and "Race reported" in run("racecheck", ORDERED).stdout:
        print(f"racecheck: calls {ORDERED} a race; kernels called …{BY_ROLES} are left out", flush=True)
        options_of["racecheck"] = ["--kernel-regex-exclude", f"kns={BY_ROLES}"]
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {
            pool.submit(run, tool, case): (tool, case) for case in options.cases for tool in options.tools
        }
        for done in as_completed(runs):
            tool, case = runs[done]
            result = done.result()
            print(
                f"{tool}: {case}: {'exit code ' + str(result.returncode) if result.returncode else 'clean'}",
                flush=True,
            )
            if result.returncode:
                failed = True
                print(result.stdout[-MOST_SHOWN:], result.stderr[-MOST_SHOWN:], sep="\n", flush=True)
    return int(failed)


def exercise(
    config: HSAConfig | MAHAConfig,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    padding: int = 0,
    sliding_window: int = 0,
    sinks: bool = False,
    decode: int = 3,
) -> None:
    """Forward and backward of all tokens, then a prefill, a chunk and single tokens against its cache."""
    kind: Any = HSAAttention if isinstance(config, HSAConfig) else MAHAAttention
    target = kind(
        config,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=dim,
        scale=dim**-0.5,
        causal=True,
        sliding_window=sliding_window,
        sinks=sinks,
        implementation="triton",
    ).to("cuda", dtype)
    generator = torch.Generator("cuda").manual_seed(0)

    def some(count: int) -> Tensor:
        shape = batch, tokens, count, dim
        return torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2)

    q, k, v = (some(count).requires_grad_() for count in (heads, kv_heads, kv_heads))
    call = unpadded(k)
    if padding:
        start = torch.arange(batch, device="cuda") * padding
        call = AttentionCall(start=start, length=tokens - start)
    if sinks:
        call = replace(call, sinks=torch.zeros(heads, device="cuda", dtype=dtype))
    target(q, k, v, call).float().square().sum().backward()
    with torch.no_grad():
        layer, begin = RetrofitLayer(), 0
        for end in (tokens - decode - 40, tokens - decode, *range(tokens - decode + 1, tokens + 1)):
            new = slice(begin, end)
            ends = replace(call, length=(end - call.start).clamp(min=0), layer=layer)
            target(q[:, :, new], k[:, :, new], v[:, :, new], ends)
            begin = end


def rotate() -> None:
    """Rotary positions and their gradients, of tokens that fill no tile."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, angles = (
        torch.randn(2, heads, 77, 48, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (9, 3, 1)
    )
    turned = rotary(q.requires_grad_(), k.requires_grad_(), angles.cos(), angles.sin())
    sum(x.float().square().sum() for x in turned).backward()


ORDERED = "a write and a read that an mbarrier orders"


def order() -> None:
    """One warp leaves numbers, and four read them when an mbarrier says so."""
    out = torch.zeros(32, dtype=torch.int32, device="cuda")
    _order[(1,)](out, num_warps=4)
    assert out.tolist() == [7] * 32


@gluon.jit
def _order(out):
    numbers = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(there, count=1)
    gl.warp_specialize([(_read, (numbers, there, out)), (_write, (numbers, there))], [1], [24])


@gluon.jit
def _read(numbers, there, out):
    FOUR_WARPS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(there, 0)
    gl.store(out + gl.arange(0, 32, FOUR_WARPS), numbers.load(FOUR_WARPS))


@gluon.jit
def _write(numbers, there):
    numbers.store(gl.full([32], 7, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(there)


CASES: dict[str, Callable[[], None]] = {
    "rotary": rotate,
    "hsa, roles": partial(exercise, HSAConfig(dense_until=0), heads=8, kv_heads=2, dim=128, tokens=1_300),
    "hsa, roles, smollm2": partial(
        exercise, HSAConfig(dense_until=0), heads=9, kv_heads=3, dim=64, tokens=1_200, dtype=torch.float16
    ),
    "hsa, roles, heads alone": partial(exercise, HSAConfig(dense_until=0), heads=2, kv_heads=2, dim=64, tokens=1_200),
    "hsa, blocks of several tiles": partial(exercise, HSAConfig(dense_until=0), heads=2, kv_heads=2, dim=256, tokens=1_200),
    "hsa, several coarse steps": partial(exercise, DEEP, heads=2, kv_heads=1, dim=64, tokens=2_309),
    "hsa, float32": partial(
        exercise, DEEP, heads=4, kv_heads=2, dim=32, tokens=701, dtype=torch.float32
    ),
    "hsa, padding and sinks": partial(
        exercise, DEEP, heads=4, kv_heads=1, dim=80, tokens=650, batch=2, padding=37, sinks=True
    ),
    "hsa, sliding window": partial(
        exercise, DEEP, heads=2, kv_heads=2, dim=64, tokens=900, sliding_window=400
    ),
    "maha": partial(exercise, MAHA, heads=4, kv_heads=2, dim=128, tokens=777),
    "maha, padding": partial(
        exercise, MAHA, heads=6, kv_heads=2, dim=64, tokens=500, batch=2, padding=61, dtype=torch.float16
    ),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
