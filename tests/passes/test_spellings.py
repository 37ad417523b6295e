"""Every spelling of attention is found, converted with proof at other sizes than the example's, and reverted.

One small module for each way to write attention down, and one for each thing that only looks like it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.errors import NoAttentionFound

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


def _heads(*tensors):
    return (tensor.transpose(1, 2) for tensor in tensors)


def _flat(y):
    return y.transpose(1, 2).flatten(2)


def _causal(t):
    return torch.ones(t, t, dtype=torch.bool).tril()


def _repeat(x):
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, HEADS // h, t, d).reshape(b, HEADS, t, d)


def _softmax_of(scores):
    """An attention that is usual but for what happens to its scores."""

    def attend(site, q, k, v):
        q, k, v = _heads(q, k, v)
        return _flat(F.softmax(scores(site, q @ k.transpose(-2, -1)), dim=-1) @ v)

    return attend


def _weights_of(weights):
    """An attention that is usual but for what happens to its weights."""

    def attend(site, q, k, v):
        q, k, v = _heads(q, k, v)
        return _flat(weights(site, q @ k.transpose(-2, -1) * SCALE) @ v)

    return attend


def _merged(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    y = torch.bmm(F.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), dim=-1), v)
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def _merged_with_mask(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(b, h, t, t)
    scores = scores + torch.zeros(t, t).masked_fill(~_causal(t), torch.finfo(torch.float32).min)
    y = torch.bmm(F.softmax(scores.view(b * h, t, t), dim=-1), v)
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def _baddbmm(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    mask = torch.zeros(t, t).masked_fill(~_causal(t), float("-inf")).expand(b * h, t, t)
    y = torch.bmm(F.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=SCALE), dim=-1), v)
    return y.view(b, h, t, d).transpose(1, 2).reshape(b, t, h * d)


def _length_first(site, q, k, v):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [t, b, h, d]
    weights = F.softmax(torch.einsum("ibhd,jbhd->ijbh", q, k) * SCALE, dim=1)
    return torch.einsum("ijbh,jbhd->ibhd", weights, v).transpose(0, 1).flatten(2)


def _keys_times_queries(site, q, k, v):
    q, k, v = _heads(q, k, v)
    weights = F.softmax(k @ q.transpose(-2, -1) * SCALE, dim=-2)
    return _flat(weights.transpose(-2, -1) @ v)


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
    q, k, v = _heads(q, k, v)
    q = q.reshape(b, 2, 2, t, d)
    weights = F.softmax(q @ k.unsqueeze(2).transpose(-2, -1) * SCALE, dim=-1)
    return _flat((weights @ v.unsqueeze(2)).reshape(b, h, t, d))


def _one_kv_head(site, q, k, v):
    b, t, h, d = q.shape
    scores = q.reshape(b, t * h, d) @ k.view(b, t, d).transpose(1, 2) * SCALE
    weights = F.softmax(scores.view(b, t, h, t), dim=-1)
    return (weights.view(b, t * h, t) @ v.view(b, t, d)).view(b, t, h * d)


def _expanded_kv_head(site, q, k, v):
    q, k, v = _heads(q, k, v)
    k, v = (x.expand(-1, HEADS, -1, -1) for x in (k, v))
    return _flat(F.softmax(q @ k.transpose(2, 3) * SCALE, dim=-1) @ v)


def _repeated_before_transpose(site, q, k, v):
    b, t, h, d = k.shape
    k, v = (x[:, :, :, None].expand(b, t, h, 2, d).reshape(b, t, HEADS, d) for x in (k, v))
    q, k, v = _heads(q, k, v)
    return _flat(F.scaled_dot_product_attention(q, k, v))


def _sdpa(prepare=lambda q, k, v: (q, k, v), **options):
    def attend(site, q, k, v):
        return _flat(F.scaled_dot_product_attention(*prepare(*_heads(q, k, v)), **options))

    return attend


def _sdpa_merged(site, q, k, v):
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, t, d) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=_causal(t))
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

    return _causal_sdpa(site, rotated(q), rotated(k), v)


def _complex_rotary(site, q, k, v):
    t = q.shape[1]
    turn = torch.polar(torch.ones(t, DIM // 2), torch.arange(t)[:, None] / torch.arange(1, DIM // 2 + 1))[
        :, None
    ]

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    return _causal_sdpa(site, rotated(q), rotated(k), v)


_causal_sdpa = _sdpa(is_causal=True)


def _normalised(site, q, k, v):
    return _causal_sdpa(site, F.rms_norm(q, (DIM,)), F.layer_norm(k, (DIM,)), v)


def _cosine(site, q, k, v):
    q, k, v = _heads(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
    return _flat(F.softmax(q @ k.transpose(2, 3) * site.temperature, -1) @ v)


def _in_place(site, q, k, v):
    q, k, v = _heads(q, k, v)
    scores = q @ k.transpose(2, 3)
    scores.mul_(SCALE)
    scores.masked_fill_(~_causal(q.shape[2]), float("-inf"))
    return _flat(F.softmax(scores, -1) @ v)


def _log_length(site, q, k, v):
    t = q.shape[1]
    factor = torch.log(torch.arange(t) + 2.0)[:, None]
    q, k, v = _heads(q, k, v)
    return _flat(F.softmax((q @ k.transpose(2, 3)) * factor * SCALE, -1) @ v)


def _stable(site, scores):
    return (scores - scores.amax(dim=-1, keepdim=True)) * SCALE


class FusedChunk(nn.Module):
    """nanoGPT's way: one projection, split; a tril buffer, sliced; dropout; causal by masked_fill."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(MOST, MOST)).view(1, 1, MOST, MOST))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


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


