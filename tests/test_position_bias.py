"""Learned relative positions of transformers' models: carried by DenseConfig, cached steps and padding included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import retrofit
from retrofit.configs import DenseConfig, HSAConfig
from retrofit.errors import CaptureError, NoAttentionFound

SIZES: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 128,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip


def build(name: str, attention: str = "sdpa") -> Any:
    from transformers import (
        MPNetConfig,
        MPNetModel,
        T5Config,
        T5ForConditionalGeneration,
        UMT5Config,
        UMT5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    own: dict[str, Any] = {"attn_implementation": attention}
    if name == "mpnet":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        model: Any = MPNetModel(MPNetConfig(**sizes, vocab_size=128))
    elif name == "t5":
        config: Any = T5Config(**SIZES, decoder_start_token_id=0, eos_token_id=None, **own)
        model = T5ForConditionalGeneration(config)
    else:  # every layer has a table of its own
        config = UMT5Config(**SIZES, decoder_start_token_id=0, eos_token_id=None, **own)
        model = UMT5ForConditionalGeneration(config)
    for parameter in model.parameters():  # attention that differs from token to token
        parameter.data *= 3
    return model.eval()


def text(rows: int, tokens: int, padded: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids, mask = torch.randint(4, 128, (rows, tokens), generator=generator), torch.ones(rows, tokens).long()
    mask[0, tokens - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, given: dict[str, Tensor], beams: int = 1) -> Tensor:
    return model.generate(**given, max_new_tokens=30, do_sample=False, num_beams=beams)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_an_encoder_decoder_is_converted_in_full(name: str, attention: str) -> None:
    model = build(name, attention).double()  # its scores are large, and so is the rounding of float32
    texts = [(text(2, 17, 5), 9), (text(1, 60), 1), (text(5, 3), 33)]
    with torch.no_grad():
        before = [
            model(**x, decoder_input_ids=text(len(x["input_ids"]), n)["input_ids"]).logits for x, n in texts
        ]
        tokens = [generated(model, texts[0][0], beams) for beams in (1, 3)]
        report = retrofit.convert(model, DenseConfig())
        assert report.coverage == 1.0
        assert report.verification.decode is not None
        assert {site.mask for site in report.converted if site.kind == "self"} == {
            "key padding+position bias",
            "causal+padding+position bias",
        }
        for (x, n), expected in zip(texts, before, strict=True):
            got = model(**x, decoder_input_ids=text(len(x["input_ids"]), n)["input_ids"]).logits
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert all(
            torch.equal(generated(model, texts[0][0], n), x) for n, x in zip((1, 3), tokens, strict=True)
        )
        retrofit.revert(model)
        again = [
            model(**x, decoder_input_ids=text(len(x["input_ids"]), n)["input_ids"]).logits for x, n in texts
        ]
        assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))


def test_a_step_computes_the_bias_of_its_own_tokens_alone() -> None:
    model = build("t5")
    retrofit.convert(model, DenseConfig())
    site = model.decoder.block[0].layer[0].SelfAttention
    sizes = []
    site.relative_attention_bias.register_forward_hook(lambda _, args, out: sizes.append(tuple(out.shape)))
    generated(model, text(2, 17))
    assert sizes[:2] == [(1, 1, 4), (1, 1, 4)]
    assert sizes[-1] == (1, 30, 4)
    assert (30, 30, 4) not in sizes


def test_an_encoder_that_is_handed_its_bias() -> None:
    model, x = build("mpnet"), text(3, 21, 6)
    keep = x["attention_mask"].bool()
    before = model(**x).last_hidden_state
    report = retrofit.convert(model, DenseConfig())
    assert report.coverage == 1.0
    torch.testing.assert_close(model(**x).last_hidden_state[keep], before[keep], rtol=1e-5, atol=1e-5)
    retrofit.revert(model)
    assert torch.equal(model(**x).last_hidden_state, before)


def test_a_bias_in_low_precision_is_carried() -> None:
    model, x = build("t5").to(torch.bfloat16), text(2, 17)
    expected = model(**x, decoder_input_ids=x["input_ids"]).logits
    assert retrofit.convert(model, DenseConfig()).coverage == 1.0
    got = model(**x, decoder_input_ids=x["input_ids"]).logits
    assert float((got - expected).norm() / expected.norm()) < 0.03


def test_other_targets_leave_it_as_it_is(tiny_hsa: HSAConfig) -> None:
    model, x = build("mpnet"), text(2, 21)
    expected = model(**x).last_hidden_state
    with pytest.raises(NoAttentionFound, match="a position bias is added to its scores"):
        retrofit.convert(model, tiny_hsa)
    assert torch.equal(model(**x).last_hidden_state, expected)


def test_the_table_is_trained() -> None:
    model, x = build("t5"), text(2, 17)
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    (expected,) = torch.autograd.grad(model(**x, labels=x["input_ids"]).loss, table)
    retrofit.convert(model, DenseConfig())
    (found,) = torch.autograd.grad(model(**x, labels=x["input_ids"]).loss, table)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_saved_model_comes_back(tmp_path: Any) -> None:
    model, x = build("t5"), text(2, 17, 5)
    retrofit.convert(model, DenseConfig())
    expected = generated(model, x)
    retrofit.save_pretrained(model, tmp_path / "model")
    assert torch.equal(generated(retrofit.from_pretrained(tmp_path / "model"), x), expected)


@pytest.mark.parametrize("relative", ["p2c|c2p", "c2p"])
def test_disentangled_attention_is_refused_with_the_reason(relative: str) -> None:
    from transformers import DebertaV2Config, DebertaV2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config: Any = DebertaV2Config(
        **sizes, vocab_size=128, relative_attention=True, pos_att_type=relative.split("|")
    )
    with pytest.raises(NoAttentionFound, match="depends on the tokens, by way of hidden_states"):
        retrofit.convert(DebertaV2Model(config).eval(), DenseConfig())


def test_a_pooled_site_asks_for_the_size_it_was_captured_with() -> None:
    from transformers import SegformerConfig, SegformerModel

    sizes: Any = dict(depths=[1], hidden_sizes=[16], num_attention_heads=[2], sr_ratios=[4], mlp_ratios=[2])
    config = SegformerConfig(num_encoder_blocks=1, patch_sizes=[7], strides=[4], **sizes)
    model, image = SegformerModel(config).eval(), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        before = model(image).last_hidden_state
        report = retrofit.convert(model, DenseConfig(), {"pixel_values": image[:2]})
        assert report.coverage == 1.0
        torch.testing.assert_close(model(image).last_hidden_state, before, rtol=1e-5, atol=1e-5)
        with pytest.raises(CaptureError, match="was captured with height=16, got 8"):
            model(torch.randn(2, 3, 32, 128))


def test_padding_between_prompts_and_a_text() -> None:
    """CPM-Ant puts prompts of its own before the padding of a text, and has a bias between their segments."""
    from transformers import CpmAntConfig, CpmAntForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2}
    model = CpmAntForCausalLM(CpmAntConfig(**sizes, vocab_size=128, prompt_length=5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batches = [text(3, 17), text(2, 40), text(2, 6)]
    for batch, padded in zip(batches, (4, 0, 2), strict=True):
        batch["input_ids"][1, :padded] = 0
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
    options: Any = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches]
        tokens = [model.generate(**batch, **options) for batch in batches]
        report = retrofit.convert(model, DenseConfig())
        assert report.coverage == 1.0
        for batch, expected, continued in zip(batches, before, tokens, strict=True):
            keep = batch["attention_mask"].bool()
            torch.testing.assert_close(model(**batch).logits[keep], expected[keep], rtol=1e-4, atol=1e-4)
            assert torch.equal(model.generate(**batch, **options), continued)
        retrofit.revert(model)
        assert all(
            torch.equal(model(**x).logits, expected) for x, expected in zip(batches, before, strict=True)
        )
