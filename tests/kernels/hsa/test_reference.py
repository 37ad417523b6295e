"""The definition against independent statements of it, one query at a time, in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, inf, log, log2
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.kernels.hsa import ops
from retrofit.kernels.hsa.geometry import UNUSED, Geometry


def cover_of(leaves: int, top: int, fanout: int) -> list[tuple[int, int]]:
    """(level, span) of the canonical cover of the first leaves."""
    spans, at = [], 0
    while at < leaves:
        level = max(x for x in range(top + 1) if at % fanout**x == 0 and at + fanout**x <= leaves)
        spans.append((level, at // fanout**level))
        at += fanout**level
    return spans


def votes(q: Tensor, k: Tensor, spans: list[tuple[int, int]], g: Geometry) -> dict[tuple[int, int], float]:
    """Votes of one query q [G, D] for spans over the keys k [n, D], each by its best node."""
    scores = {}
    for level, span in spans:
        begin, size = g.sink + span * g.span_size(level), g.node_size(level)
        nodes = k[begin : begin + g.span_size(level)].reshape(-1, size, k.shape[1]).mean(1)
        scores[level, span] = (q @ nodes.T * k.shape[1] ** -0.5).amax(-1)
    total = torch.stack(list(scores.values())).logsumexp(0) if scores else None
    return {key: float((value - total).exp().sum()) for key, value in scores.items()}


def weights(
    q: Tensor, k: Tensor, near: set[int], leaves: list[int], g: Geometry
) -> dict[tuple[int, int], float]:
    """What a token of each leaf weighs for one query q [G, D] against the keys ``near``, in steps of log 2 / 65536."""
    scale, scores = k.shape[1] ** -0.5, {}
    for leaf in leaves:
        keys = k[g.sink + leaf * g.block : g.sink + (leaf + 1) * g.block].reshape(-1, g.node, k.shape[1])
        node = keys.mean(1)
        spread = (keys - node[:, None]).square().mean((1, 2))
        second = g.spread / 2 * (scale * q).square().sum(1)[:, None] * spread
        scores[0, leaf] = (q @ node.T * scale + second).amax(-1)
    total = (q @ k[sorted(near)].T * scale).logsumexp(1)
    return {key: round(65536 * float((value - total).amax()) / log(2)) for key, value in scores.items()}


def choose(q: Tensor, k: Tensor, near: set[int], leaves: list[int], g: Geometry) -> dict[int, int]:
    """How many 4096ths of each leaf the query wants."""
    scored = {leaf: vote for (_, leaf), vote in weights(q, k, near, leaves, g).items()}
    ranked = sorted(scored.values(), reverse=True)
    cut = max(65536 * log2(g.threshold), *ranked[g.budget // g.block :][:1], -inf)
    return {leaf: min(vote - ceil(cut), 4096) for leaf, vote in scored.items() if vote > ceil(cut)}


def union(executed: dict[int, int], more: dict[int, int]) -> dict[int, int]:
    return {leaf: max(executed.get(leaf, 0), more.get(leaf, 0)) for leaf in {*executed, *more}}


def seen_by(result: Any, head: int, block: int, row: int, g: Geometry) -> dict[int, int]:
    """How many 4096ths of each leaf the query in place ``row`` sees, by the block's choices."""
    ids = g.block_leaf_ids(result.spans[0, head, block], torch.tensor(block)).tolist()
    seen: dict[int, int] = {}
    for choice in result.choices[0, head, block].tolist():
        when, candidate, rise = choice // 8192 // len(ids), choice // 8192 % len(ids), choice % 8192
        if choice < UNUSED and when <= row:
            seen[ids[candidate]] = seen.get(ids[candidate], 0) + rise
    return seen


def sinks_and_window(t: int, g: Geometry) -> set[int]:
    return {*range(g.sink), *range(max(g.sink, g.window_start(t)), t + 1)}


def best(scored: dict[tuple[int, int], float], count: int) -> list[tuple[int, int]]:
    return sorted(scored, key=lambda key: (-scored[key], key[1]))[:count]


