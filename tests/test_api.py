from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrofit import api
from retrofit.configs import DenseConfig
from retrofit.errors import CaptureError, ConfigError, MaskError, NoAttentionFound, VerificationError
from retrofit.site import RetrofittedAttention
from retrofit.verify import ModelCheck

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM._from_config(LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=16), **options)


def _qwen3(**options):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=24)
    return Qwen3ForCausalLM._from_config(config, **options)


def _gpt_neox(**options):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM._from_config(GPTNeoXConfig(**SHAPE, rotary_pct=0.25), **options)


def _gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=512, bos_token_id=1, eos_token_id=None
    )
    return GPT2LMHeadModel._from_config(config, **options)


def _mistral(**options):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=11)
    return MistralForCausalLM._from_config(config, **options)


DECODERS = {
    "llama": (_llama, "sdpa", "causal+padding"),
    "llama eager": (_llama, "eager", "causal+padding"),
    "qwen3": (_qwen3, "sdpa", "causal+padding"),
    "gpt_neox": (_gpt_neox, "sdpa", "causal+padding"),
    "gpt_neox eager": (_gpt_neox, "eager", "causal+padding"),
    "gpt2": (_gpt2, "sdpa", "causal+padding"),
    "gpt2 eager": (_gpt2, "eager", "causal+padding"),
    "mistral": (_mistral, "sdpa", "sliding window(11)+padding"),
    "mistral eager": (_mistral, "eager", "sliding window(11)+padding"),
}


