"""The cache layer: everything that transformers does to a layer takes the state along."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    StaticCache,
)

from retrofit.api import convert
from retrofit.cache import RetrofitHybridLayer, RetrofitLayer, layer_for
from retrofit.configs import HSAConfig, MAHAConfig
from retrofit.errors import CacheError


@dataclass(frozen=True)
class RunningSum:
    """A state that is easily computed anew: the sums of the keys so far."""

    sums: Tensor  # [B, H, N, D]

    def map(self, function: Callable[[Tensor], Tensor]) -> RunningSum:
        return replace(self, sums=function(self.sums))

    def crop(self, start: Tensor, tokens: int) -> RunningSum:
        assert start is not None
        return replace(self, sums=self.sums[:, :, :tokens])


def _pair(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 2, tokens, 4), torch.randn(batch, 2, tokens, 3)


def _step(layer: RetrofitLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k, v = layer.update(k, v)
    layer.start = torch.arange(k.shape[0]) if layer.start is None else layer.start
    layer.state = RunningSum(k.cumsum(2))
    return k, v


def _filled(tokens: int = 9) -> tuple[RetrofitLayer, Tensor, Tensor]:
    layer = RetrofitLayer()
    k, v = _pair(tokens)
    _step(layer, k, v)
    return layer, k, v


def test_appends_like_a_dynamic_layer() -> None:
    ours, theirs = RetrofitLayer(), DynamicLayer()
    for tokens in (5, 1, 1, 300, 1, 7):
        k, v = _pair(tokens)
        for mine, expected in zip(ours.update(k, v), theirs.update(k, v), strict=True):
            assert torch.equal(mine, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)


def test_a_decoded_token_does_not_copy_the_past() -> None:
    layer, _, _ = _filled(100)
    layer.update(*_pair(1))
    before = layer.keys.data_ptr()
    for _ in range(20):
        layer.update(*_pair(1))
    assert layer.keys.data_ptr() == before


def test_the_prompt_is_never_written_to() -> None:
    layer = RetrofitLayer()
    k, v = _pair(6)
    untouched = k.clone()
    layer.update(k, v)
    layer.crop(-3)
    layer.update(*_pair(2))
    assert torch.equal(k, untouched)


@pytest.mark.parametrize("removed", [-1, -4, -8])
def test_continuing_after_a_crop_equals_a_fresh_run(removed: int) -> None:
    layer, k, v = _filled(9)
    layer.start = torch.tensor([0, 2])
    layer.crop(removed)
    more_k, more_v = _pair(5)
    got_k, got_v = _step(layer, more_k, more_v)
    fresh = RetrofitLayer()
    expected_k, expected_v = _step(
        fresh, torch.cat([k[:, :, :removed], more_k], 2), torch.cat([v[:, :, :removed], more_v], 2)
    )
    assert torch.equal(got_k, expected_k)
    assert torch.equal(got_v, expected_v)
    assert torch.equal(layer.state.sums, fresh.state.sums)
    assert layer.start.tolist() == [0, 2]


def test_crop_takes_a_length_to_keep_as_older_versions_pass_it() -> None:
    layer, k, _ = _filled(9)
    layer.crop(4)
    assert torch.equal(layer.keys, k[:, :, :4])
    assert layer.state.sums.shape[2] == 4
    layer.crop(0)
    assert layer.get_seq_length() == 4


def test_crop_of_everything_is_a_reset() -> None:
    layer, _, _ = _filled(9)
    layer.crop(-9)
    assert layer.get_seq_length() == 0
    assert layer.state is None and layer.start is None and not layer.is_initialized


def test_rows_are_reordered_repeated_and_selected_with_their_state() -> None:
    layer, k, v = _filled()
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    rows = [1, 1, 0]
    for tensor, expected in ((layer.keys, k), (layer.values, v), (layer.state.sums, k.cumsum(2))):
        assert torch.equal(tensor, expected[rows])
    assert layer.start.tolist() == rows
    layer.batch_repeat_interleave(2)
    rows = [1, 1, 1, 1, 0, 0]
    assert torch.equal(layer.keys, k[rows])
    assert layer.start.tolist() == rows
    layer.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(layer.state.sums, k.cumsum(2)[[0, 1]])
    assert layer.start.tolist() == [0, 1]
    layer.batch_select_indices(torch.tensor([False, True]))
    assert layer.start.tolist() == [1]
    layer.update(*_pair(1, batch=1))
    assert layer.get_seq_length() == 10


def test_offload_and_prefetch_keep_everything() -> None:
    layer, k, _ = _filled()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, k)
    assert torch.equal(layer.state.sums, k.cumsum(2))
    assert layer.start is not None


def test_a_deep_copy_goes_its_own_way() -> None:
    layer, k, _ = _filled()
    layer.update(*_pair(1))
    twin = copy.deepcopy(layer)
    twin.update(*_pair(3))
    layer.update(*_pair(1))
    assert (layer.get_seq_length(), twin.get_seq_length()) == (11, 13)
    assert torch.equal(layer.keys[:, :, :9], k)
    assert torch.equal(twin.keys[:, :, :10], layer.keys[:, :, :10])
    twin.state.sums.zero_()
    assert layer.state.sums.any()


def test_gradients_go_through_the_cache() -> None:
    layer = RetrofitLayer()
    first = _pair(4)
    layer.update(*first)
    layer.update(*_pair(1))
    k, v = (tensor.requires_grad_() for tensor in _pair(2))
    keys, values = layer.update(k, v)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k))
    assert torch.equal(v.grad, torch.full_like(v, 2))


def test_a_prompt_read_in_inference_mode_can_be_continued_outside_of_it() -> None:
    layer = RetrofitLayer()
    with torch.inference_mode():
        layer.update(*_pair(4))
        layer.update(*_pair(1))
    with torch.no_grad():
        keys, _ = layer.update(*_pair(1))
    assert keys.shape[2] == 6


def test_another_batch_is_refused() -> None:
    layer, _, _ = _filled()
    with pytest.raises(CacheError, match="2 rows"):
        layer.update(*_pair(1, batch=3))


def test_layer_for_replaces_empty_plain_layers() -> None:
    cache = DynamicCache()
    layer = layer_for(cache, 1, "model.layers.1.self_attn")
    assert isinstance(layer, RetrofitLayer)
    assert layer_for(cache, 1, "model.layers.1.self_attn") is layer
    assert type(cache.layers[0]) is DynamicLayer
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert layer_for(both, 0, "decoder") is both.self_attention_cache.layers[0]


def test_layer_for_replaces_empty_sliding_layers(tiny_llama: Callable) -> None:
    from transformers import MistralConfig

    cache = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    layer = layer_for(cache, 0, "a")
    assert cache.is_sliding == [False, True]
    layer.update(*_pair(9))
    assert layer.keys.shape[2] == 9


def test_layer_for_refuses_what_it_does_not_know(tiny_llama: Callable) -> None:
    config = tiny_llama().config
    with pytest.raises(CacheError, match=r"StaticLayer.*RetrofitCache"):
        layer_for(StaticCache(config, max_cache_len=8), 0, "a")
    full = DynamicCache()
    full.update(*_pair(3), 0)
    with pytest.raises(CacheError, match="already holds 3 tokens"):
        layer_for(full, 0, "a")
    with pytest.raises(CacheError, match="needs a transformers Cache, got tuple"):
        layer_for((), 0, "a")


@pytest.mark.parametrize("target", ["hsa", "maha"])
def test_a_row_may_start_after_the_first_chunk(
    tiny_llama: Callable, tiny_hsa: HSAConfig, tiny_maha: MAHAConfig, target: str
) -> None:
    model = tiny_llama()
    convert(model, tiny_hsa if target == "hsa" else tiny_maha)
    ids = torch.randint(2, 128, (3, 200))
    mask = torch.ones_like(ids)
    mask[0, :50] = mask[1, :90] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def step(begin: int, end: int, cache: DynamicCache) -> Tensor:
        return model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
        ).logits

    with torch.no_grad():
        cache = DynamicCache()
        chunked = torch.cat([step(i, min(i + 37, 200), cache) for i in range(0, 200, 37)], dim=1)
        cache.crop(-130)
        again = step(70, 200, cache)
        for row, start in enumerate([50, 90, 0]):
            alone = model(ids[row : row + 1, start:]).logits[0]
            torch.testing.assert_close(chunked[row, start:], alone, rtol=1e-4, atol=1e-5)
            real = again[row, max(start - 70, 0) :]
            torch.testing.assert_close(real, alone[-len(real) :], rtol=1e-4, atol=1e-5)


def test_a_layer_with_linear_states_keeps_them() -> None:
    cache = DynamicCache()
    cache.layer_class_to_replicate = LinearAttentionAndFullAttentionLayer
    cache.layers.append(LinearAttentionAndFullAttentionLayer())
    states = torch.randn(2, 6, 4)
    cache.update_conv_state(states, 0)
    cache.update_recurrent_state(states, 0)
    layer = layer_for(cache, 0, "site")
    assert isinstance(layer, RetrofitHybridLayer)
    assert cache.has_previous_state(0)
    k, _ = _step(layer, *_pair(5))
    assert cache.get_seq_length() == 5
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.conv_states[0], states[[1, 0]])
    assert torch.equal(layer.recurrent_states[0], states[[1, 0]])
    assert torch.equal(layer.keys, k[[1, 0]])
    new = torch.randn(2, 6, 1)
    assert torch.equal(cache.update_conv_state(new, 0), torch.cat([states[[1, 0]], new], dim=-1))
    assert layer_for(cache, 0, "site") is layer
    layer.reset()
    assert layer.keys is None
    assert not cache.has_previous_state(0)