def search(q: Tensor, k: Tensor, t: int, g: Geometry) -> dict[int, int]:
    """How many 4096ths of each leaf the query q [T, G, D] at t wants."""
    t0 = t // g.query_block * g.query_block
    leaves = max(0, (g.window_start(t0) - g.sink) // g.block)
    limit, top = g.beam * g.fanout, 1
    while leaves // g.fanout**top > limit:
        top += 1
    cover = cover_of(leaves, top, g.fanout)
    candidates = [span for span in cover if span[0] == top]
    for level in range(top, 0, -1):
        kept = sorted(best(votes(q[t0], k, candidates, g), g.beam))
        candidates = [(level - 1, s * g.fanout + i) for _, s in kept for i in range(g.fanout)]
        candidates += [span for span in cover if span[0] == level - 1]
    candidates += [(0, leaf) for leaf in range(leaves, max(0, (g.window_start(t) - g.sink) // g.block))]
    return choose(q[t], k, sinks_and_window(t, g), [leaf for _, leaf in candidates], g)


def summarised(executed: set[int], t: int, g: Geometry) -> list[tuple[int, int]]:
    """The cover of what is not executed for the query at t."""
    t0 = t // g.query_block * g.query_block
    leaves = max(0, (g.window_start(t0) - g.sink) // g.block)
    late = range(leaves, max(0, (g.window_start(t) - g.sink) // g.block))

    def split(level: int, span: int) -> list[tuple[int, int]]:
        inside = range(span * g.fanout**level, (span + 1) * g.fanout**level)
        if not executed.intersection(inside):
            return [(level, span)]
        return [x for i in range(g.fanout) for x in split(level - 1, span * g.fanout + i)] if level else []

    cover = [x for span in cover_of(leaves, g.top_level(leaves), g.fanout) for x in split(*span)]
    return cover + [(0, leaf) for leaf in late if leaf not in executed]


def attend(
    q: Tensor, k: Tensor, v: Tensor, t: int, executed: dict[int, int], gate: float, g: Geometry
) -> Tensor:
    share = torch.zeros(t + 1, dtype=k.dtype)
    share[sorted(sinks_and_window(t, g) & set(range(t + 1)))] = 1
    for leaf, risen in executed.items():
        share[g.sink + leaf * g.block : g.sink + (leaf + 1) * g.block] = risen / 4096
    if t < g.dense_end:
        share[:] = 1
    scale = k.shape[1] ** -0.5
    weights, values = [share * (q @ k[: t + 1].T * scale).exp()], [v[: t + 1]]
    for level, span in summarised(set(executed), t, g) if gate and t >= g.dense_end else []:
        begin, size = g.sink + span * g.span_size(level), g.node_size(level)
        inside = slice(begin, begin + g.span_size(level))
        nodes = k[inside].reshape(-1, size, k.shape[1]).mean(1)
        weights.append(gate * size * (q @ nodes.T * scale).exp())
        values.append(v[inside].reshape(-1, size, v.shape[1]).mean(1))
    weight, value = torch.cat(weights, -1), torch.cat(values)
    return weight @ value / weight.sum(-1, keepdim=True)


@pytest.mark.parametrize("gate", [None, 0.3])
@pytest.mark.parametrize("sizes", [{}, {"beam": 2, "dense_until": 0}, {"query_block": 12, "dense_until": 84}])
def test_every_query_finds_and_attends_as_stated(
    build: Callable[..., object], sizes: dict[str, int], gate: float | None
) -> None:
    case = build(700, dtype=torch.float64, gate=gate, **sizes)
    g = case.geometry
    result = case.run()
    q = case.q[0].reshape(2, 2, 700, 16).transpose(1, 2)
    for head in range(2):
        k, v = case.k[0, head], case.v[0, head]
        for block in [0, *range(8, 14), 40, 41, 57, 700 // g.query_block]:
            begin, executed = block * g.query_block, {}
            for t in range(begin, min(begin + g.query_block, 700)):
                if begin >= g.dense_end:
                    executed = union(executed, search(q[head], k, t, g))
                assert seen_by(result, head, block, t - begin, g) == executed
                expected = attend(q[head, t], k, v, t, executed, gate or 0.0, g)
                out = result.out[0, head * 2 : head * 2 + 2, t]
                assert torch.allclose(out, expected, rtol=1e-10, atol=1e-10)


def test_an_unlimited_beam_chooses_the_best_of_all_leaves(build: Callable[..., object]) -> None:
    case = build(300, dtype=torch.float64, beam=64)
    g, result = case.geometry, case.run()
    q = case.q[0].reshape(2, 2, 300, 16).transpose(1, 2)
    for head in range(2):
        for block in range(g.dense_end // g.query_block, 300 // g.query_block):
            executed: dict[int, int] = {}
            for row in range(g.query_block):
                t = block * g.query_block + row
                leaves = list(range((g.window_start(t) - g.sink) // g.block))
                wanted = choose(q[head, t], case.k[0, head], sinks_and_window(t, g), leaves, g)
                executed = union(executed, wanted)
                assert seen_by(result, head, block, row, g) == executed


def test_not_causal_rows_see_window_sinks_and_the_union_of_their_block(build: Callable[..., object]) -> None:
    n = 300
    case = build(n, dtype=torch.float64, causal=False, beam=64)
    g, result = case.geometry, case.run()
    q = case.q[0].reshape(2, 2, n, 16).transpose(1, 2)
    whole = (n - g.sink) // g.block
    for head in range(2):
        k, v = case.k[0, head], case.v[0, head]
        for block in (0, 1, 9, 20, n // g.query_block):
            rows = range(block * g.query_block, min((block + 1) * g.query_block, n))
            windows, executed = {}, {}
            for t in rows:
                low = max(0, t + 1 - g.window) // g.block * g.block
                high = -(-(t + g.window) // g.block) * g.block
                windows[t] = set(range(low, min(high, n)))
                windows[t] |= {*range(g.sink), *range(g.sink + whole * g.block, n)}
                leaves = [
                    leaf
                    for leaf in range(whole)
                    if g.sink + leaf * g.block < low or g.sink + leaf * g.block >= high
                ]
                executed = union(executed, choose(q[head, t], k, windows[t], leaves, g))
            for t in rows:
                share = torch.zeros(n, dtype=k.dtype)
                for leaf, risen in executed.items():
                    share[g.sink + leaf * g.block : g.sink + (leaf + 1) * g.block] = risen / 4096
                share[sorted(windows[t])] = 1
                expected = (q[head, t] @ k.T * case.scale + share.log()).softmax(-1) @ v
                out = result.out[0, head * 2 : head * 2 + 2, t]
                assert torch.allclose(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", [None, 0.0, 0.3])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients(build: Callable[..., object], gate: float | None, causal: bool) -> None:
    """By finite differences: along so small a step no vote changes."""
    case = build(120, dtype=torch.float64, heads=2, kv_heads=1, dim=4, gate=gate, causal=causal)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    gates = [] if case.gate is None or not gate else [case.gate.clone().requires_grad_()]
    inputs = [q, k, v, *gates]

    def loss(*x: Tensor) -> Tensor:
        changed = replace(case, q=x[0], k=x[1], v=x[2], gate=x[3] if gates else case.gate)
        return changed.run().out

    weight = torch.randn_like(case.q)
    gradients = torch.autograd.grad((loss(*inputs) * weight).sum(), inputs)
    for number, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        step = torch.randn_like(x) * 1e-9
        with torch.no_grad():
            up, down = ([*inputs[:number], x + s, *inputs[number + 1 :]] for s in (step, -step))
            change = ((loss(*up) - loss(*down)) * weight).sum() / 2
        assert torch.allclose(change, (gradient * step).sum(), rtol=1e-5)


def test_a_closed_gate_is_inert_and_still_learns(build: Callable[..., object]) -> None:
    without = build(200, gate=None).run().out
    case = build(200, gate=0.0)
    case.gate.requires_grad_()
    out = case.run().out
    torch.testing.assert_close(out.detach(), without, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    assert (case.gate.grad != 0).all()
    below = build(200, gate=-0.5).run().out
    assert torch.equal(below, out)


def test_summaries_that_outweigh_every_key_stay_finite(build: Callable[..., object]) -> None:
    case = build(120, gate=1.0)
    nodes, value_nodes = [50 * x for x in case.pool(case.k)], [x * 0 + 7 for x in case.pool(case.v)]
    out, *_ = ops.hsa_attention(
        case.q,
        case.k,
        case.v,
        nodes=nodes,
        spreads=case.spreads(case.k, nodes[0]),
        value_nodes=value_nodes,
        gate=case.gate,
        scale=case.scale,
        geometry=case.geometry,
        implementation=case.implementation,
    )
    assert out.isfinite().all()
    assert torch.allclose(out[:, :, 119].amax(), torch.tensor(7.0), rtol=1e-3)
