"""The Triton kernels: in Triton's interpreter and on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from maha_case import build

from retrofit.errors import ConfigError
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.maha.ops import maha_attention

pytest.importorskip("triton")

from retrofit.kernels import tuned

WIDE = Bands((96, 222, 478, 984, 2000, 4032), None, 64, 2)
"""Scales of 128 cells for blocks of 32 queries."""


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 140, "bands": Bands((32, 16, 16), None, 8, 2), "heads": 4, "kv_heads": 2},
        {
            "tokens": 150,
            "bands": Bands((5, 9), 20, 9, 3),
            "batch": 2,
            "start": [0, 13],
            "length": [140, 100],
        },
        {"tokens": 90, "bands": Bands((), None, 0, 2), "heads": 3, "dim": 20, "value_dim": 12},
        {"tokens": 470, "bands": Bands((20, 60, 80), None, 64, 2), "heads": 1},
    ],
    ids=["plain", "padded, ratio 3, last width", "one scale, odd dims", "tiles without a mask"],
)
def test_interpreted_kernel_equals_blocked(case: dict) -> None:
    own = build(**case)
    expected = replace(own, implementation="blocked").run()
    torch.testing.assert_close(own.run(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreted
def test_interpreted_chunks_equal_the_whole() -> None:
    case = build(100, bands=Bands((32, 16, 16), None, 8, 2))
    torch.testing.assert_close(case.run_in_chunks([75, 76]), case.run(), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreted
def test_interpreted_kernel_is_causal_to_the_bit() -> None:
    case = build(100, bands=Bands((32, 16, 16), None, 8, 2))
    before = case.run()
    for x in (case.q, case.k, case.v):
        x[:, :, 93:] = 9 * torch.randn_like(x[:, :, 93:])
    after = case.run()
    assert torch.equal(before[:, :, :93], after[:, :, :93])
    assert not torch.equal(before[:, :, 93:], after[:, :, 93:])


@pytest.mark.interpreted
def test_interpreted_kernels_with_the_settings_of_another_gpu() -> None:
    own = build(70, bands=Bands((16, 8, 8), None, 8, 2), heads=4, kv_heads=1)
    with tuned.using(own.q.device, tuned.ROWS[8, 6]):
        actual, grads = own.run(), own.gradients()
    torch.testing.assert_close(actual, own.run(), rtol=1e-5, atol=1e-5)
    for one, other in zip(grads, own.gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "torch.float64"),
        ({"dim": 264}, "head_dim above 256, got 264"),
        ({"aggregation": "nash"}, "aggregation='nash'"),
        ({"regularizer": "euclidean"}, "regularizer='euclidean'"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(changes: dict, words: str) -> None:
    options = dict(changes)
    shape = (1, 1, 8, options.pop("dim", 16))
    q, k, v = (torch.randn(shape, dtype=options.pop("dtype", torch.float32)) for _ in range(3))
    with pytest.raises(ConfigError, match=f"{words}; use implementation='auto' or 'blocked'"):
        maha_attention(
            q,
            k,
            v,
            torch.tensor([0]),
            torch.tensor([8]),
            [],
            [],
            torch.zeros(1, 1),
            scale=1.0,
            widths=(),
            sink=0,
            ratio=2,
            implementation="triton",
            **options,
        )


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "case",
    [
        {"tokens": 70, "bands": Bands((16, 8, 8), None, 8, 2), "heads": 3, "dim": 20, "value_dim": 12},
        {"tokens": 66, "bands": Bands((5, 9), 20, 9, 3), "batch": 2, "start": [0, 13], "length": [60, 53]},
    ],
    ids=["odd group and dims", "padded, ratio 3, last width"],
)
def test_interpreted_gradients_equal_those_of_blocked(case: dict) -> None:
    own = build(**case)
    expected = replace(own, implementation="blocked").gradients()
    for actual, wanted in zip(own.gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 3001, "heads": 9, "kv_heads": 3, "dim": 64},
        {"tokens": 2500, "heads": 8, "kv_heads": 2, "dim": 128},
        {"tokens": 2049, "heads": 16, "kv_heads": 1, "dim": 80},
        {"tokens": 1800, "heads": 2, "kv_heads": 2, "dim": 256},
        {"tokens": 2300, "batch": 2, "start": [0, 333], "length": [2200, 1960], "dim": 32},
        {"tokens": 1000, "bands": Bands((32, 16), 99, 9, 3), "heads": 5, "value_dim": 24},
    ],
    ids=["smollm2", "llama", "wide group", "wide heads", "padded", "ratio 3"],
)
def test_on_a_gpu_equals_blocked(shape: dict, dtype: torch.dtype) -> None:
    case = build(**shape).on("cuda", dtype)
    actual = case.run()
    expected = replace(case, implementation="blocked").run()
    exact = replace(case.on("cuda", torch.float64), implementation="blocked").run()
    error, bound = ((x.double() - exact).norm() / exact.norm() for x in (actual, expected))
    assert error <= 1.5 * bound + 1e-6
    blocked, exactly = (replace(x, implementation="blocked") for x in (case, case.on("cuda", torch.float64)))
    grads = zip(case.gradients(), blocked.gradients(), exactly.gradients(), strict=True)
    for grad, other, wanted in grads:
        error, bound = ((x.double() - wanted).norm() / (wanted.norm() + 1e-30) for x in (grad, other))
        assert error <= 2 * bound + 1e-5 + 4 * torch.finfo(dtype).eps
    tokens = case.k.shape[2]
    chunks = case.run_in_chunks([tokens - 37, tokens - 1])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(chunks, actual, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 4096, "heads": 32, "kv_heads": 8, "dim": 128, "bands": WIDE},
        {"tokens": 16383, "heads": 9, "kv_heads": 3, "dim": 64, "bands": WIDE},
        {"tokens": 4001, "heads": 16, "kv_heads": 2, "dim": 128, "bands": WIDE, "batch": 2, "start": [0, 77]},
        {"tokens": 3000, "heads": 2, "kv_heads": 2, "dim": 64, "bands": Bands((250, 250), None, 16, 4)},
        {"tokens": 2000, "heads": 5, "dim": 128, "bands": Bands((96, 96), 900, 0, 2), "length": [1899]},
    ],
    ids=["llama", "smollm2", "group of 8, padded", "group of 1, ratio 4", "group of 5, last width"],
)
def test_on_a_gpu_roles_change_nothing(shape: dict, dtype: torch.dtype) -> None:
    row = tuned.settings(torch.device("cuda", 0))
    if row.maha_attend_by_roles is None:
        pytest.skip("this GPU has no such kernel")
    case = build(**shape).on("cuda", dtype)
    cut = case.k.shape[2] - 1000
    actual, continued = case.run(), case.run(cut)
    with tuned.using(case.q.device, replace(row, maha_attend_by_roles=None)):
        expected = case.run()
    exact = replace(case.on("cuda", torch.float32), implementation="blocked").run()
    error, bound = ((x.float() - exact).norm() / exact.norm() for x in (actual, expected))
    assert error <= 1.1 * bound
    assert (actual.float() - expected.float()).norm() <= 2 * bound * exact.norm()
    torch.testing.assert_close(continued, actual[:, :, cut:], rtol=1e-2, atol=1e-2)
    for _ in range(20):
        assert torch.equal(case.run(), actual)


@pytest.mark.gpu
def test_on_a_gpu_no_bit_depends_on_later_tokens() -> None:
    case = build(3000, heads=4, kv_heads=2, dim=64).on("cuda", torch.bfloat16)
    before = case.run()
    for at in (2999, 2048, 2047, 1500):
        for x in (case.q, case.k, case.v):
            x[:, :, at:] = torch.randn_like(x[:, :, at:])
        assert torch.equal(case.run()[:, :, :at], before[:, :, :at])


@pytest.mark.gpu
def test_a_call_is_captured_in_a_graph() -> None:
    case = build(2000, heads=4, kv_heads=2, dim=64).on("cuda", torch.bfloat16)
    expected = case.run(1999)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = case.run(1999)
    actual.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
