"""Sites whose scores have a softcap or sinks: what the targets make of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import retrofit
from retrofit.errors import RetrofitError

SIZES = {"window": 16, "sink": 8, "block": 8, "node": 2, "fanout": 2, "nodes_per_span": 8, "query_block": 8}


class Site(nn.Module):
    """Causal attention with a softcap of its scores and a sink for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (y.view(batch, tokens, 2, 8).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        scores = 2.0 * torch.tanh(q @ k.transpose(2, 3) / 2.0)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
        column = self.sinks.reshape(1, -1, 1, 1).expand(batch, -1, tokens, -1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        return (weights @ v).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def case() -> tuple[nn.Sequential, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model, x = nn.Sequential(Site()).eval(), 3 * torch.randn(2, 90, 16)
    out = model(x)
    return model, x, out.detach(), list(torch.autograd.grad(out.square().sum(), model.parameters()))


def _slopes(model: nn.Module, x: Tensor, names: list[str]) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    return list(torch.autograd.grad(model(x).square().sum(), [parameters[name] for name in names]))


@pytest.mark.parametrize(
    "config", [retrofit.DenseConfig(), retrofit.HSAConfig(budget=96, dense_until=0, **SIZES)]
)
def test_output_and_gradients_are_those_of_the_original(case, config) -> None:
    model, x, out, slopes = case
    names = [name for name, _ in model.named_parameters()]
    retrofit.convert(model, config, (x,))
    try:
        torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)
        for a, b in zip(_slopes(model, x, names), slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            sinks = dict(model.named_parameters())["0.sinks"]
            kept = sinks.clone()
            sinks += 20  # read as it is now: nearly all of the softmax is the sink's
            assert model(x).norm() < 1e-3 * out.norm()
            sinks.copy_(kept)
    finally:
        retrofit.revert(model)


def test_a_small_budget_leaves_keys_out_and_stays_causal(case) -> None:
    model, x, out, _ = case
    retrofit.convert(model, retrofit.HSAConfig(budget=16, dense_until=0, **SIZES), (x,))
    try:
        with torch.no_grad():
            found = model(x)
            assert not torch.allclose(found, out, rtol=1e-3, atol=1e-3)
            changed = torch.cat([x[:, :70], torch.randn_like(x[:, 70:])], dim=1)
            assert torch.equal(model(changed)[:, :70], found[:, :70])
    finally:
        retrofit.revert(model)


def test_maha_refuses_what_it_does_not_carry(case) -> None:
    model, x, *_ = case
    with pytest.raises(RetrofitError, match="MAHA does not carry a softcap of the scores"):
        retrofit.convert(model, retrofit.MAHAConfig(), (x,))
