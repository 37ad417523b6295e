from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from retrofit.passes.attention.canonical import ATTENTION, attention
from retrofit.passes.attention.masks import MaskClass, MaskSample, classify
from retrofit.passes.attention.rewrite import attentions, normalize, target_call

B, T, D = 2, 11, 8
SCALE = D**-0.5


def _repeat(x, n=2):
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, t, d).reshape(b, h * n, t, d)


def _causal(t):
    return torch.ones(t, t, dtype=torch.bool).tril()


def _additive(t):
    return torch.zeros(t, t).masked_fill(~_causal(t), torch.finfo(torch.float32).min)


def _eager(q, k, v, mask=None, scale=SCALE):
    weights = torch.matmul(q, _repeat(k).transpose(2, 3)) * scale
    if mask is not None:
        weights = weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=False), _repeat(v))


SPELLINGS = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, _repeat(k), _repeat(v)),
    "sdpa causal": lambda q, k, v: F.scaled_dot_product_attention(q, _repeat(k), _repeat(v), is_causal=True),
    "sdpa positional": lambda q, k, v: F.scaled_dot_product_attention(
        q, _repeat(k), _repeat(v), None, 0.0, True
    ),
    "sdpa scale": lambda q, k, v: F.scaled_dot_product_attention(q, _repeat(k), _repeat(v), scale=0.2),
    "sdpa gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "sdpa mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, _repeat(k), _repeat(v), attn_mask=_causal(q.shape[2])
    ),
    "repeat_interleave": lambda q, k, v: F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, 1)
    ),
    "eager": lambda q, k, v: _eager(q, k, v),
    "eager additive": lambda q, k, v: _eager(q, k, v, _additive(q.shape[2])),
    "scale on q": lambda q, k, v: _eager(q * SCALE, k, v, scale=1.0),
    "scale on k": lambda q, k, v: F.softmax(q @ _repeat(k * SCALE).transpose(-1, -2), -1) @ _repeat(v),
    "divided": lambda q, k, v: F.softmax(q @ _repeat(k).transpose(-1, -2) / math.sqrt(D), -1) @ _repeat(v),
    "masked_fill": lambda q, k, v: (
        F.softmax(
            (q @ _repeat(k).transpose(-2, -1) * SCALE).masked_fill(~_causal(q.shape[2]), float("-inf")), dim=3
        )
        @ _repeat(v)
    ),
    "scaled after masked_fill": lambda q, k, v: (
        F.softmax(
            (q @ _repeat(k).transpose(-2, -1)).masked_fill(~_causal(q.shape[2]), float("-inf")) * SCALE,
            dim=-1,
        )
        @ _repeat(v)
    ),
    "where": lambda q, k, v: (
        F.softmax(
            torch.where(_causal(q.shape[2]), q @ _repeat(k).transpose(-2, -1) * SCALE, torch.tensor(-1e9)),
            dim=-1,
        )
        @ _repeat(v)
    ),
    "two terms": lambda q, k, v: (
        F.softmax(q @ _repeat(k).transpose(2, 3) + _additive(q.shape[2]) + _additive(q.shape[2]), -1)
        @ _repeat(v)
    ),
    "scaled after adding": lambda q, k, v: (
        F.softmax((q @ _repeat(k).transpose(2, 3) + _additive(q.shape[2])) * 0.5, -1) @ _repeat(v)
    ),
    "hidden and added": lambda q, k, v: (
        F.softmax(
            (q @ _repeat(k).transpose(2, 3)).masked_fill(~_causal(q.shape[2]), float("-inf"))
            + _additive(q.shape[2]),
            -1,
        )
        @ _repeat(v)
    ),
    "hidden twice": lambda q, k, v: (
        F.softmax(
            (q @ _repeat(k).transpose(2, 3))
            .masked_fill(~_causal(q.shape[2]), float("-inf"))
            .masked_fill(~_causal(q.shape[2]), -1e9),
            -1,
        )
        @ _repeat(v)
    ),
    "softcap": lambda q, k, v: (
        F.softmax(3 * torch.tanh(q @ _repeat(k).transpose(2, 3) * 0.2), -1) @ _repeat(v)
    ),
    "permuted": lambda q, k, v: F.softmax(q @ _repeat(k).permute(0, 1, 3, 2) * SCALE, -1) @ _repeat(v),
}