def _close(got, expected):
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def _generate(model, ids, mask=None):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
    )


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_decoder_stays_what_it_was(name):
    build, implementation, mask_class = DECODERS[name]
    torch.manual_seed(0)
    model = build(attn_implementation=implementation).eval()
    ids = torch.randint(1, 128, (3, 31))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[2, :1] = 0
    logits, one = model(ids).logits, model(ids[:1, :5]).logits
    plain, padded = _generate(model, ids), _generate(model, ids, mask)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    originals = [module for module in model.modules() if type(module).__name__.endswith("Attention")]

    inspected = api.inspect(model)
    assert [site.mask for site in inspected.sites] == [mask_class] * 2
    assert inspected.observed == 2
    assert all(site.convertible and site.spelling == implementation for site in inspected.sites)

    report = api.convert(model, DenseConfig())
    assert len(report.converted) == 2
    assert not report.skipped
    assert max(report.verification.sites.values()) <= 1e-5
    assert report.verification.decode is not None
    _close(model(ids).logits, logits)
    _close(model(ids[:1, :5]).logits, one)
    assert torch.equal(_generate(model, ids), plain)
    assert torch.equal(_generate(model, ids, mask), padded)
    assert list(model.state_dict()) == list(state)

    reverted = api.revert(model)
    assert len(reverted.reverted) == 2
    assert not reverted.weights_changed
    assert model.config._attn_implementation == implementation
    assert [m for m in model.modules() if type(m).__name__.endswith("Attention")] == originals
    assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_an_encoder_keeps_its_key_padding(implementation):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(**{**SHAPE, "eos_token_id": 2})
    model = BertModel._from_config(config, attn_implementation=implementation).eval()
    ids = torch.randint(1, 128, (3, 31))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    plain = model(ids).last_hidden_state
    padded = model(ids, attention_mask=mask).last_hidden_state
    report = api.convert(model, DenseConfig())
    assert [site.mask for site in report.converted] == ["key padding"] * 2
    _close(model(ids).last_hidden_state, plain)
    got = model(ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    _close(got[real], padded[real])
    api.revert(model)
    assert torch.equal(model(ids).last_hidden_state, plain)


class NanoAttention(nn.Module):
    """Attention as nanoGPT writes it."""

    def __init__(self, width=32, heads=4, *, flash=False, block=64):
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout = nn.Dropout(0.1)
        self.n_head, self.flash = heads, flash
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for y in (q, k, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            att = self.attn_dropout(F.softmax(att, dim=-1))
            y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Stack(nn.Module):
    def __init__(self, *attentions):
        super().__init__()
        self.layers = nn.ModuleList(attentions)

    def forward(self, x, *rest):
        for layer in self.layers:
            x = x + layer(x, *rest)
        return x


@pytest.mark.parametrize("flash", [False, True])
@torch.no_grad()
def test_a_module_written_by_hand(flash):
    model = Stack(NanoAttention(flash=flash), NanoAttention(flash=flash)).eval()
    x = torch.randn(3, 20, 32)
    expected = model(x)
    report = api.convert(model, DenseConfig(), (torch.randn(2, 37, 32),))
    assert [site.mask for site in report.converted] == ["causal"] * 2
    assert [site.spelling for site in report.converted] == ["sdpa" if flash else "eager"] * 2
    _close(model(x), expected)
    _close(model(x[:1, :3]), expected[:1, :3])
    api.revert(model)
    assert torch.equal(model(x), expected)


class MaskedAttention(nn.Module):
    """Attention that is handed its mask, True where visible."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.heads = heads

    def forward(self, x, keep):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        return y.transpose(1, 2).reshape(b, t, c)


@torch.no_grad()
def test_a_mask_handed_over_is_read_at_run_time():
    model = Stack(MaskedAttention()).eval()
    keep = torch.ones(2, 21, dtype=torch.bool)
    keep[1, 15:] = False
    report = api.convert(model, DenseConfig(), (torch.randn(2, 21, 32), keep))
    assert report.converted[0].mask == "key padding"
    x, other = torch.randn(3, 30, 32), torch.ones(3, 30, dtype=torch.bool)
    other[0, 9:] = False
    got = model(x, other)
    api.revert(model)
    _close(got[other], model(x, other)[other])
    api.convert(model, DenseConfig(), (torch.randn(2, 21, 32), keep))
    other[1, 5] = False
    with pytest.raises(MaskError):
        model(x, other)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 4), nn.Linear(32, 128)

    def forward(self, x):
        weights = F.softmax(self.gate(x), dim=-1)
        return (self.experts(x).unflatten(-1, (4, 32)) * weights[..., None]).sum(-2)


class Returned(NanoAttention):
    """Uses its weights a second time."""

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        att = F.softmax(q @ k.transpose(-2, -1), dim=-1)
        y = (att @ v) * att.sum(-1, keepdim=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


class Strided(NanoAttention):
    """Sees every other key only."""

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(x).view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        at = torch.arange(t)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=(at[:, None] - at) % 2 == 0)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Experts, "not into a product with values"),
        (Returned, "weights are used elsewhere"),
        (Strided, "the mask is none of"),
    ],
)
def test_near_misses_are_refused_with_a_reason(module, reason):
    model = Stack(module()).eval()
    with pytest.raises(NoAttentionFound, match=reason):
        api.convert(model, DenseConfig(), (torch.randn(2, 21, 32),))
    (site,) = api.inspect(model, (torch.randn(2, 21, 32),)).sites
    assert not site.convertible
    assert reason in site.reason
    mixed = Stack(module(), NanoAttention()).eval()
    report = api.convert(mixed, DenseConfig(), (torch.randn(2, 21, 32),))
    assert [site.path for site in report.converted] == ["layers.1"]
    assert reason in report.skipped["layers.0"]


def test_a_model_without_attention_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(NoAttentionFound, match="no softmax or scaled_dot_product_attention"):
        api.convert(model, DenseConfig(), (torch.randn(2, 4),))
    with pytest.raises(CaptureError, match="example_inputs is needed"):
        api.inspect(model)


def test_where_and_globs(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"nearest are .*model.layers.0.self_attn"):
        api.convert(model, DenseConfig(), where="model.layers.7.self_attn")
    with pytest.raises(ConfigError, match="must be one of the targets"):
        api.convert(model, "hsa")
    report = api.convert(model, DenseConfig(), where="*.1.*")
    assert [site.path for site in report.converted] == ["model.layers.1.self_attn"]
    assert report.skipped == {"model.layers.0.self_attn": "left out by where"}
    ids = torch.randint(1, 128, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits
        api.revert(model)
        expected = model(ids, attention_mask=mask).logits
    _close(got[mask.bool()], expected[mask.bool()])
    assert len(api.convert(model, {"*.0.*": DenseConfig()}).converted) == 1


def test_sites_left_out_by_where_keep_their_target(tiny_llama, tiny_hsa, tiny_maha):
    model = tiny_llama()
    api.convert(model, tiny_maha, where="*.0.*")
    kept = dict(api.sites(model))["model.layers.0.self_attn"]
    report = api.convert(model, tiny_hsa, where="*.1.*")
    assert report.skipped == {"model.layers.0.self_attn": "left out by where; stays maha"}
    found = dict(api.sites(model))
    assert found["model.layers.0.self_attn"] is kept and not kept.dense_mode
    assert [site.retrofit.config.target for site in found.values()] == ["maha", "hsa"]
    assert set(model.config.retrofit["sites"]) == set(found)
    assert len(api.revert(model).reverted) == 2


def test_convert_is_atomic(tiny_llama, monkeypatch):
    model = tiny_llama()
    modules = list(model.modules())
    settings = model.config.to_dict()
    monkeypatch.setattr(ModelCheck, "compare", _refuse)
    with pytest.raises(VerificationError):
        api.convert(model, DenseConfig())
    assert list(model.modules()) == modules
    assert model.config.to_dict() == settings
    monkeypatch.undo()
    api.convert(model, DenseConfig(), where="*.0.*")
    before = api.sites(model)
    monkeypatch.setattr(ModelCheck, "compare", _refuse)
    with pytest.raises(VerificationError):
        api.convert(model, DenseConfig())
    assert api.sites(model) == before


def _refuse(*_):
    raise VerificationError("differs")


def test_identical_layers_share_one_graph(tiny_llama, monkeypatch):
    from retrofit.capture import plan

    made = []
    original = plan.capture
    monkeypatch.setattr(plan, "capture", lambda *args: made.append(args) or original(*args))
    model = tiny_llama(num_hidden_layers=4)
    api.convert(model, DenseConfig())
    assert len(made) == 2  # without and with a mask
    first, *others = api.sites(model)
    assert all(site.plan.source == first[1].plan.source for _, site in others)


def test_copies_are_independent(tiny_llama):
    model = tiny_llama()
    api.convert(model, DenseConfig())
    ids = torch.randint(1, 128, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(ids).logits, expected)
            for parameter in copied.parameters():
                parameter.zero_()
            assert torch.equal(model(ids).logits, expected)
            site = api.sites(copied)[0][1]
            assert site.original.q_proj is site.q_proj
            api.revert(copied)
            assert not api.sites(copied)


def test_trained_weights_are_reported(tiny_llama):
    model = tiny_llama()
    api.convert(model, DenseConfig())
    ids = torch.randint(1, 128, (2, 20))
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.warns(UserWarning, match="weights of the model have changed"):
        assert api.revert(model).weights_changed
    assert not api.sites(model)


def test_gradients_equal_those_of_the_original(tiny_llama):
    model = tiny_llama()
    other = copy.deepcopy(model)
    api.convert(model, DenseConfig())
    model.gradient_checkpointing_enable()
    ids = torch.randint(1, 128, (2, 20))
    for each in (model, other):
        each.train()
        each(ids, labels=ids).loss.backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        _close(a.grad, b.grad)


def test_a_child_exchanged_after_conversion_takes_effect_and_stays(tiny_llama):
    model = tiny_llama()
    ids = torch.randint(1, 128, (2, 20))
    api.convert(model, DenseConfig())
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj, nn.Linear(64, 64))
    with torch.no_grad():
        changed = model(ids).logits
        api.revert(model)
        _close(model(ids).logits, changed)


def test_dense_mode_and_tap(tiny_llama, tiny_hsa):
    model = tiny_llama()
    api.convert(model, DenseConfig())
    seen = []
    site = api.sites(model)[0][1]
    site.tap = lambda q, k, v, call, out: seen.append((q.shape, call.length.tolist()))
    with torch.no_grad(), api.dense(model):
        assert site.dense_mode
        model(torch.randint(1, 128, (2, 20)))
    assert not site.dense_mode
    assert seen == [(torch.Size([2, 4, 20, 16]), [20, 20])]


def test_hooks_dtype_and_compile(tiny_llama):
    model = tiny_llama()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    api.convert(model, DenseConfig())
    calls.clear()
    ids = torch.randint(1, 128, (2, 20))
    with torch.no_grad():
        model(ids)
        assert calls == [1]
        model.to(torch.bfloat16)
        low = model(ids).logits
        api.revert(model)
        assert low.dtype == torch.bfloat16
        assert (low - model(ids).logits).abs().max() < 0.05


def test_low_precision_is_verified_in_float32(tiny_llama):
    model = tiny_llama().to(torch.bfloat16)
    ids = torch.randint(1, 128, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
        report = api.convert(model, DenseConfig())
        assert max(report.verification.sites.values()) <= 1e-5
        assert (model(ids).logits - expected).norm() <= 0.01 * expected.norm()


def test_lora_before_conversion(tiny_llama):
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    ids = torch.randint(1, 128, (2, 20))
    with torch.no_grad():
        expected = adapted(ids).logits
        assert len(api.convert(adapted, DenseConfig()).converted) == 2
        _close(adapted(ids).logits, expected)
        with adapted.disable_adapter():
            assert (adapted(ids).logits - expected).abs().max() > 1e-3
        api.revert(adapted)
        assert torch.equal(adapted(ids).logits, expected)


def test_compiles_without_a_graph_break(tiny_llama):
    model = tiny_llama()
    api.convert(model, DenseConfig())
    ids = torch.randint(1, 128, (2, 20))
    layer = model.model.layers[0]
    x = torch.randn(2, 20, 64)
    rotary = model.model.rotary_emb(x, torch.arange(20)[None])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = layer(x, position_embeddings=rotary)
        assert torch.allclose(compiled(x, position_embeddings=rotary), expected, atol=1e-6)
    assert isinstance(layer.self_attn, RetrofittedAttention)
    assert ids.shape == (2, 20)