class Torch(nn.Module):
    """nn.MultiheadAttention, called as self-attention."""

    def __init__(self, *, weights=False, causal=False, **options) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.weights, self.causal = weights, causal

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        x = x if self.mha.batch_first else x.transpose(0, 1)
        y = self.mha(x, x, x, need_weights=self.weights, attn_mask=mask, is_causal=self.causal)[0]
        return y if self.mha.batch_first else y.transpose(0, 1)


def _encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class Padded(nn.Module):
    """Takes a mask of its tokens, as BERT does."""

    def __init__(self, hide) -> None:
        super().__init__()
        self.site, self.hide = Site(_causal_sdpa), hide

    def forward(self, x, mask):
        q, k, v = (
            p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.site.q, self.site.k, self.site.v)
        )
        return self.site.out(_flat(F.softmax(self.hide(q @ k.transpose(2, 3) * SCALE, mask), dim=-1) @ v))


class Pixels(nn.Module):
    """Attention of a diffusion model's decoder over the pixels of an image, without heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(3))

    def forward(self, x):
        b, c, h, w = x.shape
        q = self.q(x).reshape(b, c, h * w).permute(0, 2, 1)
        weights = F.softmax(torch.bmm(q, self.k(x).reshape(b, c, h * w)) * c**-0.5, dim=2)
        return x + torch.bmm(self.v(x).reshape(b, c, h * w), weights.permute(0, 2, 1)).reshape(b, c, h, w)


class Twice(nn.Module):
    """One attention module, called by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.between = Site(_causal_sdpa), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.attn(self.between(self.attn(x)))


def _einsum(first, second):
    def attend(site, q, k, v):
        return torch.einsum(second, F.softmax(torch.einsum(first, q, k) * SCALE, dim=-1), v).flatten(2)

    return attend


