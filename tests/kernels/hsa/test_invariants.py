"""The invariants of the operator, for every implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrofit.kernels.hsa.geometry import UNUSED

quick = settings(
    deadline=None,
    max_examples=5,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# At least three times sink + window + budget, and not a multiple of anything.
lengths = st.integers(216, 330)
options = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "dense_until": st.sampled_from([0, 72, 160]),
        "gate": st.sampled_from([None, 0.3]),
        "sliding_window": st.sampled_from([0, 0, 100]),
        "beam": st.sampled_from([1, 4, 9]),
        "softcap": st.sampled_from([0.0, 0.0, 2.0]),
        "sinks": st.sampled_from([None, None, 1.0]),
    }
)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@quick
@given(tokens=lengths, option=options, data=st.data())
def test_causal_to_the_bit(
    build: Callable[..., Any], tokens: int, option: dict[str, Any], data: st.DataObject
) -> None:
    case = build(tokens, **option)
    at = data.draw(st.integers(80, tokens - 1))
    before = case.run()

    def changed(x: torch.Tensor, at: int) -> torch.Tensor:
        x = x.clone()
        x[:, :, at] = 5 * torch.randn_like(x[:, :, at])
        return x

    token = replace(case, q=changed(case.q, at), k=changed(case.k, at), v=changed(case.v, at)).run()
    assert torch.equal(token.out[:, :, :at], before.out[:, :, :at])
    assert not torch.equal(token.out[:, :, at], before.out[:, :, at])

    last = at // 8 * 8 + 7  # only the last query of a block: it may choose differently, the others not
    if last < tokens:
        query = replace(case, q=changed(case.q, last)).run()
        others = torch.arange(tokens) != last
        assert torch.equal(query.out[:, :, others], before.out[:, :, others])
        assert torch.equal(query.spans, before.spans)
        earlier = before.choices < case.geometry.before(torch.tensor(7))
        assert torch.equal(query.choices[earlier], before.choices[earlier])


@quick
@given(tokens=lengths, option=options, causal=st.booleans())
def test_a_budget_for_all_is_dense_attention(
    build: Callable[..., Any], tokens: int, option: dict[str, Any], causal: bool
) -> None:
    case = build(tokens, **option, dtype=torch.float64, budget=tokens // 8 * 8 + 8, causal=causal)
    k, v = (x.repeat_interleave(2, dim=1) for x in (case.k, case.v))
    scores = case.q @ k.transpose(-1, -2) * case.scale
    cap, sinks = case.rules
    scores = cap * (scores / cap).tanh() if cap else scores
    t, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = (j <= t) if causal else torch.ones(tokens, tokens, dtype=torch.bool)
    if case.sliding_window:
        seen = seen & (j > t - case.sliding_window)
    shares = scores.masked_fill(~seen, -torch.inf).exp()
    total = shares.sum(-1, keepdim=True) + (0.0 if sinks is None else sinks.exp()[:, None, None])
    dense = shares / total @ v
    torch.testing.assert_close(case.run().out, dense, rtol=1e-12, atol=1e-12)


@quick
@given(tokens=lengths, option=options, data=st.data())
def test_prefill_chunks_and_decode_agree(
    build: Callable[..., Any], tokens: int, option: dict[str, Any], data: st.DataObject
) -> None:
    start = data.draw(st.sampled_from([[0, 0], [0, 13]]))
    case = build(tokens, batch=2, start=start, **option)
    if case.implementation == "reference":
        # Its products have other shapes in each call: rounded in float32, a vote may come to lie in the next step.
        case = case.to("cpu", torch.float64)
    whole = case.run()
    few = data.draw(st.sets(st.integers(1, tokens - 1), max_size=4))
    single = range(tokens - data.draw(st.integers(1, 20)), tokens)
    parts = case.run_in_chunks(sorted({*few, *single}))
    assert torch.equal(parts.spans, whole.spans)
    assert torch.equal(parts.choices, whole.choices)
    torch.testing.assert_close(parts.out, whole.out, **CLOSE)


@quick
@given(tokens=lengths, option=options, causal=st.booleans(), data=st.data())
def test_padding_is_inert(
    build: Callable[..., Any], tokens: int, option: dict[str, Any], causal: bool, data: st.DataObject
) -> None:
    start = [data.draw(st.integers(1, 60)), 0, data.draw(st.integers(1, 9))]
    right = [0, data.draw(st.integers(1, 60)), 5]
    length = [tokens - a - b for a, b in zip(start, right, strict=True)]
    case = build(tokens, batch=3, start=start, length=length, causal=causal, **option)
    index = torch.arange(tokens)
    padding = (index < case.start[:, None]) | (index >= (case.start + case.length)[:, None])
    for x in (case.q, case.k, case.v):
        x.masked_fill_(padding[:, None, :, None], 1e4)
    batch = case.run()
    assert (batch.out.masked_select(padding[:, None, :, None]) == 0).all()
    for row in range(3):
        alone = case.alone(row).run()
        real = ~padding[row]
        torch.testing.assert_close(batch.out[row, :, real], alone.out[0], **CLOSE)
        blocks = alone.spans.shape[2]
        assert torch.equal(batch.spans[row, :, :blocks], alone.spans[0])
        assert torch.equal(batch.choices[row, :, :blocks], alone.choices[0])
        assert (batch.spans[row, :, blocks:] == -1).all()
        assert (batch.choices[row, :, blocks:] == UNUSED).all()


def test_nothing_jumps_where_a_vote_crosses_the_cut(build: Callable[..., Any]) -> None:
    """Along a line of inputs the output moves in small steps, though the leaves that it comes from change."""
    case = build(200, dtype=torch.float64, dense_until=0)
    direction = torch.randn_like(case.q)
    outs, chosen = [], set()
    for step in range(60):
        result = replace(case, q=case.q + 5e-4 * step * direction).run()
        outs.append(result.out)
        chosen.add((result.choices < UNUSED).sum().item())
    moves = torch.stack([(b - a).abs().max() for a, b in pairwise(outs)])
    assert len(chosen) > 1
    assert moves.max() < 0.15  # 1.5 if leaves counted whole or not at all


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_follows_float32(build: Callable[..., Any], causal: bool) -> None:
    case = build(300, dtype=torch.bfloat16, causal=causal, sharpness=1.0, gate=0.3)
    exact = replace(case, q=case.q.float(), k=case.k.float(), v=case.v.float(), gate=case.gate.float()).run()
    half = case.run()
    assert half.out.dtype == torch.bfloat16
    levels = [case.geometry.risen(x.choices) for x in (half, exact)]
    same = (levels[0] > 0).eq(levels[1] > 0).float().mean()
    assert same > 0.9  # the pyramid is pooled in bfloat16
    dense = slice(0, 72 if causal else 0)
    torch.testing.assert_close(half.out[:, :, dense].float(), exact.out[:, :, dense], rtol=2e-2, atol=2e-2)
    assert (half.out.float() - exact.out).norm() / exact.out.norm() < 0.2
