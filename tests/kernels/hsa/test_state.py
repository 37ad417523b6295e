from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retrofit.kernels.hsa.state import HSAState


def state_of(case: Any, tokens: int) -> HSAState:
    result = case.run(end=tokens)
    nodes, value_nodes = case.pool(case.k[:, :, :tokens]), case.pool(case.v[:, :, :tokens])
    spreads = case.spreads(case.k[:, :, :tokens], nodes[0])
    return HSAState(tuple(nodes), spreads, tuple(value_nodes), result.spans, result.choices, case.geometry)


@pytest.mark.parametrize("start", [[0, 0], [0, 13], [5, 29]])
def test_a_cropped_state_is_that_of_the_shorter_sequence(build: Callable[..., Any], start: list[int]) -> None:
    case = build(260, batch=2, start=start, gate=0.3)
    whole = state_of(case, 260)
    for tokens in (9, 97, 199, 200, 201, 259):
        cropped, shorter = whole.crop(case.start, tokens), state_of(case, tokens)
        assert torch.equal(cropped.spans, shorter.spans)
        assert torch.equal(cropped.choices, shorter.choices)
        assert cropped.spreads.shape == shorter.spreads.shape
        for level, (ours, theirs) in enumerate(zip(cropped.nodes, shorter.nodes, strict=True)):
            assert ours.shape == theirs.shape
            for row, begin in enumerate(start):
                count = max(0, tokens - begin - case.geometry.sink) // case.geometry.node_sizes[level]
                assert torch.equal(ours[row, :, :count], theirs[row, :, :count])


def test_crop_to_nothing(build: Callable[..., Any]) -> None:
    case = build(200, batch=2, start=[0, 13])
    state = state_of(case, 200).crop(case.start, 0)
    assert state.spans.shape[2] == state.choices.shape[2] == 0
    assert all(level.shape[2] == 0 for level in (*state.nodes, state.spreads))


def test_map_reaches_every_tensor(build: Callable[..., Any]) -> None:
    state = state_of(build(200, batch=2, gate=0.3), 200)
    swapped = state.map(lambda x: x.flip(0))
    assert torch.equal(swapped.spans[0], state.spans[1])
    assert torch.equal(swapped.choices[0], state.choices[1])
    assert torch.equal(swapped.spreads[0], state.spreads[1])
    assert all(torch.equal(a[0], b[1]) for a, b in zip(swapped.nodes, state.nodes, strict=True))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(swapped.value_nodes, state.value_nodes, strict=True))
