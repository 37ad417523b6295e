from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrofit.kernels.hsa.geometry import MAX_POSITIONS, Geometry

LARGE = Geometry(512, 64, 384, 16, 2, 8, 16, 32, 16, 960)
SMALL = Geometry(32, 8, 32, 8, 2, 4, 8, 4, 8, 72)


def canonical_cover(leaves: int, top: int, fanout: int) -> dict[int, list[int]]:
    """Aligned complete spans of [0, leaves), the coarsest that fit first."""
    cover: dict[int, list[int]] = {level: [] for level in range(top + 1)}
    at = 0
    while at < leaves:
        level = max(x for x in range(top + 1) if at % fanout**x == 0 and at + fanout**x <= leaves)
        cover[level].append(at // fanout**level)
        at += fanout**level
    return cover


@pytest.mark.parametrize("geometry", [LARGE, SMALL])
def test_levels_reach_the_longest_row(geometry: Geometry) -> None:
    leaves = geometry.covered(MAX_POSITIONS - 1)
    top = geometry.top_level(leaves)
    assert top == geometry.levels - 1
    assert leaves // geometry.fanout**top <= geometry.beam * geometry.fanout
    assert torch.tensor(geometry.ratios).cumprod(0).tolist() == list(geometry.node_sizes)


@pytest.mark.parametrize("geometry", [LARGE, SMALL])
def test_numbers_and_tensors_agree(geometry: Geometry) -> None:
    t = torch.arange(0, 20_000, 37)
    for method in (geometry.window_start, geometry.window_end, geometry.covered, geometry.top_level):
        assert method(t).tolist() == [method(int(x)) for x in t]


@settings(deadline=None, max_examples=60)
@given(leaves=st.integers(0, 40_000), data=st.data())
def test_the_candidates_of_an_unlimited_beam_are_the_canonical_cover(
    leaves: int, data: st.DataObject
) -> None:
    geometry = SMALL
    covered = torch.tensor(leaves)
    top = geometry.top_level(leaves)
    assert top >= 1
    cover = canonical_cover(leaves, top, geometry.fanout)
    kept = torch.full((geometry.beam,), -1)
    for level in range(geometry.levels - 1, 0, -1):
        ids = geometry.coarse_ids(kept, covered, level)
        valid = ids[ids >= 0].tolist()
        children = [int(s) * geometry.fanout + i for s in kept if s >= 0 for i in range(geometry.fanout)]
        assert valid == children + cover.get(level, [])
        chosen = sorted(data.draw(st.permutations(valid))[: geometry.beam])
        kept = torch.tensor(chosen + [-1] * (geometry.beam - len(chosen)), dtype=torch.int64)
    leaf_ids = geometry.leaf_ids(kept, covered, covered)
    children = [int(s) * geometry.fanout + i for s in kept if s >= 0 for i in range(geometry.fanout)]
    assert leaf_ids[leaf_ids >= 0].tolist() == children + cover[0]


@pytest.mark.parametrize("query_block", [1, 7, 8, 24])
@pytest.mark.parametrize("window", [8, 32])
def test_leaves_that_leave_the_window_during_a_block_are_candidates(query_block: int, window: int) -> None:
    geometry = replace(SMALL, query_block=query_block, window=window)
    spans = torch.full((geometry.beam,), -1)
    for block in range(0, 60):
        ids = geometry.block_leaf_ids(spans, torch.tensor(block))
        first = geometry.covered(block * query_block)
        last = geometry.covered((block + 1) * query_block - 1)
        edge = first // geometry.fanout * geometry.fanout
        assert ids[ids >= 0].tolist() == list(range(edge, last))


def test_the_candidates_export_with_dynamic_sizes() -> None:
    class Candidates(torch.nn.Module):
        def forward(self, spans: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
            return SMALL.block_leaf_ids(spans, block)

    spans = torch.arange(60, dtype=torch.int32).reshape(3, 5, 4)
    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(
        Candidates(),
        (spans, torch.arange(20, 25)),
        dynamic_shapes=({0: dynamic, 1: dynamic}, {0: dynamic}),
    ).module()
    other, block = torch.randint(-1, 30, (2, 7, 4), dtype=torch.int32), torch.arange(40, 47)
    assert torch.equal(exported(other, block), SMALL.block_leaf_ids(other, block))
