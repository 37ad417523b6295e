"""Each key counts at most once, and the account says how many: read off the operator's own output."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from retrofit.kernels.hsa.account import count
from retrofit.kernels.hsa.geometry import UNUSED, Geometry, Votes
from tests.kernels.hsa.conftest import Case

pytestmark = pytest.mark.usefixtures("whole_leaves")


def weights_on_keys(case: Any) -> tuple[Any, Tensor]:
    """How often each key counts for each query, [B, Hkv, T, N]: the output for one-hot values and nearly equal
    scores, times the number of keys counted. What is chosen is up to the leaves' spreads."""
    eye = torch.eye(case.tokens, dtype=torch.float64).expand(*case.k.shape[:3], -1)
    result = Apart(**{**vars(case), "q": case.q * 1e-4, "v": eye}).run()
    shares = result.out[:, :: case.q.shape[1] // case.k.shape[1]]
    t = torch.arange(case.tokens)
    own = shares[:, :, t, t].unsqueeze(-1)  # every query counts its own key once
    return result, torch.where(own > 0, shares / own.clamp(min=1e-300), 0)


class Apart(Case):
    """A case whose leaves weigh very different amounts, though their scores do not."""

    def spreads(self, x: Tensor, nodes: Tensor) -> Tensor | None:
        spreads = super().spreads(x, nodes)
        return None if spreads is None else spreads * 1e10


OPTIONS = [
    {},
    {"dense_until": 0},
    {"dense_until": 160, "beam": 1},
    {"sliding_window": 100},
    {"causal": False},
    {"causal": False, "sliding_window": 100},
    {"start": [0, 17], "length": [300, 250], "batch": 2},
    {"start": [0, 17], "length": [300, 250], "batch": 2, "causal": False},
]


def account(case: Any, result: Any) -> tuple[Tensor, Tensor]:
    return count(
        result.spans,
        result.choices,
        case.start,
        case.length,
        queries=case.tokens,
        tokens=case.tokens,
        causal=case.causal,
        sliding_window=case.sliding_window,
        summaries=case.gate is not None,
        geometry=case.geometry,
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_keys_executed(build: Callable[..., Any], option: dict[str, Any]) -> None:
    case = build(300, dtype=torch.float64, **option)
    result, weights = weights_on_keys(case)
    assert ((weights < 1e-6) | ((weights - 1).abs() < 0.01)).all()
    keys, _ = account(case, result)
    assert torch.equal(keys.double(), weights.round().sum(-1))


@pytest.mark.parametrize("option", OPTIONS)
def test_with_summaries_every_key_counts_exactly_once(
    build: Callable[..., Any], option: dict[str, Any]
) -> None:
    case = build(300, dtype=torch.float64, gate=1.0, **option)
    _, weights = weights_on_keys(case)
    for row in range(len(case.start)):
        begin, n = int(case.start[row]), int(case.length[row])
        inside = weights[row, :, begin : begin + n, begin : begin + n]
        t, j = torch.arange(n)[:, None], torch.arange(n)
        seen = (j <= t) if case.causal else torch.ones(n, n, dtype=torch.bool)
        if case.sliding_window:
            # What is partly out of the sliding window is in no summary: stated as loss.
            seen = seen & (j > t - case.sliding_window)
            assert (inside[:, ~seen] == 0).all()
            partly = seen & (j < t - case.sliding_window + case.geometry.block)
            seen = seen & ~partly
        assert torch.allclose(inside[:, seen], torch.ones((), dtype=torch.float64), rtol=0.01)
        assert inside.max() < 1.01


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("gate", [None, 1.0])
def test_nodes_scored(build: Callable[..., Any], option: dict[str, Any], gate: float | None) -> None:
    case = build(300, dtype=torch.float64, gate=gate, **option)
    result = case.run()
    _, nodes = account(case, result)
    for row in range(len(case.start)):
        n = int(case.length[row])
        for t in [0, 71, 72, 100, 163, 164, 175, 176, 231, 239, n - 1]:
            expected = nodes_by_hand(case, result, row, 1, t, n)
            assert nodes[row, 1, int(case.start[row]) + t] == pytest.approx(expected), t


def nodes_by_hand(case: Any, result: Any, row: int, head: int, t: int, n: int) -> float:
    g: Geometry = case.geometry
    if (t if case.causal else n - 1) < g.dense_end:
        return 0.0
    block = torch.tensor(t // g.query_block)
    t0 = int(block) * g.query_block
    low = t - case.sliding_window + 1 if case.sliding_window else 0
    covered = g.covered(t0) if case.causal else g.complete(n)
    end = g.covered(t) if case.causal else covered
    total = 0.0
    kept = torch.full((g.beam,), -1)
    for level in range(g.levels - 1, 0, -1):
        ids = g.coarse_ids(kept, torch.tensor(covered), level)
        ids = ids[ids >= 0]
        total += len(ids) * g.nodes_per_span / g.query_block
        kept = torch.nn.functional.pad(ids[: g.beam], (0, max(0, g.beam - len(ids))), value=-1)
    leaves = g.block_leaf_ids(result.spans[row, head, block], block, None if case.causal else torch.tensor(n))
    window = range(g.window_start(t), t + 1 if case.causal else g.window_end(t))
    tail = [] if case.causal else range(g.sink + covered * g.block, n)
    exact = {*range(g.sink), *window, *tail} & set(range(max(0, low), min(n, t + 1) if case.causal else n))
    total += len(exact)
    executed = set()
    when = t - t0 if case.causal else g.query_block - 1
    first_rows = g.first_rows(result.choices[row, head, block])
    for leaf, first in zip(leaves.tolist(), first_rows.tolist(), strict=True):
        begin = g.sink + leaf * g.block
        if leaf < 0 or begin in window or (case.causal and begin > t) or begin + g.block <= low:
            continue
        total += g.block // g.node
        if first <= when:
            executed.add(leaf)
    if case.gate is None:
        return total

    def free(level: int, span: int) -> bool:
        first, size = span * g.fanout**level, g.fanout**level
        limit = end if level == 0 else covered
        begins = [g.sink + leaf * g.block for leaf in range(first, first + size)]
        inside = first + size <= limit and begins[0] >= low
        return inside and not any(b in window or (b - g.sink) // g.block in executed for b in begins)

    for level in range(g.top_level(covered) + 1):
        for span in range(end // g.fanout**level):
            parent = level < g.top_level(covered) and free(level + 1, span // g.fanout)
            total += g.nodes_in_span(level) * (free(level, span) and not parent)
    return total


def test_cost_grows_like_the_logarithm_of_the_position() -> None:
    g = Geometry(512, 64, 384, 16, 2, 8, 16, 32, 16, 960)
    costs = []
    for tokens in [2**power for power in range(13, 18)]:
        blocks = g.blocks(tokens)
        spans = torch.arange(g.beam, dtype=torch.int32).expand(1, 1, blocks, -1)
        candidate = torch.arange(g.leaf_width)
        choices = (
            g.packed(candidate.remainder(g.query_block), candidate, candidate * 0 + 4096).int().sort().values
        )
        choices = pad(choices, (0, g.choices(Votes.of(torch.float32)) - g.leaf_width), value=UNUSED).expand(
            1, 1, blocks, -1
        )
        keys, nodes = count(
            spans,
            choices,
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([tokens]),
            queries=1,
            tokens=tokens,
            causal=True,
            sliding_window=0,
            summaries=False,
            geometry=g,
        )
        costs.append(float(keys + nodes))
    assert all(after / before < 1.1 for before, after in pairwise(costs))
    assert costs[-1] / costs[0] < 1.4
