"""Modules that give zero on the example are compared with random numbers in the place of what is zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.awaken import awakened
from retrofit.errors import NoAttentionFound, VerificationError

HEADS, DIM = 4, 8
WIDTH = HEADS * DIM


class Asleep(nn.Module):
    """Attention whose last layer starts at zero."""

    def __init__(self, weights: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1)) -> None:
        super().__init__()
        self.qkv, self.o, self.weights = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), weights
        for parameter in self.o.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = self.weights(q @ k.transpose(-1, -2) * DIM**-0.5)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def _around(site: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), site).eval()


def _converted(site: nn.Module) -> tuple[nn.Module, retrofit.ConversionReport]:
    model = _around(site)
    return model, retrofit.convert(model, retrofit.DenseConfig(), (torch.randn(2, 11, WIDTH),))


def _sunk(scores: Tensor) -> Tensor:
    column = torch.zeros(1, HEADS, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


RIGHT = {
    "softmax": lambda s: s.softmax(-1),
    "the maximum first": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "the largest first": lambda s: (s - s.max(-1, keepdim=True).values).softmax(-1),
    "a number first": lambda s: (s + 3).softmax(-1),
    "a sink": _sunk,
}
WRONG = {
    "the maximum over queries": (
        lambda s: (s - s.amax(-2, keepdim=True)).softmax(-1),
        "not that over the keys",
    ),
    "the largest over queries": (
        lambda s: (s - s.max(-2, keepdim=True).values).softmax(-1),
        "not that over the keys",
    ),
    "a number beside a sink": (lambda s: _sunk(s + 3), "not to the logit that stands beside them"),
    "a maximum beside a sink": (
        lambda s: _sunk(s - s.amax(-1, keepdim=True)),
        "not to the logit that stands beside them",
    ),
    "dropout": (lambda s: F.dropout(s.softmax(-1), 0.1), "drops out attention weights in evaluation"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_weights_loaded_after_the_conversion(name: str) -> None:
    model, report = _converted(Asleep(RIGHT[name]))
    ((_, error),) = report.verification.sites.items()
    assert 0 < error < 1e-5
    assert not any(parameter.any() for parameter in model[1].o.parameters())
    nn.init.normal_(model[1].o.weight)
    x = torch.randn(2, 13, WIDTH)
    with torch.no_grad():
        got = model(x)
        retrofit.revert(model)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WRONG)
def test_what_zero_hides_is_refused(name: str) -> None:
    weights, reason = WRONG[name]
    with pytest.raises(NoAttentionFound, match=reason):
        _converted(Asleep(weights))


class Gated(Asleep):
    """Behind a gate that is always shut."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.0


def test_what_stays_zero_is_refused() -> None:
    model = _around(Gated())
    with pytest.raises(VerificationError, match=r"1 gives zero on the example, also with random numbers"):
        retrofit.convert(model, retrofit.DenseConfig(), (torch.randn(2, 11, WIDTH),))
    assert type(model[1]) is Gated


class Swapped(Asleep):
    """Is another module while it is exported, which its last layer hides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1) if torch.compiler.is_compiling() else x)


def test_what_the_last_layer_hides_is_found_and_the_layer_restored() -> None:
    model = _around(Swapped())
    model[1].o.weight.data[0] = -0.0
    bits = [parameter.view(torch.int32).clone() for parameter in model.parameters()]
    with pytest.raises(VerificationError, match="differs from the original"):
        retrofit.convert(model, retrofit.DenseConfig(), (torch.randn(2, 11, WIDTH),))
    assert all(map(torch.equal, bits, (parameter.view(torch.int32) for parameter in model.parameters())))


class Biased(Swapped):
    """Gives the same for every token."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.o.bias)


class Uniform(nn.Module):
    """Starts with scores of zero, which hide that they are scaled otherwise while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        nn.init.zeros_(self.q.weight)
        nn.init.zeros_(self.q.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in (self.q(x), *self.kv(x).chunk(2, -1))
        )
        scale = 2.0 if torch.compiler.is_compiling() else 1.0
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("site", [Biased, Uniform])
def test_what_hides_a_part_is_found_as_well(site: type[nn.Module]) -> None:
    with pytest.raises(VerificationError, match="differs from the original"):
        _converted(site())


def test_the_numbers_are_the_same_every_time_and_go_on_errors() -> None:
    site, seen = Asleep(), []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), awakened(site) as count:
            assert count == 2
            seen.append(site.o.weight.clone())
            raise ZeroDivisionError
        assert not site.o.weight.any()
    assert torch.equal(*seen)
    assert seen[0].any()


class Pair(nn.Module):
    """Two attentions in one module, with a last layer of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            x = x + 1
        for linear in (self.a, self.b):
            q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in linear(x).chunk(3, -1))
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(x)


def test_modules_with_several_attentions() -> None:
    with pytest.raises(NoAttentionFound, match="run without them, it differs"):
        _converted(Pair())


class Second(Asleep):
    """What it gives besides is another thing while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.o.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x * (2 if torch.compiler.is_compiling() else 1)


class First(nn.Module):
    def __init__(self, site: nn.Module, all_of_it: bool) -> None:
        super().__init__()
        self.site, self.all_of_it = site, all_of_it

    def forward(self, x: Tensor) -> object:
        first, second = self.site(x)
        return {"y": first, "z": second} if self.all_of_it else first


def test_all_tensors_of_a_site_are_compared() -> None:
    with pytest.raises(VerificationError, match="site differs from the original"):
        _converted(First(Second(), False))


def test_all_tensors_of_a_model_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = First(Second(), True).eval()
    monkeypatch.setattr("retrofit.admit.verify_site", lambda *_: 1e-7)
    with pytest.raises(VerificationError, match="whole model's output differs"):
        retrofit.convert(model, retrofit.DenseConfig(), (torch.randn(2, 11, WIDTH),))
