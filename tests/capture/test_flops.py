"""The operations of attention are counted as it runs, however it is spelled and whoever recognises it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrofit.capture.record import record

B, H, T, N, D, DV = 2, 3, 5, 7, 8, 6
WHOLE = 2 * B * H * T * N * (D + DV)


def _sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def _eager(q, k, v):
    return torch.softmax(q @ k.mT / 3, -1) @ v


def _einsum(q, k, v):
    return torch.einsum("bhts,bhse->bhte", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v)


def _with_sinks(q, k, v):
    scores = q @ k.mT
    weights = torch.softmax(torch.cat([scores, scores.new_zeros(B, H, T, 1)], -1), -1)
    return weights[..., :-1] @ v


def _capped(q, k, v):
    return torch.softmax(torch.tanh(q @ k.mT), -1) @ v


def _router(q, k, v):
    return torch.softmax(q.flatten(0, 2) @ k[0, 0].mT, -1).sum()


def _in_parts(q, k, v):
    exponentials = (q @ k.mT).exp()
    return exponentials / exponentials.sum(-1, keepdim=True) @ v


def _divided_last(q, k, v):
    exponentials = (q @ k.mT).exp()
    return exponentials @ v / exponentials.sum(-1, keepdim=True)


def _by_logarithm(q, k, v):
    return (q @ k.mT).log_softmax(-1).exp() @ v


def _by_logsumexp(q, k, v):
    scores = q @ k.mT
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def _sigmoid(q, k, v):
    return (q @ k.mT / 3 - 1).sigmoid() @ v


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return self.function(q, k, v)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_sdpa, WHOLE),
        (_eager, WHOLE),
        (_einsum, WHOLE),
        (_with_sinks, WHOLE),
        (_capped, WHOLE),
        (_in_parts, WHOLE),
        (_divided_last, WHOLE),
        (_by_logarithm, WHOLE),
        (_by_logsumexp, WHOLE),
        (_sigmoid, WHOLE),
        (_router, 0),
    ],
)
def test_the_two_products_are_counted(function, expected):
    tensors = torch.randn(B, H, T, D), torch.randn(B, H, N, D), torch.randn(B, H, N, DV)
    (call,) = record(Module(function), tensors, {}).owners[""]
    assert call.flops == expected


class RouterFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.attention = Module(_router), Module(_eager)

    def forward(self, q, k, v):
        return self.attention(q, k, v) * self.router(q + 1, k, v) + self.attention(q, k, v)


def test_the_softmax_of_another_module_is_left_aside():
    tensors = torch.randn(B, H, T, D), torch.randn(B, H, N, D), torch.randn(B, H, N, DV)
    owners = record(RouterFirst(), tensors, {}).owners
    assert [call.flops for call in owners["attention"]] == [WHOLE, WHOLE]
    assert [call.flops for call in owners["router"]] == [0]


class Gated(nn.Module):
    """Experts with weights for each, and gates that are sigmoids of a product with them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(B * H, D, D)) for _ in range(2))

    def forward(self, x):
        return torch.bmm(torch.bmm(x, self.up).sigmoid(), self.down)


def _products_of_exponentials(q, k, v):
    return q.exp() @ (k.exp().mT @ v) / k.sum((-1, -2), keepdim=True).exp()


def _closure(x):
    """A soft adjacency with its powers, as a reading order has them: who is before whom, by way of others."""
    adjacency = (x @ x.mT / 3).sigmoid() * (1 - torch.eye(x.shape[-2]))
    adjacency = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1.0)
    closure = power = adjacency
    for _ in range(2):
        power = 0.5 * (adjacency @ power)
        closure = closure + power
    return closure - closure.mT


def _powers(q, k, v):
    return _closure(q)


def _common_neighbours(q, k, v):
    adjacency = (q @ k.mT).sigmoid()
    return adjacency @ adjacency.mT


@pytest.mark.parametrize(
    "module", [Gated(), *map(Module, (_products_of_exponentials, _powers, _common_neighbours))]
)
def test_what_is_no_attention_has_no_owner(module):
    tensors = torch.randn(B, H, T, D), torch.randn(B, H, N, D), torch.randn(B, H, N, DV)
    given = tensors if isinstance(module, Module) else (torch.randn(B * H, T, D),)
    assert not record(module, given, {}).owners


def _closure_on_values(q, k, v):
    return _closure(k) @ v


def _closure_at_once_on_values(q, k, v):
    adjacency = (k @ k.mT).sigmoid().flatten(0, 1)
    return torch.baddbmm(adjacency, adjacency, adjacency) @ v.flatten(0, 1)


def _two_hops(q, k, v):
    adjacency = (k @ k.mT).sigmoid()
    return adjacency @ (adjacency @ v)


def _gated_values(q, k, v):
    return (q @ k.mT).sigmoid() @ (v * (k @ k.mT @ v).sigmoid())


def _of_sigmoids_alone(q, k, v):
    x = (k @ k.mT @ v).sigmoid()
    return (x @ x.mT - 1).sigmoid() @ x


@pytest.mark.parametrize(
    "function",
    [
        _closure_on_values,
        _closure_at_once_on_values,
        _two_hops,
        _gated_values,
        _of_sigmoids_alone,
    ],
)
def test_sigmoids_that_meet_values_are_attention(function):
    tensors = torch.randn(B, H, T, D), torch.randn(B, H, N, D), torch.randn(B, H, N, DV)
    (call,) = record(Module(function), tensors, {}).owners[""]
    assert call.softmax == (2 if function is _two_hops else 1)
