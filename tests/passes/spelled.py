"""What the tests of spellings share: a site that attends in one spelling, a model around it, and the check."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit

WIDTH, HEADS, DIM = 32, 4, 8
SCALE = DIM**-0.5
MOST = 64


class Site(nn.Module):
    """Projections, and ``attend`` in one spelling: [b, t, h, d] three times to [b, t, h·d]."""

    def __init__(self, attend: Callable[..., Tensor], kv_heads: int = HEADS, value_dim: int = DIM) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Linear(WIDTH, kv_heads * DIM)
        self.v = nn.Linear(WIDTH, kv_heads * value_dim)
        self.out = nn.Linear(HEADS * value_dim, WIDTH)
        self.drop = nn.Dropout(0.0)
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.mix = nn.Parameter(torch.eye(HEADS) + 0.1 * torch.randn(HEADS, HEADS))
        self.register_buffer("tril", torch.tril(torch.ones(MOST, MOST)).view(1, 1, MOST, MOST))
        self.attend, self.kv_heads, self.value_dim = attend, kv_heads, value_dim

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, DIM)
        k = self.k(x).view(b, t, self.kv_heads, DIM)
        v = self.v(x).view(b, t, self.kv_heads, self.value_dim)
        return self.out(self.attend(self, q, k, v))


class Model(nn.Module):
    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.before, self.attn, self.after = nn.Linear(WIDTH, WIDTH), site, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.before(x))
        return self.after(y[0] if isinstance(y, tuple) else y)


def heads(*tensors):
    return (tensor.transpose(1, 2) for tensor in tensors)


def flat(y):
    return y.transpose(1, 2).flatten(2)


def causal(t):
    return torch.ones(t, t, dtype=torch.bool).tril()


def repeat(x):
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, HEADS // h, t, d).reshape(b, HEADS, t, d)


def powers(relation):
    """Of a relation [t, t], also what holds by way of one other, and of two."""
    twice = relation @ relation * 0.5
    return relation + twice + relation @ twice


def softmax_of(scores):
    """An attention that is usual but for what happens to its scores."""

    def attend(site, q, k, v):
        q, k, v = heads(q, k, v)
        return flat(F.softmax(scores(site, q @ k.transpose(-2, -1)), dim=-1) @ v)

    return attend


def weights_of(weights):
    """An attention that is usual but for what happens to its weights."""

    def attend(site, q, k, v):
        q, k, v = heads(q, k, v)
        return flat(weights(site, q @ k.transpose(-2, -1) * SCALE) @ v)

    return attend


def sdpa(prepare=lambda q, k, v: (q, k, v), **options):
    def attend(site, q, k, v):
        return flat(F.scaled_dot_product_attention(*prepare(*heads(q, k, v)), **options))

    return attend


causal_sdpa = sdpa(is_causal=True)


def inputs(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, t, WIDTH, generator=generator) for b, t in sizes]


class Around(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, *args):
        return self.attn(*args)


def check_round_trip(model: nn.Module) -> None:
    """Converts ``model`` with proof, at other sizes than the example's too, and reverts it."""
    example, *others = inputs((2, 11), (1, 7), (3, 23), (5, 2))
    with torch.no_grad():
        before = [model(x) for x in (example, *others)]
        report = retrofit.convert(model, retrofit.DenseConfig(), (example,))
        assert report.converted
        assert not report.skipped
        for x, expected in zip((example, *others), before, strict=True):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert all(site.retrofit.config.target == "dense" for _, site in retrofit.api.sites(model))
        retrofit.revert(model)
        assert all(
            torch.equal(model(x), expected) for x, expected in zip((example, *others), before, strict=True)
        )
