"""The HSA target: parameters, cached decoding, the account, and training its search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.attention_call import AttentionCall
from retrofit.cache import RetrofitLayer
from retrofit.configs import POOLINGS, HSAConfig
from retrofit.errors import CacheError, ConfigError
from retrofit.targets.hsa import HSAAttention, geometry_of

SHAPE: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "value_dim": 16,
    "scale": 0.25,
    "causal": True,
    "sliding_window": 0,
}


def qkv(tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q = 2 * torch.randn(batch, 4, tokens, 16, dtype=dtype)
    return q, torch.randn(batch, 2, tokens, 16, dtype=dtype), torch.randn(batch, 2, tokens, 16, dtype=dtype)


def call(tokens: int, start: list[int], layer: RetrofitLayer | None = None) -> AttentionCall:
    begin = torch.tensor(start)
    return AttentionCall(start=begin, length=tokens - begin, layer=layer)


@pytest.mark.parametrize("summaries", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_cached_decoding_gives_what_one_forward_gives(
    tiny_hsa: HSAConfig, pooling: str, summaries: bool
) -> None:
    target = HSAAttention(replace(tiny_hsa, pooling=pooling, summaries=summaries), **SHAPE)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
        q, k, v = qkv(260, batch=2)
        whole = target(q, k, v, call(260, [0, 21]))
        layer, parts = RetrofitLayer(), []
        for begin, end in [(0, 150), (150, 233), *((i, i + 1) for i in range(233, 260))]:
            now = [x[:, :, begin:end] for x in (q, k, v)]
            parts.append(target(*now, call(end, [0, 21], layer)))
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-4, atol=1e-5)
        once = RetrofitLayer()
        target(q, k, v, call(260, [0, 21], once))
    assert torch.equal(layer.state.spans, once.state.spans)
    assert torch.equal(layer.state.choices, once.state.choices)
    assert len(once.state.value_nodes) == (target.geometry.levels if summaries else 0)


@pytest.mark.parametrize("pooling", ["attention", "learned"])
def test_learned_pooling_starts_at_the_mean(tiny_hsa: HSAConfig, pooling: str) -> None:
    mean = HSAAttention(tiny_hsa, **SHAPE)
    learned = HSAAttention(replace(tiny_hsa, pooling=pooling, summaries=True), **SHAPE)
    assert not list(mean.parameters())
    assert len(list(learned.parameters())) == 2 * learned.geometry.levels + 1
    q, k, v = qkv(260, dtype=torch.float64)
    learned.double()
    torch.testing.assert_close(
        learned(q, k, v, call(260, [0])), mean(q, k, v, call(260, [0])), rtol=1e-9, atol=1e-9
    )


def test_rows_beyond_the_grid_are_refused(tiny_hsa: HSAConfig) -> None:
    tokens = 2**21 + 1
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16).expand(-1, -1, tokens, -1)
    with pytest.raises(ConfigError, match=r"at most 2,097,152 tokens for HSA, got 2,097,153"):
        HSAAttention(tiny_hsa, **SHAPE)(q, k, k, call(tokens, [0]))


def test_more_leaves_than_a_choice_has_bits_for_are_refused(tiny_hsa: HSAConfig) -> None:
    beam = 262_144 // (tiny_hsa.query_block * tiny_hsa.fanout)
    with pytest.raises(ConfigError, match=r"at most 262,143, got .* lower beam"):
        geometry_of(replace(tiny_hsa, beam=beam))
    assert geometry_of(replace(tiny_hsa, beam=beam // 2)).beam == beam // 2


def test_dense_until_stands_for_all_that_fits(tiny_hsa: HSAConfig) -> None:
    assert geometry_of(tiny_hsa).dense_until == 72
    assert geometry_of(replace(tiny_hsa, query_block=16)).dense_until == 80
    assert geometry_of(replace(tiny_hsa, dense_until=0)).dense_end == 72


@pytest.mark.parametrize(
    ("options", "group", "expected"),
    [
        *(({}, group, size) for group, size in ((1, 128), (2, 64), (3, 32), (4, 32), (16, 32))),
        ({"query_block": 16}, 1, 16),
        ({"beam": 256}, 1, 64),
        ({"fanout": 128}, 1, 64),
        ({"window": 32, "budget": 32}, 1, 64),
    ],
    ids=str,
)
def test_query_blocks_fill_tiles_where_other_sizes_allow_it(
    options: dict[str, int], group: int, expected: int
) -> None:
    geometry = geometry_of(HSAConfig(**options), group)
    assert geometry.query_block == expected
    assert geometry.dense_until % expected == 0
    assert geometry_of(HSAConfig(**options, dense_until=0), group).query_block == expected


def test_candidates_of_the_default_sizes_are_at_most_256() -> None:
    assert all(geometry_of(HSAConfig(), group).leaf_width <= 256 for group in (1, 2, 3, 4))


def test_a_short_sliding_window_stays_dense(tiny_hsa: HSAConfig) -> None:
    q, k, v = qkv(300)
    short = HSAAttention(tiny_hsa, **{**SHAPE, "sliding_window": 72})
    seen: list[Mapping[str, Tensor]] = []
    short.observer = seen.append
    out = short(q, k, v, call(300, [0]))
    t, j = torch.arange(300)[:, None], torch.arange(300)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.25
    weights = scores.masked_fill((j > t) | (j <= t - 72), -torch.inf).softmax(-1)
    torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1), rtol=1e-4, atol=1e-5)
    assert seen[0]["keys"][0, 0, -1] == 72


def test_the_observer_hears_the_cost_of_each_query(tiny_hsa: HSAConfig) -> None:
    target = HSAAttention(tiny_hsa, **SHAPE)
    seen: list[Mapping[str, Tensor]] = []
    target.observer = seen.append
    q, k, v = qkv(300, batch=2)
    layer = RetrofitLayer()
    target(q[:, :, :290], k[:, :, :290], v[:, :, :290], call(290, [0, 21], layer))
    for i in range(290, 300):
        target(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], call(i + 1, [0, 21], layer))
    parts = {name: torch.cat([record[name] for record in seen], dim=-1) for name in seen[0]}
    seen.clear()
    target(q, k, v, call(300, [0, 21]))
    for name, value in seen[0].items():
        assert torch.equal(parts[name], value)
    keys, nodes, valid = (seen[0][name] for name in ("keys", "nodes", "valid"))
    assert valid.sum() == 300 + 279
    assert keys.shape == nodes.shape == (2, 2, 300)
    assert torch.equal(keys[0, 0, :72], torch.arange(1.0, 73.0))
    assert (nodes[0, :, :72] == 0).all() and (nodes[0, :, 72:] > 0).all()
    assert (keys[1, :, :21] == 0).all()
    assert keys[0, :, 200:].max() < 200


@pytest.mark.parametrize("pooling", ["attention", "learned"])
@pytest.mark.parametrize("causal", [True, False])
def test_training_the_pooling_lowers_the_layer_loss(tiny_hsa: HSAConfig, pooling: str, causal: bool) -> None:
    target = HSAAttention(replace(tiny_hsa, pooling=pooling, summaries=True), **{**SHAPE, "causal": causal})
    q, k, v = (x.requires_grad_() for x in qkv(300, batch=2))
    k.data[:, :, ::2] *= 0.1  # the mean hides half of the other keys
    optimizer = torch.optim.Adam(target.key_pooling.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        torch.manual_seed(0)
        loss = target.layer_loss(q, k, v, call(300, [0, 20]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert q.grad is None and k.grad is None and v.grad is None
    assert target.gate is not None and target.gate.grad is None
    assert all(parameter.grad is None for parameter in target.value_pooling)


def test_extreme_values_leave_the_layer_loss_finite(tiny_hsa: HSAConfig) -> None:
    target = HSAAttention(replace(tiny_hsa, pooling="attention"), **SHAPE)
    q, k, v = qkv(300)
    q[:, :, 100:110] = 1e30
    k[:, :, 40:60] = -1e30
    k[:, :, 90] = torch.inf
    loss = target.layer_loss(q, k, v, call(300, [0]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or not p.grad.isnan().any() for p in target.parameters())


def test_short_rows_have_no_layer_loss(tiny_hsa: HSAConfig) -> None:
    target = HSAAttention(replace(tiny_hsa, pooling="learned"), **SHAPE)
    loss = target.layer_loss(*qkv(60), call(60, [0]))
    assert loss == 0 and not loss.requires_grad


def test_pooling_without_parameters_has_nothing_to_train(tiny_hsa: HSAConfig) -> None:
    with pytest.raises(ConfigError, match="pooling='mean' has nothing to train"):
        HSAAttention(tiny_hsa, **SHAPE).layer_loss(*qkv(200), call(200, [0]))


def test_a_cache_filled_by_something_else_is_refused(tiny_hsa: HSAConfig) -> None:
    layer = RetrofitLayer()
    q, k, v = qkv(100)
    layer.update(k[:, :, :99], v[:, :, :99])
    with pytest.raises(CacheError, match="99 tokens"):
        HSAAttention(tiny_hsa, **SHAPE)(q[:, :, 99:], k[:, :, 99:], v[:, :, 99:], call(100, [0], layer))
