"""The loss of the search against its steps written out one query at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.kernels.hsa.selector import sample_positions, selector_loss


@pytest.fixture(params=["reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def divergence(case: Any, q: Tensor, k: Tensor, level: int, spans: list[int]) -> tuple[Tensor, Tensor]:
    """KL(true mass ‖ votes) of one step for q [G, D], and the votes."""
    g = case.geometry
    true, votes = [], []
    for span in spans:
        keys = k[g.sink + span * g.span_size(level) : g.sink + (span + 1) * g.span_size(level)]
        members = keys.reshape(-1, g.node_size(level), k.shape[1])
        pooled = members.mean(1)
        scores = q @ pooled.T * case.scale
        if level == 0:
            spread = (members - pooled[:, None]).square().mean((1, 2))
            scores = scores + g.spread / 2 * (case.scale * q).square().sum(-1, keepdim=True) * spread
        true.append((q @ keys.T * case.scale).logsumexp(-1))
        votes.append(scores.amax(-1))
    p, r = (torch.stack(x, -1).softmax(-1).mean(0) for x in (true, votes))
    return (p * (p.log() - r.log())).sum(), r


def loss_by_hand(case: Any, at: Tensor) -> Tensor:
    g = case.geometry
    leaf, coarse = [], []
    for row, positions in enumerate(at.tolist()):
        alone = case.alone(row)
        spans = alone.run().spans
        for t in positions:
            block = t // g.query_block
            t0 = block * g.query_block
            covered = g.covered(t0) if case.causal else g.complete(alone.tokens)
            for head in range(2):
                q, k = alone.q[0, head * 2 : head * 2 + 2], alone.k[0, head]
                kept = torch.full((g.beam,), -1)
                for level in range(g.top_level(covered), 0, -1):
                    ids = [i for i in g.coarse_ids(kept, torch.tensor(covered), level).tolist() if i >= 0]
                    if not ids:
                        continue
                    kl, votes = divergence(case, q[:, t0], k, level, ids)
                    coarse.append(kl)
                    best = sorted(range(len(ids)), key=lambda i: (-votes[i], ids[i]))[: g.beam]
                    chosen = sorted(ids[i] for i in best)
                    kept = torch.tensor(chosen + [-1] * (g.beam - len(chosen)))
                assert kept.tolist() == spans[0, head, block].tolist()
                length = None if case.causal else torch.tensor(alone.tokens)
                ids = g.block_leaf_ids(spans[0, head, block], torch.tensor(block), length).tolist()
                outside = [
                    i
                    for i in ids
                    if i >= 0
                    and (
                        g.sink + i * g.block < g.window_start(t)
                        or (not case.causal and g.sink + i * g.block >= g.window_end(t))
                    )
                ]
                leaf.append(divergence(case, q[:, t], k, 0, outside)[0])
    return torch.stack(leaf).mean() + torch.stack(coarse).mean()


def loss(case: Any, at: Tensor, real: Tensor, nodes: list[Tensor] | None = None) -> Tensor:
    nodes = case.pool(case.k) if nodes is None else nodes
    return selector_loss(
        case.q,
        case.k,
        nodes,
        case.spreads(case.k, nodes[0]),
        case.start,
        case.length,
        at,
        real,
        scale=case.scale,
        causal=case.causal,
        sliding_window=case.sliding_window,
        geometry=case.geometry,
    )


@pytest.mark.parametrize("causal", [True, False])
def test_the_loss_is_the_divergence_of_every_step(build: Callable[..., Any], causal: bool) -> None:
    case = build(700, dtype=torch.float64, causal=causal, batch=2, start=[0, 40], length=[690, 660])
    at = torch.tensor([[75, 300, 511, 689], [100, 333, 640, 659]])
    actual = loss(case, at, torch.ones_like(at, dtype=torch.bool))
    torch.testing.assert_close(actual, loss_by_hand(case, at))
    # What is not real does not count.
    some = torch.tensor([[True, False, True, True], [False] * 4])
    rows = torch.tensor([[75, 511, 689]])
    alone = case.alone(0)
    torch.testing.assert_close(loss(case, at, some), loss(alone, rows, torch.ones_like(rows).bool()))


def test_spans_of_equal_keys_have_no_loss(build: Callable[..., Any]) -> None:
    """Where the keys of a span are equal, its best node has the span's mass, up to a factor that all share."""
    case = build(200, dtype=torch.float64, beam=64)
    g = case.geometry
    behind, size = case.k[:, :, g.sink :], g.span_size(1)
    whole = behind.shape[2] // size * size
    behind[:, :, :whole] = behind[:, :, :whole:size].repeat_interleave(size, dim=2)
    at = torch.tensor([[199, 150, 120]])
    assert loss(case, at, torch.ones_like(at, dtype=torch.bool)).abs() < 1e-12


@pytest.mark.parametrize("sliding_window", [0, 100])
def test_the_gradient_points_downhill(build: Callable[..., Any], sliding_window: int) -> None:
    case = build(300, dtype=torch.float64, sliding_window=sliding_window)
    at, real = sample_positions(
        16, case.start, case.length, queries=300, tokens=300, causal=True, geometry=case.geometry
    )
    assert real.all() and (at >= case.geometry.dense_end).all() and (at < 300).all()
    nodes = [x.requires_grad_() for x in case.pool(case.k)]
    before = loss(case, at, real, nodes)
    gradients = torch.autograd.grad(before, nodes, allow_unused=True)
    used = [(x, d) for x, d in zip(nodes, gradients, strict=True) if d is not None and d.numel()]
    assert used and all(d.isfinite().all() for _, d in used)
    moved = [x - 0.05 * d if d is not None else x for x, d in zip(nodes, gradients, strict=True)]
    assert loss(case, at, real, moved) < before


def test_rows_without_sparse_queries_have_none(build: Callable[..., Any]) -> None:
    case = build(300, batch=3, start=[0, 0, 250], length=[300, 60, 50])
    for causal in (True, False):
        at, real = sample_positions(
            8, case.start, case.length, queries=300, tokens=300, causal=causal, geometry=case.geometry
        )
        assert real.tolist() == [[True] * 8, [False] * 8, [False] * 8]
        assert (at < case.length[:, None]).all()
        assert loss(case, at, real).isfinite()
        assert loss(case, at, torch.zeros_like(real)) == 0
