"""Two-dimensional masks: what a site reads from them, what it refuses, and sites left dense beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrofit
from retrofit import masks
from retrofit.errors import CacheError, CaptureError, MaskError, ModelLoadError
from retrofit.masks import to_start_length


def _read(mask: Tensor | None, queries: int | None = None, **options: Any) -> list[list[int]]:
    batch, keys = (2, 6) if mask is None else (mask.shape[0], mask.shape[-1])
    start, length = to_start_length(mask, batch, keys, queries or keys, "cpu", **options)
    assert start.dtype == length.dtype == torch.int64
    return [start.tolist(), length.tolist()]


def test_no_mask_is_no_padding() -> None:
    assert _read(None) == [[0, 0], [6, 6]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_on_both_sides(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0], [0] * 6]).to(dtype)
    assert _read(mask) == [[2, 0, 1, 0], [4, 3, 4, 0]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_a_whole_mask_may_be_of_whole_numbers(dtype: torch.dtype) -> None:
    mask = _whole([0, 2], [6, 4], keys=6, queries=6)
    assert _read(mask.to(dtype)) == _read(mask) == [[0, 2], [6, 4]]


def test_holes_are_refused() -> None:
    with pytest.raises(MaskError, match=r"padding between real tokens \(row 1\)"):
        _read(torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]))


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(MaskError, match=r"keys=6\].*covers the cached tokens as well.*got \[2, 4\]"):
        to_start_length(torch.ones(2, 4), 2, 6, 4, "cpu")


def _whole(
    start: list[int], length: list[int], keys: int, queries: int, causal: bool = True, window: int = 0
) -> Tensor:
    q = torch.arange(keys - queries, keys)[:, None]
    k = torch.arange(keys)
    rows = [
        (k >= s) & (k < s + n) & ((k <= q) if causal else True) & ((q - k < window) if window else True)
        for s, n in zip(start, length, strict=True)
    ]
    return torch.stack([row.expand(queries, keys) for row in rows])[:, None]


@pytest.mark.parametrize("queries", [6, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_a_whole_mask_is_read_if_it_says_the_same(queries: int, causal: bool, additive: bool) -> None:
    mask = _whole([0, 3], [6, 3], 6, queries, causal)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert _read(mask, queries, causal=causal) == [[0, 3], [6, 3]]


def test_a_whole_mask_with_a_window() -> None:
    assert _read(_whole([0, 1], [6, 5], 6, 6, window=3), sliding_window=3) == [[0, 1], [6, 5]]
    assert _read(_whole([0], [6], 6, 1, window=3), 1, sliding_window=3) == [[0], [6]]


def test_a_whole_mask_of_another_class_is_refused() -> None:
    causal = _whole([0], [6], 6, 6)
    for other in (
        _whole([0], [6], 6, 6, causal=False),
        _whole([0], [6], 6, 6, window=3),
        causal & (torch.arange(6) // 3 == torch.arange(6)[:, None] // 3),
    ):
        with pytest.raises(MaskError):
            _read(other)
    with pytest.raises(MaskError, match="not bidirectional"):
        _read(causal, causal=False)
    with pytest.raises(MaskError, match="carries a bias"):
        _read(torch.where(causal, 0.5, -torch.inf))


# On models.


class _Seen(nn.Module):
    """Keeps the mask that a module was given."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Any = "never called"

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.mask = kwargs.get("attention_mask")


def _watch(model: nn.Module, path: str) -> _Seen:
    seen = _Seen()
    model.get_submodule(path).register_forward_pre_hook(seen, with_kwargs=True)
    return seen


def _padded(batch: int = 2, tokens: int = 40) -> dict[str, Tensor]:
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, :7] = 0
    return {"input_ids": torch.randint(1, 128, (batch, tokens)), "attention_mask": mask}


@pytest.fixture
def converted(tiny_llama: Callable) -> Any:
    if not _made:
        _made.append(tiny_llama())
        retrofit.convert(_made[0], retrofit.DenseConfig())
    return copy.deepcopy(_made[0])


_made: list[Any] = []


