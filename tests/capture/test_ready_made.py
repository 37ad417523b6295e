"""Sizes and sequences of modules that are handed ready-made queries and keys, or several sequences at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import retrofit
from retrofit.errors import CaptureError

WIDTH, HEADS = 32, 4
LIMIT = retrofit.HSAConfig(
    window=8, sink=8, budget=4096, block=8, node=4, fanout=2, nodes_per_span=4, query_block=8
)


class Attend(nn.Module):
    """No weights: queries and keys come ready-made."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q * 1.5, k, v, is_causal=self.causal)


class Attention(nn.Module):
    """Hands its queries and keys on, of one sequence or of two, behind some keys of its own."""

    def __init__(self, causal: bool, memory: int = 0) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.memory = nn.Parameter(torch.randn(HEADS, memory, WIDTH // HEADS)) if memory else None
        self.attend = Attend(causal) if not memory else Masked()

    def forward(self, x, context=None):
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in (self.q(x), *self.kv(x if context is None else context).chunk(2, -1))
        )
        if self.memory is not None:
            own = self.memory.expand(x.shape[0], -1, -1, -1)
            k, v = torch.cat([own, k], 2), torch.cat([own, v], 2)
        return x + self.attend(q, k, v).transpose(1, 2).flatten(2)


class Masked(nn.Module):
    def forward(self, q, k, v):
        scores = q @ k.transpose(2, 3)
        i, j = scores.shape[-2:]
        hidden = torch.ones(i, j, dtype=torch.bool).triu(j - i + 1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.cross = Attention(True), Attention(False)

    def forward(self, x, context):
        return self.cross(self.attention(x), context)


class Joint(nn.Module):
    """Tokens of two kinds attend as one sequence, with rotary angles for both."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, text, angles):
        states = torch.cat([text, x], 1)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(states).chunk(3, -1))
        turned = [part * angles.cos() + part.roll(1, -1) * angles.sin() for part in (q, k)]
        out = F.scaled_dot_product_attention(*turned, v).transpose(1, 2).flatten(2)
        return out[:, text.shape[1] :]


class Holder(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args):
        return self.attention(*args)


def states(rows: int, length: int) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH)


def same_after(model: nn.Module, config: retrofit.DenseConfig | retrofit.HSAConfig, calls: list) -> list:
    """Converts with the first call, compares all, reverts; returns the sites."""
    with torch.no_grad():
        before = [model(*call) for call in calls]
        report = retrofit.convert(model, config, calls[0])
        for call, expected in zip(calls, before, strict=True):
            torch.testing.assert_close(model(*call), expected, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert torch.equal(model(*calls[0]), before[0])
    return list(report.converted)


@pytest.mark.parametrize("config", [retrofit.DenseConfig(), LIMIT], ids=["dense", "HSA"])
def test_ready_made_queries_and_keys_of_one_sequence_are_self_attention(config):
    torch.manual_seed(0)
    model = Holder(Attention(True)).eval()
    (site,) = same_after(model, config, [(states(2, 24),), (states(1, 7),), (states(3, 65),)])
    assert (site.path, site.kind, str(site.mask)) == ("attention.attend", "self", "causal")


def test_two_sequences_of_the_same_length_are_cross_attention():
    torch.manual_seed(0)
    model = Decoder().eval()
    calls = [(states(2, 24), states(2, 24)), (states(3, 9), states(3, 31)), (states(1, 31), states(1, 9))]
    sites = same_after(model, retrofit.DenseConfig(), calls)
    assert [site.kind for site in sites] == ["self", "cross"]
    sparse = retrofit.convert(model, LIMIT, calls[0])
    assert [site.path for site in sparse.converted] == ["attention.attend"]
    assert "cross-attention takes DenseConfig() alone" in sparse.skipped["cross.attend"]


def test_a_mask_grows_with_keys_that_outnumber_the_queries():
    torch.manual_seed(0)
    model = Holder(Attention(True, memory=3)).eval()
    calls = [(states(2, 24),), (states(1, 27),), (states(3, 5),)]
    assert len(same_after(model, retrofit.DenseConfig(), calls)) == 1


def joint(rows: int, tokens: int, words: int) -> tuple[torch.Tensor, ...]:
    return states(rows, tokens), states(rows, words), torch.randn(tokens + words, WIDTH // HEADS)


def test_an_input_is_as_long_as_two_sequences():
    torch.manual_seed(0)
    model = Holder(Joint()).eval()
    calls = [joint(2, 16, 9), joint(1, 20, 4), joint(3, 5, 11)]
    assert len(same_after(model, retrofit.DenseConfig(), calls)) == 1


def test_as_many_tokens_as_channels():
    torch.manual_seed(0)
    model = Decoder().eval()
    calls = [(states(2, WIDTH), states(2, 7)), (states(1, 5), states(1, 9))]
    assert len(same_after(model, retrofit.DenseConfig(), calls)) == 2


class Fixed(nn.Module):
    """Adds something whose shape the graph is made for."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, extra):
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v * len(extra)).transpose(1, 2).flatten(2)


def test_a_size_that_the_graph_is_made_for_is_checked():
    torch.manual_seed(0)
    model = Holder(Fixed()).eval()
    retrofit.convert(model, retrofit.DenseConfig(), (states(2, 24), torch.ones(5)))
    model(states(3, 7), torch.ones(5))
    with pytest.raises(CaptureError, match=r"captured with extra of shape \[5\], got \[6\]"):
        model(states(3, 7), torch.ones(6))
