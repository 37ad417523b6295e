from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrofit import api
from retrofit.capture.call import Signature, leaves, lookup, rebuild
from retrofit.capture.export import capture
from retrofit.capture.probes import make_probes
from retrofit.capture.record import record
from retrofit.configs import DenseConfig
from retrofit.errors import CaptureError


class Opaque(nn.Module):
    """A linear layer that cannot be traced: it looks at values, as quantised ones do."""

    def __init__(self, width, out):
        super().__init__()
        self.inner = nn.Linear(width, out)

    def forward(self, x):
        if float(x.detach().abs().max()) > 1e9:
            raise ValueError("out of range")
        return self.inner(x)


class Attention(nn.Module):
    def __init__(self, width=24, heads=2):
        super().__init__()
        self.qkv, self.out = Opaque(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.ones(width))
        self.heads = heads

    def forward(self, x, pair, *, flag=True, scale=None, **extra):
        b, t, c = x.shape
        q, k, v = (self.qkv(x) * pair[0] + pair[1]).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=flag, scale=scale)
        y = y.transpose(1, 2).reshape(b, t, c) * self.gain
        return {"out": self.drop(self.out(y)), "weights": None}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x):
        pair = (torch.ones(()), torch.zeros(()))
        x = self.first(x, pair, flag=True)["out"]
        return self.second(x, pair=pair, flag=False, unused=3)["out"]


def test_recording_finds_the_owners_and_their_calls():
    model = Model().eval()
    x = torch.randn(2, 9, 24)
    recording = record(model, (x,), {})
    assert list(recording.owners) == ["first", "second"]
    (call,) = recording.owners["second"]
    assert call.sdpa == 1
    assert call.kwargs["unused"] == 3
    assert [child.path for child in call.children] == ["qkv", "out", "drop"]
    assert recording.observed == 2
    assert not model.first._forward_hooks


class Doubled(nn.Module):
    """Projects to as many channels as the example has tokens."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 3 * 12), nn.Linear(12, 24)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (2, 6)).transpose(1, 2) for part in self.qkv(x).split([12, 12, 12], dim=-1)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tokens", [12, 36, 24])
def test_a_linear_layer_is_as_wide_whatever_the_number_of_tokens(tokens):
    model = nn.Sequential(nn.Linear(8, 24), Doubled()).eval()
    x, y = torch.randn(2, tokens, 8), torch.randn(3, 7, 8)
    expected = model(y)
    assert len(api.convert(model, DenseConfig(), (x,)).converted) == 1
    torch.testing.assert_close(model(y), expected, rtol=1e-5, atol=1e-5)


def test_children_stay_live_leaves_even_if_they_cannot_be_traced():
    model = Model().eval()
    recording = record(model, (torch.randn(2, 9, 24),), {})
    qkv = model.first.qkv
    captured = capture(model.first, recording.owners["first"][0])
    assert model.first.qkv is qkv
    targets = [node.target for node in captured.graph.nodes if node.op == "call_module"]
    assert targets == ["qkv", "out", "drop"]
    assert [n.target for n in captured.graph.nodes if n.op == "get_attr"] == ["gain"]
    assert set(captured.inputs.values()) == {("x",), ("pair", 0), ("pair", 1)}


def test_a_conversion_with_dictionaries_pairs_and_dropout():
    torch.manual_seed(0)
    model = Model().eval()
    x = torch.randn(3, 17, 24)
    with torch.no_grad():
        expected = model(x)
        report = api.convert(model, DenseConfig(), {"x": torch.randn(2, 11, 24)})
        assert [site.mask for site in report.converted] == ["causal", "none"]
        torch.testing.assert_close(model(x), expected)
        model.train()
        assert not torch.allclose(model(x), expected)  # the residual dropout is live
        model.eval()
        with pytest.raises(CaptureError, match="is_causal"):
            model.first(x, (torch.ones(()), torch.zeros(())), is_causal=False)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(
        name for name, _ in Model().named_parameters()
    )


class Rotary(nn.Module):
    """A child that is called with a length, as rotary embeddings of older models are."""

    def forward(self, x, tokens):
        return x * torch.arange(tokens).cos()[:, None]


class CallsWithALength(Attention):
    def __init__(self):
        super().__init__()
        self.rotary = Rotary()

    def forward(self, x, pair, **options):
        return super().forward(self.rotary(x, x.shape[1]), pair, **options)


def test_a_child_that_is_given_a_length_gets_the_length_at_hand():
    torch.manual_seed(0)
    model = Model().eval()
    model.first = CallsWithALength().eval()
    x = torch.randn(3, 17, 24)
    with torch.no_grad():
        expected = model(x)
        api.convert(model, DenseConfig(), {"x": torch.randn(2, 11, 24)})
        torch.testing.assert_close(model(x), expected)


def test_calls_are_bound_taken_apart_and_put_together():
    signature = Signature.of(Attention())
    bound = signature.bind((1, (2, 3)), {"flag": False, "other": [4]})
    assert bound == {"x": 1, "pair": (2, 3), "flag": False, "scale": None, "other": [4]}
    found = leaves(bound)
    assert found[("pair", 1)] == 3
    assert found[("other", 0)] == 4
    assert rebuild(bound, {("pair", 1): 9})["pair"] == (2, 9)
    assert lookup(bound, ("pair", 1)) == 3
    assert lookup(bound, ("missing", 1)) is None
    with pytest.raises(TypeError, match="positional"):
        signature.bind((1,) * 9, {})


def test_a_batch_of_one_is_doubled():
    (probe,) = make_probes(Model(), (torch.randn(1, 9, 24),))
    assert probe.args[0].shape == (2, 9, 24)


def test_a_probe_is_longer_than_every_window(tiny_llama):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, vocab_size=64, sliding_window=70,
    )  # fmt: skip
    probes = make_probes(MistralForCausalLM(config), None)
    assert [probe.name for probe in probes] == ["plain", "padded left", "padded right"]
    assert probes[0].kwargs["input_ids"].shape[1] > 80


def test_a_model_that_cannot_be_called_says_so():
    with pytest.raises(CaptureError, match="cannot be called with the example"):
        api.inspect(Model(), (torch.randn(2, 9, 5),))
    with pytest.raises(CaptureError, match="tuple or a dict"):
        api.inspect(Model(), 3)


class Attending(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Settling(nn.Module):
    """Replaces its attention when it is first called, as BigBird does for short texts."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = nn.Identity(), Attending()

    def forward(self, x):
        if isinstance(self.inner, nn.Identity):
            self.inner = Attending()
        return self.other(self.inner(x))


