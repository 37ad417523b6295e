import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from retrofit.attention_call import AttentionCall
from retrofit.cache import RetrofitLayer
from retrofit.configs import MAHAConfig
from retrofit.errors import CacheError, ConfigError
from retrofit.kernels.dense.ops import dense_attention
from retrofit.kernels.maha.account import mean_keys
from retrofit.targets.maha import EFFICIENT, MAHAAttention, bands_of


def make(config, causal=True, heads=4, kv_heads=2, dim=8, sliding_window=0, **options):
    return MAHAAttention(
        config,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        value_dim=dim,
        scale=dim**-0.5,
        causal=causal,
        sliding_window=sliding_window,
        **options,
    )


def stir(target):
    """Parameters as after training, all of them in use."""
    with torch.no_grad():
        for parameter in target.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return target


def inputs(batch, tokens, heads=4, kv_heads=2, dim=8):
    return tuple(torch.randn(batch, h, tokens, dim) for h in (heads, kv_heads, kv_heads))


def whole(batch, tokens, layer=None):
    return AttentionCall(torch.zeros(batch, dtype=torch.int64), torch.full((batch,), tokens), layer)


VARIANTS = [
    {},
    {"downsampling": "max"},
    {"downsampling": "mean", "regularizer": "euclidean"},
    {"aggregation": "nash"},
    {"dilated_branch": True},
    {"last_width": 24},
]


def test_parameters_start_neutral(tiny_maha):
    q, k, v = inputs(2, 150)
    learned = make(replace(tiny_maha, dilated_branch=True))
    mean = make(replace(tiny_maha, downsampling="mean"))
    torch.testing.assert_close(learned(q, k, v, whole(2, 150)), mean(q, k, v, whole(2, 150)))
    names = {name for name, _ in learned.named_parameters()}
    assert {"offsets", "branch", "branch_gate", "key_weights.0", "value_weights.2"} <= names


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_chunks_equal_one_forward(tiny_maha, variant):
    target = stir(make(replace(tiny_maha, **variant)))
    q, k, v = inputs(2, 130)
    start, length = torch.tensor([0, 11]), torch.tensor([130, 119])
    expected = target(q, k, v, AttentionCall(start, length))
    layer, seen, parts = RetrofitLayer(), 0, []
    for chunk in (40, 1, 1, 37, 50, 1):
        call = AttentionCall(start, (seen + chunk - start).clamp(min=0), layer)
        parts.append(target(*(x[:, :, seen : seen + chunk] for x in (q, k, v)), call))
        seen += chunk
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=1e-4, atol=1e-5)
    assert not expected[1, :, :11].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cropped_state_is_that_of_the_shorter_row(tiny_maha, variant):
    target = stir(make(replace(tiny_maha, **variant)))
    q, k, v = inputs(2, 120)
    start = torch.tensor([0, 5])
    layer = RetrofitLayer()
    target(q, k, v, AttentionCall(start, 120 - start, layer))
    layer.start = start
    layer.crop(83)
    short = RetrofitLayer()
    target(*(x[:, :, :83] for x in (q, k, v)), AttentionCall(start, 83 - start, short))
    for one, other in zip(
        layer.state.keys + layer.state.values, short.state.keys + short.state.values, strict=True
    ):
        assert torch.equal(one[:1], other[:1])
        assert one.shape == other.shape
    new = [torch.randn(2, x.shape[1], 4, 8) for x in (q, k, v)]
    outs = [target(*new, AttentionCall(start, 87 - start, one)) for one in (layer, short)]
    assert torch.equal(*outs)


def test_state_follows_map(tiny_maha):
    q, k, v = inputs(3, 60)
    layer = RetrofitLayer()
    make(tiny_maha)(q, k, v, whole(3, 60, layer))
    picked = layer.state.map(lambda x: x[[2, 0]])
    assert torch.equal(picked.keys[1], layer.state.keys[1][[2, 0]])


def test_causal_branch_sees_no_later_token(tiny_maha):
    target = stir(make(replace(tiny_maha, dilated_branch=True)))
    q, k, v = inputs(1, 100)
    before = target(q, k, v, whole(1, 100))
    v[:, :, 70:] = 5
    after = target(q, k, v, whole(1, 100))
    assert torch.equal(before[:, :, :70], after[:, :, :70])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("variant", [*VARIANTS[:5], {"mode": "paper"}])
