"""The Triton kernel gives the very bits of ``blocked``: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from retrofit.kernels.pyramid import blocked

pytest.importorskip("triton")

RATIOS = (2, 4, 3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16])
def test_built_at_once_or_extended_the_bits_are_those_of_blocked(pooling: str, dtype: torch.dtype) -> None:
    from retrofit.kernels.pyramid import triton as kernels

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 90, 3, 20, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    start = torch.tensor([0, 13], device=DEVICE)
    options = {"ratios": RATIOS, "offset": 8, "pooling": pooling}
    levels = None
    for begin, end in ((0, 50), (50, 51), (51, 90)):
        levels = kernels.extend_pyramid(x[:, :, :end], levels, start, new=end - begin, **options)
        at_once = kernels.extend_pyramid(x[:, :, :end], None, start, new=end, **options)
        expected = blocked.extend_pyramid(x[:, :, :end], None, start, new=end, weights=[None] * 3, **options)
        for size, *found in zip((2, 8, 24), levels, at_once, expected, strict=True):
            for b, first in enumerate(start.tolist()):
                complete = max(0, end - first - 8) // size
                extended, built, wanted = (level[b, :, :complete] for level in found)
                assert torch.equal(extended, wanted)
                assert torch.equal(built, wanted)
                assert all(level.isfinite().all() for level in found)


def test_what_the_kernel_cannot_do_is_named() -> None:
    from retrofit.kernels.pyramid import triton as kernels

    x = torch.zeros(1, 1, 4, 4)
    assert kernels.unsupported(x, "mean") is None
    assert kernels.unsupported(x, "learned") == "pooling='learned'"
    assert kernels.unsupported(x.double(), "mean") == "torch.float64"
    assert kernels.unsupported(x.clone().requires_grad_(), "max") == "gradients"
