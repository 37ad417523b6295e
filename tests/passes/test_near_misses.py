"""What only looks like attention is refused with the reason, and left untouched."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from spelled import (
    DIM,
    HEADS,
    SCALE,
    WIDTH,
    Model,
    Site,
    causal,
    flat,
    heads,
    inputs,
    powers,
    softmax_of,
    weights_of,
)
from torch import nn

import retrofit
from retrofit.errors import NoAttentionFound


class FusedUnbind(nn.Module):
    """timm's way: reshape, permute, unbind; q scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * SCALE) @ k.transpose(-2, -1)
        attn = self.attn_drop(attn.softmax(dim=-1))
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class WithWeights(nn.Module):
    """Returns its weights as well; they become None."""

    def __init__(self) -> None:
        super().__init__()
        self.site = FusedUnbind()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in self.site.qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.site.proj((weights @ v).transpose(1, 2).flatten(2)), weights.mean(dim=1)


def _talking(site, s):
    return torch.einsum("bhts,hg->bgts", F.softmax(s * SCALE, -1), site.mix)


def _sink(site, s, column=None):
    b, h, t, _ = s.shape
    column = site.sinks.view(1, h, 1, 1).expand(b, h, t, 1) if column is None else column
    scores = torch.cat([s, column], dim=-1)
    return F.softmax(scores, dim=-1)[..., :-1]


def _sink_by_query(site, s):
    b, h, t, _ = s.shape
    return _sink(site, s, torch.arange(t).float().view(1, 1, t, 1).expand(b, h, t, 1))


def _sink_as_factor(q, k, v, sinks, less=torch.sub):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(2, 3) * SCALE
    factor = less(scores.logsumexp(-1), sinks.view(1, -1, 1)).sigmoid()
    return flat(F.softmax(scores, -1) @ v * factor.unsqueeze(-1))


def _mask_before_tanh(site, s):
    return torch.tanh(s.masked_fill(~causal(s.shape[-1]), -1e9))


def _mask_after_sinks(site, s):
    t = s.shape[-1]
    scores = torch.cat([s, site.sinks.view(1, -1, 1, 1).expand(s.shape[0], -1, t, 1)], dim=-1)
    hidden = F.pad(~causal(t), (0, 1))
    return F.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)[..., :-1]


def _without_last(site, s):
    return F.softmax(s, dim=-1)[..., :-1]


def _distance(t):
    return torch.arange(t) - torch.arange(t)[:, None]


def _relative_terms(site, q, k, v):
    """As DeBERTa and Transformer-XL: what is added is a product of the queries and a table of distances."""
    q, k, v = heads(q, k, v)
    b, h, t, _ = q.shape
    terms = q @ torch.outer(torch.arange(DIM).float(), site.sinks)
    buckets = _distance(t).clamp(-2, 1) + 2
    return flat(F.softmax((q @ k.mT + terms.gather(-1, buckets.expand(b, h, t, t))) * SCALE, -1) @ v)


def _dynamic(site, q, k, v):
    """As Doge: what is added to each key is made from its value, with a factor that starts at zero."""
    b, t, h, _ = v.shape
    bias = (site.mix.sum() * 0 * F.softplus(v.mean(dim=-1))).exp().transpose(1, 2)[:, :, None]
    bias = bias.expand(b, h, t, t).masked_fill(~causal(t), torch.finfo(v.dtype).min)
    return flat(F.scaled_dot_product_attention(*heads(q, k, v), attn_mask=bias))


def _gated(site, q, k, v):
    """As WavLM: a gate of each query on a learned bias."""
    gate = q.mean(dim=-1).transpose(1, 2).sigmoid()[..., None]
    q, k, v = heads(q, k, v)
    bias = site.mix.flatten()[_distance(q.shape[2]).abs().clamp(max=15)]
    return flat(F.softmax(q @ k.mT * SCALE + gate * bias, -1) @ v)


def _side_by_side(site, q, k, v):
    """As long-document encoders: keys of the same block, and some that all see."""
    q, k, v = heads(q, k, v)
    scores = torch.cat([q @ k[:, :, :1].mT, q @ k.mT], dim=-1) * SCALE
    weights = F.softmax(scores, -1)
    return flat(weights[..., :1] @ v[:, :, :1] + weights[..., 1:] @ v)


def _score_dependent(site, s):
    return s.masked_fill(s < s.mean(dim=-1, keepdim=True), float("-inf"))


def _over_channels(site, q, k, v):
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))  # [b, h, d, t]
    return (F.softmax(q @ k.transpose(2, 3), -1) @ v).permute(0, 3, 1, 2).flatten(2)


