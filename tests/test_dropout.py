"""Dropout in training: of the weights that are executed, and of everything else the module drops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.configs import DenseConfig, HSAConfig
from retrofit.errors import CaptureError

WIDTH, HEADS, DIM, TOKENS, DRAWS = 8, 2, 4, 7, 4000


class Site(nn.Module):
    """Attention whose values are the identity, so that what comes out are the weights: [B, T, H·T]."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.qk, self.spelling = nn.Linear(WIDTH, 2 * HEADS * DIM), spelling
        self.dropout, self.drop = 0.25, nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k = (y.view(b, t, HEADS, DIM).transpose(1, 2) for y in self.qk(x).chunk(2, dim=-1))
        v = torch.eye(TOKENS)[:t].expand(b, HEADS, t, TOKENS)
        p = self.dropout if self.training else 0.0
        if self.spelling == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            s = (q @ k.transpose(2, 3) * DIM**-0.5).masked_fill(torch.ones(t, t).triu(1) == 1, -torch.inf)
            w = s.softmax(-1)
            out = {
                "F.dropout": lambda: F.dropout(w, self.dropout, self.training),
                "nn.Dropout": lambda: self.drop(w),
                "a number": lambda: F.dropout(w, 0.25, self.training),
            }[self.spelling]() @ v
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("spelling", ["sdpa", "F.dropout", "nn.Dropout", "a number"])
def test_a_quarter_of_the_weights_is_dropped_and_the_mean_stays(spelling: str) -> None:
    model, x = nn.Sequential(Site(spelling)), torch.randn(2, TOKENS, WIDTH)
    retrofit.convert(model.train(), DenseConfig(), (x,))
    weights = model.eval()(x)
    model.train()
    drawn = torch.stack([model(x) for _ in range(DRAWS)])
    seen = weights > 0
    dropped = (drawn == 0).float().mean(0)[seen]
    assert float((dropped - 0.25).abs().max()) < 0.04  # the deviation of one is 0.007
    torch.testing.assert_close(drawn.mean(0), weights, rtol=0, atol=0.04)
    kept = drawn[:, seen] / weights[seen]
    assert torch.allclose(kept[kept != 0], torch.tensor(1 / 0.75), rtol=1e-4)
    assert not bool(drawn[:, ~seen].any())


def test_the_probability_is_read_when_it_is_used() -> None:
    model, x = nn.Sequential(Site("sdpa")), torch.randn(2, TOKENS, WIDTH)
    (path,) = [site.path for site in retrofit.convert(model, DenseConfig(), (x,)).converted]
    site: Any = model.get_submodule(path)
    model.train()
    assert not torch.equal(model(x), model.eval()(x))
    model.train()
    site.dropout = 0.0
    assert torch.equal(model(x), model.eval()(x))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_and_padding(tiny_llama: Callable, implementation: str) -> None:
    model = tiny_llama(attention_dropout=0.5, attn_implementation=implementation)
    ids, mask = torch.randint(2, 128, (2, 20)), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0
    expected = model(ids, attention_mask=mask).logits
    retrofit.convert(model, DenseConfig())
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[1], expected[1])
    model.train()
    first, second = (model(ids, attention_mask=mask).logits for _ in range(2))
    assert not torch.allclose(first[mask.bool()], second[mask.bool()])
    first[mask.bool()].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.gradient_checkpointing_enable()
    model(ids, attention_mask=mask).logits.sum().backward()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_sparse_attention_refuses_it_in_training_alone(
    tiny_llama: Callable, tiny_hsa: HSAConfig, implementation: str
) -> None:
    model = tiny_llama(attention_dropout=0.5, attn_implementation=implementation)
    retrofit.convert(model, {"*.0.*": DenseConfig(), "*.1.*": tiny_hsa})
    ids = torch.randint(2, 128, (1, 90))
    model(ids)
    model.train()
    with pytest.raises(
        CaptureError, match=r"layers.1.self_attn.attention_dropout must be 0 .* got 0.5; set it"
    ):
        model(ids)
    model.model.layers[1].self_attn.attention_dropout = 0.0
    model(ids).logits.sum().backward()


