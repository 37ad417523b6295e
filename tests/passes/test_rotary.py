"""The pass that makes one call of the rotary positions of queries and keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from retrofit.kernels.rotary.ops import rotary
from retrofit.passes.attention.rotary import fuse_rotary

D = 8
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def turn(x: Tensor) -> Tensor:
    return torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def parts_rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As in GPT-NeoX: of twice as many dims the first half is rotated."""
    (q, rest_q), (k, rest_k) = (x.repeat(1, 1, 1, 2).split(D, -1) for x in (q, k))
    q, k = plain(q, k, cos, sin)
    return torch.cat([q, rest_q], -1), torch.cat([k, rest_k], -1)


def size_of_the_first(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The second is made with the first one's size."""
    first = q * cos + turn(q) * sin
    k = k + torch.zeros_like(first)[:, :1]
    return first, k * cos + turn(k) * sin


FUSED: dict[str, Forward] = {
    "as in Llama": plain,
    "factors the other way round": lambda q, k, cos, sin: (cos * q + sin * turn(q), cos * k + sin * turn(k)),
    "terms the other way round": lambda q, k, cos, sin: (turn(q) * sin + q * cos, turn(k) * sin + k * cos),
    "one of the two": lambda q, k, cos, sin: (q * cos + turn(q) * sin, turn(k) * sin + k * cos),
    "parts of heads": lambda q, k, cos, sin: parts_rotated(q, k, cos, sin),
    "used again": lambda q, k, cos, sin: (*plain(q, k, cos, sin), turn(q)),
}
LEFT: dict[str, Forward] = {
    "only queries": lambda q, k, cos, sin: (q * cos + turn(q) * sin, k),
    "other angles": lambda q, k, cos, sin: (q * cos + turn(q) * sin, k * sin + turn(k) * cos),
    "turned the other way": lambda q, k, cos, sin: tuple(
        x * cos + torch.cat([x[..., D // 2 :], -x[..., : D // 2]], -1) * sin for x in (q, k)
    ),
    "other halves": lambda q, k, cos, sin: tuple(
        x * cos + torch.cat([-x[..., D // 4 : 3 * D // 4], x[..., : D // 2]], -1) * sin for x in (q, k)
    ),
    "every other dim": lambda q, k, cos, sin: tuple(
        x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k)
    ),
    "a factor": lambda q, k, cos, sin: tuple(torch.add(x * cos, turn(x) * sin, alpha=2) for x in (q, k)),
    "another turned": lambda q, k, cos, sin: (q * cos + turn(k[:, :1]) * sin, k * cos + turn(q[:, :2]) * sin),
    "angles of heads": lambda q, k, cos, sin: tuple(
        x * y + turn(x) * sin for x in (q, k) for y in (cos.expand(-1, x.shape[1], -1, -1),)
    ),
    "the size of the first": size_of_the_first,
    "the second of the first": lambda q, k, cos, sin: (
        first := q * cos + turn(q) * sin,
        (first + 1) * cos + turn(first + 1) * sin,
    ),
}


def traced(forward: Forward, given: tuple[Tensor, ...]) -> GraphModule:
    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return forward(*tensors)

    return torch.export.export(Model(), given).module(check_guards=False)


@pytest.fixture
def given() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, D), (2, 2, 5, D), (1, 1, 5, D), (1, 1, 5, D))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("name", FUSED)
def test_rotations_by_the_same_angles_become_one_call(name: str, given: tuple[Tensor, ...]) -> None:
    module = traced(FUSED[name], given)
    expected = module(*given)
    assert fuse_rotary(module.graph) == 1
    module.recompile()
    assert sum(node.target is rotary for node in module.graph.nodes) == 1
    assert not [node for node in module.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    for x, y in zip(module(*given), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_something_else_is_left(name: str, given: tuple[Tensor, ...]) -> None:
    module = traced(LEFT[name], given)
    before = str(module.graph)
    assert fuse_rotary(module.graph) == 0
    assert str(module.graph) == before