class UsesWeights(nn.Module):
    """Takes the weights that its attention returns for a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = WithWeights()

    def forward(self, x):
        y, weights = self.inner(x)
        return y * weights.amax(dim=-1, keepdim=True)


class Router(nn.Module):
    """A mixture of experts: its softmax has nothing to do with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = (
            nn.Linear(WIDTH, 3),
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)),
        )

    def forward(self, x):
        share = F.softmax(self.gate(x), dim=-1)
        return (torch.stack([expert(x) for expert in self.experts], dim=-1) * share.unsqueeze(-2)).sum(-1)


class Classifier(nn.Module):
    """A softmax over classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return F.softmax(self.head(x), dim=-1)


class Mixed(nn.Module):
    """A mixture of experts with a router spelled as a product, and ``mix`` to put the experts together."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.gate, self.experts = (
            nn.Parameter(torch.randn(3, WIDTH)),
            nn.Parameter(torch.randn(3, WIDTH, WIDTH)),
        )
        self.mix = mix

    def forward(self, x):
        share = F.softmax(x @ self.gate.T, dim=-1)
        return self.mix(share, torch.einsum("btc,ecd->bted", x, self.experts))


class Codebook(nn.Module):
    """A soft choice among learned codes, which are the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.codes = (nn.Parameter(torch.randn(16, WIDTH)) for _ in range(2))

    def forward(self, x):
        return F.softmax(x @ self.keys.T, dim=-1) @ self.codes


class Pooled(nn.Module):
    """A mean of all tokens, weighted by learned scores."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x):
        return x + F.softmax(self.score(x), dim=1).transpose(1, 2) @ x


