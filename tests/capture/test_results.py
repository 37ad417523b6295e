"""What a module returns: tensors in tuples and dicts; what no graph can give is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.errors import NoAttentionFound, VerificationError

WIDTH, HEADS = 32, 4
SIZES = [(2, 11), (1, 7), (3, 23)]


@dataclass
class Result:
    states: Tensor
    count: int = 3


class Holder:
    def __init__(self, states: Tensor) -> None:
        self.states = states


class Attention(nn.Module):
    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.qkv, self.give = nn.Linear(WIDTH, 3 * WIDTH), give

    def heads(self, x: Tensor) -> Iterator[Tensor]:
        return (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.heads(x)
        return self.give(x, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, attention: nn.Module, take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.attention, self.take = attention, take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.attention(x * 1))


TAKEN: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "a dict": (lambda x, y: {"states": y, "name": "y", "none": None}, lambda found: found["states"]),
    "a list in a tuple": (lambda x, y: (3, [y, y * 2]), lambda found: found[0] * found[1][1]),
    "a dataclass that nobody reads tensors of": (
        lambda x, y: (y, Result(y * 2)),
        lambda found: found[0] * found[1].count,
    ),
    "the input as well": (lambda x, y: (y, x), lambda found: found[0] + found[1]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_structures_are_given_back(name: str) -> None:
    give, take = TAKEN[name]
    model, inputs = Model(Attention(give), take).eval(), [torch.randn(*size, WIDTH) for size in SIZES]
    expected = [model(x) for x in inputs]
    assert len(retrofit.convert(model, retrofit.DenseConfig(), (inputs[0],)).converted) == 1
    for x, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor], str]] = {
    "a size": (
        lambda x, y: (y, x.shape[1]),
        lambda found: found[0],
        "returns a number that depends on the sizes of its inputs",
    ),
    "an object": (
        lambda x, y: (y, Holder(y)),
        lambda found: found[1].states,
        "returns a Holder, which is neither a tensor nor a tuple, dict or dataclass of tensors",
    ),
    "a changed input": (
        lambda x, y: y + x.add_(1),
        lambda found: found,
        "changes a buffer or an input",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_give_is_named(name: str) -> None:
    give, take, reason = REFUSED[name]
    model, x = Model(Attention(give), take).eval(), torch.randn(2, 11, WIDTH)
    expected = model(x)
    with pytest.raises(NoAttentionFound, match=f"attention: Attention.forward {reason}"):
        retrofit.convert(model, retrofit.DenseConfig(), (x,))
    assert torch.equal(model(x), expected)


def test_tensors_in_a_dataclass_become_none() -> None:
    model = Model(Attention(lambda x, y: (y, Result(y * 2))), lambda found: found[0] + found[1].states).eval()
    x = torch.randn(2, 11, WIDTH)
    expected = model(x)
    with pytest.raises(VerificationError, match="tensors in the Result that it returns become None"):
        retrofit.convert(model, retrofit.DenseConfig(), (x,))
    assert torch.equal(model(x), expected)


def test_each_call_returns_a_dataclass_of_its_own() -> None:
    model = Model(Attention(lambda x, y: (y, Result(y * 2))), lambda found: found).eval()
    x = torch.randn(2, 11, WIDTH)
    retrofit.convert(model, retrofit.DenseConfig(), (x,))
    first: Any = model(x)
    first[1].count = 7
    second: Any = model(x)
    assert second[1].states is None
    assert second[1].count == 3


class Weighing(Attention):
    def forward(self, x: Tensor) -> Any:
        q, k, v = self.heads(x)
        weights = torch.softmax(q @ k.mT, dim=-1)
        return self.give(weights, (weights @ v).transpose(1, 2).flatten(2))


WEIGHTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "last": (lambda w, y: (y, w), lambda found: found[0]),
    "first": (lambda w, y: (w, y), lambda found: found[1]),
    "first in a dict": (lambda w, y: {"w": w, "y": y}, lambda found: found["y"]),
    "last in a dict": (lambda w, y: {"y": y, "w": w}, lambda found: found["y"]),
    "two of them, first": (lambda w, y: ((w, w.mean(1)), y), lambda found: found[1]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_nobody_takes_may_stand_anywhere(name: str) -> None:
    torch.manual_seed(0)
    give, take = WEIGHTS[name]
    model, inputs = Model(Weighing(give), take).eval(), [torch.randn(*size, WIDTH) for size in SIZES]
    expected = [model(x) for x in inputs]
    assert len(retrofit.convert(model, retrofit.DenseConfig(), (inputs[0],)).converted) == 1
    for x, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    retrofit.revert(model)
    assert all(torch.equal(model(x), wanted) for x, wanted in zip(inputs, expected, strict=True))


@pytest.mark.parametrize(
    "take", [lambda found: found[1] * found[0].amax(), lambda found: found[0] @ found[0]]
)
def test_weights_that_are_first_and_taken_are_refused(take: Callable[[Any], Tensor]) -> None:
    model = Model(Weighing(lambda w, y: (w, y)), take).eval()
    with pytest.raises(NoAttentionFound, match="used by the module around it"):
        retrofit.convert(model, retrofit.DenseConfig(), (torch.randn(2, 11, WIDTH),))
