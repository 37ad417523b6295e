"""SDPA in every form of its arguments: found, converted with proof at other sizes than the example's, and reverted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from spelled import (
    DIM,
    HEADS,
    MOST,
    Model,
    Site,
    causal,
    causal_sdpa,
    check_round_trip,
    flat,
    heads,
    repeat,
    sdpa,
)
from torch import nn


def _repeated_before_transpose(site, q, k, v):
    b, t, h, d = k.shape
    k, v = (x[:, :, :, None].expand(b, t, h, 2, d).reshape(b, t, HEADS, d) for x in (k, v))
    q, k, v = heads(q, k, v)
    return flat(F.scaled_dot_product_attention(q, k, v))


def _sdpa_merged(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal(t))
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def _sdpa_five(site, q, k, v):
    b, t, _, d = q.shape
    q, k, v = (x.view(b, t, 2, 2, d).permute(0, 2, 3, 1, 4) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(0, 3, 1, 2, 4).flatten(2)


def _sdpa_no_heads(site, q, k, v):
    return F.scaled_dot_product_attention(*(x.flatten(2) for x in (q, k, v)), is_causal=True)


def _rotary(site, q, k, v):
    t = q.shape[1]
    angle = torch.arange(t)[:, None] / 100 ** (torch.arange(DIM // 2) / DIM)
    cos, sin = (f(angle).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))

    def rotated(x):
        return x * cos + torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) * sin

    return causal_sdpa(site, rotated(q), rotated(k), v)


def _sliced_rotary(site, q, k, v):
    """From tables for all positions, in float32 whatever the type of the queries."""
    t, angle = q.shape[1], torch.arange(MOST)[:, None] / 100 ** (torch.arange(DIM // 2) / DIM)
    cos, sin = (table.repeat(1, 2)[:t].unsqueeze(1) for table in (angle.cos(), angle.sin()))

    def rotated(x):
        a, b = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat((-b, a), -1) * sin).type_as(x)

    return causal_sdpa(site, rotated(q), rotated(k), v)


def _gathered_rotary(site, q, k, v):
    """From a table by the number of each token."""
    angle = torch.arange(MOST)[:, None] / 100 ** (torch.arange(DIM // 2) / DIM)
    turn = torch.stack([angle.cos(), angle.sin()], dim=-1)[torch.arange(q.shape[1])][:, None]

    def rotated(x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    return causal_sdpa(site, rotated(q), rotated(k), v)


def _rotary_by_matrix(site, q, k, v):
    angle = torch.arange(q.shape[1])[:, None] / torch.arange(1, DIM // 2 + 1)
    rows = [torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)]
    turn = torch.stack(rows, dim=-2)  # [t, d / 2, 2, 2]

    def rotated(x):
        return torch.einsum("tpij,bthpj->bthpi", turn, x.unflatten(-1, (-1, 2))).flatten(-2)

    return causal_sdpa(site, rotated(q), rotated(k), v)


def _rotary_with_decay(site, q, k, v):
    """xPos: what queries are multiplied with, keys are divided by."""
    t = q.shape[1]
    decay = ((torch.arange(DIM // 2) + 3) / (DIM // 2 + 3)) ** (torch.arange(t)[:, None] / 64)
    angle = torch.arange(t)[:, None] / torch.arange(1, DIM // 2 + 1)

    def rotated(x, size):
        a, b = x.chunk(2, dim=-1)
        cos, sin = ((f(angle) * size)[:, None] for f in (torch.cos, torch.sin))
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return causal_sdpa(site, rotated(q, decay), rotated(k, 1 / decay), v)


def _with_backend(site, q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return causal_sdpa(site, q, k, v)


def _mask_of_rows_and_heads(site, q, k, v):
    b, t, h, _ = q.shape
    mask = torch.zeros(b, h, t, t).masked_fill(~causal(t), torch.finfo(q.dtype).min)
    return sdpa(attn_mask=mask, dropout_p=0.0, is_causal=False, scale=0.3)(site, q, k, v)


def _by_name(site, q, k, v):
    q, k, v = heads(q, k, v)
    return flat(F.scaled_dot_product_attention(value=v, key=k, query=q, is_causal=True, attn_mask=None))


def _interleaved_rotary(site, q, k, v):
    t = q.shape[1]
    angle = torch.arange(t)[:, None] / 100 ** (torch.arange(DIM // 2) / DIM)
    cos, sin = (f(angle).repeat_interleave(2, dim=1)[:, None] for f in (torch.cos, torch.sin))

    def rotated(x):
        return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin

    return causal_sdpa(site, rotated(q), rotated(k), v)


def _partial_rotary(site, q, k, v):
    half = DIM // 2
    angle = torch.arange(q.shape[1])[:, None] / 100 ** (torch.arange(half // 2) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotated(x):
        (a, b), rest = x[..., :half].chunk(2, dim=-1), x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    return causal_sdpa(site, rotated(q), rotated(k), v)


def _complex_rotary(site, q, k, v):
    t = q.shape[1]
    turn = torch.polar(torch.ones(t, DIM // 2), torch.arange(t)[:, None] / torch.arange(1, DIM // 2 + 1))[
        :, None
    ]

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    return causal_sdpa(site, rotated(q), rotated(k), v)


def _normalised(site, q, k, v):
    return causal_sdpa(site, F.rms_norm(q, (DIM,)), F.layer_norm(k, (DIM,)), v)


SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: Site(sdpa()),
    "sdpa causal": lambda: Site(causal_sdpa),
    "sdpa scale": lambda: Site(sdpa(scale=0.2)),
    "sdpa enable_gqa": lambda: Site(sdpa(enable_gqa=True), kv_heads=2),
    "sdpa repeat_interleave": lambda: Site(
        sdpa(lambda q, k, v: (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))), kv_heads=2
    ),
    "sdpa expand": lambda: Site(sdpa(lambda q, k, v: (q, repeat(k), repeat(v))), kv_heads=2),
    "sdpa expand before transpose": lambda: Site(_repeated_before_transpose, kv_heads=2),
    "sdpa bool mask": lambda: Site(lambda site, q, k, v: sdpa(attn_mask=causal(q.shape[1]))(site, q, k, v)),
    "sdpa additive mask": lambda: Site(
        lambda site, q, k, v: sdpa(
            attn_mask=torch.zeros(q.shape[1], q.shape[1]).masked_fill(~causal(q.shape[1]), -torch.inf)
        )(site, q, k, v)
    ),
    "sdpa sliced tril buffer": lambda: Site(
        lambda site, q, k, v: sdpa(attn_mask=site.tril[..., : q.shape[1], : q.shape[1]].bool())(site, q, k, v)
    ),
    "sdpa causal for more than one token": lambda: Site(
        lambda site, q, k, v: sdpa(is_causal=q.shape[1] > 1)(site, q, k, v)
    ),
    "sdpa by name": lambda: Site(_by_name),
    "sdpa with a mask for each row and head": lambda: Site(_mask_of_rows_and_heads),
    "sdpa with a mask of three dimensions": lambda: Site(
        lambda site, q, k, v: sdpa(attn_mask=causal(q.shape[1])[None])(site, q, k, v)
    ),
    "sdpa with a backend": lambda: Site(_with_backend),
    "sdpa enable_gqa for one kv head, causal": lambda: Site(
        sdpa(is_causal=True, enable_gqa=True), kv_heads=1
    ),
    "sdpa by position": lambda: Site(
        lambda site, q, k, v: flat(F.scaled_dot_product_attention(*heads(q, k, v), None, 0.0, True))
    ),
    "sdpa dropout in training": lambda: Site(
        lambda site, q, k, v: sdpa(dropout_p=0.1 if site.training else 0.0)(site, q, k, v)
    ),
    "sdpa (b h) t d": lambda: Site(_sdpa_merged),
    "sdpa five dimensions": lambda: Site(_sdpa_five),
    "sdpa without heads": lambda: Site(_sdpa_no_heads),
    "sdpa value width": lambda: Site(causal_sdpa, value_dim=12),
    "rotary": lambda: Site(_rotary),
    "rotary from a sliced table": lambda: Site(_sliced_rotary),
    "rotary from a gathered table": lambda: Site(_gathered_rotary),
    "rotary by a matrix": lambda: Site(_rotary_by_matrix),
    "rotary with a decay": lambda: Site(_rotary_with_decay),
    "interleaved rotary": lambda: Site(_interleaved_rotary),
    "partial rotary": lambda: Site(_partial_rotary),
    "complex rotary": lambda: Site(_complex_rotary),
    "q and k norm": lambda: Site(_normalised),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_converted_and_reverted(name):
    torch.manual_seed(0)
    check_round_trip(Model(SPELLINGS[name]()).eval())
