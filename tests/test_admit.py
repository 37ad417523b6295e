"""One site that cannot be rewritten does not keep the others from it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from retrofit import api
from retrofit.configs import DenseConfig
from retrofit.errors import VerificationError
from retrofit.verify import relative_error


class Doubled(LlamaAttention):
    """Doubles what it gives for a single token, which no call on a whole prompt shows."""

    def forward(self, hidden_states, attention_mask=None, **options):
        out, weights = super().forward(hidden_states, attention_mask=attention_mask, **options)
        return (out * 2 if hidden_states.shape[1] == 1 else out), weights


def test_a_site_that_changes_the_model_is_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].self_attn = Doubled(model.config, 1).eval()
    report = api.convert(model, DenseConfig())
    assert [site.path for site in report.converted] == ["model.layers.0.self_attn"]
    ((path, why),) = report.skipped.items()
    assert path == "model.layers.1.self_attn"
    assert "cached decode differs from the original" in why
    assert set(report.verification.sites) == {"model.layers.0.self_attn"}
    assert [path for path, _ in api.sites(model)] == ["model.layers.0.self_attn"]
    assert type(model.model.layers[1].self_attn) is Doubled


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Shy(Plain):
    """Is another module while it is exported."""

    def forward(self, x):
        return super().forward(x) * (2 if torch.compiler.is_compiling() else 1)


class Starred(Plain):
    def forward(self, *args):
        return super().forward(*args)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Shy, "differs from the original by"), (Starred, "must name its arguments, got *args")],
)
def test_a_site_that_fails_alone_is_refused(kind, reason):
    model = nn.Sequential(Plain(), kind()).eval()
    example = (torch.randn(2, 11, 8),)
    report = api.convert(model, DenseConfig(), example)
    assert [site.path for site in report.converted] == ["0"]
    ((path, why),) = report.skipped.items()
    assert path == "1"
    assert reason in why


def test_none_is_an_error_and_changes_nothing():
    model = nn.Sequential(Shy(), Shy()).eval()
    modules = list(model.modules())
    with pytest.raises(VerificationError, match="0 differs from the original by"):
        api.convert(model, DenseConfig(), (torch.randn(2, 11, 8),))
    assert list(model.modules()) == modules


def test_a_model_that_reads_padding_is_refused_with_the_reason():
    from transformers import SiglipTextConfig, SiglipTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = Pooled(SiglipTextModel(SiglipTextConfig(**sizes, vocab_size=128))).eval()
    with pytest.raises(
        VerificationError, match=r"the model reads what its attention gives at padding \(padded right\)"
    ):
        api.convert(model, DenseConfig(), {"input_ids": torch.randint(128, (2, 31))})


def test_a_model_that_reads_padding_in_a_second_call_is_refused_with_the_reason():
    from transformers import SiglipTextConfig, SiglipTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    body = SiglipTextModel(SiglipTextConfig(**sizes, vocab_size=128))
    with pytest.raises(
        VerificationError, match=r"reads what its attention gives at padding \(padded right\)"
    ):
        api.convert(Twice(body).eval(), DenseConfig(), {"input_ids": torch.randint(128, (2, 31))})


def test_a_site_that_needs_the_others_is_not_refused_with_those_that_fail() -> None:
    """The head of SigLIP 2 makes a mask of its own, which is another where sites beside it are not converted."""
    from transformers import Siglip2Config, Siglip2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    text = {**sizes, "vocab_size": 128, "max_position_embeddings": 64, "projection_size": 32}
    vision = {**sizes, "num_patches": 16, "patch_size": 4}
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()
    example = {
        "input_ids": torch.randint(128, (2, 21)),
        "pixel_values": torch.randn(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "spatial_shapes": torch.full((2, 2), 4),
    }
    report = api.convert(model, DenseConfig(), example)
    assert {site.path for site in report.converted} == {
        "vision_model.encoder.layers.0.self_attn",
        "vision_model.head.attention",
    }
    ((path, why),) = report.skipped.items()
    assert path == "text_model.encoder.layers.0.self_attn"
    assert "reads what its attention gives at padding" in why


class Pooled(nn.Module):
    """Gives the last token alone, whatever it is."""

    def __init__(self, body):
        super().__init__()
        self.body, self.config = body, body.config

    def forward(self, input_ids, attention_mask=None):
        return self.body(input_ids, attention_mask=attention_mask).pooler_output


class Twice(Pooled):
    """Looks at the first tokens before."""

    def forward(self, input_ids, attention_mask=None):
        self.body(input_ids[:, :3])
        return super().forward(input_ids, attention_mask)


class Widened(nn.Module):
    """Takes the first token for real and the last for padding where a prompt is padded and cached."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *args, attention_mask=None, past_key_values=None, **options):
        if past_key_values is not None and attention_mask is not None and bool((attention_mask == 0).any()):
            attention_mask = attention_mask.clone()
            attention_mask[:, 0], attention_mask[:, -1] = 1, 0
        return self.body(*args, attention_mask=attention_mask, past_key_values=past_key_values, **options)


def test_steps_without_padding_count_where_the_original_contradicts_itself_with_it(tiny_llama):
    model = tiny_llama()
    model.model = Widened(model.model)
    report = api.convert(model, DenseConfig())
    assert len(report.converted) == 2
    assert report.verification.decode < 1e-4


class Renamed(LlamaAttention):
    def forward(self, hidden_states, attention_mask=None, state=None, **options):
        return super().forward(hidden_states, attention_mask=attention_mask, past_key_values=state, **options)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, past_key_values=None, **options):
        return self.inner(hidden_states, state=past_key_values, **options)


def test_a_cache_is_used_whatever_its_argument_is_called(tiny_llama):
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].self_attn = Around(Renamed(model.config, 0).eval())
    ids = torch.randint(1, 128, (2, 12))
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert api.convert(model, DenseConfig()).verification.decode < 1e-4
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_cached_steps_of_encoder_decoders_are_compared():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 128}
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = BartConfig(**sizes, **layers, max_position_embeddings=64)
    report = api.convert(BartForConditionalGeneration(config).eval(), DenseConfig())
    assert len(report.converted) == 3
    assert report.verification.decode < 1e-4


@pytest.mark.parametrize("length_first", [False, True])
def test_padding_is_not_compared(length_first):
    keep = torch.tensor([[True, True, False], [True, True, True]])
    expected, got = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    got[0, 2] = 7
    if length_first:
        expected, got = expected.transpose(0, 1), got.transpose(0, 1)
    assert relative_error(got, expected, keep) == 0
    assert relative_error(got * 2, expected, keep) > 0.5


def test_a_model_may_return_a_number() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Padded()

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return (self.attention(x, keep) * keep[..., None]).square().mean()

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=(keep != 0)[:, None, None])
            return found.transpose(1, 2).flatten(2)

    model, x, keep = Loss().eval(), torch.randn(2, 11, 16), torch.ones(2, 11)
    keep[0, 6:] = 0
    expected = model(x, keep)
    assert len(api.convert(model, DenseConfig(), (x, keep)).converted) == 1
    torch.testing.assert_close(model(x, keep), expected, rtol=1e-5, atol=1e-5)
