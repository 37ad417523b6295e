"""One or a few new tokens on a GPU: the same as in one call, the same state, and nothing that moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.configs import HSAConfig
from retrofit.errors import ConfigError
from retrofit.kernels.hsa.decode import hsa_decode
from retrofit.kernels.hsa.geometry import FADE
from retrofit.kernels.hsa.state import HSAState
from retrofit.kernels.pyramid.ops import extend_spreads
from retrofit.targets.hsa import geometry_of

pytest.importorskip("triton")

from retrofit.kernels import tuned
from retrofit.kernels.hsa import triton_decode
from retrofit.kernels.hsa.triton_call import Call


@pytest.fixture
def implementation() -> str:
    return "triton"


def after(case: Any, tokens: int) -> tuple[Tensor, HSAState]:
    """The output for, and the state after, the first ``tokens`` index slots."""
    g, done = case.geometry, case.run(0, tokens)
    k = case.k[:, :, :tokens]
    nodes = case.pool(k)
    spreads = extend_spreads(k, nodes[0], None, case.start, new=tokens, ratio=g.node, offset=g.sink)
    return done.out, HSAState(tuple(nodes), spreads, (), done.spans, done.choices, g)


def decoded(case: Any, begin: int, steps: list[int], *, ending: bool = False) -> tuple[Tensor, HSAState]:
    """The output of the tokens from ``begin`` on, so many in each call, and the state after them.

    With ``ending`` there are slots behind the tokens, which nobody may read.
    """
    _, state = after(case, begin)
    state = state.with_room(case.k)
    outs = []
    for step in steps:
        end = begin + step
        k, v = case.k[:, :, :end], case.v[:, :, :end]
        if ending:
            behind = torch.full_like(case.k[:, :, end:], torch.nan)
            k, v = (torch.cat([x, behind], 2) for x in (k, v))
        outs.append(
            hsa_decode(
                case.q[:, :, begin:end],
                k,
                v,
                state,
                start=case.start,
                length=torch.minimum(case.length, end - case.start).clamp(min=0),
                sinks=case.rules.sinks,
                scale=case.scale,
                sliding_window=case.sliding_window,
                padded=case.padded,
                ending=ending,
            )
        )
        begin = end
    return torch.cat(outs, 2), state


def same_state(case: Any, actual: HSAState, expected: HSAState) -> None:
    """Compares what has a meaning to the bit: the selection, and the cells that each row's tokens complete."""
    g = case.geometry
    assert torch.equal(actual.spans, expected.spans)
    if (
        case.q.is_cuda and case.q.dtype == torch.float32
    ):  # other instructions may round a vote to the next step
        risen = [g.risen(x.choices) for x in (actual, expected)]
        assert (risen[0] - risen[1]).abs().max() <= FADE // 1024
    else:
        assert torch.equal(actual.choices, expected.choices)
    assert actual.spreads is not None and expected.spreads is not None
    for row, length in enumerate(case.length.tolist()):
        counts = [max(0, length - g.sink) // size for size in g.node_sizes]
        for level, count in enumerate(counts):
            found, wanted = (x.nodes[level][row, :, :count] for x in (actual, expected))
            assert torch.equal(found, wanted), (row, level)
        found, wanted = (x.spreads[row, :, : counts[0]] for x in (actual, expected))
        torch.testing.assert_close(
            found, wanted, rtol=0 if found.is_cuda else 1e-6, atol=0 if found.is_cuda else 1e-7
        )


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "inputs",
    [
        {"tokens": 111},
        {"tokens": 130, "beam": 2, "fanout": 2, "nodes_per_span": 8},
        {"tokens": 118, "batch": 3, "start": [0, 44, 9], "length": [118, 74, 101], "heads": 6, "kv_heads": 2},
        {"tokens": 111, "sinks": 0.5},
        {"tokens": 130, "sliding_window": 85},
        {"tokens": 79, "window": 8, "query_block": 16, "dense_until": 0},
    ],
    ids=["plain", "levels", "padded", "sinks", "sliding window", "wide query blocks"],
)
@pytest.mark.parametrize("ending", [False, True], ids=["slots", "room"])
def test_interpreted_tokens_equal_the_whole(
    build: Callable[..., Any], inputs: dict[str, Any], ending: bool
) -> None:
    case = build(**{"heads": 2, "kv_heads": 1, **inputs})
    steps = [1, 1, 3, 8, 1]
    begin = case.tokens - sum(steps)
    out, state = decoded(case, begin, steps, ending=ending and not case.padded)
    expected, whole = after(replace(case, implementation="blocked"), case.tokens)
    torch.testing.assert_close(out, expected[:, :, begin:], rtol=1e-5, atol=1e-5)
    same_state(case, state, whole)


def as_exact(case: Any, out: Tensor, expected: Tensor) -> None:
    """Compares the errors of the last tokens, decoded and in one call, against float64."""
    exact = replace(case, implementation="blocked").to(str(case.q.device), torch.float64).run().out
    exact = exact[:, :, -out.shape[2] :]
    error, bound = (float((x.double() - exact).norm() / exact.norm()) for x in (out, expected))
    assert error <= 1.5 * bound + 1e-6


@pytest.mark.interpreted
@pytest.mark.parametrize("inputs", [{}, {"sinks": 0.5}, {"heads": 5}], ids=["plain", "sinks", "five heads"])
def test_interpreted_tokens_in_half_precision_are_as_exact_as_the_whole(
    build: Callable[..., Any], inputs: dict[str, Any]
) -> None:
    case = build(118, **{"heads": 2, "kv_heads": 1, **inputs}).to("cpu", torch.float16)
    out, _ = decoded(case, 115, [1, 2])
    expected, _ = after(replace(case, implementation="blocked"), case.tokens)
    as_exact(case, out, expected[:, :, 115:])


