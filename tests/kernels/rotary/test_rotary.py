"""Rotary positions: the kernel rounds as the operators do, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from retrofit.kernels import tape
from retrofit.kernels.prepared import Prepared
from retrofit.kernels.rotary import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
CASES = {
    "smollm2": ((1, 9, 3, 50, 64), {}),
    "one token": ((3, 4, 4, 1, 32), {}),
    "padded dims, rows": ((2, 5, 1, 37, 24), {"rows": 2}),
    "part of a head": ((2, 2, 2, 19, 16), {"rest": 8}),
    "many heads": ((1, 33, 2, 7, 128), {}),
}


def inputs(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    angles: torch.dtype,
    *,
    rows: int = 1,
    rest: int = 0,
    seed: int = 0,
) -> list[Tensor]:
    """q and k as projections leave them, cos and sin."""
    batch, heads, kv_heads, tokens, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    x = [
        torch.randn(batch, tokens, count, dim + rest, generator=generator)
        .to(DEVICE, dtype)[..., :dim]
        .transpose(1, 2)
        for count in (heads, kv_heads)
    ]
    turns = torch.rand(rows, 1, tokens, dim, generator=generator) * 6
    return [*x, *(angle.to(DEVICE, angles) for angle in (turns.cos(), turns.sin()))]


@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("dtype", "angles"), [(HALF, HALF), (HALF, torch.float32), (torch.float32, torch.float32)]
)
def test_the_kernel_rounds_as_the_operators_do(
    sizes: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, angles: torch.dtype
) -> None:
    from retrofit.kernels.rotary import triton as kernels

    q, k, cos, sin = inputs(sizes, dtype, angles, **options)
    result = torch.result_type(q, cos)
    q.requires_grad_(), k.requires_grad_()
    expected = ops.rotated(q, cos, sin), ops.rotated(k, cos, sin)
    actual = kernels.rotary(q.detach(), k.detach(), cos, sin, result)
    grads = [torch.randn_like(x) for x in expected]
    wanted = torch.autograd.grad(expected, (q, k), grads)
    found = kernels.rotary_backward(*grads, cos, sin, dtype)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
        of_x, of_y = ([z.stride(dim) for dim in range(4) if z.shape[dim] > 1] for z in (x, y))
        assert of_x == of_y
    for x, y in zip(found, wanted, strict=True):
        if result == dtype:
            assert torch.equal(x, y)
        else:  # the operators sum what they have rounded to ``dtype``, the kernel before
            tolerance = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_on_a_gpu_the_kernel_runs_and_is_differentiated(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_tapes", type(tape._tapes)())
    for seed in range(4):
        given = inputs((2, 9, 3, 70, 64), torch.bfloat16, torch.bfloat16, seed=seed)
        q, k = (x.requires_grad_(grad) for x in given[:2])
        actual = ops.rotary(q, k, *given[2:])
        expected = tuple(ops.rotated(x, *given[2:]) for x in (q, k))
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)
            assert x.requires_grad == grad
        if grad:
            weights = [torch.randn_like(x) for x in expected]
            for x, y in zip(
                torch.autograd.grad(actual, (q, k), weights),
                torch.autograd.grad(expected, (q, k), weights),
                strict=True,
            ):
                assert torch.equal(x, y)
    steps = [[type(step) for step in found.steps] for found in tape._tapes.values()]
    assert steps == [[Prepared]] * (1 + grad)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k, cos.requires_grad_(), sin),
        lambda q, k, cos, sin: (q, k, cos, sin[..., :1]),
        lambda q, k, cos, sin: (q, k[:, :, :1], cos[:, :, :1], sin[:, :, :1]),
        lambda q, k, cos, sin: (q.double(), k.double(), cos, sin),
    ],
    ids=["learned angles", "broadcast angles", "one key", "float64"],
)
def test_what_the_kernel_cannot_do_is_done_by_operators(change: Any) -> None:
    q, k, cos, sin = change(*inputs((2, 4, 2, 9, 16), torch.float32, torch.float32))
    assert not ops._is_for_kernel(q, k, cos, sin)
    for x, y in zip(ops.rotary(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(x, y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_well_made(dtype: torch.dtype) -> None:
    q, k, cos, sin = inputs((2, 4, 2, 9, 16), dtype, torch.float32)
    torch.library.opcheck(torch.ops.retrofit.rotary, (q.requires_grad_(), k.requires_grad_(), cos, sin))


def test_a_program_that_is_compiled_has_the_operators_alone() -> None:
    given = inputs((2, 4, 2, 9, 16), torch.float32, torch.float32)

    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return ops.rotary(*tensors)

    program = torch.export.export(Model(), tuple(given))
    assert not [node for node in program.graph.nodes if "retrofit" in str(node.target)]
