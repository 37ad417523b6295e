"""What a model hands to its attention as a mask is read as its attention reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.configs import DenseConfig, HSAConfig
from retrofit.errors import MaskError, NoAttentionFound

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def _deberta() -> Any:
    """Its encoder makes a mask of ones and zeros that is looked at for its truth."""
    from transformers import DebertaV2Config, DebertaV2Model

    return DebertaV2Model(DebertaV2Config(**SIZES, vocab_size=128))


def _imagegpt() -> Any:
    """Its mask is bidirectional, and its attention hides later keys itself."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 128}
    return ImageGPTForCausalImageModeling(ImageGPTConfig(**sizes))


def _padded(left: int, right: int) -> dict[str, Tensor]:
    ids, mask = torch.randint(4, 120, (2, 31), generator=torch.Generator().manual_seed(1)), torch.ones(2, 31)
    mask[0, :left] = 0
    mask[1, 31 - right :] = 0
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("build", [_deberta, _imagegpt])
def test_its_padding_is_understood(build: Any, tiny_hsa: HSAConfig) -> None:
    torch.manual_seed(0)
    model = build().eval()
    batches = [_padded(5, 0), _padded(0, 9), _padded(3, 4), {"input_ids": _padded(0, 0)["input_ids"][:1, :7]}]
    with torch.no_grad():
        before = [model(**batch)[0] for batch in batches]
        for config in (DenseConfig(), tiny_hsa):  # too short for HSA to leave anything out
            report = retrofit.convert(model, config)
            assert not report.skipped
            for batch, expected in zip(batches, before, strict=True):
                keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                torch.testing.assert_close(model(**batch)[0][keep], expected[keep], rtol=1e-4, atol=1e-5)
        retrofit.revert(model)
        assert all(torch.equal(model(**x)[0], expected) for x, expected in zip(batches, before, strict=True))


def test_a_step_of_generation_sees_all_earlier_keys() -> None:
    torch.manual_seed(0)
    model, batch = _imagegpt().eval(), _padded(5, 0)
    options = {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(**batch, **options)
    retrofit.convert(model, DenseConfig())
    assert torch.equal(model.generate(**batch, **options), expected)


def test_a_mask_that_is_true_where_keys_are_hidden() -> None:
    """FSMT's attention is handed one by its encoder, for itself and for those that attend to it."""
    from transformers import FSMTConfig, FSMTForConditionalGeneration

    torch.manual_seed(0)
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in FSMT.items()}
    config = FSMTConfig(
        langs=["a", "b"],
        src_vocab_size=128,
        tgt_vocab_size=128,
        d_model=32,
        max_position_embeddings=64,
        **sides,
    )
    model = FSMTForConditionalGeneration(config).eval()
    batches = [{**_padded(5, 0), "decoder_input_ids": _padded(0, 0)["input_ids"][:, :9]}]
    batches += [
        {**batches[0], **_padded(0, 9)},
        {**batches[0], **_padded(3, 4)},
        {**batches[0], **_padded(0, 0)},
    ]
    options = {"max_new_tokens": 9, "do_sample": False}
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches]
        tokens = model.generate(**_padded(0, 9), **options)
        for example in (None, batches[0], batches[1], batches[3]):
            report = retrofit.convert(model, DenseConfig(), example)
            assert not report.skipped
            for batch, expected in zip(batches, before, strict=True):
                torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(model.generate(**_padded(0, 9), **options), tokens)
        retrofit.revert(model)
        assert all(
            torch.equal(model(**x).logits, expected) for x, expected in zip(batches, before, strict=True)
        )


FSMT = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def test_an_argument_of_padded_calls_alone_is_named() -> None:
    """Zaya hides padded tokens from the convolution of its queries and keys, where there are any."""
    package = pytest.importorskip("transformers.models.zaya")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"moe_intermediate_size": 16, "num_experts": 2, "router_hidden_size": 16}
    config = package.ZayaConfig(
        vocab_size=128, num_hidden_layers=2, max_position_embeddings=64, **sizes, **experts
    )
    model = package.ZayaForCausalLM(config).eval()
    with pytest.raises(
        NoAttentionFound, match=r"attention_mask\['conv'\], which it is given in some calls alone"
    ):
        retrofit.convert(model, DenseConfig())


class Fused(nn.Module):
    """Adds a mask that it is handed to its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class OfTorch(nn.Module):
    """The same by torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return out


class Passes(nn.Module):
    """Hands all it gets on to its attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.attention(x, mask)
        return out


@pytest.mark.parametrize(
    ("build", "shape"), [(Fused, ()), (Fused, (1, 1)), (Fused, (2, 1)), (OfTorch, ())], ids=str
)
def test_a_mask_that_only_hid_must_go_on_to(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Passes(build()).eval(), torch.randn(2, 11, 32)
    hides = torch.full((11, 11), -torch.inf).triu(1).expand(*shape, 11, 11)
    expected = model(x, hides)
    retrofit.convert(model, DenseConfig(), (x, hides))
    torch.testing.assert_close(model(x, hides), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MaskError, match="adds a bias to the scores, which this site was not captured with"):
        model(x, hides + torch.rand(11, 11))


def _alibi(slopes: list[float], tokens: int) -> Tensor:
    index = torch.arange(tokens)
    bias = torch.tensor(slopes)[:, None, None] * (index - index[:, None])
    return bias.masked_fill(index > index[:, None], -torch.inf)[None]


def test_a_position_bias_that_is_handed_in_must_keep_its_slopes() -> None:
    torch.manual_seed(0)
    model, slopes = Passes(Fused()).eval(), [0.5, 0.25, 0.1, 0.05]
    batches = [(torch.randn(2, n, 32), _alibi(slopes, n)) for n in (11, 40)]
    expected = [model(*batch) for batch in batches]
    retrofit.convert(model, DenseConfig(), batches[0])
    for batch, before in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(*batch), before, rtol=1e-5, atol=1e-5)
    with pytest.raises(MaskError, match="other slopes than this site was captured with"):
        model(batches[0][0], _alibi([0.9, 0.25, 0.3, 0.05], 11))
