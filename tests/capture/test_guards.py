"""A site is used for the sizes alone for which its module does what the graph does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.errors import CaptureError, NoAttentionFound

WIDTH, HEADS = 32, 4
SIZES = [(2, 11), (1, 7), (3, 22), (5, 16), (2, 17), (4, 1), (1, 1)]

Change = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Does ``change`` to what attention gives, which may go by the sizes of its input."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.qkv, self.change = nn.Linear(WIDTH, 3 * WIDTH), change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.change(
            x, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.attention(x, *rest)


def _one_by_one(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([2 * token for token in y.unbind(1)], dim=1)


CASES: dict[str, tuple[Change, str | None]] = {
    "short": (lambda x, y: y if x.shape[1] <= 16 else 2 * y, r"x.shape\[1\] <= 16"),
    "odd": (lambda x, y: y if x.shape[1] % 2 else 2 * y, r"\(x.shape\[1\] % 2\) != 0"),
    "few rows": (lambda x, y: y if x.shape[0] < 4 else 2 * y, r"x.shape\[0\] < 4"),
    "more tokens than rows": (lambda x, y: y if x.shape[1] > 2 * x.shape[0] else 2 * y, "2 ?\\*"),
    "the logarithm of the length": (lambda x, y: y * math.log(x.shape[1]), r"x.shape\[1\] == 11"),
    "a list of tokens": (_one_by_one, r"x.shape\[1\] == 11"),
    "one token": (lambda x, y: y if x.shape[1] > 1 else 2 * y, r"x.shape\[1\] > 1"),
    "one row": (lambda x, y: y if x.shape[0] > 1 else 2 * y, r"x.shape\[0\] > 1"),
    "a factor": (lambda x, y: y * x.shape[1], None),
    "a remainder": (lambda x, y: y * (1 + x.shape[1] % 3), None),
    "padding to blocks": (lambda x, y: F.pad(y, (0, 0, 0, -x.shape[1] % 4))[:, : x.shape[1]], None),
}


@pytest.mark.parametrize("name", CASES)
def test_other_sizes_are_right_or_refused(name: str) -> None:
    change, reason = CASES[name]
    model, inputs = Model(Attention(change)).eval(), [torch.randn(*size, WIDTH) for size in SIZES]
    with torch.no_grad():
        before = [model(x) for x in inputs]
        retrofit.convert(model, retrofit.DenseConfig(), (inputs[0],))
        refused = 0
        for x, expected in zip(inputs, before, strict=True):
            try:
                got = model(x)
            except CaptureError as error:
                assert reason is not None
                assert re.search(f"attention was captured where .*{reason}", str(error))
                refused += 1
            else:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert bool(refused) == (reason is not None)


class Causal(nn.Module):
    """Hides later tokens where there are many."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        causal = x.shape[1] > 16
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def test_what_hides_by_the_length_is_right_or_refused() -> None:
    model, inputs = Model(Causal()).eval(), [torch.randn(2, tokens, WIDTH) for tokens in (11, 5, 1, 17)]
    expected = [model(x) for x in inputs]
    retrofit.convert(model, retrofit.DenseConfig(), (inputs[0],))
    for x, wanted in zip(inputs[:-1], expected, strict=False):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(CaptureError, match=r"captured where .*16.*got 17"):
        model(inputs[-1])


class Compares(nn.Module):
    """Takes another way where its second sequence is as long as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
        k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.kv(y).chunk(2, dim=-1))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return found + y if x.shape == y.shape else found


def test_two_inputs_are_compared() -> None:
    model, x, y = Model(Compares()).eval(), torch.randn(2, 11, WIDTH), torch.randn(2, 7, WIDTH)
    expected = model(x, y)
    retrofit.convert(model, retrofit.DenseConfig(), (x, y))
    torch.testing.assert_close(model(x, y), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(CaptureError, match=r"attention was captured where .*shape.*got 11, 11"):
        model(x, x.clone())


def test_an_example_of_one_token_is_too_short() -> None:
    model = Model(Attention(lambda x, y: y)).eval()
    with pytest.raises(
        NoAttentionFound, match="the example has one key alone, which shows nothing of the mask"
    ):
        retrofit.convert(model, retrofit.DenseConfig(), (torch.randn(2, 1, WIDTH),))
