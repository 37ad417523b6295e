"""The operator: schema, fake, autograd, compile, export, flops, errors."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from retrofit.errors import ConfigError
from retrofit.kernels.dense.scores import ScoreRules
from retrofit.kernels.hsa import account
from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.hsa.ops import hsa_attention, hsa_attention_within
from retrofit.kernels.pyramid.blocked import extend_pyramid, extend_spreads

TINY = Geometry(
    window=16,
    sink=8,
    budget=16,
    block=8,
    node=2,
    fanout=4,
    nodes_per_span=8,
    beam=4,
    query_block=8,
    dense_until=0,
    threshold=0.01,
    spread=1.2,
)
START = torch.tensor([0, 3])


def pyramid(x: Tensor, start: Tensor) -> list[Tensor]:
    return extend_pyramid(
        x,
        None,
        start,
        new=x.shape[2],
        ratios=TINY.ratios,
        offset=TINY.sink,
        pooling="mean",
        weights=[None] * TINY.levels,
    )


def spreads_of(x: Tensor, nodes: Tensor, start: Tensor) -> Tensor:
    return extend_spreads(
        x.detach(), nodes.detach(), None, start, new=x.shape[2], ratio=TINY.node, offset=TINY.sink
    )


def inputs(slots: int = 90, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 4, slots, 8, **options),
        torch.randn(2, 2, slots, 8, **options),
        torch.randn(2, 2, slots, 8, **options),
    )


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("summaries", [False, True])
def test_opcheck(implementation: str, summaries: bool) -> None:
    q, k, v = inputs(60, requires_grad=True)
    nodes = [x.detach().requires_grad_() for x in pyramid(k, START)]
    values = [x.detach().requires_grad_() for x in pyramid(v, START)] if summaries else []
    gate = torch.rand(4, requires_grad=True) if summaries else None
    sinks = torch.rand(4, requires_grad=True) if summaries else None
    length = torch.tensor([60, 50])
    options = {"scale": 0.3, "softcap": 2.0 * summaries, "causal": True, "sliding_window": 0, "padded": True}
    torch.library.opcheck(
        torch.ops.retrofit.hsa_attention.default,
        (q, k, v, START, length, nodes, spreads_of(k, nodes[0], START), values, gate, None, None, sinks),
        {**options, "implementation": implementation, **TINY.options},
    )


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradients_reach_the_pooled_tensors_the_gate_and_the_sinks(softcap: float) -> None:
    def run(implementation: str, summaries: bool) -> tuple[Tensor, ...]:
        nodes = pyramid(k, START * 0)
        out, *_ = hsa_attention(
            q,
            k,
            v,
            nodes=nodes,
            spreads=spreads_of(k, nodes[0], START * 0),
            value_nodes=pyramid(v, START * 0) if summaries else [],
            gate=gate if summaries else None,
            scale=0.3,
            geometry=TINY,
            rules=ScoreRules(softcap, sinks),
            implementation=implementation,
        )
        return torch.autograd.grad(out.square().sum(), (q, k, v, sinks, *([gate] if summaries else [])))

    q, k, v = inputs(100, requires_grad=True, dtype=torch.float64)
    gate = torch.tensor([0.0, 0.4, -0.1, 1.0], requires_grad=True, dtype=torch.float64)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True, dtype=torch.float64)
    for summaries in (False, True):
        for a, b in zip(run("blocked", summaries), run("reference", summaries), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            assert a.norm() > 0


WITHIN: dict[str, Any] = {
    **{"scale": 0.3, "causal": True, "sliding_window": 0, "padded": True, "geometry": TINY},
    **{"start": START, "length": 100 - START},
}


def with_pooling(q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, sinks: Tensor | None = None) -> Any:
    """What ``hsa_attention`` returns of 100 slots and the pyramid of ``pooled``; and its nodes."""
    nodes = pyramid(pooled, START)
    spreads = spreads_of(pooled, nodes[0], START)
    return *hsa_attention(
        q, k, v, nodes=nodes, spreads=spreads, rules=ScoreRules(sinks=sinks), **WITHIN
    ), nodes


@pytest.mark.parametrize("has_sinks", [False, True])
def test_with_pooling_it_is_one_node_whose_gradients_are_its_own(has_sinks: bool) -> None:
    q, k, v = inputs(100, requires_grad=True, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if has_sinks else None
    graded = [x for x in (q, k, v, sinks) if x is not None]
    expected, *_ = with_pooling(q, k, v, k.detach(), sinks)
    out, spans, choices, _, nodes = hsa_attention_within(
        lambda: with_pooling(q, k, v, k, sinks), q, k, v, sinks=sinks, **WITHIN
    )
    assert torch.equal(out, expected)
    assert not any(x.requires_grad for x in (spans, choices, *nodes))
    found = (torch.autograd.grad(x.square().sum(), graded) for x in (out, expected))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.norm() > 0


@pytest.mark.parametrize("watched", ["neither", "forward", "backward"])
def test_with_pooling_it_saves_the_same_where_somebody_watches(watched: str) -> None:
    q, k, v = inputs(100, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        run = partial(with_pooling, q, k, v, k.detach())
        out: Tensor = hsa_attention_within(run, q, k, v, sinks=None, **WITHIN)[0]
        return out * 2

    def counted(name: str) -> Any:
        return FlopCounterMode(display=False) if watched == name else nullcontext()

    with counted("forward"):
        out = checkpoint(attend, q, k, v, use_reentrant=False)
    with counted("backward"):
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
    expected = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, nodes: list[Tensor], spreads: Tensor) -> Tensor:
        out, _, first, _ = hsa_attention(
            q, k, v, start=START, nodes=nodes, spreads=spreads, scale=0.3, geometry=TINY
        )
        return out * first.shape[2]


def test_compiles_whole_with_dynamic_lengths() -> None:
    compiled = torch.compile(Attend(), fullgraph=True, dynamic=True, backend="aot_eager")
    for slots in (70, 85):
        q, k, v = inputs(slots, requires_grad=True)
        nodes = [x.detach() for x in pyramid(k, START)]
        spreads = spreads_of(k, nodes[0], START)
        expected, actual = Attend()(q, k, v, nodes, spreads), compiled(q, k, v, nodes, spreads)
        assert torch.equal(actual, expected)
        (grad,) = torch.autograd.grad(actual.sum(), k)
        assert torch.equal(grad, torch.autograd.grad(expected.sum(), k)[0])


@pytest.mark.slow
def test_compiles_by_inductor() -> None:
    q, k, v = inputs(70, requires_grad=True)
    nodes = [x.detach() for x in pyramid(k, START)]
    arguments = (q, k, v, nodes, spreads_of(k, nodes[0], START))
    expected, actual = Attend()(*arguments), torch.compile(Attend(), fullgraph=True)(*arguments)
    torch.testing.assert_close(actual, expected)
    grads = (torch.autograd.grad(out.sum(), k)[0] for out in (actual, expected))
    torch.testing.assert_close(*grads)


def test_exports_with_dynamic_lengths() -> None:
    dynamic = {2: torch.export.Dim.DYNAMIC}
    q, k, v = inputs(70)
    nodes = pyramid(k, START)
    shapes = (dynamic, dynamic, dynamic, [dynamic] + [None] * (TINY.levels - 1), dynamic)
    spreads = spreads_of(k, nodes[0], START)
    program = torch.export.export(Attend(), (q, k, v, nodes, spreads), dynamic_shapes=shapes)
    q, k, v = inputs(85)
    nodes = [pyramid(k, START)[0], *nodes[1:]]
    arguments = (q, k, v, nodes, spreads_of(k, nodes[0], START))
    assert torch.equal(program.module()(*arguments), Attend()(*arguments))


@pytest.mark.parametrize("summaries", [False, True])
def test_flops_are_those_of_the_account(summaries: bool) -> None:
    q, k, v = inputs(requires_grad=True)
    start, length = START * 0, torch.tensor([90, 90])
    nodes = [x.detach() for x in pyramid(k, start)]
    values = [x.detach() for x in pyramid(v, start)] if summaries else []
    gate = torch.ones(4) if summaries else None
    with FlopCounterMode(display=False) as counter:
        out, spans, first, _ = hsa_attention(
            q,
            k,
            v,
            nodes=nodes,
            spreads=spreads_of(k, nodes[0], start),
            value_nodes=values,
            gate=gate,
            scale=0.3,
            geometry=TINY,
        )
        out.sum().backward()
    keys, scored = account.count(
        spans,
        first,
        start,
        length,
        queries=90,
        tokens=90,
        causal=True,
        sliding_window=0,
        summaries=False,
        geometry=TINY,
    )
    flops = counter.get_flop_counts()["Global"]
    forward = flops[torch.ops.retrofit.hsa_attention]
    least = 2 * 2 * float(keys.sum() * 16 + scored.sum() * 8)
    assert forward > least if summaries else forward == pytest.approx(least)
    assert flops[torch.ops.retrofit.hsa_attention_backward] > 2 * 2 * float(keys.sum()) * 40 - 1


def test_wrong_arguments_are_named() -> None:
    q, k, v = inputs()
    nodes = pyramid(k, START)
    spreads = spreads_of(k, nodes[0], START)

    def call(**changes: Any) -> None:
        arguments = {"q": q, "k": k, "v": v, "nodes": nodes, "spreads": spreads, "scale": 0.3, **changes}
        arguments["geometry"] = TINY
        hsa_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)

    with pytest.raises(
        ConfigError, match="implementation must be one of auto, reference, blocked, triton, got 'fast'"
    ):
        call(implementation="fast")
    with pytest.raises(ConfigError, match=r"q must be float32, .* got torch.int64; convert"):
        call(q=q.long())
    with pytest.raises(ConfigError, match="k must have the dtype of q"):
        call(k=k.double())
    with pytest.raises(ConfigError, match="multiple of the 3 kv heads"):
        call(k=k[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(ConfigError, match="levels of the geometry"):
        call(nodes=nodes[:1])
    with pytest.raises(ConfigError, match=r"spreads must have the shape .* got None; make them with"):
        call(spreads=None)
    with pytest.raises(ConfigError, match="value_nodes must have"):
        call(gate=torch.ones(4))
    with pytest.raises(ConfigError, match="both or neither"):
        call(past_spans=torch.zeros(2, 2, 1, 4, dtype=torch.int32))
    with pytest.raises(ConfigError, match="length must be a tensor or None, got int"):
        call(length=90)
    with pytest.raises(ConfigError, match=r"sliding_window must be an integer, got 20\.5"):
        call(sliding_window=20.5)