POSITIVE: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: Site(_sdpa()),
    "sdpa causal": lambda: Site(_causal_sdpa),
    "sdpa scale": lambda: Site(_sdpa(scale=0.2)),
    "sdpa enable_gqa": lambda: Site(_sdpa(enable_gqa=True), kv_heads=2),
    "sdpa repeat_interleave": lambda: Site(
        _sdpa(lambda q, k, v: (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))), kv_heads=2
    ),
    "sdpa expand": lambda: Site(_sdpa(lambda q, k, v: (q, _repeat(k), _repeat(v))), kv_heads=2),
    "sdpa expand before transpose": lambda: Site(_repeated_before_transpose, kv_heads=2),
    "sdpa bool mask": lambda: Site(lambda site, q, k, v: _sdpa(attn_mask=_causal(q.shape[1]))(site, q, k, v)),
    "sdpa (b h) t d": lambda: Site(_sdpa_merged),
    "sdpa five dimensions": lambda: Site(_sdpa_five),
    "sdpa without heads": lambda: Site(_sdpa_no_heads),
    "sdpa value width": lambda: Site(_causal_sdpa, value_dim=12),
    "rotary": lambda: Site(_rotary),
    "complex rotary": lambda: Site(_complex_rotary),
    "q and k norm": lambda: Site(_normalised),
    "scale on the scores": lambda: Site(_softmax_of(lambda site, s: s * SCALE)),
    "division": lambda: Site(_softmax_of(lambda site, s: s / math.sqrt(DIM))),
    "division by a tensor": lambda: Site(_softmax_of(lambda site, s: s / torch.sqrt(torch.tensor(8.0)))),
    "scale left of the scores": lambda: Site(_softmax_of(lambda site, s: SCALE * s)),
    "no scale": lambda: Site(_softmax_of(lambda site, s: s)),
    "a softcap": lambda: Site(_softmax_of(lambda site, s: torch.tanh(s / 5) * 5)),
    "a tanh": lambda: Site(_softmax_of(lambda site, s: torch.tanh(s))),
    "attention sinks": lambda: Site(_weights_of(_sink)),
    "a sink as a factor": lambda: Site(lambda site, q, k, v: _sink_as_factor(q, k, v, site.sinks)),
    "a softcap, a mask and sinks": lambda: Site(_weights_of(_softcap_mask_and_sinks)),
    "scale on both": lambda: Site(
        lambda site, q, k, v: _softmax_of(lambda site, s: s)(site, q * DIM**-0.25, k * DIM**-0.25, v)
    ),
    "a learned temperature per head": lambda: Site(_cosine),
    "a scale that depends on the query": lambda: Site(_log_length),
    "softmax in float32": lambda: Site(
        _weights_of(lambda site, s: F.softmax(s.float(), dim=-1, dtype=torch.float32).type_as(s))
    ),
    "softmax after subtracting the maximum": lambda: Site(_softmax_of(_stable)),
    "dropout": lambda: Site(_weights_of(lambda site, s: site.drop(F.softmax(s, dim=-1)))),
    "masked_fill": lambda: Site(
        _softmax_of(lambda site, s: (s * SCALE).masked_fill(~_causal(s.shape[-1]), float("-inf")))
    ),
    "masked_fill with a sliced buffer": lambda: Site(
        _softmax_of(
            lambda site, s: (s * SCALE).masked_fill(site.tril[:, :, : s.shape[2], : s.shape[3]] == 0, -1e9)
        )
    ),
    "masked_fill and zeros after the softmax": lambda: Site(
        _weights_of(
            lambda site, s: F.softmax(s.masked_fill(~_causal(s.shape[-1]), -1e9), -1).masked_fill(
                ~_causal(s.shape[-1]), 0.0
            )
        )
    ),
    "in place": lambda: Site(_in_place),
    "where": lambda: Site(
        _softmax_of(
            lambda site, s: torch.where(_causal(s.shape[-1]), s * SCALE, torch.finfo(torch.float32).min)
        )
    ),
    "where, turned around": lambda: Site(
        _softmax_of(lambda site, s: torch.where(~_causal(s.shape[-1]), -torch.inf, s * SCALE))
    ),
    "addition": lambda: Site(
        _softmax_of(lambda site, s: s * SCALE + torch.full_like(s, float("-inf")).triu(1))
    ),
    "times the mask, minus a large number": lambda: Site(
        _softmax_of(
            lambda site, s: (
                s * SCALE * site.tril[..., : s.shape[2], : s.shape[3]]
                - 1e4 * (1 - site.tril[..., : s.shape[2], : s.shape[3]])
            )
        )
    ),
    "1 - mask times a large number": lambda: Site(
        _softmax_of(lambda site, s: s * SCALE - (1.0 - site.tril[..., : s.shape[2], : s.shape[3]]) * 1e9)
    ),
    "bmm on (b h) t d": lambda: Site(_merged),
    "a mask in between on b h t s": lambda: Site(_merged_with_mask),
    "baddbmm": lambda: Site(_baddbmm),
    "einsum bthd,bshd->bhts": lambda: Site(_einsum("bthd,bshd->bhts", "bhts,bshd->bthd")),
    "einsum in another order": lambda: Site(_einsum("bihc,bjhc->hbij", "hbij,bjhc->bihc")),
    "einsum with dots": lambda: Site(
        lambda site, q, k, v: _flat(
            torch.einsum(
                "...ts,...sd->...td",
                F.softmax(torch.einsum("...td,...sd->...ts", *list(_heads(q, k))) * SCALE, -1),
                v.transpose(1, 2),
            )
        )
    ),
    "length first": lambda: Site(_length_first),
    "keys times queries": lambda: Site(_keys_times_queries),
    "values times weights": lambda: Site(_values_times_weights),
    "no head axis": lambda: Site(_no_heads),
    "value width": lambda: Site(_softmax_of(lambda site, s: s * SCALE), value_dim=12),
    "grouped einsum": lambda: Site(_grouped, kv_heads=2),
    "grouped by broadcasting": lambda: Site(_grouped_broadcast, kv_heads=2),
    "one kv head": lambda: Site(_one_kv_head, kv_heads=1),
    "one kv head, expanded": lambda: Site(_expanded_kv_head, kv_heads=1),
    "nanoGPT": FusedChunk,
    "timm": FusedUnbind,
    "weights returned": WithWeights,
    "nn.MultiheadAttention": lambda: Torch(batch_first=True),
    "nn.MultiheadAttention, weights": lambda: Torch(batch_first=True, weights=True),
    "nn.MultiheadAttention, length first": Torch,
    "nn.MultiheadAttention, causal": lambda: Torch(batch_first=True, causal=True),
    "nn.MultiheadAttention, length first, weights": lambda: Torch(weights=True, causal=True),
    "nn.TransformerEncoder": _encoder,
    "shared between layers": Twice,
}


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
    q, k, v = _heads(q, k, v)
    scores = q @ k.transpose(2, 3) * SCALE
    factor = less(scores.logsumexp(-1), sinks.view(1, -1, 1)).sigmoid()
    return _flat(F.softmax(scores, -1) @ v * factor.unsqueeze(-1))


