"""Biases on the scores that do not depend on the tokens: found, carried by DenseConfig, refused by name elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from spelled import (
    HEADS,
    SCALE,
    WIDTH,
    Around,
    Model,
    Site,
    causal,
    check_round_trip,
    flat,
    heads,
    softmax_of,
)
from torch import Tensor, nn

import retrofit
from retrofit.errors import NoAttentionFound

BUCKETS = 16


def _distance(t):
    return torch.arange(t) - torch.arange(t)[:, None]


@contextmanager
def carried(model: nn.Module, examples: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Converts the one site of ``model``, which carries its bias, for as long; with proof on all examples."""
    with torch.no_grad():
        before = [model(*example) for example in examples]
        (site,) = retrofit.convert(model, retrofit.DenseConfig(), examples[0]).converted
        assert site.mask == "position bias"
        for example, expected in zip(examples, before, strict=True):
            torch.testing.assert_close(model(*example), expected, rtol=1e-5, atol=1e-5)
        yield
        retrofit.revert(model)
        assert all(torch.equal(model(*x), expected) for x, expected in zip(examples, before, strict=True))


class Biased(nn.Module):
    """A site with a table of biases for each bucket of distances; ``attend`` gets them as [1, HEADS, t, t]."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.site = Site(lambda site, q, k, v: attend(site, *heads(q, k, v), self.bias(q.shape[1])))
        self.table = nn.Embedding(BUCKETS, HEADS)

    def bias(self, t: int) -> Tensor:
        buckets = _distance(t).clamp(-BUCKETS // 2, BUCKETS // 2 - 1) + BUCKETS // 2
        return self.table(buckets).permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def _sdpa(site, q, k, v, bias):
    return flat(F.scaled_dot_product_attention(q, k, v, bias.expand(q.shape[0], -1, -1, -1)))


def _sdpa_causal(site, q, k, v, bias):
    bias = torch.where(causal(q.shape[2]), bias, torch.finfo(q.dtype).min).contiguous()
    return flat(F.scaled_dot_product_attention(q, k, v, bias, scale=1.0))


def _eager(site, q, k, v, bias):
    return flat((q @ k.mT + bias).softmax(-1) @ v)


def _bias_first(site, q, k, v, bias):
    return flat((bias + q @ k.mT * SCALE).masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v)


def _with_added_mask(site, q, k, v, bias):
    mask = torch.full((q.shape[2], q.shape[2]), -torch.inf).triu(1)
    return flat((q @ k.mT * SCALE + bias + mask).softmax(-1) @ v)


def _with_softcap_and_sinks(site, q, k, v, bias):
    s = 5 * torch.tanh(q @ k.mT / 5) + bias
    s = s.masked_fill(~causal(q.shape[2]), -torch.inf)
    column = site.sinks.view(1, HEADS, 1, 1).expand(*s.shape[:3], 1)
    return flat(torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v)


def _without_heads(site, q, k, v, bias):
    return flat((q @ k.mT * SCALE + bias[:, :1]).softmax(-1) @ v)


SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "a table, as the mask of SDPA": lambda: Biased(_sdpa),
    "a table and later keys hidden, as the mask of SDPA": lambda: Biased(_sdpa_causal),
    "a table": lambda: Biased(_eager),
    "a table left of the scores, and later keys hidden": lambda: Biased(_bias_first),
    "a table and a mask that is added": lambda: Biased(_with_added_mask),
    "a table for all heads": lambda: Biased(_without_heads),
    "a table, a softcap and sinks": lambda: Biased(_with_softcap_and_sinks),
    "a learned slope": lambda: Site(
        softmax_of(lambda site, s: s + _distance(s.shape[-1]).float() * site.temperature)
    ),
    "the root of the distance": lambda: Site(
        softmax_of(lambda site, s: s - _distance(s.shape[-1]).abs().sqrt())
    ),
    "a slope to both sides": lambda: Site(softmax_of(lambda site, s: s - 0.3 * _distance(s.shape[-1]).abs())),
    "by the key alone": lambda: Site(softmax_of(lambda site, s: s + torch.arange(s.shape[-1]).sin())),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_converted_and_reverted(name: str) -> None:
    torch.manual_seed(0)
    check_round_trip(Model(SPELLINGS[name]()).eval())


@pytest.mark.parametrize("config", [retrofit.HSAConfig(), retrofit.MAHAConfig()], ids=lambda c: c.target)
def test_other_targets_refuse_it_by_name(config: retrofit.HSAConfig) -> None:
    model, x = Model(Biased(_eager)).eval(), torch.randn(2, 11, WIDTH)
    with pytest.raises(
        NoAttentionFound, match=r"a position bias is added to its scores, which DenseConfig\(\) alone"
    ):
        retrofit.convert(model, config, (x,))
    (site,) = retrofit.inspect(model, (x,)).sites
    assert (site.convertible, site.mask) == (True, "position bias")


class Windows(nn.Module):
    """Attention within windows of 4 × 4 pixels with a bias for each pair of pixels, zero as it is born."""

    SIDE = 4

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.zeros((2 * self.SIDE - 1) ** 2, HEADS))
        at = torch.stack(torch.meshgrid(*[torch.arange(self.SIDE)] * 2, indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + self.SIDE - 1
        self.register_buffer("index", apart[0] * (2 * self.SIDE - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        y = ((q * SCALE) @ k.mT + bias.unsqueeze(0)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


def test_a_table_that_is_zero_as_yet_is_carried_and_trained() -> None:
    torch.manual_seed(0)
    model = Model(Windows()).eval()
    x, y = torch.randn(6, Windows.SIDE**2, WIDTH), torch.randn(9, Windows.SIDE**2, WIDTH)
    (site,) = retrofit.convert(model, retrofit.DenseConfig(), (x,)).converted
    assert site.mask == "position bias"
    with torch.no_grad():
        model.attn.table.normal_()
    table = model.attn.table
    (found,) = torch.autograd.grad(model(y).square().sum(), table)
    got = model(y)
    with pytest.warns(UserWarning, match="weights of the model have changed"):
        retrofit.revert(model)
    torch.testing.assert_close(got, model(y), rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(model(y).square().sum(), table)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Shifted(Windows):
    """The same in windows that were shifted around the edge, where what came from the other side is far away."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        (b, n, _), windows = x.shape, mask.shape[0]
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = (q * SCALE) @ k.mT + bias.unsqueeze(0)
        scores = scores.view(b // windows, windows, HEADS, n, n) + mask.unsqueeze(1).unsqueeze(0)
        y = scores.view(-1, HEADS, n, n).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


def test_shifted_windows_of_images_of_any_size() -> None:
    torch.manual_seed(0)
    model = Around(Shifted()).eval()
    torch.nn.init.normal_(model.attn.table)
    examples = []
    for images, windows in ((2, 4), (3, 4), (1, 9), (5, 1)):
        region = torch.randint(2, (windows, Windows.SIDE**2))
        mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)
        examples.append((torch.randn(images * windows, Windows.SIDE**2, WIDTH), mask))
    with carried(model, examples), pytest.raises(RuntimeError, match="invalid for input of size"):
        model(examples[0][0][:6], examples[0][1])


class HandedIn(nn.Module):
    """Attention whose caller hands in what is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return flat(F.scaled_dot_product_attention(q, k, v, bias))


def test_a_bias_that_is_handed_in_stays_so() -> None:
    torch.manual_seed(0)
    model = Around(HandedIn()).eval()
    examples = [
        (torch.randn(b, t, WIDTH), torch.randn(b, HEADS, t, t)) for b, t in ((2, 11), (1, 7), (5, 23))
    ]
    with carried(model, examples):
        pass
