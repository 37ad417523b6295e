"""What may happen to the scores between the product and the softmax: found, converted with proof at other sizes than the example's, and reverted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from spelled import (
    DIM,
    HEADS,
    MOST,
    SCALE,
    Model,
    Site,
    causal,
    check_round_trip,
    flat,
    heads,
    inputs,
    softmax_of,
    weights_of,
)
from torch import nn

import retrofit


def _cosine(site, q, k, v):
    q, k, v = heads(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
    return flat(F.softmax(q @ k.transpose(2, 3) * site.temperature, -1) @ v)


def _in_place(site, q, k, v):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(2, 3)
    scores.mul_(SCALE)
    scores.masked_fill_(~causal(q.shape[2]), float("-inf"))
    return flat(F.softmax(scores, -1) @ v)


def _log_length(site, q, k, v):
    t = q.shape[1]
    factor = torch.log(torch.arange(t) + 2.0)[:, None]
    q, k, v = heads(q, k, v)
    return flat(F.softmax((q @ k.transpose(2, 3)) * factor * SCALE, -1) @ v)


def _stable(site, scores):
    return (scores - scores.amax(dim=-1, keepdim=True)) * SCALE


def _sink(site, s, column=None):
    b, h, t, _ = s.shape
    column = site.sinks.view(1, h, 1, 1).expand(b, h, t, 1) if column is None else column
    scores = torch.cat([s, column], dim=-1)
    return F.softmax(scores, dim=-1)[..., :-1]


def _sink_as_factor(q, k, v, sinks, less=torch.sub):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(2, 3) * SCALE
    factor = less(scores.logsumexp(-1), sinks.view(1, -1, 1)).sigmoid()
    return flat(F.softmax(scores, -1) @ v * factor.unsqueeze(-1))


def _softcap_mask_and_sinks(site, s):
    s = (50 * torch.tanh(s / 50)).masked_fill(~causal(s.shape[-1]), -torch.inf)
    column = site.sinks.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], -1)
    both = torch.cat([s, column], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return F.softmax(both, dim=-1, dtype=torch.float32)[..., :-1]


class Filled(Site):
    """Hides later keys by a value that is a buffer, as GPT-J has it."""

    def __init__(self) -> None:
        super().__init__(softmax_of(_filled))
        self.register_buffer("value", torch.tensor(-1e9))


def _filled(site, s):
    return torch.where(site.tril[..., : s.shape[2], : s.shape[3]].bool(), s * SCALE, site.value)


def _assigned(site, s):
    s = s * SCALE
    s[..., ~causal(s.shape[-1])] = -torch.inf
    return s


def _child_softmax(site, q, k, v):
    q, k, v = heads(q, k, v)
    return flat(site.softmax(q @ k.mT * SCALE) @ v)


class WithSoftmax(Site):
    def __init__(self) -> None:
        super().__init__(_child_softmax)
        self.softmax = nn.Softmax(dim=-1)


def _parts(s, mask=lambda e: e, stable=True):
    e = mask((s - s.amax(-1, keepdim=True) if stable else s).exp())
    return e / e.sum(-1, keepdim=True)


def _inverse_of_the_sum(s):
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return e * (1 / e.sum(-1)).unsqueeze(-1)


def _with_epsilon(s):
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return e / (e.sum(-1, keepdim=True) + 1e-9)


def _parts_in_place(s):
    s.sub_(s.amax(-1, keepdim=True))
    s.exp_()
    s /= s.sum(-1, keepdim=True)
    return s


def _divided_last(site, q, k, v):
    q, k, v = heads(q, k, v)
    s = (q @ k.mT * SCALE).masked_fill(~causal(q.shape[2]), -torch.inf)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return flat((e @ v) / e.sum(-1, keepdim=True))


IN_PARTS = {
    "exp by its sum": lambda s: _parts(s, stable=False),
    "exp by its sum, after subtracting the maximum": _parts,
    "two exps in float32": lambda s: torch.exp(s.float()) / torch.exp(s.float()).sum(-1, keepdim=True),
    "exp times the inverse of its sum": _inverse_of_the_sum,
    "exp by its sum and next to nothing": _with_epsilon,
    "exp by its sum, in place": _parts_in_place,
    "exp times the mask": lambda s: _parts(s, lambda e: e * causal(e.shape[-1])),
    "exp times the mask in numbers": lambda s: _parts(s, lambda e: e * causal(e.shape[-1]).float()),
    "exp filled with zeros": lambda s: _parts(s, lambda e: e.masked_fill(~causal(e.shape[-1]), 0.0)),
    "exp or zero": lambda s: _parts(s, lambda e: torch.where(causal(e.shape[-1]), e, 0.0)),
    "log_softmax": lambda s: s.log_softmax(-1).exp(),
    "log_softmax of masked scores": lambda s: s.masked_fill(~causal(s.shape[-1]), -1e9).log_softmax(3).exp(),
    "logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "logsumexp, unsqueezed": lambda s: torch.exp(s - torch.logsumexp(s, -1)[..., None]),
}
"""A softmax of the scores that is not one call."""


FILLS = {
    "minus infinity": -torch.inf,
    "the least number": torch.finfo(torch.float32).min,
    "half of the least number": torch.finfo(torch.float32).min / 2,
    "-1e30": -1e30,
    "-1e9": -1e9,
    "the least half": torch.finfo(torch.float16).min,
    "-1e4": -1e4,
}
"""What acts as minus infinity."""


SLOPES = torch.tensor([0.5, 0.3, 0.0, 0.01]).view(HEADS, 1, 1)


def _alibi(site, s):
    t = s.shape[-1]
    distance = torch.arange(t) - torch.arange(t)[:, None]
    return (s * SCALE + distance * SLOPES).masked_fill(~causal(t), -torch.inf)


def _alibi_by_key(site, s):
    return s * SCALE + SLOPES * torch.arange(s.shape[-1]) + torch.full_like(s, -torch.inf).triu(1)


def _alibi_sliced(site, s):
    t = s.shape[-1]
    bias = -SLOPES * (torch.arange(MOST)[:, None] - torch.arange(MOST)).clamp(min=0)
    return s * SCALE + bias[:, :t, :t] + torch.full((t, t), torch.finfo(s.dtype).min).triu(1)


def _alibi_in_sdpa(site, q, k, v):
    t = q.shape[1]
    bias = SLOPES * (torch.arange(t) - torch.arange(t)[:, None])
    bias = bias.masked_fill(~causal(t), -torch.inf).expand(q.shape[0], -1, -1, -1)
    return flat(F.scaled_dot_product_attention(*heads(q, k, v), attn_mask=bias))


def _alibi_by_baddbmm(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    bias = (SLOPES * torch.arange(t)).repeat(b, 1, 1)
    scores = bias.baddbmm(q, k.transpose(1, 2), alpha=SCALE).view(b, h, t, t)
    weights = F.softmax(scores.masked_fill(~causal(t), -1e38), dim=-1).view(b * h, t, t)
    return torch.bmm(weights, v).view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "scale on the scores": lambda: Site(softmax_of(lambda site, s: s * SCALE)),
    "division": lambda: Site(softmax_of(lambda site, s: s / math.sqrt(DIM))),
    "division by a tensor": lambda: Site(softmax_of(lambda site, s: s / torch.sqrt(torch.tensor(8.0)))),
    "scale left of the scores": lambda: Site(softmax_of(lambda site, s: SCALE * s)),
    "no scale": lambda: Site(softmax_of(lambda site, s: s)),
    "a softcap": lambda: Site(softmax_of(lambda site, s: torch.tanh(s / 5) * 5)),
    "a tanh": lambda: Site(softmax_of(lambda site, s: torch.tanh(s))),
    "attention sinks": lambda: Site(weights_of(_sink)),
    "a sink of zero": lambda: Site(weights_of(lambda site, s: _sink(site, s, torch.zeros_like(s[..., :1])))),
    "a sink of one number, and a mask": lambda: Site(
        weights_of(
            lambda site, s: _sink(
                site, s.masked_fill(~causal(s.shape[-1]), -torch.inf), torch.full((*s.shape[:-1], 1), 0.5)
            )
        )
    ),
    "a number that sizes make added": lambda: Site(softmax_of(lambda site, s: s * SCALE + s.shape[-1])),
    "a sink as a factor": lambda: Site(lambda site, q, k, v: _sink_as_factor(q, k, v, site.sinks)),
    "a softcap, a mask and sinks": lambda: Site(weights_of(_softcap_mask_and_sinks)),
    "ALiBi": lambda: Site(softmax_of(_alibi)),
    "ALiBi by the key alone": lambda: Site(softmax_of(_alibi_by_key)),
    "ALiBi from a table": lambda: Site(softmax_of(_alibi_sliced)),
    "ALiBi as the mask of SDPA": lambda: Site(_alibi_in_sdpa),
    "ALiBi by baddbmm": lambda: Site(_alibi_by_baddbmm),
    "scale on both": lambda: Site(
        lambda site, q, k, v: softmax_of(lambda site, s: s)(site, q * DIM**-0.25, k * DIM**-0.25, v)
    ),
    "a learned temperature per head": lambda: Site(_cosine),
    "a scale that depends on the query": lambda: Site(_log_length),
    "softmax in float32": lambda: Site(
        weights_of(lambda site, s: F.softmax(s.float(), dim=-1, dtype=torch.float32).type_as(s))
    ),
    "softmax after subtracting the maximum": lambda: Site(softmax_of(_stable)),
    "dropout": lambda: Site(weights_of(lambda site, s: site.drop(F.softmax(s, dim=-1)))),
    "masked_fill": lambda: Site(
        softmax_of(lambda site, s: (s * SCALE).masked_fill(~causal(s.shape[-1]), float("-inf")))
    ),
    "masked_fill with a sliced buffer": lambda: Site(
        softmax_of(
            lambda site, s: (s * SCALE).masked_fill(site.tril[:, :, : s.shape[2], : s.shape[3]] == 0, -1e9)
        )
    ),
    "masked_fill and zeros after the softmax": lambda: Site(
        weights_of(
            lambda site, s: F.softmax(s.masked_fill(~causal(s.shape[-1]), -1e9), -1).masked_fill(
                ~causal(s.shape[-1]), 0.0
            )
        )
    ),
    "in place": lambda: Site(_in_place),
    "where": lambda: Site(
        softmax_of(
            lambda site, s: torch.where(causal(s.shape[-1]), s * SCALE, torch.finfo(torch.float32).min)
        )
    ),
    "where, turned around": lambda: Site(
        softmax_of(lambda site, s: torch.where(~causal(s.shape[-1]), -torch.inf, s * SCALE))
    ),
    "addition": lambda: Site(
        softmax_of(lambda site, s: s * SCALE + torch.full_like(s, float("-inf")).triu(1))
    ),
    "times the mask, minus a large number": lambda: Site(
        softmax_of(
            lambda site, s: (
                s * SCALE * site.tril[..., : s.shape[2], : s.shape[3]]
                - 1e4 * (1 - site.tril[..., : s.shape[2], : s.shape[3]])
            )
        )
    ),
    "the logarithm of the mask": lambda: Site(
        softmax_of(lambda site, s: s * SCALE + site.tril[..., : s.shape[2], : s.shape[3]].log())
    ),
    "where with a value that is a buffer": Filled,
    "where with a tensor made for it": lambda: Site(
        softmax_of(lambda site, s: torch.where(causal(s.shape[-1]), s, torch.full([], -1e9, dtype=s.dtype)))
    ),
    "numbers compared": lambda: Site(
        softmax_of(
            lambda site, s: s.masked_fill(
                torch.arange(s.shape[-1]) > torch.arange(s.shape[-2])[:, None], -torch.inf
            )
        )
    ),
    "by assignment": lambda: Site(softmax_of(_assigned)),
    "nn.Softmax": WithSoftmax,
    **{
        name: partial(lambda spelled: Site(weights_of(lambda site, s: spelled(s))), spelled)
        for name, spelled in IN_PARTS.items()
    },
    "values by exp, then by its sum": lambda: Site(_divided_last),
    "Tensor.softmax in float32": lambda: Site(
        weights_of(lambda site, s: s.softmax(dim=3, dtype=torch.float32).to(s.dtype))
    ),
    **{
        f"masked_fill with {name}": partial(
            lambda value: Site(
                softmax_of(lambda site, s: (s * SCALE).masked_fill(~causal(s.shape[-1]), value))
            ),
            value,
        )
        for name, value in FILLS.items()
    },
    **{
        f"addition of {name}": partial(
            lambda value: Site(softmax_of(lambda site, s: s * SCALE + torch.full_like(s, value).triu(1))),
            value,
        )
        for name, value in FILLS.items()
    },
    **{
        f"where with {name}": partial(
            lambda value: Site(
                softmax_of(lambda site, s: torch.where(causal(s.shape[-1]), s * SCALE, value))
            ),
            value,
        )
        for name, value in FILLS.items()
    },
    "1 - mask times a large number": lambda: Site(
        softmax_of(lambda site, s: s * SCALE - (1.0 - site.tril[..., : s.shape[2], : s.shape[3]]) * 1e9)
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_converted_and_reverted(name):
    torch.manual_seed(0)
    check_round_trip(Model(SPELLINGS[name]()).eval())


def test_a_window_wider_than_the_example_is_seen():
    def windowed(site, scores):
        at = torch.arange(scores.shape[-1])
        back = at[:, None] - at
        return (scores * SCALE).masked_fill((back < 0) | (back >= 40), float("-inf"))

    model = Model(Site(softmax_of(windowed))).eval()
    example, longer = inputs((2, 11), (2, 90))
    with torch.no_grad():
        expected = model(longer)
        (site,) = retrofit.convert(model, retrofit.DenseConfig(), (example,)).converted
        assert site.mask == "sliding window(40)"
        torch.testing.assert_close(model(longer), expected, rtol=1e-5, atol=1e-5)