class Additive(nn.Module):
    """Attention in its first form: the scores are no product."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.energy = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        scores = self.energy(torch.tanh(self.q(x)[:, :, None] + self.k(x)[:, None]))
        return F.softmax(scores.squeeze(-1), dim=-1) @ x


def _distances(site, q, k, v):
    q, k, v = heads(q, k, v)
    return flat(F.softmax(-torch.cdist(q, k), dim=-1) @ v)


def _noise(site, s):
    return s + torch.randn_like(s)


def _normed_channels(site, q, k, v):
    """As XCiT: channels attend to channels."""
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * site.temperature
    return (F.softmax(scores, dim=-1) @ v).permute(0, 3, 1, 2).flatten(2)


def _renormalised(site, s):
    weights = F.softmax(s, dim=-1)
    return weights / weights.sum(-1, keepdim=True)


def _used_elsewhere(q, k, v):
    q, k, v = heads(q, k, v)
    weights = F.softmax(q @ k.transpose(2, 3) * SCALE, -1)
    return flat((weights @ v) * weights.amax(-1, keepdim=True))


def _convolved(site, s):
    return F.conv2d(s * SCALE, site.mix[..., None, None])


def _parts(s, dim=-1, more=0.0):
    e = s.exp()
    return e / (e.sum(dim, keepdim=True) + more)


def _little_more(site, s):
    e = (s - s.amax(-1, keepdim=True)).exp() * causal(s.shape[-1])
    return e / (e.sum(-1, keepdim=True) + 1e-9)


def _chunks(site, q, k, v):
    q, k, v = heads(q, k, v)
    return flat(torch.cat([F.softmax(part @ k.mT * SCALE, -1) @ v for part in q.split(4, dim=2)], 2))


def _slices(site, q, k, v):
    q, k, v = heads(q, k, v)
    parts = [q[:, :, first : first + 4] for first in range(0, q.shape[2], 4)]
    return flat(torch.cat([F.scaled_dot_product_attention(part, k, v) for part in parts], 2))


class InParts(nn.Module):
    """A softmax over classes, written out."""

    def __init__(self, softmax, mix=lambda share, x: share) -> None:
        super().__init__()
        self.head, self.softmax, self.mix = nn.Linear(WIDTH, WIDTH), softmax, mix

    def forward(self, x):
        return self.mix(self.softmax(self.head(x)), x)


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax over experts": (Router, "not into a product with values"),
    "softmax over experts, by einsum": (
        lambda: Mixed(lambda share, y: torch.einsum("bte,bted->btd", share, y)),
        "the keys are the same for every row",
    ),
    "softmax over experts, by matmul": (
        lambda: Mixed(lambda share, y: (share.unsqueeze(2) @ y).squeeze(2)),
        "the keys are the same for every row",
    ),
    "softmax over classes": (Classifier, "a softmax whose result is not multiplied with values"),
    "softmax over classes, in parts": (
        lambda: InParts(_parts),
        "a softmax whose result is not multiplied with values",
    ),
    "softmax over classes, by its logarithm": (
        lambda: InParts(lambda s: s.log_softmax(-1).exp()),
        "a softmax whose result is not multiplied with values",
    ),
    "softmax over experts, in parts": (
        lambda: InParts(_parts, lambda share, x: (share[..., None] * x[:, :, None]).sum(-2)),
        "not into a product with values",
    ),
    "scores divided by the length": (
        lambda: Site(weights_of(lambda site, s: F.softmax(s / s.shape[-1], -1))),
        "the scores are divided by a number that depends on the sizes of the inputs",
    ),
    "scores multiplied with the length": (
        lambda: Site(softmax_of(lambda site, s: s * s.shape[-1] ** -0.5)),
        "the scores are multiplied with a number that depends on the sizes of the inputs",
    ),
    "chunks of queries": (lambda: Site(_chunks), "its queries attend in 3 chunks, each in a call of its own"),
    "chunks of queries, by slices": (lambda: Site(_slices), "its queries attend in 3 chunks"),
    "softmax over queries, in parts": (
        lambda: Site(weights_of(lambda site, s: _parts(s, dim=2))),
        "not over the keys",
    ),
    "softmax with one more in the sum": (
        lambda: Site(weights_of(lambda site, s: _parts(s, more=1.0))),
        "1 is added to the sum of the exponentials, so that they are no softmax",
    ),
    "softmax with a little more in the sum": (
        lambda: Site(weights_of(lambda site, s: _parts(s, more=1e-9))),
        "1e-09 is added to the sum of the exponentials, which may all be small",
    ),
    "softmax with a little more in the sum of what the mask leaves": (
        lambda: Site(weights_of(_little_more)),
        "1e-09 is added to the sum of the exponentials, which may all be small",
    ),
    "sigmoid attention": (
        lambda: Site(weights_of(lambda site, s: torch.sigmoid(s - 2.0))),
        "the attention weights are a sigmoid of the scores, not a softmax",
    ),
    "sigmoid attention with a mask": (
        lambda: Site(weights_of(lambda site, s: torch.sigmoid(s).masked_fill(~causal(s.shape[-1]), 0) / 8)),
        "the attention weights are a sigmoid of the scores, not a softmax",
    ),
    "sigmoid attention by way of others": (
        lambda: Site(weights_of(lambda site, s: powers(torch.sigmoid(s)))),
        "the attention weights are a sigmoid of the scores, not a softmax",
    ),
    "softmax over learned codes": (Codebook, "the keys are the same for every row"),
    "a mean by learned scores": (
        Pooled,
        "the scores come from score, not from a product of queries and keys",
    ),
    "additive attention": (Additive, "the scores come from energy, not from a product of queries and keys"),
    "distances for scores": (lambda: Site(_distances), "not from a product of queries and keys"),
    "softmax over normed channels": (
        lambda: Site(_normed_channels),
        "width of the heads depends on the input",
    ),
    "scores squared": (
        lambda: Site(softmax_of(lambda site, s: s**2)),
        r"the scores come from aten.pow.Tensor_Scalar, not from a product",
    ),
    "noise on the scores": (
        lambda: Site(softmax_of(_noise)),
        "depends on the scores, through random numbers",
    ),
    "a softmax of a softmax": (
        lambda: Site(weights_of(lambda site, s: F.softmax(F.softmax(s, -1), -1))),
        "a softmax whose result goes into aten.softmax.int",
    ),
    "weights divided by their sum": (lambda: Site(weights_of(_renormalised)), "goes into aten.sum"),
    "softmax over queries": (
        lambda: Site(weights_of(lambda site, s: F.softmax(s, dim=2))),
        "not over the keys",
    ),
    "softmax over channels": (lambda: Site(_over_channels), "width of the heads depends on the input"),
    "linear attention": (
        lambda: Site(
            lambda site, q, k, v: (F.softmax(q, -1) @ (F.softmax(k, 1).transpose(2, 3) @ v)).flatten(2)
        ),
        "not from a product",
    ),
    "talking heads": (lambda: Site(weights_of(_talking)), "not"),
    "talking heads before the softmax": (
        lambda: Site(softmax_of(_convolved)),
        r"a convolution over the scores \(talking heads\) stands between",
    ),
    "a selection of the largest scores": (
        lambda: Site(softmax_of(lambda site, s: s.masked_fill(s < s.topk(2).values[..., -1:], -torch.inf))),
        "depends on the scores, through a selection of the largest scores",
    ),
    "a clamp": (lambda: Site(softmax_of(lambda site, s: s.clamp(-5, 5))), "the scores are clamped"),
    "a mask before a tanh": (lambda: Site(softmax_of(_mask_before_tanh)), "wrong side of a tanh"),
    "a factor after a tanh": (
        lambda: Site(softmax_of(lambda site, s: torch.tanh(s) * site.temperature)),
        "wrong side of a tanh",
    ),
    "two tanh": (
        lambda: Site(softmax_of(lambda site, s: torch.tanh(torch.tanh(s)))),
        "wrong side of a tanh",
    ),
    "the scores of two products": (
        lambda: Site(_side_by_side),
        "the scores of 2 products of queries and keys stand side by side",
    ),
    "a logit for each query": (lambda: Site(weights_of(_sink_by_query)), "vary over more than the heads"),
    "a mask after the sinks": (lambda: Site(weights_of(_mask_after_sinks)), "after a logit was added"),
    "a factor that is no sink": (
        lambda: Site(lambda site, q, k, v: _sink_as_factor(q, k, v, site.temperature, torch.mul)),
        "used elsewhere",
    ),
    "a key that is left out": (
        lambda: Site(lambda site, q, k, v: weights_of(_without_last)(site, q, k, v[:, :-1])),
        "0 logits are added to the scores and 1 taken",
    ),
    "a bias of the queries by distance": (
        lambda: Site(_relative_terms),
        "the bias added to the scores depends on the tokens",
    ),
    "a bias of the values that is 1 as yet": (
        lambda: Site(_dynamic),
        "the bias added to the scores depends on the tokens, by way of x",
    ),
    "a learned bias with a gate": (
        lambda: Site(_gated),
        "the bias added to the scores depends on the tokens",
    ),
    "a mask that depends on the scores": (
        lambda: Site(softmax_of(_score_dependent)),
        "depends on the scores",
    ),
    "a mild mask": (
        lambda: Site(softmax_of(lambda site, s: s.masked_fill(~causal(s.shape[-1]), -5.0))),
        "set to -5.0",
    ),
    "weights used elsewhere": (
        lambda: Site(lambda site, q, k, v: _used_elsewhere(q, k, v)),
        "used elsewhere",
    ),
    "weights used by the module around": (UsesWeights, "used by the module around it"),
    "a factor that varies over the keys": (
        lambda: Site(softmax_of(lambda site, s: s * torch.arange(1, s.shape[-1] + 1))),
        "varies over the keys",
    ),
    "a gate after the softmax": (
        lambda: Site(weights_of(lambda site, s: F.softmax(s, -1) * site.temperature)),
        "not into a product with values",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_refused_and_left_untouched(name):
    torch.manual_seed(0)
    make, reason = NEAR_MISSES[name]
    model = Model(make()).eval()
    modules, (example,) = list(model.modules()), inputs((2, 11))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        torch.manual_seed(0)
        before = model(example)
        with pytest.raises(NoAttentionFound, match=reason):
            retrofit.convert(model, retrofit.DenseConfig(), (example,))
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(model(example), before)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    (site,) = retrofit.inspect(model, (example,)).sites
    assert not site.convertible
    assert re.search(r"(spelled|test_near_misses)\.py:\d", site.reason) or "around it" in site.reason


def _kernelised(site, q, k, v, positive=lambda x: F.elu(x) + 1):
    q, k, v = heads(positive(q), positive(k), v)
    return flat(q @ (k.transpose(2, 3) @ v) / (q @ k.sum(2)[..., None]))


def _reading_order(site, q, k, v):
    q, k, v = heads(q, k, v)
    return flat(v * powers(torch.sigmoid(q @ k.mT * SCALE)).mean(-1, keepdim=True))


NO_SOFTMAX: dict[str, Callable[[], nn.Module]] = {
    "relu attention": lambda: Site(weights_of(lambda site, s: F.relu(s) / s.shape[-1])),
    "linear attention with a kernel": lambda: Site(_kernelised),
    "linear attention with exponentials": lambda: Site(
        lambda site, q, k, v: _kernelised(site, q, k, v, torch.exp)
    ),
    "a gate": lambda: InParts(torch.sigmoid, lambda gate, x: gate * x @ x.mT @ x),
    "a relation and its powers": lambda: Site(_reading_order),
    "exponentials alone": lambda: InParts(torch.exp, lambda e, x: e @ x.mT @ x),
}


@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_what_has_no_softmax_is_left_untouched(name):
    torch.manual_seed(0)
    model = Model(NO_SOFTMAX[name]()).eval()
    modules = list(model.modules())
    (example,) = inputs((2, 11))
    with torch.no_grad():
        before = model(example)
        with pytest.raises(NoAttentionFound, match="Model has no attention: no softmax"):
            retrofit.convert(model, retrofit.DenseConfig(), (example,))
        assert torch.equal(model(example), before)
    assert list(model.modules()) == modules
    assert retrofit.inspect(model, (example,)).sites == ()
