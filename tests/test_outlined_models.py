"""Modules with several attentions as parts of larger models: called often, inside one another, beside others."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.capture import outline
from retrofit.configs import DenseConfig, HSAConfig
from retrofit.errors import CaptureError, NoAttentionFound

WIDTH, DIM = 32, 8
LIMIT = HSAConfig(window=8, sink=8, budget=4096, block=8, node=4, fanout=2, nodes_per_span=4, query_block=8)


def _heads(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in x.chunk(3, dim=-1))


def _sdpa(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*_heads(x), **options).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Two attentions, and a factor that the caller may choose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        x = F.layer_norm(x, (WIDTH,))
        x = x + _sdpa(self.first(x), is_causal=True)
        return factor * (x + _sdpa(self.second(x)))


class Stack(nn.Module):
    """Calls its blocks in turn, each as often and with such factors as it is told."""

    def __init__(self, *blocks: nn.Module, factors: tuple[tuple[float, ...], ...] = ()) -> None:
        super().__init__()
        self.blocks, self.factors = nn.ModuleList(blocks), factors or ((),) * len(blocks)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        for block, factors in zip(self.blocks, self.factors, strict=True):
            for factor in factors:
                x = block(x, factor)
            if not factors:
                x = block(x, *rest)
        return x


def test_a_module_that_is_called_otherwise_is_refused_alone() -> None:
    model = Stack(Block(), Block(), factors=((1.0, 2.0), (3.0,))).eval()
    x, longer = torch.randn(2, 11, WIDTH), torch.randn(3, 23, WIDTH)
    expected = [model(x), model(longer)]
    report = retrofit.convert(model, DenseConfig(), (x,))
    assert [site.path for site in report.converted] == ["blocks.1.attention_0", "blocks.1.attention_1"]
    reason = report.skipped["blocks.0"]
    assert "2 attentions in one module" in reason
    assert "cannot be sites of their own: blocks.0 was captured with factor=1.0, got 2.0" in reason
    for got, wanted in zip([model(x), model(longer)], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_module_that_is_called_alike_is_converted_once() -> None:
    block = Block()
    model, x = Stack(block, block, factors=((2.0, 2.0), (2.0,))).eval(), torch.randn(2, 11, WIDTH)
    expected = model(x)
    report = retrofit.convert(model, DenseConfig(), (x,))
    assert [site.path for site in report.converted] == ["blocks.0.attention_0", "blocks.0.attention_1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    retrofit.revert(model)
    assert model.blocks[0] is model.blocks[1] is block


def test_identical_modules_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(outline, "capture", lambda *args: made.append(args) or capture(*args))
    capture = retrofit.capture.export.capture
    model = Stack(*(Block() for _ in range(3))).eval()
    report = retrofit.convert(model, DenseConfig(), (torch.randn(2, 11, WIDTH),))
    assert len(report.converted) == 6
    assert len(made) == 1


class One(Block):
    """One attention."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return x + _sdpa(self.first(x))


class Outer(Block):
    """Two attentions around a module of two and a module of one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.one = Block(), One()

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.one(super().forward(self.inner(x), factor))


class Mixed(Block):
    """Two attentions, a module of two, and one of torch, which returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mha = Block(), nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        x = super().forward(self.inner(x), factor)
        return x + self.mha(x, x, x, need_weights=False)[0]


def test_no_attention_is_found_twice() -> None:
    model, x, longer = Stack(Mixed()).eval(), torch.randn(2, 11, WIDTH), torch.randn(3, 23, WIDTH)
    expected = model(longer)
    report = retrofit.convert(model, DenseConfig(), (x,))
    paths = {site.path for site in report.converted}
    assert paths == {"blocks.0.inner.attention_0", "blocks.0.inner.attention_1", "blocks.0.mha"}
    assert "a softmax of its own around the attention of blocks.0.mha" in report.skipped["blocks.0"]
    torch.testing.assert_close(model(longer), expected, rtol=1e-5, atol=1e-5)


def test_modules_within_one_another() -> None:
    model, x, longer = Stack(Outer()).eval(), torch.randn(2, 11, WIDTH), torch.randn(3, 23, WIDTH)
    expected, modules = [model(x), model(longer)], list(model.modules())
    names, paths = list(model.state_dict()), []
    # Some of them, others, and all.
    for where in ("*inner*", "blocks.0.attention_?", "*one", "*"):
        report = retrofit.convert(model, DenseConfig(), (x,), where=where)
        paths = [path for path, _ in retrofit.sites(model)]
        assert {site.path for site in report.converted} <= set(paths)
        assert list(model.state_dict()) == names
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(each(longer), expected[1], rtol=1e-5, atol=1e-5)
            if each is not model:
                retrofit.revert(each)
                assert torch.equal(each(x), expected[0])
                assert [type(module) for module in each.modules()] == [type(module) for module in modules]
    assert len(paths) == 5
    retrofit.revert(model)
    assert list(model.modules()) == modules
    retrofit.convert(model, DenseConfig(), (x,), where="*one")
    assert [path for path, _ in retrofit.sites(model)] == ["blocks.0.one"]
    assert {type(module).__name__ for module in model.modules()}.isdisjoint({"Outlined", "Attend"})


