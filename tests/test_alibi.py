"""A bias in proportion to the distance: carried over exactly, by every target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import retrofit
from retrofit.configs import DenseConfig, HSAConfig, MAHAConfig
from retrofit.errors import ConfigError, NoAttentionFound
from retrofit.positions import COLUMNS, slope_columns, with_positions

IDS = torch.randint(4, 128, (2, 70), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :9] = 0
WHOLE_HSA = HSAConfig(
    window=16, sink=8, budget=4096, block=8, node=2, fanout=4, nodes_per_span=8, query_block=8, dense_until=0
)
WHOLE_MAHA = MAHAConfig(scales=2, ratio=2, widths=(4096,), sink=8)


def build(name: str, **options: Any) -> Any:
    from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

    torch.manual_seed(0)
    if name == "bloom":  # six heads have slopes that are no powers of two
        own = {
            "hidden_size": 48,
            "n_layer": 2,
            "n_head": 6,
            "vocab_size": 128,
            "pad_token_id": 3,
            "eos_token_id": None,
        }
        model: Any = BloomForCausalLM(BloomConfig(**own, **options))
    else:
        own = {"d_model": 48, "n_heads": 6, "n_layers": 2, "vocab_size": 128, "max_seq_len": 256}
        model = MptForCausalLM(MptConfig(**own, **options))
    for parameter in model.parameters():  # attention that differs from token to token
        parameter.data *= 3
    return model.eval()


def generated(model: Any) -> Tensor:
    return model.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("config", [DenseConfig(), WHOLE_HSA, WHOLE_MAHA], ids=lambda config: config.target)
@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_models_with_alibi_are_converted_in_full(name: str, config: Any) -> None:
    model = build(name)
    with torch.no_grad():
        before, short = model(IDS, attention_mask=MASK).logits, model(IDS[:1, :7]).logits
        tokens = generated(model)
        report = retrofit.convert(model, config)
        assert [site.mask for site in report.converted] == ["causal+padding+ALiBi"] * 2
        assert not report.skipped
        after = model(IDS, attention_mask=MASK).logits
        for got, expected in ((after[MASK.bool()], before[MASK.bool()]), (model(IDS[:1, :7]).logits, short)):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert torch.equal(generated(model), tokens)
        retrofit.revert(model)
        assert torch.equal(model(IDS, attention_mask=MASK).logits, before)


def test_a_small_budget_leaves_keys_out_and_stays_causal(tiny_hsa: HSAConfig) -> None:
    model, ids = build("bloom"), IDS.repeat(1, 3)
    with torch.no_grad():
        dense = model(ids).logits
        retrofit.convert(model, tiny_hsa)
        found = model(ids).logits
        assert not torch.allclose(found[:, 120:], dense[:, 120:], rtol=1e-3)
        changed = torch.cat([ids[:, :150], ids[:, 150:].flip(1)], dim=1)
        assert torch.equal(model(changed).logits[:, :150], found[:, :150])


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_cached_steps_and_padding_change_nothing(name: str, tiny_hsa: HSAConfig) -> None:
    model, ids = build(name), IDS.repeat(1, 3)
    retrofit.convert(model, tiny_hsa)
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = None, []
        for part in ids.split([150, 41, 1, 1, 17], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
        padded, mask = (
            torch.cat([IDS[:, :13], ids], dim=1),
            torch.ones(2, 13 + ids.shape[1], dtype=torch.int64),
        )
        mask[:, :13] = 0
        alone = model(padded, attention_mask=mask).logits[:, 13:]
        torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-4)


def test_a_saved_model_comes_back(tmp_path: Any, tiny_hsa: HSAConfig) -> None:
    model = build("mpt")
    retrofit.convert(model, tiny_hsa)
    expected = model(IDS, attention_mask=MASK).logits
    retrofit.save_pretrained(model, tmp_path / "model")
    loaded: Any = retrofit.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(IDS, attention_mask=MASK).logits, expected)


def test_precision(tmp_path: Any) -> None:
    model = build("bloom").to(torch.bfloat16)
    with pytest.raises(NoAttentionFound, match=r"rounded to torch.bfloat16; convert the model in float32"):
        retrofit.convert(model, DenseConfig())
    whole = build("bloom")
    expected = whole(IDS).logits
    retrofit.convert(whole, DenseConfig())
    error = (whole.to(torch.bfloat16)(IDS).logits.float() - expected).norm() / expected.norm()
    original = (model(IDS).logits.float() - expected).norm() / expected.norm()
    assert error < 1.2 * original


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_are_exact(dtype: torch.dtype) -> None:
    slopes, scale, past = (0.5, 0.35355338, 0.0039), 0.125, 40_000
    q, k = torch.zeros(1, 3, 5, 4, dtype=dtype), torch.zeros(1, 1, 5, 4, dtype=dtype)
    start = torch.tensor([17])
    wide_q, wide_k = with_positions(q, k, slope_columns(slopes, 3, scale), start, past, "attn")
    assert wide_q.shape[3] == wide_k.shape[3] == 4 + COLUMNS
    scores = wide_q.double() @ wide_k.double().transpose(2, 3) * scale
    position = torch.arange(past, past + 5).double() - 17
    expected = torch.tensor(slopes, dtype=torch.float64).view(3, 1, 1) * position
    # Small parts of a slope reach the end of what float16 holds.
    torch.testing.assert_close(scores, expected.expand_as(scores[0])[None], rtol=3e-7, atol=0.0)


def test_too_many_positions_for_a_low_precision() -> None:
    x = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    with pytest.raises(
        ConfigError, match="holds for 65,536 tokens at most, got 70,001; run the model in float32"
    ):
        with_positions(x, x, slope_columns((1.0,), 1, 1.0), torch.tensor([0]), 70_000, "attn")


def test_export_refuses_it(tmp_path: Any) -> None:
    model = build("bloom")
    retrofit.convert(model, DenseConfig())
    with pytest.raises(retrofit.errors.ExportError, match="a bias by distance"):
        retrofit.export_onnx(model, tmp_path / "model.onnx")
