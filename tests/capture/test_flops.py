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


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return self.function(q, k, v)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(_sdpa, WHOLE), (_eager, WHOLE), (_einsum, WHOLE), (_with_sinks, WHOLE), (_capped, WHOLE), (_router, 0)],
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