def _close(got: Tensor, expected: Tensor, mask: Tensor) -> None:
    real = mask[:, -got.shape[1] :, None].bool()
    torch.testing.assert_close(got * real, expected * real, atol=1e-5, rtol=1e-4)


def test_a_converted_model_gets_two_dimensions_or_none(converted: Any) -> None:
    seen = _watch(converted, "model.layers.1.self_attn")
    inputs = _padded()
    converted(**inputs)
    assert torch.equal(seen.mask, inputs["attention_mask"].int())
    converted(input_ids=inputs["input_ids"])
    assert seen.mask is None
    converted(input_ids=inputs["input_ids"], attention_mask=torch.ones_like(inputs["attention_mask"]))
    assert seen.mask is None


def test_masks_longer_than_the_queries(tiny_llama: Callable, converted: Any) -> None:
    dense, inputs = tiny_llama(), _padded()
    expected = dense(**inputs).logits
    first = {name: value[:, :33] for name, value in inputs.items()}
    cache = converted(**first, use_cache=True).past_key_values
    rest = converted(
        input_ids=inputs["input_ids"][:, 33:],
        attention_mask=inputs["attention_mask"],
        position_ids=torch.arange(33, 40)[None],
        past_key_values=cache,
    )
    _close(rest.logits, expected[:, 33:], inputs["attention_mask"])
    with pytest.raises(MaskError, match="41 columns, one for each token, the cached ones included, got 1"):
        converted(
            input_ids=inputs["input_ids"][:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache
        )


def test_a_mask_that_hides_cached_tokens_later_is_refused(converted: Any) -> None:
    inputs = _padded()
    cache = converted(**inputs, use_cache=True).past_key_values
    token, position = inputs["input_ids"][:, :1], torch.tensor([[40]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    mask[1, :12] = 0
    with pytest.raises(MaskError, match=r"a row \(1\) that began at 0 and now begins at 12"):
        converted(token, attention_mask=mask, position_ids=position, past_key_values=cache)


def test_packed_sequences_are_refused(converted: Any) -> None:
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with pytest.raises(MaskError, match="packed sequences"):
        converted(input_ids=torch.randint(1, 128, (1, 20)), position_ids=positions, use_cache=False)
    converted(
        input_ids=torch.randint(1, 128, (1, 20)), position_ids=torch.arange(5, 25)[None], use_cache=False
    )


def test_a_static_cache_is_named(converted: Any) -> None:
    from transformers import StaticCache

    cache = StaticCache(config=converted.config, max_cache_len=64)
    ids = torch.ones(1, 40, dtype=torch.int64)
    with pytest.raises(MaskError, match=r"64 columns.*got 40; if the cache is static, pass RetrofitCache"):
        converted(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    with pytest.raises(CacheError, match=r"leave past_key_values and cache_implementation out"):
        converted.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_an_empty_batch_is_refused(converted: Any) -> None:
    with pytest.raises(CaptureError, match=r"layers.0.self_attn needs at least one row.*\[0, 40, 64\]"):
        converted(torch.ones(0, 40, dtype=torch.int64))


def test_a_whole_mask_from_the_user(tiny_llama: Callable, converted: Any) -> None:
    inputs = _padded()
    mask = _whole([7, 0], [33, 40], 40, 40)
    got = converted(input_ids=inputs["input_ids"], attention_mask=mask).logits
    _close(got, tiny_llama()(**inputs).logits, inputs["attention_mask"])
    with pytest.raises(MaskError, match="not causal"):
        converted(input_ids=inputs["input_ids"], attention_mask=torch.ones_like(mask))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_sites_left_dense_get_their_own_mask(tiny_llama: Callable, implementation: str) -> None:
    dense = tiny_llama(attn_implementation=implementation)
    model = copy.deepcopy(dense)
    retrofit.convert(model, retrofit.DenseConfig(), where="model.layers.1.*")
    inputs = _padded()
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        mask = given.get("attention_mask", torch.ones(2, 40))
        _close(model(**given).logits, dense(**given).logits, mask)
    seen = _watch(model, "model.layers.1.self_attn")
    generated = [
        each.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0) for each in (dense, model)
    ]
    assert torch.equal(*generated)
    assert seen.mask.dim() == 2
    twin = copy.deepcopy(model)
    retrofit.revert(model)
    _close(twin(**inputs).logits, dense(**inputs).logits, inputs["attention_mask"])
    retrofit.revert(twin)
    assert twin.model.layers[0].self_attn.config is twin.config
    assert torch.equal(twin(**inputs).logits, dense(**inputs).logits)


def test_revert_restores_the_setting(tiny_llama: Callable) -> None:
    model = tiny_llama()
    before = model(**_padded()).logits.shape, model.config.to_dict(), model.config._attn_implementation
    for where in ("*", "model.layers.0.*"):
        retrofit.convert(model, retrofit.DenseConfig(), where=where)
        assert model.config._attn_implementation != "sdpa"
        retrofit.revert(model)
        assert model.config._attn_implementation == "sdpa"
        assert model.config.to_dict() == before[1]
        attention = model.model.layers[1].self_attn
        assert attention.config is model.config
        assert not attention._forward_pre_hooks
        assert not [name for name in vars(attention) if name.startswith("_retrofit")]


@pytest.mark.parametrize("where", ["*", "model.layers.0.*"])
def test_sliding_windows(where: str) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    dense = MistralForCausalLM(
        MistralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=128,
            sliding_window=9,
        )
    ).eval()
    model = copy.deepcopy(dense)
    retrofit.convert(model, retrofit.DenseConfig(), where=where)
    inputs = _padded()
    _close(model(**inputs).logits, dense(**inputs).logits, inputs["attention_mask"])
    generated = [
        each.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0) for each in (dense, model)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("where", ["*", "encoder.layer.0.*"])
def test_encoders(where: str) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    dense = BertModel(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=128
        )
    ).eval()
    model = copy.deepcopy(dense)
    retrofit.convert(model, retrofit.DenseConfig(), where=where)
    inputs = _padded()
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        mask = given.get("attention_mask", torch.ones(2, 40))
        _close(model(**given).last_hidden_state, dense(**given).last_hidden_state, mask)


def test_an_unconverted_model_with_the_setting_says_so(converted: Any) -> None:
    stranger = type(converted)(copy.deepcopy(converted.config))
    with pytest.raises(ModelLoadError, match=r"LlamaAttention.*not converted.*retrofit\.from_pretrained"):
        stranger(input_ids=torch.randint(1, 128, (1, 5)))


def test_registering_twice_changes_nothing() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    masks.register()
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping)
    masks.register()
    after = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    assert before.keys() == after.keys()
    assert before["sdpa"] is after["sdpa"]


