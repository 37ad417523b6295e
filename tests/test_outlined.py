"""Several attentions in one forward: each is found, converted with proof, and left where it cannot be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.configs import DenseConfig, HSAConfig, MAHAConfig
from retrofit.errors import CaptureError

WIDTH, HEADS, DIM = 32, 4, 8
SIZES = [(2, 11, 7), (3, 5, 23), (1, 9, 9), (5, 1, 2)]


def _heads(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in x.chunk(parts, dim=-1))


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _sdpa(*args: Tensor, **options: Any) -> Tensor:
    return _flat(F.scaled_dot_product_attention(*args, **options))


class Block(nn.Module):
    """Two self-attentions, one after the other: both ways by SDPA, causal step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + _sdpa(*_heads(self.first(x), 3))
        q, k, v = _heads(self.second(x), 3)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return x + _flat((q @ k.mT * 0.3).masked_fill(later, -1e9).softmax(-1) @ v)


class Differential(Block):
    """The difference of two attentions to the same values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.first(x), 3)
        return _sdpa(q, k, v) - 0.5 * _sdpa(k, q, v)


class Chained(Block):
    """One attends to what comes of the other."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.first(x), 3)
        return _sdpa(q, k, F.scaled_dot_product_attention(q, k, v))


class Scales(Block):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.first(x), 3)
        return _sdpa(q, k, v) - _sdpa(q, k, -v, scale=1.0)


class Whole(nn.Module):
    """A transformer in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) * 0.2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + _sdpa(*_heads(x @ weight, 3), is_causal=True)
        return x


class Decoder(nn.Module):
    """Self-attention with a softcap and sinks, then cross-attention to ``y`` under a mask of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.q, self.kv = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(20, WIDTH),
        )
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        q, k, v = _heads(self.qkv(x), 3)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (3 * torch.tanh(q @ k.mT / 3)).masked_fill(later, -torch.inf)
        column = self.sinks.view(1, HEADS, 1, 1).expand(*scores.shape[:3], 1)
        x = x + _flat(torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v)
        (q,), (k, v) = _heads(self.q(x), 1), _heads(self.kv(y), 2)
        return x + _sdpa(q, k, v, attn_mask=mask[:, None, None] != 0, enable_gqa=True)


class Around(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.before, self.block = nn.Linear(WIDTH, WIDTH), block

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.block(self.before(x), *rest)


def _inputs(name: str, batch: int, tokens: int, keys: int) -> tuple[Tensor, ...]:
    if name != "Decoder":
        return (torch.randn(batch, tokens, WIDTH),)
    mask = torch.ones(batch, keys)
    mask[0, keys // 2 + 1 :] = 0
    return torch.randn(batch, tokens, WIDTH), torch.randn(batch, keys, 20), mask


CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str]]]] = {
    "Block": (Block, [("self", "none"), ("self", "causal")]),
    "Differential": (Differential, [("self", "none")] * 2),
    "Chained": (Chained, [("self", "none")] * 2),
    "Scales": (Scales, [("self", "none")] * 2),
    "Whole": (Whole, [("self", "causal")] * 3),
    "Decoder": (Decoder, [("self", "causal"), ("cross", "key padding")]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_is_a_site(name: str) -> None:
    make, expected = CASES[name]
    model, examples = Around(make()).eval(), [_inputs(name, *sizes) for sizes in SIZES]
    modules, names = list(model.modules()), list(model.state_dict())
    with torch.no_grad():
        before = [model(*example) for example in examples]
        report = retrofit.convert(model, DenseConfig(), examples[0])
        assert [(site.kind, site.mask) for site in report.converted] == expected
        paths = [f"block.attention_{number}" for number in range(len(expected))]
        assert (
            [site.path for site in report.converted] == paths == [path for path, _ in retrofit.sites(model)]
        )
        assert report.coverage == 1.0
        assert list(model.state_dict()) == names
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for example, wanted in zip(examples, before, strict=True):
                torch.testing.assert_close(each(*example), wanted, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert list(model.modules()) == modules
        assert all(torch.equal(model(*x), wanted) for x, wanted in zip(examples, before, strict=True))


LIMIT = HSAConfig(window=8, sink=8, budget=4096, block=8, node=4, fanout=2, nodes_per_span=4, query_block=8)


@pytest.mark.parametrize(
    "config", [LIMIT, MAHAConfig(scales=2, widths=(4096,), sink=8)], ids=lambda c: c.target
)
def test_other_targets_take_them(config: HSAConfig) -> None:
    model, x = Around(Whole()).eval(), torch.randn(2, 40, WIDTH)
    expected = model(x)
    retrofit.convert(model, config, (x,))
    assert {site.retrofit.config.target for _, site in retrofit.sites(model)} == {config.target}
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_they_are_selected_one_by_one() -> None:
    model, x = Around(Whole()).eval(), torch.randn(2, 40, WIDTH)
    expected = model(x)
    retrofit.convert(model, LIMIT, (x,), where="*.attention_[01]")
    report = retrofit.convert(model, DenseConfig(), (x,), where=[1, 2])
    assert report.skipped == {"block.attention_0": "left out by where; stays hsa"}
    targets = [site.retrofit.config.target for _, site in retrofit.sites(model)]
    assert targets == ["hsa", "dense", "dense"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    sites = retrofit.inspect(model, (x,)).sites
    assert [site.target for site in sites] == targets
    assert [path for path, _ in retrofit.sites(model)] == [site.path for site in sites]


class Partly(Block):
    """The second sees every other key alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + _sdpa(*_heads(self.first(x), 3))
        at = torch.arange(x.shape[1])
        return x + _sdpa(*_heads(self.second(x), 3), attn_mask=(at[:, None] - at) % 2 == 0)


def test_one_that_cannot_be_keeps_no_other_from_it() -> None:
    model, x = Around(Partly()).eval(), torch.randn(2, 11, WIDTH)
    expected, longer = model(x), torch.randn(3, 23, WIDTH)
    wanted = model(longer)
    report = retrofit.convert(model, DenseConfig(), (x,))
    assert [site.path for site in report.converted] == ["block.attention_0"]
    assert "the mask is none of none, causal" in report.skipped["block.attention_1"]
    assert "test_outlined.py:" in report.skipped["block.attention_1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(longer), wanted, rtol=1e-5, atol=1e-5)
    retrofit.revert(model)
    assert torch.equal(model(x), expected)


def test_gradients_reach_everything() -> None:
    model, x = Around(Decoder()).eval(), _inputs("Decoder", 2, 11, 7)
    other = copy.deepcopy(model)
    retrofit.convert(model, DenseConfig(), x)
    for each in (model, other):
        each(*x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


class Dropping(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


def test_training_with_dropout_is_refused() -> None:
    model, x = Around(Dropping()).eval(), torch.randn(2, 11, WIDTH)
    retrofit.convert(model, DenseConfig(), (x,))
    model(x)
    with pytest.raises(CaptureError, match="block cannot be trained: it has several attentions"):
        model.train()(x)


def test_weights_of_one_used_by_the_other_are_refused() -> None:
    class Shared(Block):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = _heads(self.first(x), 3)
            weights = (q @ k.mT).softmax(-1)
            return _flat(weights @ v) + _sdpa(q * weights.amax(), k, v)

    model, x = Around(Shared()).eval(), torch.randn(2, 11, WIDTH)
    expected = model(x)
    with pytest.raises(retrofit.errors.NoAttentionFound, match="the attention weights are used elsewhere"):
        retrofit.convert(model, DenseConfig(), (x,))
    assert torch.equal(model(x), expected)
