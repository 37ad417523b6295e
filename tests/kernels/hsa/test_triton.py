"""The Triton kernels: in Triton's interpreter, compiled for every architecture, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from retrofit.errors import ConfigError
from retrofit.kernels.dense.scores import ScoreRules
from retrofit.kernels.hsa.geometry import FADE, Geometry

pytest.importorskip("triton")

DEFAULT = Geometry(
    window=256,
    sink=32,
    budget=480,
    block=32,
    node=4,
    fanout=8,
    nodes_per_span=16,
    beam=31,
    query_block=32,
    dense_until=0,
    threshold=0.002,
    spread=1.4,
)

# Compiles every kernel that a call launches, as on a GPU of the given compute capability; runs none.
COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from retrofit.kernels.hsa import triton as kernels, triton_decode
from retrofit.kernels.hsa.geometry import Geometry

class Driver:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

triton.runtime.driver.set_active(Driver())
run, compiled = JITFunction.run, {}
def warm(self, *args, grid, warmup, **options):
    compiled[self.__name__] = run(self, *args, grid=grid, warmup=True, **options).asm["cubin"]
JITFunction.run = warm
g = Geometry(256, 32, 480, 32, 4, 8, 16, 31, 32, 0, 0.002, 1.4)
q, k = (torch.empty(1, heads, 2**18, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2))
nodes = [torch.empty(1, 2, 2**18 // g.node_size(i), 64, dtype=torch.bfloat16, device="meta") for i in range(g.levels)]
at = torch.zeros(1, dtype=torch.int64, device="meta")
spreads = torch.empty(1, 2, nodes[0].shape[2], device="meta")
kernels.hsa_attention(
    q, k, k, at, at, nodes, spreads, [], None, None, None, scale=0.1, causal=True, sliding_window=0,
    padded=False, geometry=g,
)
spans, choices = g.selection(k, None, None)
lse = torch.empty(1, 8, 2**18, device="meta")
kernels.hsa_attention_backward(
    q, q, k, k, at, at, nodes, [], spans, choices, q, lse, scale=0.1, padded=False, geometry=g
)
triton_decode.hsa_decode(
    q[:, :, :1], k, k, at, at, nodes, spreads, spans, choices, [None] * g.levels,
    scale=0.1, pooling="mean", padded=False, ending=True, geometry=g,
)
print(*sorted(name for name, code in compiled.items() if len(code) > 1000))
"""


@pytest.fixture
def implementation() -> str:
    return "triton"


