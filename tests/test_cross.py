"""Cross-attention: found, converted to DenseConfig with proof, and left as it is by other targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.configs import DenseConfig, HSAConfig
from retrofit.errors import CacheError, CaptureError, NoAttentionFound

WIDTH, HEADS, DIM = 32, 4, 8
SIZES = [(2, 11, 7), (3, 5, 23), (1, 9, 9), (5, 1, 2)]


class Cross(nn.Module):
    """Attention of x [b, t, WIDTH] to y [b, n, 2·WIDTH] under ``mask``, spelled by ``attend``."""

    def __init__(self, attend: Callable[..., Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(2 * WIDTH, 2 * kv_heads * DIM)
        self.out, self.attend, self.bias = (
            nn.Linear(WIDTH, WIDTH),
            attend,
            nn.Parameter(torch.randn(HEADS, 1, 1)),
        )

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = (part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in self.kv(y).chunk(2, dim=-1))
        return self.out(self.attend(self, q, k, v, mask).transpose(1, 2).flatten(2))


class Around(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.before, self.attn = nn.Linear(WIDTH, WIDTH), attn

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.attn(self.before(x), *rest)


def _eager(site: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(2, 3) * DIM**-0.5
    return scores.softmax(-1) @ v


def _einsum(site: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = (torch.einsum("bhjd,bhid->jhbi", k, q) * DIM**-0.5).softmax(0)
    return torch.einsum("jhbi,bhje->bhie", weights, v)


def _bmm(site: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    b, h, t, _ = q.shape
    q, k, v = (x.reshape(b * h, -1, DIM) for x in (q, k, v))
    return torch.bmm(torch.bmm(q * DIM**-0.5, k.transpose(1, 2)).softmax(-1), v).view(b, h, t, DIM)


def _repeated(site: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return _eager(site, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask)


def _masked(site: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3) * DIM**-0.5).masked_fill(mask[:, None, None] == 0, -torch.inf)
    return scores.softmax(-1) @ v


def _biased(site: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A learned bias, and a mask of each query's own."""
    near = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs() < 5
    scores = q @ k.transpose(2, 3) + site.bias * torch.arange(k.shape[2])
    return scores.masked_fill(~near | (mask[:, None, None] == 0), -1e9).softmax(-1) @ v


class Torch(nn.Module):
    """nn.MultiheadAttention, to keys and values of other widths."""

    def __init__(self, *, masked: bool = False, weights: bool = False) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, kdim=2 * WIDTH, vdim=WIDTH, batch_first=True)
        self.masked, self.weights = masked, weights

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        hidden = mask == 0 if self.masked else None
        out, _ = self.mha(x, y, y[..., :WIDTH], key_padding_mask=hidden, need_weights=self.weights)
        return out


SPELLINGS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sdpa": (lambda: Cross(lambda site, q, k, v, mask: F.scaled_dot_product_attention(q, k, v)), "none"),
    "eager": (lambda: Cross(_eager), "none"),
    "einsum": (lambda: Cross(_einsum), "none"),
    "bmm": (lambda: Cross(_bmm), "none"),
    "repeat_interleave": (lambda: Cross(_repeated, 2), "none"),
    "nn.MultiheadAttention": (Torch, "none"),
    "nn.MultiheadAttention, padded": (partial(Torch, masked=True), "key padding"),
    "nn.MultiheadAttention, weights": (partial(Torch, masked=True, weights=True), "key padding"),
    "enable_gqa": (
        lambda: Cross(
            lambda site, q, k, v, mask: F.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True), 2
        ),
        "none",
    ),
    "a mask of the keys": (lambda: Cross(_masked), "key padding"),
    "a mask of its own": (lambda: Cross(_biased), "as given"),
}