NEAR_MISSES = {
    "over the queries": (
        lambda q, k, v: F.softmax(q @ _repeat(k).transpose(2, 3), 2) @ _repeat(v),
        "not over the keys",
    ),
    "weights used elsewhere": (
        lambda q, k, v: (lambda w: (w @ _repeat(v)) * w.sum(-1, keepdim=True))(
            F.softmax(q @ _repeat(k).transpose(2, 3), -1)
        ),
        "used elsewhere",
    ),
    "no product of queries": (
        lambda q, k, v: F.softmax(q, -1) @ v.transpose(2, 3)[:, :1],
        "not from a product",
    ),
    "two tanh": (
        lambda q, k, v: F.softmax(torch.tanh(q @ _repeat(k).transpose(2, 3)).tanh(), -1) @ _repeat(v),
        "tanh",
    ),
    "a mild mask": (
        lambda q, k, v: (
            F.softmax((q @ _repeat(k).transpose(2, 3)).masked_fill(~_causal(q.shape[2]), -5.0), -1)
            @ _repeat(v)
        ),
        "set to -5.0",
    ),
    "a negative scale": (
        lambda q, k, v: F.softmax(q @ _repeat(k).transpose(2, 3) * -1.0, -1) @ _repeat(v),
        "positive number",
    ),
    "a gate": (lambda q, k, v: F.softmax(q, -1) * q, "not into a product"),
}


class _Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return (self.function(q, k, v),)


def _inputs():
    return torch.randn(B, 4, T, D), torch.randn(B, 2, T, D), torch.randn(B, 2, T, D)


def _exported(function):
    auto = torch.export.Dim.AUTO
    shape = {0: auto, 2: auto}
    with torch.no_grad():
        program = torch.export.export(
            _Wrapped(function), _inputs(), dynamic_shapes=((shape,) * 3), strict=False
        )
    return program.module().graph, program


def _graph(function):
    from torch.fx import Graph

    _, program = _exported(function)
    graph = Graph()
    copied = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in ("q", "k", "v"):
            copied[node] = graph.get_attr(node.name)
            copied[node].meta = dict(node.meta)
            value = program.constants[program.graph_signature.inputs_to_lifted_tensor_constants[node.name]]
            setattr(graph, node.name, value)
            if value.numel() == 1:
                copied[node].meta["constant"] = value.item()
        elif node.op == "output":
            graph.output(tuple(copied[item] for item in node.args[0]))
        else:
            copied[node] = graph.node_copy(node, lambda item: copied[item])
    return graph


def _run(graph, *inputs):
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            setattr(root, node.target, getattr(graph, node.target))
    return GraphModule(root, graph)(*inputs)[0]


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_becomes_the_canonical_node(name):
    torch.manual_seed(0)
    graph = _graph(SPELLINGS[name])
    inputs = _inputs()
    report = normalize(graph)
    assert report.total == 1
    assert not report.refusals
    (node,) = attentions(graph)
    assert [argument.name for argument in node.args[:3]] == ["q", "k", "v"]  # scale and repetition are gone
    assert "val" in node.meta
    torch.testing.assert_close(_run(graph, *inputs), SPELLINGS[name](*inputs))
    before = str(graph)
    assert normalize(graph).total == 0
    assert str(graph) == before


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_refused_with_reason_and_node(name):
    function, reason = NEAR_MISSES[name]
    graph = _graph(function)
    before = str(graph)
    report = normalize(graph)
    assert report.total == 0
    (refusal,) = report.refusals
    assert reason in refusal.reason
    assert refusal.node in {node.name for node in graph.nodes}
    assert str(graph) == before


def test_the_target_call_drops_the_mask_and_keeps_it_on_demand():
    for keep in (False, True):
        graph = _graph(SPELLINGS["masked_fill"])
        normalize(graph)
        (node,) = attentions(graph)
        call = target_call(graph, node, keep_mask=keep)
        assert call.target == "retrofit_attend"
        assert len(call.args) == (5 if keep else 4)
        kept = [node for node in graph.nodes if node.op == "call_function"]
        assert bool(kept) == keep
        assert [n.name for n in graph.nodes if n.op == "placeholder"] == ["q", "k", "v", "context"]


