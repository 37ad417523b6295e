"""Modules as libraries write them: found, converted with proof at other sizes than the example's, and reverted."""

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
    WIDTH,
    Around,
    Model,
    Site,
    causal,
    causal_sdpa,
    check_round_trip,
    flat,
    inputs,
    powers,
)
from torch import nn

import retrofit


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


class Fused(nn.Module):
    """One projection, taken apart by ``split``: [b, t, 3·h·d] to q, k, v [b, h, t, d]."""

    def __init__(self, split) -> None:
        super().__init__()
        self.qkv, self.proj, self.split = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), split

    def forward(self, x):
        q, k, v = self.split(self.qkv(x))
        return self.proj(flat(F.softmax(q @ k.transpose(2, 3) * SCALE, dim=-1) @ v))


FUSED = {
    "chunk": lambda y: [part.unflatten(2, (HEADS, DIM)).transpose(1, 2) for part in y.chunk(3, dim=-1)],
    "split": lambda y: [
        part.view(*part.shape[:2], HEADS, DIM).permute(0, 2, 1, 3) for part in y.split(WIDTH, dim=2)
    ],
    "unbind": lambda y: y.view(*y.shape[:2], 3, HEADS, DIM).transpose(1, 3).unbind(2),
    "reshape and permute": lambda y: list(y.reshape(*y.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4)),
    "head by head": lambda y: y.view(*y.shape[:2], HEADS, 3 * DIM).transpose(1, 2).chunk(3, dim=-1),
    "index": lambda y: [
        y.view(*y.shape[:2], HEADS, 3, DIM)[..., place, :].transpose(1, 2) for place in range(3)
    ],
    "tensor_split": lambda y: [
        part.unflatten(2, (HEADS, DIM)).transpose(1, 2) for part in y.tensor_split(3, dim=-1)
    ],
    "narrow": lambda y: [
        y.narrow(2, WIDTH * place, WIDTH).unflatten(2, (HEADS, DIM)).transpose(1, 2) for place in range(3)
    ],
    "slices": lambda y: [
        y[..., WIDTH * place : WIDTH * (place + 1)].unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        for place in range(3)
    ],
}


