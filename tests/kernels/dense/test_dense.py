from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retrofit.errors import ConfigError
from retrofit.kernels.dense import reference
from retrofit.kernels.dense.ops import dense_attention
from retrofit.kernels.dense.scores import ScoreRules


def _inputs(tokens, slots, start, length, *, heads=4, kv_heads=2, dim=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    batch = len(start)
    q = torch.randn(batch, heads, tokens, dim, dtype=dtype)
    k = torch.randn(batch, kv_heads, slots, dim, dtype=dtype)
    v = torch.randn(batch, kv_heads, slots, dim + 4, dtype=dtype)
    return q, k, v, torch.tensor(start), torch.tensor(length)


CASES = [
    # tokens, slots, start, length, causal, window
    (1, 1, [0, 0], [1, 1], True, 0),
    (63, 63, [0, 0], [63, 63], True, 0),
    (65, 65, [0, 0], [65, 65], False, 0),
    (65, 65, [7, 0], [58, 65], True, 0),
    (65, 65, [0, 0], [65, 40], False, 0),
    (65, 65, [0, 5], [40, 60], True, 0),
    (1, 65, [7, 0], [58, 65], True, 0),
    (9, 65, [60, 0], [5, 65], True, 0),
    (9, 65, [0, 0], [65, 65], True, 0),
    (65, 65, [7, 0], [58, 65], True, 10),
    (65, 65, [0, 0], [65, 65], True, 10),
    (1, 65, [7, 0], [58, 65], True, 10),
    (1000, 1000, [0], [1000], True, 300),
    (600, 1000, [0], [1000], True, 0),
]


@pytest.mark.parametrize(("tokens", "slots", "start", "length", "causal", "window"), CASES)
def test_blocked_equals_the_definition(tokens, slots, start, length, causal, window):
    q, k, v, s, n = _inputs(tokens, slots, start, length)
    options = {"scale": 0.3, "causal": causal, "sliding_window": window}
    exact = reference.dense_attention(q.double(), k.double(), v.double(), s, n, **options)
    for implementation in ("reference", "blocked"):
        out = dense_attention(q, k, v, s, n, **options, implementation=implementation)
        assert (out - exact).norm() <= 1e-6 * exact.norm() + 1e-30


@pytest.mark.parametrize(("tokens", "slots", "start", "length", "causal", "window"), CASES[:10])
def test_gradients_equal_those_of_the_definition(tokens, slots, start, length, causal, window):
    q, k, v, s, n = _inputs(tokens, slots, start, length, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    options = {"scale": 0.3, "causal": causal, "sliding_window": window}
    exact = reference.dense_attention(q, k, v, s, n, **options)
    weight = torch.randn_like(exact)
    expected = torch.autograd.grad((exact * weight).sum(), inputs)
    out = dense_attention(q, k, v, s, n, **options)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_padding_is_inert_and_gives_zeros():
    q, k, v, s, n = _inputs(20, 20, [6, 0], [14, 20])
    for x in (q, k, v):
        x[0, :, :6] = float("nan")
    out = dense_attention(q, k, v, s, n, scale=0.3, causal=True)
    assert torch.equal(out[0, :, :6], torch.zeros_like(out[0, :, :6]))
    alone = dense_attention(q[:1, :, 6:], k[:1, :, 6:], v[:1, :, 6:], s[1:], n[:1], scale=0.3, causal=True)
    torch.testing.assert_close(out[:1, :, 6:], alone)


RULES = [(2.0, False), (0.0, True), (1.5, True)]


@pytest.mark.parametrize(("softcap", "has_sinks"), RULES)
@pytest.mark.parametrize(("tokens", "slots", "start", "length", "causal", "window"), CASES[:10])
def test_a_softcap_and_sinks_follow_their_formulas(
    tokens, slots, start, length, causal, window, softcap, has_sinks
):
    q, k, v, s, n = _inputs(tokens, slots, start, length, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None
    inputs = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
    scores = 0.3 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    seen = reference.visible(tokens, slots, s, n, causal=causal, sliding_window=window)[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    column = torch.full_like(scores[..., :1], -1e300)
    if has_sinks:
        column = column + 1e300 + sinks[:, None, None]
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1].masked_fill(~seen, 0.0)
    expected = weights @ v.repeat_interleave(2, 1)
    weight = torch.randn_like(expected)
    slopes = torch.autograd.grad((expected * weight).sum(), inputs)
    for implementation in ("reference", "blocked"):
        out = dense_attention(
            q,
            k,
            v,
            s,
            n,
            scale=0.3,
            causal=causal,
            sliding_window=window,
            rules=ScoreRules(softcap, sinks),
            implementation=implementation,
        )
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
        got = torch.autograd.grad((out * weight).sum(), inputs)
        for a, b in zip(got, slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(0.0, False), (1.5, True)])
def test_opcheck(implementation, softcap, has_sinks):
    q, k, v, s, n = _inputs(9, 17, [3, 0], [14, 17])
    sinks = torch.randn(4, requires_grad=True) if has_sinks else None
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(
        torch.ops.retrofit.dense_attention.default,
        (q, k, v, s, n, sinks),
        {
            "scale": 0.3,
            "softcap": softcap,
            "causal": True,
            "sliding_window": 0,
            "implementation": implementation,
        },
    )


@pytest.mark.parametrize(("tokens", "slots", "start", "length", "causal", "window"), CASES)
def test_flops_count_the_visible_pairs(tokens, slots, start, length, causal, window):
    q, k, v, s, n = _inputs(tokens, slots, start, length)
    pairs = int(reference.visible(tokens, slots, s, n, causal=causal, sliding_window=window).sum())
    with FlopCounterMode(display=False) as counter:
        dense_attention(q, k, v, s, n, scale=1.0, causal=causal, sliding_window=window)
    assert counter.get_total_flops() == 2 * 4 * pairs * (8 + 12)


def test_wrong_options_are_named():
    q, k, v, s, n = _inputs(4, 4, [0], [4])
    with pytest.raises(ConfigError, match="implementation must be one of"):
        dense_attention(q, k, v, s, n, scale=1.0, causal=True, implementation="tritn")
    with pytest.raises(ConfigError, match="needs causal"):
        dense_attention(q, k, v, s, n, scale=1.0, causal=False, sliding_window=3)
