"""The Triton kernel gives the very bits of ``blocked``: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from operator import mul

import pytest
import torch

from retrofit.kernels.pyramid import blocked

pytest.importorskip("triton")

RATIOS = ((2, 4, 3), (2, 2, 2, 2, 2, 2, 2))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("pooling", ["mean", "max", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16])
@pytest.mark.parametrize("ratios", RATIOS, ids=["mixed", "halving"])
def test_built_at_once_or_extended_the_bits_are_those_of_blocked(
    pooling: str, dtype: torch.dtype, ratios: tuple[int, ...]
) -> None:
    from retrofit.kernels.pyramid import triton as kernels

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 150, 2, 20, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    weights: list[torch.Tensor | None] = [None] * len(ratios)
    if pooling == "learned":
        weights = [torch.randn(2, 20, r, generator=generator).to(DEVICE) for r in ratios]
    start = torch.tensor([0, 13], device=DEVICE)
    options = {"ratios": ratios, "offset": 8, "pooling": pooling, "weights": weights}
    levels = None
    for begin, end in ((0, 80), (80, 81), (81, 150)):
        levels = kernels.extend_pyramid(x[:, :, :end], levels, start, new=end - begin, **options)
        at_once = kernels.extend_pyramid(x[:, :, :end], None, start, new=end, **options)
        expected = blocked.extend_pyramid(x[:, :, :end], None, start, new=end, **options)
        sizes = list(accumulate(ratios, mul))
        for size, *found in zip(sizes, levels, at_once, expected, strict=True):
            for b, first in enumerate(start.tolist()):
                complete = max(0, end - first - 8) // size
                extended, built, wanted = (level[b, :, :complete] for level in found)
                assert torch.equal(extended, wanted)
                assert torch.equal(built, wanted)
                assert all(level.isfinite().all() for level in found)


@pytest.mark.parametrize("pooling", ["mean", "max", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16])
@pytest.mark.parametrize("ratios", RATIOS, ids=["mixed", "halving"])
@pytest.mark.parametrize("tokens", [9, 150], ids=["no cell", "cells"])
def test_spreads_built_with_the_pyramid_are_those_measured_after_it(
    pooling: str, dtype: torch.dtype, ratios: tuple[int, ...], tokens: int
) -> None:
    from retrofit.kernels.pyramid import triton as kernels

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 2, 20, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    weights: list[torch.Tensor | None] = [None] * len(ratios)
    if pooling == "learned":
        weights = [torch.randn(2, 20, r, generator=generator).to(DEVICE) for r in ratios]
    start = torch.tensor([0, 13], device=DEVICE)
    options = {"ratios": ratios, "offset": 8, "pooling": pooling, "weights": weights}
    levels, spreads = kernels.build_with_spreads(x, start, **options)
    expected = kernels.extend_pyramid(x, None, start, new=tokens, **options)
    measured = kernels.extend_spreads(x, expected[0], None, start, new=tokens, ratio=ratios[0], offset=8)
    size = ratios[0]
    assert spreads.shape == measured.shape == (2, 2, (tokens - 8) // size)
    for b, first in enumerate(start.tolist()):
        complete = max(0, tokens - first - 8) // size
        assert torch.equal(spreads[b, :, :complete], measured[b, :, :complete])
        for level, wanted in zip(levels, expected, strict=True):
            complete = min(complete, level.shape[2])
            assert torch.equal(level[b, :, :complete], wanted[b, :, :complete])


@pytest.mark.parametrize("pooling", ["mean", "max", "learned"])
@pytest.mark.parametrize(
    ("most", "many"), [(256, 128), (8, 8)], ids=["one launch", "several launches and steps"]
)
@pytest.mark.parametrize("ratios", RATIOS, ids=["mixed", "halving"])
@pytest.mark.parametrize("tokens", [9, 30, 150], ids=["no cell", "no cell of some levels", "cells"])
def test_gradients_are_those_of_blocked(
    monkeypatch: pytest.MonkeyPatch, pooling: str, most: int, many: int, ratios: tuple[int, ...], tokens: int
) -> None:
    from retrofit.kernels import tuned
    from retrofit.kernels.pyramid import triton as kernels

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 2, 20, generator=generator).to(DEVICE).transpose(1, 2).requires_grad_()
    weights: list[torch.Tensor | None] = [None] * len(ratios)
    if pooling == "learned":
        weights = [torch.randn(2, 20, r, generator=generator).to(DEVICE).requires_grad_() for r in ratios]
    start = torch.tensor([0, 13], device=DEVICE)
    options = {"ratios": ratios, "offset": 8, "pooling": pooling, "weights": weights}
    own = tuned.settings(x.device)
    monkeypatch.setattr(kernels, "MOST_CELLS", most)
    with tuned.using(x.device, replace(own, pooling=replace(own.pooling, many=many))):
        built = kernels.extend_pyramid(x, None, start, new=tokens, **options)
        expected = blocked.extend_pyramid(x, None, start, new=tokens, **options)
        grads = [torch.randn(level.shape, generator=generator).to(DEVICE) for level in built]
        for size, grad in zip(accumulate(ratios, mul), grads, strict=True):
            for b, first in enumerate(start.tolist()):
                grad[b, :, max(0, tokens - first - 8) // size :] = 0
        leaves = [x, *(weight for weight in weights if weight is not None)]
        found, wanted = (torch.autograd.grad(levels, leaves, grads) for levels in (built, expected))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    assert (tokens < 10) == (not bool(wanted[0].any()))


def test_levels_adjoin_but_not_those_that_an_operator_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.kernels.pyramid import ops
    from retrofit.kernels.pyramid import triton as kernels

    x, start = torch.randn(2, 3, 50, 16, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    options = {"ratios": [2, 2, 4], "offset": 0, "pooling": "mean"}
    levels = kernels.extend_pyramid(x, None, start, new=50, weights=[None] * 3, **options)
    for level, following in pairwise(levels):
        assert level.is_contiguous()
        assert level.data_ptr() + level.numel() * level.element_size() == following.data_ptr()
    monkeypatch.setattr(ops, "_on_gpu", lambda x: True)
    apart = torch.ops.retrofit.extend_pyramid(x, x, start, [], [], **options)
    for level, other in zip(levels, apart, strict=True):
        assert torch.equal(level, other)


def test_what_the_kernel_cannot_do_is_named() -> None:
    from retrofit.kernels.pyramid import triton as kernels

    x = torch.zeros(1, 1, 4, 4)
    assert kernels.unsupported(x, "mean", [None]) is None
    assert kernels.unsupported(x, "learned", [x]) is None
    assert kernels.unsupported(x, "attention", [x]) == "pooling='attention'"
    assert kernels.unsupported(x.double(), "mean", [None]) == "torch.float64"
    assert kernels.unsupported(x, "learned", [x.double()]) == "weights in float64"
    graded = x.clone().requires_grad_()
    assert kernels.unsupported(graded, "max", [None]) is None
    assert kernels.unsupported(graded, "max", [None], differentiable=False) == "gradients"
    assert kernels.unsupported(x, "learned", [graded], differentiable=False) == "gradients"