def test_layer_loss_trains_the_targets_own_parameters(tiny_maha, variant):
    config = replace(tiny_maha, **variant)
    target = make(config, causal=config.mode == "causal")
    q, k, v = (x.requires_grad_() for x in inputs(1, 160))
    call = whole(1, 160)
    optimizer = torch.optim.Adam(target.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = target.layer_loss(q, k, v, call)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert q.grad is None and k.grad is None and v.grad is None
    own = dict(target.named_parameters())
    unmoved = {"branch"} if config.dilated_branch else set()
    for name in own.keys() - unmoved:
        assert own[name].grad is not None and own[name].grad.any(), name


def test_observer_counts_what_is_attended(tiny_maha):
    seen = []
    target = make(tiny_maha)
    target.observer = seen.append
    start, length = torch.tensor([0, 30]), torch.tensor([100, 60])
    target(*inputs(2, 100), AttentionCall(start, length))
    (counts,) = seen
    assert counts["keys"].shape == counts["nodes"].shape == (2, 2, 100)
    assert counts["valid"].sum(1).tolist() == [100, 60]
    assert counts["keys"][1, 0, 30:90].tolist() == counts["keys"][0, 0, :60].tolist()
    assert not counts["keys"][1, :, :30].any()
    assert counts["keys"][0, 0, :32].tolist() == list(range(1, 33))
    assert counts["keys"][0, 0, 99] < 100


def test_81_percent_fewer_flops_than_dense_at_4096():
    q, k, v = inputs(1, 4096, heads=2, kv_heads=1, dim=4)
    call = whole(1, 4096)
    assert (EFFICIENT.scales, EFFICIENT.ratio, EFFICIENT.sink) == (4, 2, 8)
    counts = []
    for run in (
        lambda: make(EFFICIENT, heads=2, kv_heads=1, dim=4)(q, k, v, call),
        lambda: dense_attention(q, k, v, call.start, call.length, scale=0.5, causal=True),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * 4 * 4 * 4096 * 4097 // 2
    assert counts[0] <= 0.19 * counts[1]


def test_balanced_attends_to_at_most_800_keys_at_4096():
    assert mean_keys(bands_of(MAHAConfig()), 4096) <= 800


@pytest.mark.parametrize("variant", [{}, {"downsampling": "max"}, {"aggregation": "nash"}])
def test_paper_mode_is_inert_to_padding_and_mixes_scales(tiny_maha, variant):
    target = stir(make(replace(tiny_maha, mode="paper", **variant), causal=False))
    q, k, v = inputs(1, 61)
    alone = target(q, k, v, whole(1, 61))
    padded = [torch.randn(2, x.shape[1], 90, 8) for x in (q, k, v)]
    for x, own in zip(padded, (q, k, v), strict=True):
        x[:1, :, 13:74] = own
    out = target(*padded, AttentionCall(torch.tensor([13, 0]), torch.tensor([61, 90])))
    torch.testing.assert_close(out[:1, :, 13:74], alone, rtol=1e-4, atol=1e-5)
    assert not out[0, :, :13].any() and not out[0, :, 74:].any()
    assert out.isfinite().all()


def test_paper_mode_is_the_published_formula():
    config = MAHAConfig(scales=2, ratio=2, widths=(8,), sink=0, mode="paper")
    target = stir(make(config, causal=False))
    q, k, v = inputs(1, 20)
    outs = [scaled_dot_product_attention(q, k, v, enable_gqa=True)]
    pooled = [
        torch.nn.functional.conv1d(
            x.transpose(2, 3).flatten(1, 2),
            w.flatten(0, 1)[:, None],
            stride=2,
            padding=1,
            groups=x.shape[1] * 8,
        )
        .unflatten(1, (x.shape[1], 8))
        .transpose(2, 3)
        for x, w in zip(
            (q, k, v), (target.query_weights[0], target.key_weights[0], target.value_weights[0]), strict=True
        )
    ]
    outs.append(scaled_dot_product_attention(*pooled, enable_gqa=True).repeat_interleave(2, 2))
    weights = target.offsets.softmax(1)
    expected = sum(weights[:, i, None, None] * out for i, out in enumerate(outs))
    torch.testing.assert_close(target(q, k, v, whole(1, 20)), expected, rtol=1e-4, atol=1e-5)


def test_a_narrow_sliding_window_stays_dense(tiny_maha):
    q, k, v = inputs(1, 100)
    target = make(tiny_maha, sliding_window=30)
    call = whole(1, 100)
    expected = dense_attention(
        q, k, v, call.start, call.length, scale=8**-0.5, causal=True, sliding_window=30
    )
    assert torch.equal(target(q, k, v, call), expected)


def test_what_cannot_be_served_is_refused(tiny_maha):
    with pytest.raises(ConfigError, match='use mode="causal"'):
        make(replace(tiny_maha, mode="paper"))
    with pytest.raises(ConfigError, match='use mode="paper"'):
        make(tiny_maha, causal=False)
    with pytest.raises(ConfigError, match="sliding_window must be at most"):
        make(tiny_maha, sliding_window=1000)
    layer = RetrofitLayer()
    q, k, v = inputs(1, 9)
    layer.update(k, v)
    with pytest.raises(CacheError, match="not this site's cells"):
        make(tiny_maha)(q, k, v, whole(1, 18, layer))


def test_copies_are_independent(tiny_maha):
    target = make(tiny_maha)
    other = copy.deepcopy(target)
    stir(other)
    assert not target.offsets.any()
