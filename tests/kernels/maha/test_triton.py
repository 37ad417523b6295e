"""The Triton kernels: in Triton's interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from retrofit.errors import ConfigError
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.maha.ops import maha_attention
from retrofit.kernels.pyramid.blocked import extend_pyramid

pytest.importorskip("triton")

from retrofit.kernels import tuned

GROWING = Bands((224, 252, 504, 1008), None, 32, 2)
"""More scales the further back: all but the last hold about 128 cells."""


@dataclass(frozen=True)
class Case:
    """Inputs over N index slots and how the op is to be called."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor
    offsets: Tensor
    bands: Bands
    implementation: str = "triton"

    def run(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The op on the queries at index begin … end, with the keys up to end."""
        end = self.k.shape[2] if end is None else end
        k, v = self.k[:, :, :end], self.v[:, :, :end]
        levels = [self.cells(k), self.cells(v)]
        return self.call(self.q[:, :, begin:end], k, v, *levels, self.offsets)

    def gradients(self) -> list[Tensor]:
        """Of q, k, v, the cells and the offsets, for a random gradient of the output."""
        cells = [self.cells(self.k), self.cells(self.v)]
        q, k, v, offsets = own = [x.clone().requires_grad_() for x in (self.q, self.k, self.v, self.offsets)]
        keys, values = ([x.clone().requires_grad_() for x in part] for part in cells)
        out = self.call(q, k, v, keys, values, offsets)
        above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return list(torch.autograd.grad(out, [*own, *keys, *values], above))

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor], offsets: Tensor
    ) -> Tensor:
        return maha_attention(
            q,
            k,
            v,
            self.start,
            torch.minimum(self.length, k.shape[2] - self.start).clamp(min=0),
            keys,
            values,
            offsets,
            scale=self.q.shape[3] ** -0.5,
            widths=self.bands.widths,
            last_width=self.bands.last_width,
            sink=self.bands.sink,
            ratio=self.bands.ratio,
            implementation=self.implementation,
        )

    def run_in_chunks(self, cuts: Sequence[int]) -> Tensor:
        return torch.cat([self.run(*part) for part in pairwise([0, *cuts, self.k.shape[2]])], 2)

    def cells(self, x: Tensor) -> list[Tensor]:
        count = self.bands.scales - 1
        return extend_pyramid(
            x,
            None,
            self.start,
            new=x.shape[2],
            ratios=(self.bands.ratio,) * count,
            offset=0,
            pooling="mean",
            weights=[None] * count,
        )

    def on(self, device: str, dtype: torch.dtype) -> Case:
        names = ("q", "k", "v", "start", "length", "offsets")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **(moved | {name: moved[name].to(dtype) for name in ("q", "k", "v")}))


def build(
    tokens: int,
    *,
    bands: Bands = GROWING,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 16,
    value_dim: int | None = None,
    start: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
) -> Case:
    begin = torch.tensor(start if start is not None else [0] * batch)
    return Case(
        q=torch.randn(batch, heads, tokens, dim) * 2,
        k=torch.randn(batch, kv_heads, tokens, dim),
        v=torch.randn(batch, kv_heads, tokens, value_dim or dim),
        start=begin,
        length=torch.tensor(length) if length is not None else tokens - begin,
        offsets=torch.randn(heads, bands.scales),
        bands=bands,
    )


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


@interpreted
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


@interpreted
def test_interpreted_chunks_equal_the_whole() -> None:
    case = build(100, bands=Bands((32, 16, 16), None, 8, 2))
    torch.testing.assert_close(case.run_in_chunks([75, 76]), case.run(), rtol=1e-5, atol=1e-5)


@interpreted
def test_interpreted_kernel_is_causal_to_the_bit() -> None:
    case = build(100, bands=Bands((32, 16, 16), None, 8, 2))
    before = case.run()
    for x in (case.q, case.k, case.v):
        x[:, :, 93:] = 9 * torch.randn_like(x[:, :, 93:])
    after = case.run()
    assert torch.equal(before[:, :, :93], after[:, :, :93])
    assert not torch.equal(before[:, :, 93:], after[:, :, 93:])


@interpreted
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


@interpreted
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