def test_a_plain_causal_mask_reads_nothing_from_the_device() -> None:
    from transformers.masking_utils import causal_mask_function

    sizes: dict[str, Any] = {"batch_size": 2, "q_length": 1, "kv_length": 9, "q_offset": 8, "device": "meta"}
    assert masks._make(**sizes, mask_function=causal_mask_function) is None
    with pytest.raises(RuntimeError):
        masks._make(**sizes, mask_function=lambda *at: causal_mask_function(*at))


def test_compiled_models_check_packing_when_they_run(converted: Any) -> None:
    compiled = torch.compile(converted.model, backend="eager")
    ids = torch.randint(1, 128, (1, 20))
    torch.testing.assert_close(
        compiled(ids, use_cache=False).last_hidden_state,
        converted.model(ids, use_cache=False).last_hidden_state,
    )
    with pytest.raises(RuntimeError, match="packed sequences"):
        compiled(ids, position_ids=torch.arange(20)[None] % 11, use_cache=False)


SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def test_attention_left_dense_may_keep_no_configuration() -> None:
    from transformers import MvpConfig, MvpForConditionalGeneration

    torch.manual_seed(0)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIDE.items()}
    model = MvpForConditionalGeneration(MvpConfig(vocab_size=64, d_model=32, use_cache=True, **sizes)).eval()
    ids = torch.randint(5, 60, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :7]}
    with torch.no_grad():
        before = model(**inputs).logits
        report = retrofit.convert(model, retrofit.DenseConfig(), kind="encoder")
        after = model(**inputs).logits
    assert len(report.converted) == SIDE["layers"]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    retrofit.revert(model)
    assert "config" not in vars(model.model.decoder.layers[0].self_attn)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_attention_left_dense_may_hand_its_mask_to_a_child() -> None:
    package = pytest.importorskip("transformers.models.dots3_note")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    widths = {"head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = package.Dots3NoteTextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["indexed_attention", "sliding_attention"],
        mlp_layer_types=["dense", "dense"],
        sliding_window=9,
        index_topk=8,
        index_head_dim=16,
        index_n_heads=2,
        qk_rope_head_dim=8,
        pad_token_id=0,
        **heads,
        **widths,
        **{f"swa_{name}": size for name, size in {**heads, **widths}.items()},
    )
    dense = package.Dots3NoteForCausalLM(config).eval()
    model = copy.deepcopy(dense)
    report = retrofit.convert(model, retrofit.DenseConfig())
    assert [site.path for site in report.converted] == ["model.layers.1.self_attn"]
    inputs = _padded()
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        mask = given.get("attention_mask", torch.ones(2, 40))
        _close(model(**given).logits, dense(**given).logits, mask)
    retrofit.revert(model)
    assert torch.equal(model(**inputs).logits, dense(**inputs).logits)


