"""Modules with a softmax of their own around the attention of others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit

WIDTH, HEADS = 32, 4
SIZES = [(2, 11), (1, 7), (3, 23)]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Parallel(Attention):
    """Attends beside what its children do, one of which attends as well, in the depths."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        found = self.child(x)
        return super().forward(x) + (found[0] if isinstance(found, tuple) else found)


class Talkative(Attention):
    """Returns more than tensors, so that no graph can have a call of it in its place."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate = Attention(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) * self.gate(x).softmax(-1)[..., :1]


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


CASES = {
    "one in a child": (lambda: Parallel(Attention()), ["block", "block.child"], None),
    "one in a child of a child": (
        lambda: Parallel(nn.Sequential(nn.LayerNorm(WIDTH), Attention())),
        ["block", "block.child.1"],
        None,
    ),
    "three": (
        lambda: Parallel(Parallel(Attention())),
        ["block", "block.child", "block.child.child"],
        None,
    ),
    "a child without a call in the graph": (
        lambda: Parallel(Talkative()),
        ["block.child"],
        "it has a softmax of its own around the attention of block.child",
    ),
    "a router": (
        Router,
        ["block.attention"],
        "a softmax besides the attention of block.attention, between no two products",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_is_converted_that_can_be(name: str) -> None:
    make, expected, reason = CASES[name]
    model, inputs = Model(make()).eval(), [torch.randn(*size, WIDTH) for size in SIZES]
    modules = list(model.modules())
    with torch.no_grad():
        before = [model(x) for x in inputs]
        for _ in range(2):  # and again, from the originals
            report = retrofit.convert(model, retrofit.DenseConfig(), (inputs[0],))
            assert [path for path, _ in retrofit.sites(model)] == expected
            assert list(report.skipped.values()) == ([] if reason is None else [reason])
            for each in (model, copy.deepcopy(model)):
                for x, wanted in zip(inputs, before, strict=True):
                    torch.testing.assert_close(each(x), wanted, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert list(model.modules()) == modules
        assert all(torch.equal(model(x), wanted) for x, wanted in zip(inputs, before, strict=True))
    others = [site.kind for site in retrofit.inspect(model, (inputs[0],)).sites if site.reason == reason]
    assert reason is None or others == ["other" if name == "a router" else "unknown"]