def test_canonical_op():
    q, k, v = (x.requires_grad_(False) for x in _inputs())
    torch.library.opcheck(attention, (q, k, v, _causal(T), False, 0.3, 0.0))
    assert ATTENTION(q, k, v, None, True, 0.3, 0.0).shape == (B, 4, T, D)


def _sample(mask, keep=None, *, causal=False, n=T):
    return MaskSample(mask, causal, B, n, keep)


def _keep(left=0, right=0):
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[0, :left] = False
    keep[1, T - right :] = False
    return keep


def _distance(t):
    return torch.arange(t)[:, None] - torch.arange(t).float()


def _windowed(t, w):
    at = torch.arange(t)
    return _causal(t) & (at > at[:, None] - w)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([_sample(None)], "none"),
        ([_sample(None, causal=True)], "causal"),
        ([_sample(_causal(T)[None, None])], "causal"),
        ([_sample(_additive(T)[None, None])], "causal"),
        (
            [_sample(None, causal=True), _sample((_causal(T) & _keep(3)[:, None, None, :]), _keep(3))],
            "causal+padding",
        ),
        ([_sample(_keep(0, 4)[:, None, None, :])], "key padding"),
        ([_sample(_windowed(T, 4)[None, None])], "sliding window(4)"),
        ([_sample((_windowed(T, 4) & _keep(3)[:, None, None, :]), _keep(3))], "sliding window(4)+padding"),
        ([_sample(-torch.arange(T).float()[None, None, None])], "ALiBi"),
        ([_sample(-torch.arange(T).float().square()[None, None, None])], "the same for every query"),
        ([_sample(-torch.arange(T).float().expand(1, 4, T, T) + _additive(T))], "causal+ALiBi"),
        (
            [_sample(-_distance(T).abs().expand(1, 4, T, T))],
            "adds a bias to the scores, by distance, but not in proportion to it",
        ),
        (
            [_sample(-_distance(T).expand(1, 4, T, T)), _sample(-2 * _distance(T).expand(1, 4, T, T))],
            "whose slope depends on the input",
        ),
        ([_sample(-_distance(T).expand(1, 4, T, T)), _sample(None)], "for some inputs alone"),
        ([_sample(-_distance(T).expand(1, 4, T, T).bfloat16())], "rounded to torch.bfloat16"),
        ([_sample(torch.rand(1, 4, T, T))], "adds a bias to the scores, not by distance alone"),
        ([_sample((torch.arange(T) % 2 == 0)[None, None, None])], "middle of a row"),
        ([_sample(torch.rand(1, 4, T, T) > 0.5)], "differs between heads"),
        ([_sample(_causal(T).T[None, None])], "none of"),
        (
            [_sample((_causal(T) & (torch.arange(T)[:, None] // 4 == torch.arange(T) // 4))[None, None])],
            "own chunk of 4 tokens",
        ),
        ([_sample(None), _sample(None, causal=True)], "none of"),
        (
            [_sample(_windowed(T, 4)[None, None], _keep(3))],
            "does not hide padding: in a probe of 11 tokens key 0, which is padding, is visible to query 3",
        ),
        ([_sample((_distance(T).abs() <= 2)[None, None])], "which sees 2 before it and 2 after it"),
        (
            [
                _sample((_distance(T).abs() <= 2)[None, None]),
                _sample((_distance(T).abs() <= 2) & _keep(3)[:, None, None, :], _keep(3)),
            ],
            "a sliding window on both sides",
        ),
        (
            [_sample((_causal(T) | (torch.arange(T) < 3))[None, None])],
            "the first 3 tokens see one another, later ones see those before them",
        ),
        (
            [_sample((torch.arange(T)[:, None] // 4 == torch.arange(T) // 4)[None, None])],
            "nearest to causal, but in a probe of 11 tokens key 1 is visible to query 0",
        ),
        (
            [_sample((_distance(T) != 4)[None, None])],
            "nearest to one that hides padding alone, but in a probe of 11 tokens key 0 is hidden from query 4",
        ),
    ],
)
def test_masks_are_classified_or_refused(samples, expected):
    found = classify(samples)
    if isinstance(found, MaskClass):
        assert str(found) == expected
    else:
        assert expected in found