def test_what_the_model_itself_exchanges_is_refused():
    model = nn.Sequential(Settling()).eval()
    recording = record(model, (torch.randn(2, 5, 8),), {})
    assert recording.exchanged == {"0.inner": ("Identity", "Attending")}
    assert not record(model, (torch.randn(2, 5, 8),), {}).exchanged
    sites = {
        site.path: site for site in api.inspect(nn.Sequential(Settling()).eval(), torch.randn(2, 5, 8)).sites
    }
    assert "puts Attending in the place of Identity at 0.inner" in sites["0"].reason
    assert sites["0.other"].convertible


class Distances(nn.Module):
    """Attention with a learned bias for each distance, which a child makes from sizes alone."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(400, 1)

    def forward(self, x):
        n = x.shape[1]
        distance = torch.arange(n)[:, None] - torch.arange(n) + 200
        mask = self.bias(distance)[None, ..., 0]
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask[:, None])[:, 0]


def test_a_bias_that_a_child_makes_from_sizes_stays_in_the_graph():
    model, longer = nn.Sequential(Distances()).eval(), torch.randn(3, 90, 8)
    with torch.no_grad():
        expected = model(longer)
        (site,) = api.convert(model, DenseConfig(), torch.randn(2, 11, 8)).converted
        assert site.mask == "position bias"
        torch.testing.assert_close(model(longer), expected, rtol=1e-5, atol=1e-5)


class Choosing(nn.Module):
    """Does one thing or another, or what torch.export does not take."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails

    def forward(self, x):
        y = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        if self.fails:
            return y + torch.from_numpy(y.detach().numpy())
        return y * 2 if x.sum() > 0 else y


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (False, r"Choosing does one thing or another by the values of a tensor.*\(at test_capture.py:\d+\)"),
        (True, r"torch.export of Choosing failed: .*\(at test_capture.py:\d+\)"),
    ],
)
def test_what_cannot_be_exported_is_named_with_its_line(fails, reason):
    recording = record(nn.Sequential(Choosing(fails)).eval(), (torch.randn(2, 9, 8),), {})
    (call,) = recording.owners["0"]
    with pytest.raises(CaptureError, match=reason):
        capture(Choosing(fails), call)