@pytest.mark.interpreted
@pytest.mark.parametrize("keys", [8, 32], ids=["a leaf at a time", "several leaves at a time"])
@pytest.mark.parametrize("programs", [1, 7, 60])
def test_programs_share_the_work_in_any_way(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, programs: int, keys: int
) -> None:
    case = build(
        118, batch=3, start=[0, 44, 9], length=[118, 74, 101], heads=6, kv_heads=2, sliding_window=85
    )
    expected, _ = after(replace(case, implementation="blocked"), case.tokens)
    monkeypatch.setattr(Call, "programs", lambda *_: programs)
    monkeypatch.setattr(triton_decode, "ITEMS_AT_ONCE", 4)
    monkeypatch.setattr(triton_decode, "PARTS_AT_ONCE", 2)
    monkeypatch.setattr(triton_decode, "FEWEST_KEYS", keys)
    row = tuned.settings(case.q.device)
    tiles = {kind: replace(tile, keys=keys) for kind, tile in row.attend_parts.items()}
    monkeypatch.setitem(tuned.ROWS, tuned.INTERPRETED, replace(row, attend_parts=tiles))
    out, _ = decoded(case, 115, [1, 2])
    torch.testing.assert_close(out, expected[:, :, 115:], rtol=1e-5, atol=1e-5)


@pytest.mark.interpreted
def test_sums_are_divided_before_they_are_rounded(build: Callable[..., Any]) -> None:
    case = build(2051, heads=1, kv_heads=1, dense_until=2056).to("cpu", torch.float16)
    case = replace(case, k=torch.zeros_like(case.k), v=torch.ones_like(case.v), implementation="blocked")
    out, _ = decoded(case, 2050, [1])  # the sum of 2,051 equal weights is no number of float16
    assert torch.equal(out, torch.ones_like(out))


def test_a_state_without_room_is_refused(build: Callable[..., Any]) -> None:
    case = replace(build(110, heads=2, kv_heads=1), implementation="blocked")
    _, state = after(case, 109)
    options = {"start": case.start, "length": case.length, "scale": 1.0}
    with pytest.raises(ConfigError, match=r"room for the 110 slots.*state.with_room\(k\)"):
        hsa_decode(case.q[:, :, 109:], case.k, case.v, replace(state, spans=state.spans[:, :, :3]), **options)


DEFAULT = geometry_of(HSAConfig(dense_until=0, query_block=32))


def on_gpu(case: Any, dtype: torch.dtype, query_block: int = 32) -> Any:
    return replace(case, geometry=replace(DEFAULT, query_block=query_block)).to("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "inputs",
    [
        {"tokens": 3001, "heads": 9, "kv_heads": 3, "dim": 64},
        {"tokens": 2500, "heads": 8, "kv_heads": 2, "dim": 128},
        {"tokens": 2049, "heads": 16, "kv_heads": 1, "dim": 80},
        {"tokens": 10240, "heads": 4, "kv_heads": 4, "dim": 32},
        {"tokens": 2300, "batch": 3, "start": [0, 1900, 7], "length": [2300, 400, 2290], "dim": 64},
        {"tokens": 2300, "heads": 16, "kv_heads": 2, "dim": 64, "sinks": 1.0},
        {"tokens": 3000, "heads": 8, "kv_heads": 2, "dim": 128, "sliding_window": 1500},
    ],
    ids=["smollm2", "llama", "wide group", "long", "padded", "sinks", "sliding window"],
)
def test_on_a_gpu_tokens_equal_the_whole(
    build: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype
) -> None:
    group = inputs.get("heads", 4) // inputs.get("kv_heads", 2)
    case = on_gpu(build(**inputs), dtype, query_block=128 if group == 1 else 32)
    steps = [1] * 40 + [7, 16, 1]
    begin = case.tokens - sum(steps)
    out, state = decoded(case, begin, steps, ending=not case.padded)
    expected, whole = after(case, case.tokens)
    tolerance = 5e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out, expected[:, :, begin:], rtol=tolerance, atol=tolerance)
    if dtype != torch.float32:  # in which a vote may be rounded to the next step
        as_exact(case, out, expected[:, :, begin:])
    same_state(case, state, whole)


@pytest.mark.gpu
def test_a_graph_is_replayed_for_later_tokens(build: Callable[..., Any]) -> None:
    case = on_gpu(build(2600, dim=64), torch.bfloat16)
    begin, count = 2500, 100
    expected, whole = after(case, case.tokens)
    _, state = after(case, begin)
    state = state.with_room(case.k)
    q, length = case.q[:, :, begin : begin + 1].clone(), case.length.clone()
    # What comes later is not read.
    k, v = case.k.clone(), case.v.clone()
    k[:, :, begin:], v[:, :, begin:] = torch.nan, torch.nan

    def step() -> Tensor:
        return hsa_decode(q, k, v, state, start=case.start, length=length, scale=case.scale, ending=True)

    graph, out = torch.cuda.CUDAGraph(), torch.empty(0)
    for at in range(begin, begin + count):
        q.copy_(case.q[:, :, at : at + 1])
        k[:, :, at], v[:, :, at] = case.k[:, :, at], case.v[:, :, at]
        length.fill_(at + 1)
        if at == begin:
            step()  # compiles; it may be done twice
            with torch.cuda.graph(graph):
                out = step()
        graph.replay()
        torch.testing.assert_close(out, expected[:, :, at : at + 1], rtol=1e-2, atol=1e-2)
    same_state(case, state, whole)