def both(case: Any) -> tuple[Any, Any]:
    return case.run(), replace(case, implementation="blocked").run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(
    "inputs",
    [
        {"tokens": 110},
        {"tokens": 118, "batch": 2, "start": [0, 9], "length": [110, 101]},
        {"tokens": 130, "beam": 2, "fanout": 2, "nodes_per_span": 8},
        {"tokens": 111, "heads": 3, "kv_heads": 1, "block": 16, "sink": 16, "dense_until": 0},
        {"tokens": 120, "heads": 6, "query_block": 32, "dense_until": 0},
    ],
    ids=["plain", "padded", "levels", "wide blocks", "wide group"],
)
def test_interpreted_kernels_equal_blocked(build: Callable[..., Any], inputs: dict[str, Any]) -> None:
    case = build(**{"heads": 2, "kv_heads": 1, **inputs})
    actual, expected = both(case)
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual.spans, expected.spans)
    assert torch.equal(actual.choices, expected.choices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_interpreted_chunks_equal_the_whole(build: Callable[..., Any]) -> None:
    case = build(100, heads=2, kv_heads=1)
    whole, chunks = case.run(), case.run_in_chunks([75, 76, 91])
    torch.testing.assert_close(chunks.out, whole.out, rtol=1e-6, atol=1e-6)
    assert torch.equal(chunks.spans, whole.spans)
    assert torch.equal(chunks.choices, whole.choices)


def outweighed(case: Any) -> Any:
    """The case with a key, behind the sinks, of more weight than a float holds beside the others."""
    q, k = case.q.clone(), case.k.clone()
    q[..., 0], k[:, :, 12, 0] = 10, 60
    return replace(case, q=q, k=k)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_interpreted_rows_beyond_the_range_are_done_again(build: Callable[..., Any]) -> None:
    case = outweighed(build(110, heads=2, kv_heads=1))
    actual, expected = both(case)
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-5, atol=1e-5)
    assert (actual.out[:, :, 80:] - case.v[:, :, 12:13]).abs().max() < 1e-5


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles(capability: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    forward = {"top_scores", "refine", "keep", "choose", "list_blocks", "attend_listed", "attend_run"}
    backward = {"count_entries", "write_entries", "count_steps"}
    backward |= {"query_gradients", "key_gradients", "join_gradients"}
    decoding = {"grow_levels", "vote_parts", "settle_parts", "attend_parts", "join_parts"}
    assert set(result.stdout.split()) == forward | backward | decoding


def test_what_the_kernels_cannot_do_is_refused(build: Callable[..., Any]) -> None:
    for changes, words in (
        ({"causal": False}, "not causal"),
        ({"sliding_window": 90}, "sliding window, got 90"),
        ({"rules": ScoreRules(2.0)}, "a softcap or sinks in the softmax"),
    ):
        with pytest.raises(ConfigError, match=f"{words}.*use implementation='auto' or 'blocked'"):
            replace(build(100), **changes).run()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "inputs",
    [
        {"tokens": 3001, "heads": 9, "kv_heads": 3, "dim": 64, "geometry": DEFAULT},
        {"tokens": 2500, "heads": 8, "kv_heads": 2, "dim": 128, "geometry": DEFAULT},
        {"tokens": 2049, "heads": 16, "kv_heads": 1, "dim": 80, "geometry": DEFAULT},
        {"tokens": 1800, "heads": 2, "kv_heads": 2, "dim": 256, "geometry": DEFAULT},
        {
            "tokens": 2300,
            "batch": 2,
            "start": [0, 333],
            "length": [2200, 1960],
            "dim": 32,
            "geometry": DEFAULT,
        },
        {"tokens": 1000},
        {"tokens": 700, "batch": 2, "start": [0, 40], "length": [690, 660], "beam": 2, "fanout": 2},
    ],
    ids=["smollm2", "llama", "wide group", "wide heads", "padded", "tiny", "levels"],
)
def test_on_a_gpu_equals_blocked(
    build: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype
) -> None:
    inputs = dict(inputs)
    geometry = inputs.pop("geometry", None)
    case = build(inputs.pop("tokens"), **inputs)
    case = replace(case, geometry=geometry or case.geometry).to("cuda", dtype)
    actual, expected = both(case)
    exact = replace(case, implementation="blocked").to("cuda", torch.float64).run()
    risen = [case.geometry.risen(x.choices) for x in (actual, expected)]
    assert ((risen[0] - risen[1]).abs() <= FADE // 64).all(-1).float().mean() > 0.999
    error, bound = ((x.out.double() - exact.out).norm() / exact.out.norm() for x in (actual, expected))
    assert error <= 1.5 * bound + 1e-6
    chunks = case.run_in_chunks([case.tokens - 37, case.tokens - 1])
    assert torch.equal(chunks.spans, actual.spans)
    assert torch.equal(chunks.choices, actual.choices)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(chunks.out, actual.out, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_rows_beyond_the_range_are_done_again(build: Callable[..., Any], dtype: torch.dtype) -> None:
    case = outweighed(replace(build(1500, dim=64), geometry=DEFAULT)).to("cuda", dtype)
    out = case.run().out[:, :, 900:]
    value = case.v.repeat_interleave(2, 1)[:, :, 12:13]
    assert (out - value).abs().max() < 1e-2


@pytest.mark.gpu
def test_on_a_gpu_no_bit_depends_on_later_tokens(build: Callable[..., Any]) -> None:
    case = replace(build(3000, dim=64), geometry=DEFAULT).to("cuda", torch.bfloat16)
    before = case.run().out
    for at in (1500, 2047, 2048, 2999):
        q, k, v = (x.clone() for x in (case.q, case.k, case.v))
        for x in (q, k, v):
            x[:, :, at:] = torch.randn_like(x[:, :, at:])
        after = replace(case, q=q, k=k, v=v).run().out
        assert torch.equal(after[:, :, :at], before[:, :, :at])


@pytest.mark.gpu
def test_a_call_is_captured_in_a_graph(build: Callable[..., Any]) -> None:
    case = replace(build(2000, dim=64), geometry=DEFAULT).to("cuda", torch.bfloat16)
    past = case.run(0, 1999)
    expected = case.run(1999, 2000, past).out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = case.run(1999, 2000, past).out
    actual.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