def test_dropout_of_other_things_stays(tiny_hsa: HSAConfig) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=512)
    model = GPT2LMHeadModel(config)
    retrofit.convert(model, tiny_hsa)
    ids = torch.randint(2, 128, (1, 90))
    model.train()
    with pytest.raises(CaptureError, match=r"h.0.attn.attn_dropout.p must be 0 .* got 0.1"):
        model(ids)
    model.get_submodule("transformer.h.0.attn.attn_dropout").p = 0.0
    assert not torch.equal(model(ids).logits, model(ids).logits)


class Behind(Site):
    """Drops out what it returns with a number of its own."""

    def __init__(self) -> None:
        super().__init__("sdpa")
        self.dropout, self.hidden_dropout = 0.0, 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), self.hidden_dropout, self.training)


def test_functional_dropout_behind_attention_is_carried_over(tiny_hsa: HSAConfig) -> None:
    model, x = nn.Sequential(Behind()), torch.randn(2, TOKENS, WIDTH)
    retrofit.convert(model, tiny_hsa, (x,))
    whole = model.eval()(x)
    out = model.train()(x)
    assert 0.3 < float((out[whole > 0] == 0).float().mean()) < 0.7
    torch.testing.assert_close(out[out != 0], 2 * whole[out != 0])
    site: Any = model[0]
    site.hidden_dropout = 0.0
    torch.testing.assert_close(model(x), whole)


class Noisy(Site):
    """Adds noise in training, which no graph of its evaluation has."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + torch.randn_like(out) if self.training else out


def test_what_does_more_in_training_is_refused_there() -> None:
    model, x = nn.Sequential(Noisy("sdpa")), torch.randn(2, TOKENS, WIDTH)
    expected = model.eval()(x)
    retrofit.convert(model, DenseConfig(), (x,))
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(CaptureError, match="0 cannot be trained: in training it does more"):
        model.train()(x)


class Mode(nn.Module):
    """Does something else in training, without a random number."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.qkv, self.norm, self.what = nn.Linear(WIDTH, 3 * WIDTH), nn.BatchNorm1d(WIDTH), what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "a child":
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        elif self.what == "statistics":
            x = F.batch_norm(
                x.transpose(1, 2), self.norm.running_mean, self.norm.running_var, training=self.training
            ).transpose(1, 2)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        causal = self.training and self.what == "a mask"
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("what", ["a child", "statistics", "a mask"])
def test_what_differs_in_training_is_carried_over_or_refused_there(what: str) -> None:
    model, x = nn.Sequential(Mode(what)).eval(), torch.randn(3, TOKENS, WIDTH)
    expected = model(x)
    retrofit.convert(model, DenseConfig(), (x,))
    torch.testing.assert_close(model(x), expected)
    norm: Any = model.get_submodule("0.norm")
    assert not norm.running_mean.any()  # nothing of the examples is left there
    model.train()
    if what != "a child":
        with pytest.raises(CaptureError, match="0 cannot be trained: in training it does more than drop out"):
            model(x)
        return
    trained = model(x)
    retrofit.revert(model)
    torch.testing.assert_close(trained, model(x))


@pytest.mark.parametrize("whole", [False, True])
def test_modules_of_torch_drop_weights(whole: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x, need_weights=whole)[0]

    model, x = nn.Sequential(Attention()).eval(), torch.randn(2, TOKENS, WIDTH)
    expected = model(x)
    retrofit.convert(model, DenseConfig(), (x,))
    model.train()
    drawn = torch.stack([model(x) for _ in range(500)])
    assert float(drawn.std(0).min()) > 0
    torch.testing.assert_close(drawn.mean(0), expected, rtol=0, atol=0.1)
    site: Any = model.get_submodule("0.mha")
    site.original.dropout = 0.0
    torch.testing.assert_close(model(x), expected)


def test_dropout_that_was_zero_at_the_conversion_is_not_left_out() -> None:
    model, x = nn.Sequential(Site("sdpa")), torch.randn(2, TOKENS, WIDTH)
    original: Any = model[0]
    original.dropout = 0.0
    retrofit.convert(model, DenseConfig(), (x,))
    original.dropout = 0.1
    with pytest.raises(CaptureError, match=r"0.dropout must be 0 as when the site was converted, got 0.1"):
        model.train()(x)