class FusedGroups(nn.Module):
    """One projection of four heads of queries, two of keys and two of values, group by group or part by part."""

    def __init__(self, *, by_group: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.by_group = nn.Linear(WIDTH, 8 * DIM), nn.Linear(WIDTH, WIDTH), by_group

    def forward(self, x):
        b, t, _ = x.shape
        if self.by_group:  # as Falcon and GPT-NeoX have it
            q, k, v = self.qkv(x).view(b, t, 2, 4, DIM).split([2, 1, 1], dim=3)
        else:
            q, k, v = self.qkv(x).unflatten(2, (8, DIM)).split([4, 2, 2], dim=2)
        q, k, v = (part.reshape(b, t, -1, DIM).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        return self.proj(flat(F.softmax(q @ k.transpose(2, 3) * SCALE, dim=-1) @ v))


class Head(nn.Module):
    """One head of several, as in a lecture: without a head axis, the heads side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, DIM, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(MOST, MOST)))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        T = x.shape[1]
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        wei = self.dropout(F.softmax(wei, dim=-1))
        return wei @ self.value(x)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head() for _ in range(HEADS))

    def forward(self, x):
        return torch.cat([h(x) for h in self.heads], dim=-1)


class Latent(nn.Module):
    """Multi-head latent attention: keys and values from one latent, one rotary key for all heads, wider keys."""

    def __init__(self, *, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.latent = nn.Linear(WIDTH, HEADS * (DIM + 4)), nn.Linear(WIDTH, 12 + 4)
        self.norm, self.kv = nn.LayerNorm(12), nn.Linear(12, HEADS * (DIM + 6))
        self.out = nn.Linear(HEADS * 6, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        angle = torch.arange(t)[:, None] / torch.tensor([1.0, 10.0])
        turn = torch.polar(torch.ones_like(angle), angle)
        q = self.q(x).view(b, t, HEADS, DIM + 4).transpose(1, 2)
        latent, k_turned = self.latent(x).split([12, 4], dim=-1)
        k, v = self.kv(self.norm(latent)).view(b, t, HEADS, DIM + 6).transpose(1, 2).split([DIM, 6], dim=-1)
        k_turned = _turned(k_turned.view(b, 1, t, 4), turn).expand(-1, HEADS, -1, -1)
        q, k = torch.cat([q[..., :DIM], _turned(q[..., DIM:], turn)], -1), torch.cat([k, k_turned], -1)
        if self.fused:
            return self.out(flat(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        scores = (q @ k.transpose(2, 3) * (DIM + 4) ** -0.5).masked_fill(~causal(t), -torch.inf)
        return self.out(flat(F.softmax(scores, dim=-1) @ v))


def _turned(x, turn):
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Gated(nn.Module):
    """A sigmoid gate on what attention gives, which is no sigmoid attention."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.gate = Site(causal_sdpa), nn.Linear(WIDTH, HEADS * DIM)
        self.site.out = nn.Identity()

    def forward(self, x):
        return self.site(x) * torch.sigmoid(self.gate(x))


def _beside_an_order(site, q, k, v):
    """Attention beside a relation between tokens: a sigmoid whose powers are no sigmoid attention."""
    order = powers(torch.sigmoid(q.flatten(2) @ k.flatten(2).mT))
    return causal_sdpa(site, q, k, v) * order.mean(-1, keepdim=True)


class Several(nn.Module):
    """Two attentions of different spellings in one forward, and one inside a child of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Fused(FUSED["chunk"]), Site(causal_sdpa)
        self.nested = nn.Sequential(nn.LayerNorm(WIDTH), FusedUnbind())

    def forward(self, x):
        return self.nested(self.first(x) + self.second(x))


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


class TypedWeights(WithWeights):
    """As protein models have it: the weights in the type of the output, rotary embeddings where there are any."""

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in self.site.qkv(x).chunk(3, dim=-1))
        if self.norm:
            q, k = self.norm(q), self.norm(k)
        weights = torch.softmax(q @ k.mT * SCALE, dim=-1)
        y = self.site.proj((weights @ v).transpose(1, 2).flatten(2))
        return y, weights.type_as(y).transpose(1, 0).mean(dim=0)


class Torch(nn.Module):
    """nn.MultiheadAttention, called as self-attention."""

    def __init__(self, *, weights=False, causal=False, mean=True, **options) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.weights, self.causal, self.mean = weights, causal, mean

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        x = x if self.mha.batch_first else x.transpose(0, 1)
        options = {"need_weights": self.weights, "average_attn_weights": self.mean, "is_causal": self.causal}
        y = self.mha(x, x, x, attn_mask=mask, **options)[0]
        return y if self.mha.batch_first else y.transpose(0, 1)


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)


class Padded(nn.Module):
    """Takes a mask of its tokens, as BERT does."""

    def __init__(self, hide) -> None:
        super().__init__()
        self.site, self.hide = Site(causal_sdpa), hide

    def forward(self, x, mask):
        q, k, v = (
            p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.site.q, self.site.k, self.site.v)
        )
        return self.site.out(flat(F.softmax(self.hide(q @ k.transpose(2, 3) * SCALE, mask), dim=-1) @ v))


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
        self.attn, self.between = Site(causal_sdpa), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.attn(self.between(self.attn(x)))


class Shared(nn.Module):
    """One attention module under two paths."""

    def __init__(self) -> None:
        super().__init__()
        attn = Site(causal_sdpa)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": attn, "linear": nn.Linear(WIDTH, WIDTH)}) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["linear"](layer["attn"](x))
        return x


SPELLINGS: dict[str, Callable[[], nn.Module]] = {
    "nanoGPT": FusedChunk,
    "timm": FusedUnbind,
    "weights returned": WithWeights,
    "weights returned in the type of the output, and a child asked whether it is there": TypedWeights,
    "nn.MultiheadAttention": lambda: Torch(batch_first=True),
    "nn.MultiheadAttention, weights": lambda: Torch(batch_first=True, weights=True),
    "nn.MultiheadAttention, length first": Torch,
    "nn.MultiheadAttention, causal": lambda: Torch(batch_first=True, causal=True),
    "nn.MultiheadAttention, length first, weights": lambda: Torch(weights=True, causal=True),
    "nn.MultiheadAttention, weights of each head": lambda: Torch(batch_first=True, weights=True, mean=False),
    "nn.MultiheadAttention with a key of its own": lambda: Torch(batch_first=True, add_bias_kv=True),
    "nn.MultiheadAttention with a key of zeros": lambda: Torch(batch_first=True, add_zero_attn=True),
    "nn.MultiheadAttention without bias": lambda: Torch(batch_first=True, bias=False),
    "nn.TransformerEncoder": _encoder,
    "nn.TransformerEncoder, norm first": partial(_encoder, norm_first=True, activation="gelu"),
    "nn.TransformerEncoderLayer": lambda: _encoder().layers[0],
    "called by two layers": Twice,
    "shared between layers": Shared,
    "MLA": Latent,
    "MLA by SDPA": partial(Latent, fused=True),
    "a module for each head": Heads,
    "fused grouped heads, part by part": partial(FusedGroups, by_group=False),
    "fused grouped heads, group by group": partial(FusedGroups, by_group=True),
    "a gate behind it": Gated,
    "powers of a relation beside it": lambda: Site(_beside_an_order),
    "several in one forward": Several,
    **{f"fused q, k and v by {name}": partial(Fused, split) for name, split in FUSED.items()},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_converted_and_reverted(name):
    torch.manual_seed(0)
    check_round_trip(Model(SPELLINGS[name]()).eval())


PADDING = {
    "masked_fill": lambda s, mask: s.masked_fill(mask[:, None, None, :] == 0, float("-inf")),
    "an extended mask": lambda s, mask: s + (1.0 - mask[:, None, None, :].to(s.dtype)) * -10000.0,
    "with a causal mask": lambda s, mask: s.masked_fill(~causal(s.shape[-1]), -1e9).masked_fill(
        ~mask.bool()[:, None, None], -1e9
    ),
    "ALiBi with a causal mask": lambda s, mask: (
        s + torch.arange(s.shape[-1]) * torch.tensor([0.5, 0.25, 0.1, 0.0]).view(HEADS, 1, 1)
    ).masked_fill(~causal(s.shape[-1]) | ~mask.bool()[:, None, None], -torch.inf),
}


@pytest.mark.parametrize("name", [*PADDING, "nn.MultiheadAttention"])
def test_padding_is_carried_through(name):
    torch.manual_seed(0)
    model = Around(Padded(PADDING[name]) if name in PADDING else PaddedTorch()).eval()

    def padded(rows, tokens):
        (x,) = inputs((rows, tokens))
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        mask[0, tokens // 2 :] = 0
        return x, mask

    others = [padded(2, 11), padded(3, 23), padded(1, 5)]
    with torch.no_grad():
        before = [model(*inputs) for inputs in others]
        (site,) = retrofit.convert(model, retrofit.DenseConfig(), others[0]).converted
        assert site.mask == ("causal+padding" if "causal" in name else "key padding") + "+ALiBi" * (
            "ALiBi" in name
        )
        for (x, mask), expected in zip(others, before, strict=True):
            real = mask[..., None]
            torch.testing.assert_close(model(x, mask) * real, expected * real, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        for given, expected in zip(others, before, strict=True):
            assert torch.equal(model(*given), expected)


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
        retrofit.revert(model)
        assert all(torch.equal(model(x), expected) for x, expected in zip(others, before, strict=True))


def test_the_fast_path_of_torch_gives_way_and_comes_back():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()

    def padded(rows, tokens):
        (x,), padding = inputs((rows, tokens)), torch.zeros(rows, tokens, dtype=torch.bool)
        padding[-1, tokens // 2 :] = True  # the fast path leaves these tokens out
        return {"src": x, "src_key_padding_mask": padding}

    examples = [padded(3, 12), padded(2, 5), padded(1, 23)]
    with torch.no_grad():
        before = [model(**example) for example in examples]
        report = retrofit.convert(model, retrofit.DenseConfig(), examples[0])
        assert [site.mask for site in report.converted] == ["key padding"] * 2
        for example, expected in zip(examples, before, strict=True):
            longest = expected.shape[1]  # where a nested tensor ends
            real = ~example["src_key_padding_mask"][:, :longest, None]
            got = model(**example)[:, :longest]
            torch.testing.assert_close(got * real, expected * real, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert all(torch.equal(model(**x), expected) for x, expected in zip(examples, before, strict=True))


class PaddedTorch(nn.Module):
    """nn.MultiheadAttention with padding, and weights that nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x, mask):
        return self.mha(x, x, x, key_padding_mask=mask == 0)[0]


def test_weights_are_none_where_they_were_returned():
    model, (x,) = Around(WithWeights()).eval(), inputs((2, 11))
    y, weights = model(x)
    assert weights.shape == (2, 11, 11)
    retrofit.convert(model, retrofit.DenseConfig(), (x,))
    got, none = model(x)
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)
    assert none is None