def _softcap_mask_and_sinks(site, s):
    s = (50 * torch.tanh(s / 50)).masked_fill(~_causal(s.shape[-1]), -torch.inf)
    column = site.sinks.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], -1)
    both = torch.cat([s, column], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return F.softmax(both, dim=-1, dtype=torch.float32)[..., :-1]


def _mask_before_tanh(site, s):
    return torch.tanh(s.masked_fill(~_causal(s.shape[-1]), -1e9))


def _mask_after_sinks(site, s):
    t = s.shape[-1]
    scores = torch.cat([s, site.sinks.view(1, -1, 1, 1).expand(s.shape[0], -1, t, 1)], dim=-1)
    hidden = F.pad(~_causal(t), (0, 1))
    return F.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)[..., :-1]


def _without_last(site, s):
    return F.softmax(s, dim=-1)[..., :-1]


def _alibi(site, s):
    t = s.shape[-1]
    distance = (torch.arange(t) - torch.arange(t)[:, None]).float()
    return s * SCALE + distance * site.temperature


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


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "softmax over experts": (Router, "not into a product with values"),
    "softmax over queries": (
        lambda: Site(_weights_of(lambda site, s: F.softmax(s, dim=2))),
        "not over the keys",
    ),
    "softmax over channels": (lambda: Site(_over_channels), "width of the heads depends on the input"),
    "linear attention": (
        lambda: Site(
            lambda site, q, k, v: (F.softmax(q, -1) @ (F.softmax(k, 1).transpose(2, 3) @ v)).flatten(2)
        ),
        "not from a product",
    ),
    "talking heads": (lambda: Site(_weights_of(_talking)), "not"),
    "a mask before a tanh": (lambda: Site(_softmax_of(_mask_before_tanh)), "wrong side of a tanh"),
    "a factor after a tanh": (
        lambda: Site(_softmax_of(lambda site, s: torch.tanh(s) * site.temperature)),
        "wrong side of a tanh",
    ),
    "two tanh": (
        lambda: Site(_softmax_of(lambda site, s: torch.tanh(torch.tanh(s)))),
        "wrong side of a tanh",
    ),
    "a logit for each query": (lambda: Site(_weights_of(_sink_by_query)), "vary over more than the heads"),
    "a mask after the sinks": (lambda: Site(_weights_of(_mask_after_sinks)), "after a logit was added"),
    "a factor that is no sink": (
        lambda: Site(lambda site, q, k, v: _sink_as_factor(q, k, v, site.temperature, torch.mul)),
        "used elsewhere",
    ),
    "a key that is left out": (
        lambda: Site(lambda site, q, k, v: _weights_of(_without_last)(site, q, k, v[:, :-1])),
        "0 logits are added to the scores and 1 taken",
    ),
    "ALiBi": (lambda: Site(_softmax_of(_alibi)), "bias"),
    "a mask that depends on the scores": (
        lambda: Site(_softmax_of(_score_dependent)),
        "depends on the scores",
    ),
    "a mild mask": (
        lambda: Site(_softmax_of(lambda site, s: s.masked_fill(~_causal(s.shape[-1]), -5.0))),
        "set to -5.0",
    ),
    "weights used elsewhere": (
        lambda: Site(lambda site, q, k, v: _used_elsewhere(q, k, v)),
        "used elsewhere",
    ),
    "weights used by the module around": (UsesWeights, "used by the module around it"),
    "a factor that varies over the keys": (
        lambda: Site(_softmax_of(lambda site, s: s * torch.arange(1, s.shape[-1] + 1))),
        "varies over the keys",
    ),
    "a gate after the softmax": (
        lambda: Site(_weights_of(lambda site, s: F.softmax(s, -1) * site.temperature)),
        "not into a product with values",
    ),
}