class Sampled(nn.Module):
    """Takes a mask that no attention has, as attention at sampled points does."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        assert attention_mask.shape == hidden_states.shape[:2]
        return hidden_states * attention_mask[..., None]


class Masks(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.sampled = norm, Sampled()

    def forward(self, hidden_states: Tensor) -> Tensor:
        mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool)
        mask[0, -3:] = False
        return self.sampled(self.norm(hidden_states), attention_mask=mask)


def test_masks_that_a_model_makes_for_other_things_stay_as_they_are(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.model.norm = Masks(model.model.norm)
    inputs = _padded()
    expected = model(**inputs).logits
    assert len(retrofit.convert(model, retrofit.DenseConfig()).converted) == 2
    _close(model(**inputs).logits, expected, inputs["attention_mask"])
    retrofit.revert(model)
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("where", ["*", "*cross_attention*", "*self_attends*"])
def test_masks_of_latents_that_attend_to_tokens(where: str) -> None:
    from transformers import PerceiverConfig, PerceiverForMaskedLM

    torch.manual_seed(0)
    sizes = {"d_latents": 32, "d_model": 32, "num_latents": 8, "num_self_attends_per_block": 1}
    config = PerceiverConfig(**sizes, num_blocks=1, vocab_size=64, max_position_embeddings=24)
    model = PerceiverForMaskedLM(config).eval()
    ids, mask = torch.randint(8, 64, (3, 24)), torch.ones(3, 24, dtype=torch.int64)
    mask[1, 17:] = 0
    texts = [{"inputs": ids}, {"inputs": ids, "attention_mask": mask}]
    with torch.no_grad():
        before = [model(**text).logits for text in texts]
        for example in texts:
            report = retrofit.convert(model, retrofit.DenseConfig(), example, where=where)
            assert len(report.converted) == {"*": 3, "*cross_attention*": 2, "*self_attends*": 1}[where]
            for text, expected in list(zip(texts, before, strict=True))[: 1 + ("attention_mask" in example)]:
                torch.testing.assert_close(model(**text).logits, expected, atol=1e-5, rtol=0)
            retrofit.revert(model)
        assert all(
            torch.equal(model(**text).logits, expected) for text, expected in zip(texts, before, strict=True)
        )


def test_a_window_that_a_module_left_dense_does_not_know_is_named(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    masks._keep_dense(attention, model.config)
    mask = torch.ones(2, 7, dtype=masks.KINDS["sliding"])
    with pytest.raises(MaskError, match="a sliding window, which its LlamaConfig does not know"):
        attention(torch.randn(2, 7, model.config.hidden_size), attention_mask=mask)