def _inputs(batch: int, tokens: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.ones(batch, keys)
    mask[0, keys // 2 + 1 :] = 0
    return torch.randn(batch, tokens, WIDTH), torch.randn(batch, keys, 2 * WIDTH), mask


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_converted_and_reverted(name: str) -> None:
    make, mask = SPELLINGS[name]
    model, examples = Around(make()).eval(), [_inputs(*sizes) for sizes in SIZES]
    with torch.no_grad():
        before = [model(*example) for example in examples]
        (site,) = retrofit.convert(model, DenseConfig(), examples[0]).converted
        assert (site.kind, site.side, site.mask) == ("cross", "decoder", mask)
        for example, expected in zip(examples, before, strict=True):
            torch.testing.assert_close(model(*example), expected, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert all(torch.equal(model(*x), expected) for x, expected in zip(examples, before, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_decoder_of_torch(batch_first: bool, causal: bool) -> None:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerDecoder(layer, 2).eval()
    examples = []
    for batch, tokens, keys in SIZES:
        hidden = torch.zeros(batch, keys, dtype=torch.bool)
        hidden[0, keys // 2 + 1 :] = True
        shapes = [(batch, length) if batch_first else (length, batch) for length in (tokens, keys)]
        target, memory = (torch.randn(*shape, WIDTH) for shape in shapes)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens) if causal else None
        given = {"tgt": target, "memory": memory, "memory_key_padding_mask": hidden}
        examples.append({**given, "tgt_mask": mask, "tgt_is_causal": causal})
    with torch.no_grad():
        before = [model(**example) for example in examples]
        report = retrofit.convert(model, DenseConfig(), examples[0])
        assert sorted(site.kind for site in report.converted) == ["cross", "cross", "self", "self"]
        masks = {site.mask for site in report.converted if site.kind == "self"}
        assert masks == {"causal" if causal else "none"}
        for example, expected in zip(examples, before, strict=True):
            torch.testing.assert_close(model(**example), expected, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert all(torch.equal(model(**x), expected) for x, expected in zip(examples, before, strict=True))


def test_a_whole_transformer_of_torch() -> None:
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 48, dropout=0.0, batch_first=True).eval()
    examples = [
        {
            "src": torch.randn(batch, keys, WIDTH),
            "tgt": torch.randn(batch, tokens, WIDTH),
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(tokens),
        }
        for batch, tokens, keys in SIZES
    ]
    with torch.no_grad():
        before = [model(**example) for example in examples]
        report = retrofit.convert(model, DenseConfig(), examples[0])
        assert [(site.kind, site.mask) for site in report.converted] == [
            ("self", "none"),
            ("self", "causal"),
            ("cross", "none"),
        ]
        for example, expected in zip(examples, before, strict=True):
            torch.testing.assert_close(model(**example), expected, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert all(torch.equal(model(**x), expected) for x, expected in zip(examples, before, strict=True))


def _causal(site: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _capped(site: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return (5 * torch.tanh(q @ k.transpose(2, 3) / 5)).softmax(-1) @ v


@pytest.mark.parametrize(
    ("attend", "reason"),
    [(_causal, "hides keys by their number alone"), (_capped, "has a softcap of the scores")],
)
def test_what_is_not_carried_over_is_refused_by_name(attend: Callable[..., Tensor], reason: str) -> None:
    model, (x, y, _) = Around(Cross(attend)).eval(), _inputs(*SIZES[0])
    expected = model(x, y)
    with pytest.raises(NoAttentionFound, match=f"cross-attention that {reason} keeps its own attention"):
        retrofit.convert(model, DenseConfig(), (x, y))
    assert torch.equal(model(x, y), expected)


def build(name: str) -> tuple[Any, dict[str, Any] | None, dict[str, Tensor]]:
    """A tiny encoder-decoder, the example that it needs, and what it generates from."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
        WhisperConfig,
        WhisperForConditionalGeneration,
    )

    torch.manual_seed(0)
    ids, mask = torch.randint(4, 128, (2, 17)), torch.ones(2, 17, dtype=torch.int64)
    mask[0, 12:] = 0
    text, example = {"input_ids": ids, "attention_mask": mask}, None
    sizes: dict[str, Any] = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 128,
        "pad_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2, "eos_token_id": None,
    }  # fmt: skip
    if name == "bart":
        model: Any = BartForConditionalGeneration(BartConfig(**sizes, forced_eos_token_id=None))
    elif name == "t5":
        own = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
        model = T5ForConditionalGeneration(T5Config(**own, decoder_start_token_id=0, eos_token_id=None))
    else:
        heard = {"max_source_positions": 30, "max_target_positions": 64, "num_mel_bins": 8}
        silent = {"suppress_tokens": None, "begin_suppress_tokens": None}
        model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heard, **silent))
        text = {"input_features": torch.randn(2, 8, 60)}
        example = {**text, "decoder_input_ids": torch.randint(3, 128, (2, 9))}
    for parameter in model.parameters():  # attention that differs from token to token
        parameter.data *= 3
    return model.eval(), example, text


def generated(model: Any, text: dict[str, Tensor], beams: int = 1) -> Tensor:
    return model.generate(**text, max_new_tokens=10, do_sample=False, num_beams=beams)


@pytest.mark.parametrize("name", ["bart", "whisper", "t5"])
def test_generation_is_that_of_the_original(name: str) -> None:
    model, example, text = build(name)
    expected = [generated(model, text, beams) for beams in (1, 3)]
    report = retrofit.convert(model, DenseConfig(), example)
    assert report.coverage == 1.0
    assert any(site.kind == "cross" for site in report.converted)
    assert report.verification.decode is not None
    assert all(torch.equal(generated(model, text, n), x) for n, x in zip((1, 3), expected, strict=True))
    retrofit.revert(model)
    assert torch.equal(generated(model, text), expected[0])


def test_keys_are_made_once() -> None:
    model, _, text = build("bart")
    retrofit.convert(model, DenseConfig())
    calls = []
    model.model.decoder.layers[0].encoder_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    generated(model, text)
    assert len(calls) == 1


def test_other_targets_leave_it_as_it_is(tiny_hsa: HSAConfig) -> None:
    model, _, text = build("bart")
    expected = generated(model, text)
    report = retrofit.convert(model, tiny_hsa)
    assert {site.kind for site in report.converted} == {"self"}
    assert len(report.converted) == 4
    assert set(report.skipped) == {f"model.decoder.layers.{n}.encoder_attn" for n in (0, 1)}
    assert all("cross-attention takes DenseConfig() alone" in reason for reason in report.skipped.values())
    assert torch.equal(generated(model, text), expected)  # short enough to be dense
    with pytest.raises(NoAttentionFound, match=r"cross-attention takes DenseConfig\(\) alone"):
        retrofit.convert(model, tiny_hsa, kind="cross")
    mixed = retrofit.convert(model, {"*.encoder_attn": DenseConfig(), "*": tiny_hsa})
    assert not mixed.skipped
    retrofit.convert(model, tiny_hsa)
    assert len(retrofit.sites(model)) == 4  # the others have their own attention back, as it says
    retrofit.convert(model, {"*.encoder_attn": DenseConfig(), "*": tiny_hsa})
    assert torch.equal(generated(model, text), expected)


def test_a_saved_model_comes_back(tmp_path: Any) -> None:
    model, _, text = build("bart")
    retrofit.convert(model, DenseConfig())
    expected = generated(model, text)
    retrofit.save_pretrained(model, tmp_path / "model")
    loaded: Any = retrofit.from_pretrained(tmp_path / "model")
    assert sum(site.plan.kind == "cross" for _, site in retrofit.sites(loaded)) == 2
    assert torch.equal(generated(loaded, text), expected)


def test_training_drops_weights_and_reaches_both_sides() -> None:
    model, _, text = build("bart")
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = (
                0.5 if "encoder_attn" in type(module).__name__ or hasattr(module, "k_proj") else 0.0
            )
    retrofit.convert(model, DenseConfig(), kind="cross")
    ids = text["input_ids"]
    model.train()
    first, second = (model(**text, decoder_input_ids=ids[:, :9]).logits for _ in range(2))
    assert not torch.allclose(first, second)
    first.square().sum().backward()
    attn = model.model.decoder.layers[0].encoder_attn
    assert all(
        float(getattr(attn, name).weight.grad.abs().sum()) > 0 for name in ("q_proj", "k_proj", "v_proj")
    )


def test_a_cache_without_a_place_for_its_keys_is_refused() -> None:
    from transformers import DynamicCache

    model, *_ = build("bart")
    retrofit.convert(model, DenseConfig())
    site = model.model.decoder.layers[0].encoder_attn
    x, y = torch.randn(2, 3, 32), torch.randn(2, 17, 32)
    with pytest.raises(CacheError, match="needs an EncoderDecoderCache, got DynamicCache"):
        site(x, key_value_states=y, past_key_values=DynamicCache())
    with pytest.raises(CaptureError, match="needs key_value_states for its keys, got None"):
        site(x)


def test_keys_pooled_from_the_same_tokens_are_no_cross_attention(tiny_hsa: HSAConfig) -> None:
    from transformers import SegformerConfig, SegformerModel

    sizes = dict(depths=[1], hidden_sizes=[16], num_attention_heads=[2], sr_ratios=[4], mlp_ratios=[2])
    model = SegformerModel(
        SegformerConfig(num_encoder_blocks=1, patch_sizes=[7], strides=[4], **sizes)
    ).eval()
    with pytest.raises(
        NoAttentionFound, match=r"one is pooled from the other, or learned\) takes DenseConfig\(\) alone"
    ):
        retrofit.convert(model, tiny_hsa, {"pixel_values": torch.randn(2, 3, 64, 64)})


class Pooling(nn.Module):
    """One learned query attends to all tokens, as the heads of SigLIP do."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.query, self.kv, self.attend = (
            nn.Parameter(torch.randn(WIDTH)),
            nn.Linear(WIDTH, 2 * WIDTH),
            attend,
        )

    def forward(self, x: Tensor) -> Tensor:
        q = self.query.view(1, 1, HEADS, DIM).expand(x.shape[0], -1, -1, -1).transpose(1, 2)
        k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in self.kv(x).chunk(2, dim=-1))
        return self.attend(self, q, k, v, None).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attend", [_eager, lambda site, q, k, v, _: F.scaled_dot_product_attention(q, k, v)])
def test_one_learned_query(attend: Callable[..., Tensor], tiny_hsa: HSAConfig) -> None:
    model, examples = (
        Around(Pooling(attend)).eval(),
        [torch.randn(*size, WIDTH) for size in ((2, 11), (1, 7), (5, 40))],
    )
    with torch.no_grad():
        before = [model(x) for x in examples]
        with pytest.raises(NoAttentionFound, match=r"or learned\) takes DenseConfig\(\) alone"):
            retrofit.convert(model, tiny_hsa, examples[0])
        assert len(retrofit.convert(model, DenseConfig(), examples[0]).converted) == 1
        for x, expected in zip(examples, before, strict=True):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert all(torch.equal(model(x), expected) for x, expected in zip(examples, before, strict=True))


class Reduced(nn.Module):
    """Keys and values of every other pixel of 8 × 8, as PVT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.reduce = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Conv2d(WIDTH, WIDTH, 2, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        few = self.reduce(x.transpose(1, 2).reshape(x.shape[0], WIDTH, 8, 8)).flatten(2).transpose(1, 2)
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in self.kv(few).chunk(2, dim=-1))
        return _eager(self, q, k, v, None).transpose(1, 2).flatten(2)


def test_keys_of_an_image_of_one_size() -> None:
    model, images = Around(Reduced()).eval(), [torch.randn(rows, 64, WIDTH) for rows in (2, 1, 5)]
    with torch.no_grad():
        before = [model(x) for x in images]
        assert len(retrofit.convert(model, DenseConfig(), images[0]).converted) == 1
        for x, expected in zip(images, before, strict=True):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert all(torch.equal(model(x), expected) for x, expected in zip(images, before, strict=True))


def test_blocks_of_a_sequence_need_an_example_of_several() -> None:
    from transformers import LongT5Config, LongT5EncoderModel

    torch.manual_seed(0)
    sizes: Any = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    model, texts = (
        LongT5EncoderModel(LongT5Config(**sizes, local_radius=15)).eval(),
        [torch.randint(4, 128, size) for size in ((2, 45), (2, 13), (3, 100))],
    )
    with torch.no_grad():
        before = [model(ids).last_hidden_state for ids in texts]
        with pytest.raises(
            NoAttentionFound, match="the example is no longer than one; convert with a longer example"
        ):
            retrofit.convert(model, DenseConfig(), {"input_ids": texts[1]})
        report = retrofit.convert(model, DenseConfig(), {"input_ids": texts[0]})
        assert "cannot be told from what the mask hides" in next(iter(report.skipped.values()))
        for ids, expected in zip(texts, before, strict=True):
            torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
