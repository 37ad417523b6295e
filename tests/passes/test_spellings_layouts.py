"""The products of attention in every layout: found, converted with proof at other sizes than the example's, and reverted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

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
    check_round_trip,
    flat,
    heads,
    repeat,
    softmax_of,
)
from torch import nn


def _merged(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    y = torch.bmm(F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), dim=-1), v)
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def _merged_with_mask(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(b, h, t, t)
    scores = scores + torch.zeros(t, t).masked_fill(~causal(t), torch.finfo(torch.float32).min)
    y = torch.bmm(F.softmax(scores.view(b * h, t, t), dim=-1), v)
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def _baddbmm(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    mask = torch.zeros(t, t).masked_fill(~causal(t), float("-inf")).expand(b * h, t, t)
    y = torch.bmm(F.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=SCALE), dim=-1), v)
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def _baddbmm_onto_nothing(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    scores = torch.baddbmm(q.new_empty(b * h, t, t), q, k.transpose(1, 2), beta=0.0, alpha=SCALE)
    y = torch.bmm(F.softmax(scores, dim=-1), v)
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def _fairseq(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(0, 1).reshape(t, b * h, d).transpose(0, 1) for x in (q, k, v))
    weights = F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)) + torch.full((t, t), -torch.inf).triu(1), -1)
    return torch.bmm(weights, v).transpose(0, 1).reshape(t, b, h * d).transpose(0, 1)


def _length_first(site, q, k, v):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [t, b, h, d]
    weights = F.softmax(torch.einsum("ibhd,jbhd->ijbh", q, k) * SCALE, dim=1)
    return torch.einsum("ijbh,jbhd->ibhd", weights, v).transpose(0, 1).flatten(2)


def _keys_times_queries(site, q, k, v):
    q, k, v = heads(q, k, v)
    weights = F.softmax(k @ q.transpose(-2, -1) * SCALE, dim=-2)
    return flat(weights.transpose(-2, -1) @ v)


def _values_times_weights(site, q, k, v):
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))  # [b, h, d, t]
    weights = F.softmax(q.transpose(2, 3) @ k * SCALE, dim=-1)
    return (v @ weights.transpose(2, 3)).permute(0, 3, 1, 2).flatten(2)


def _no_heads(site, q, k, v):
    q, k, v = (x.flatten(2) for x in (q, k, v))
    return F.softmax(q @ k.transpose(1, 2) / math.sqrt(WIDTH), dim=-1) @ v


def _grouped(site, q, k, v):
    b, t, _, d = q.shape
    q = q.view(b, t, 2, 2, d)
    weights = F.softmax(torch.einsum("btkgd,bskd->bkgts", q, k) * SCALE, dim=-1)
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2)


def _grouped_broadcast(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = heads(q, k, v)
    q = q.reshape(b, 2, 2, t, d)
    weights = F.softmax(q @ k.unsqueeze(2).transpose(-2, -1) * SCALE, dim=-1)
    return flat((weights @ v.unsqueeze(2)).reshape(b, h, t, d))


def _one_kv_head(site, q, k, v):
    b, t, h, d = q.shape
    scores = q.reshape(b, t * h, d) @ k.view(b, t, d).transpose(1, 2) * SCALE
    weights = F.softmax(scores.view(b, t, h, t), dim=-1)
    return (weights.view(b, t * h, t) @ v.view(b, t, d)).view(b, t, h * d)


def _expanded_kv_head(site, q, k, v):
    q, k, v = heads(q, k, v)
    k, v = (x.expand(-1, HEADS, -1, -1) for x in (k, v))
    return flat(F.softmax(q @ k.transpose(2, 3) * SCALE, dim=-1) @ v)


def _repeated(repeat):
    def attend(site, q, k, v):
        q, k, v = heads(q, k, v)
        k, v = repeat(k), repeat(v)
        return flat(F.softmax(q @ k.transpose(2, 3) * SCALE, dim=-1) @ v)

    return attend


def _einsum(first, second, *, swapped=False):
    def attend(site, q, k, v):
        q, k = (k, q) if swapped else (q, k)
        return torch.einsum(second, F.softmax(torch.einsum(first, q, k) * SCALE, dim=-1), v).flatten(2)

    return attend


def _einsum_in_any_order(seed):
    """Both products with the letters of every tensor in an order drawn from ``seed``."""
    draw = random.Random(seed)
    of_q, of_k, of_v, scores, out = (
        "".join(draw.sample(word, 4)) for word in ("bthd", "bshd", "bshe", "bhts", "bthe")
    )

    def attend(site, q, k, v):
        q, k, v = (
            x.permute(*map(order.index, own))
            for x, order, own in ((q, "bthd", of_q), (k, "bshd", of_k), (v, "bshe", of_v))
        )
        weights = F.softmax(torch.einsum(f"{of_q},{of_k}->{scores}", q, k) * SCALE, dim=scores.index("s"))
        y = torch.einsum(f"{of_v},{scores}->{out}", v, weights)
        return y.permute(*map(out.index, "bthe")).flatten(2)

    return attend


def _einsum_by_numbers(site, q, k, v):
    weights = F.softmax(torch.einsum(q, [0, 1, 2, 3], k, [0, 4, 2, 3], [0, 2, 1, 4]) * SCALE, dim=-1)
    return torch.einsum(weights, [0, 2, 1, 4], v, [0, 4, 2, 3], [0, 1, 2, 3]).flatten(2)


def _differential(site, q, k, v):
    """As the Differential Transformer in two calls: the same weights for either half of the values."""
    half = k.shape[2] // 2
    q, k, v = heads(q, k, v)
    first, second = (
        F.scaled_dot_product_attention(q, k, part.repeat(1, 2, 1, 1), attn_mask=causal(q.shape[2]))
        for part in v.split(half, dim=1)
    )
    return flat(first - 0.5 * second)


def _differential_eager(site, q, k, v):
    def weights():
        return (q @ k.mT * SCALE).masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1)

    q, k, v = heads(q, k, v)
    first = weights() @ v
    return flat(first - 0.5 * (weights() @ v.flip(1)[..., :4]).repeat(1, 1, 1, 2))


SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "two attentions of the same weights": lambda: Site(_differential),
    "two attentions of the same weights, step by step": lambda: Site(_differential_eager),
    "bmm on (b h) t d": lambda: Site(_merged),
    "a mask in between on b h t s": lambda: Site(_merged_with_mask),
    "baddbmm": lambda: Site(_baddbmm),
    "baddbmm onto nothing": lambda: Site(_baddbmm_onto_nothing),
    "bmm on t (b h) d": lambda: Site(_fairseq),
    "einsum bthd,bshd->bhts": lambda: Site(_einsum("bthd,bshd->bhts", "bhts,bshd->bthd")),
    "einsum in another order": lambda: Site(_einsum("bihc,bjhc->hbij", "hbij,bjhc->bihc")),
    "einsum, keys first": lambda: Site(_einsum("zkyx,zqyx->zyqk", "zyqk,zkyx->zqyx", swapped=True)),
    "einsum with spaces": lambda: Site(_einsum("b i h d, b j h d -> b h i j", "b h i j, b j h d -> b i h d")),
    "einsum by numbers": lambda: Site(_einsum_by_numbers),
    **{
        f"einsum, order {seed}": partial(lambda seed: Site(_einsum_in_any_order(seed), value_dim=12), seed)
        for seed in range(12)
    },
    "einsum, values first": lambda: Site(
        lambda site, q, k, v: torch.einsum(
            "bshd,bhts->bthd", v, F.softmax(torch.einsum("bthd,bshd->bhts", q, k) * SCALE, dim=-1)
        ).flatten(2)
    ),
    "einsum without an arrow": lambda: Site(
        lambda site, q, k, v: flat(
            torch.einsum(
                "...ij,...jk",
                F.softmax(torch.einsum("...id,...jd", *heads(q, k)) * SCALE, -1),
                v.transpose(1, 2),
            )
        )
    ),
    "torch.matmul": lambda: Site(
        lambda site, q, k, v: flat(
            torch.matmul(
                F.softmax(torch.matmul(q.transpose(1, 2), k.permute(0, 2, 3, 1)) * SCALE, dim=-1),
                v.transpose(1, 2),
            )
        )
    ),
    "scale on q": lambda: Site(lambda site, q, k, v: softmax_of(lambda _, s: s)(site, q * SCALE, k, v)),
    "scale on k": lambda: Site(lambda site, q, k, v: softmax_of(lambda _, s: s)(site, q, k / DIM**0.5, v)),
    "repeat_interleave": lambda: Site(_repeated(lambda x: x.repeat_interleave(2, dim=1)), kv_heads=2),
    "repeat": lambda: Site(
        _repeated(lambda x: x[:, :, None].repeat(1, 1, 2, 1, 1).flatten(1, 2)), kv_heads=2
    ),
    "heads of keys one behind the other": lambda: Site(_repeated(lambda x: x.repeat(1, 2, 1, 1)), kv_heads=2),
    "heads of keys by number": lambda: Site(_repeated(lambda x: x[:, torch.arange(HEADS) // 2]), kv_heads=2),
    "repeat_kv": lambda: Site(_repeated(repeat), kv_heads=2),
    "einsum with dots": lambda: Site(
        lambda site, q, k, v: flat(
            torch.einsum(
                "...ts,...sd->...td",
                F.softmax(torch.einsum("...td,...sd->...ts", *list(heads(q, k))) * SCALE, -1),
                v.transpose(1, 2),
            )
        )
    ),
    "length first": lambda: Site(_length_first),
    "keys times queries": lambda: Site(_keys_times_queries),
    "values times weights": lambda: Site(_values_times_weights),
    "no head axis": lambda: Site(_no_heads),
    "value width": lambda: Site(softmax_of(lambda site, s: s * SCALE), value_dim=12),
    "grouped einsum": lambda: Site(_grouped, kv_heads=2),
    "grouped by broadcasting": lambda: Site(_grouped_broadcast, kv_heads=2),
    "one kv head": lambda: Site(_one_kv_head, kv_heads=1),
    "one kv head, expanded": lambda: Site(_expanded_kv_head, kv_heads=1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_converted_and_reverted(name):
    torch.manual_seed(0)
    check_round_trip(Model(SPELLINGS[name]()).eval())