class Windowed(Block):
    """The second sees no more than the last 16 tokens."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        x = x + _sdpa(self.first(x), is_causal=True)
        at = torch.arange(x.shape[1])
        back = at[:, None] - at
        return x + _sdpa(self.second(x), attn_mask=(back >= 0) & (back < 16))


@pytest.mark.parametrize("config", [DenseConfig(), LIMIT], ids=lambda config: config.target)
def test_a_window_wider_than_the_example_is_found(config: Any) -> None:
    model, x, longer = Stack(Windowed()).eval(), torch.randn(2, 11, WIDTH), torch.randn(3, 50, WIDTH)
    expected = model(longer)
    report = retrofit.convert(model, config, (x,))
    assert [site.mask for site in report.converted] == ["causal", "sliding window(16)"]
    torch.testing.assert_close(model(longer), expected, rtol=1e-4, atol=1e-4)


def test_what_stays_needs_the_same_graph_around_it() -> None:
    model, x = Stack(Block()).eval(), torch.randn(2, 11, WIDTH)
    once, twice = model(x), model(x, 2.0)
    retrofit.convert(model, LIMIT, (x,), where="*attention_0")
    with pytest.raises(CaptureError, match="attention_0 cannot stay as it is"):
        retrofit.convert(model, DenseConfig(), (x, 2.0), where="*attention_1")
    assert [path for path, _ in retrofit.sites(model)] == ["blocks.0.attention_0"]
    torch.testing.assert_close(model(x), once, rtol=1e-5, atol=1e-5)
    retrofit.convert(model, DenseConfig(), (x, 2.0))
    torch.testing.assert_close(model(x, 2.0), twice, rtol=1e-5, atol=1e-5)
    with pytest.raises(CaptureError, match=r"captured with factor=2\.0, got 1\.0"):
        model(x)


class Weights(Block):
    """Returns what it attended with."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Any:
        q, k, v = _heads(self.first(x))
        weights = (q @ k.mT).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2) + _sdpa(self.second(x)), weights


class Keeping(Block):
    """Keeps its keys for somebody to look at."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Any:
        self.keys = _heads(self.first(x))[1]
        return (super().forward(x),)


class First(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


@pytest.mark.parametrize(
    ("block", "reason"),
    [(Weights, "Weights.forward returns attention weights"), (Keeping, "a call changes keys of it")],
)
def test_why_they_cannot_be_parted_is_said(block: type[nn.Module], reason: str) -> None:
    model, x = First(block()).eval(), torch.randn(2, 11, WIDTH)
    expected = model(x)
    with pytest.raises(
        NoAttentionFound, match=f"block: 2 attentions .*cannot be sites of their own: {reason}"
    ):
        retrofit.convert(model, DenseConfig(), (x,))
    assert torch.equal(model(x), expected)
    sites = retrofit.inspect(model, (x,)).sites
    shown = json.loads(json.dumps([dataclasses.asdict(site) for site in sites]))
    assert reason in shown[0]["reason"]


class Upcast(Block):
    """Softmax in float32 and back, under a mask in float32; once with a softcap."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        later = torch.full((x.shape[1], x.shape[1]), torch.finfo(torch.float32).min).triu(1)
        for layer, cap in ((self.first, None), (self.second, 30.0)):
            q, k, v = _heads(layer(x))
            scores = (q @ k.mT).float() * 0.3
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            x = x + ((scores + later).softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return x


def test_half_precision() -> None:
    model, x = Stack(Upcast()).eval().bfloat16(), torch.randn(2, 11, WIDTH).bfloat16()
    expected = model(x)
    report = retrofit.convert(model, DenseConfig(), (x,))
    assert [site.mask for site in report.converted] == ["causal", "causal"]
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


def test_compile() -> None:
    model, x, longer = Stack(Block()).eval(), torch.randn(2, 11, WIDTH), torch.randn(3, 23, WIDTH)
    expected = [model(x), model(longer)]
    retrofit.convert(model, DenseConfig(), (x,))
    compiled = torch.compile(model, backend="aot_eager")
    for inputs, wanted in zip((x, longer), expected, strict=True):
        torch.testing.assert_close(compiled(inputs), wanted, rtol=1e-5, atol=1e-5)