def _used_elsewhere(q, k, v):
    q, k, v = _heads(q, k, v)
    weights = F.softmax(q @ k.transpose(2, 3) * SCALE, -1)
    return _flat((weights @ v) * weights.amax(-1, keepdim=True))


def _inputs(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, t, WIDTH, generator=generator) for b, t in sizes]


@pytest.mark.parametrize("name", POSITIVE)
def test_a_spelling_is_converted_and_reverted(name):
    torch.manual_seed(0)
    model = Model(POSITIVE[name]()).eval()
    example, *others = _inputs((2, 11), (1, 7), (3, 23), (5, 2))
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


PADDING = {
    "masked_fill": lambda s, mask: s.masked_fill(mask[:, None, None, :] == 0, float("-inf")),
    "an extended mask": lambda s, mask: s + (1.0 - mask[:, None, None, :].to(s.dtype)) * -10000.0,
    "with a causal mask": lambda s, mask: s.masked_fill(~_causal(s.shape[-1]), -1e9).masked_fill(
        ~mask.bool()[:, None, None], -1e9
    ),
}


class Around(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, *args):
        return self.attn(*args)


@pytest.mark.parametrize("name", PADDING)
def test_padding_is_carried_through(name):
    torch.manual_seed(0)
    model = Around(Padded(PADDING[name])).eval()

    def padded(rows, tokens):
        (x,) = _inputs((rows, tokens))
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        mask[0, tokens // 2 :] = 0
        return x, mask

    others = [padded(2, 11), padded(3, 23), padded(1, 5)]
    with torch.no_grad():
        before = [model(*inputs) for inputs in others]
        (site,) = retrofit.convert(model, retrofit.DenseConfig(), others[0]).converted
        assert site.mask == ("causal+padding" if "causal" in name else "key padding")
        for (x, mask), expected in zip(others, before, strict=True):
            real = mask[..., None]
            torch.testing.assert_close(model(x, mask) * real, expected * real, rtol=1e-5, atol=1e-5)


def test_pixels_attend():
    torch.manual_seed(0)
    model = Around(Pixels()).eval()
    others = [torch.randn(b, WIDTH, h, w) for b, h, w in ((2, 6, 6), (3, 4, 9), (1, 8, 8))]
    with torch.no_grad():
        before = [model(x) for x in others]
        (site,) = retrofit.convert(model, retrofit.DenseConfig(), (others[0],)).converted
        assert (site.heads, site.head_dim) == (1, WIDTH)
        for x, expected in zip(others, before, strict=True):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_decoder_of_torch_keeps_its_cross_attention():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    target, memory = _inputs((2, 11), (2, 7))
    with torch.no_grad():
        expected = model(target, memory, tgt_is_causal=False)
        report = retrofit.convert(model, retrofit.DenseConfig(), (target, memory))
        assert [site.path for site in report.converted] == ["layers.0.self_attn", "layers.1.self_attn"]
        assert all("cross-attention" in reason for reason in report.skipped.values())
        torch.testing.assert_close(model(target, memory), expected, rtol=1e-5, atol=1e-5)


def test_a_window_wider_than_the_example_is_seen():
    def windowed(site, scores):
        at = torch.arange(scores.shape[-1])
        back = at[:, None] - at
        return (scores * SCALE).masked_fill((back < 0) | (back >= 40), float("-inf"))

    model = Model(Site(_softmax_of(windowed))).eval()
    example, longer = _inputs((2, 11), (2, 90))
    with torch.no_grad():
        expected = model(longer)
        (site,) = retrofit.convert(model, retrofit.DenseConfig(), (example,)).converted
        assert site.mask == "sliding window(40)"
        torch.testing.assert_close(model(longer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_refused_and_left_untouched(name):
    torch.manual_seed(0)
    make, reason = NEAR_MISSES[name]
    model = Model(make()).eval()
    (example,) = _inputs((2, 11))
    with torch.no_grad():
        before = model(example)
        with pytest.raises(NoAttentionFound, match=reason):
            retrofit.convert(model, retrofit.DenseConfig(), (example,))
        assert torch.equal(model(example), before)
    (site,) = retrofit.inspect(model, (example,)).sites
    assert not site.convertible
    assert "test_spellings.py:" in site.reason or "around it" in site.reason
