"""The Triton kernels: in Triton's interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from retrofit.configs import HSAConfig
from retrofit.errors import ConfigError
from retrofit.kernels.dense.scores import ScoreRules
from retrofit.kernels.hsa.geometry import FADE, UNUSED
from retrofit.targets.hsa import geometry_of

pytest.importorskip("triton")

from retrofit.kernels import tuned
from retrofit.kernels.hsa import hopper
from retrofit.kernels.hsa.triton import FUSED_FROM, SETTLING, choosing
from retrofit.kernels.hsa.triton_call import Call
from retrofit.kernels.hsa.triton_choose import settle

DEFAULT = geometry_of(HSAConfig(dense_until=0, query_block=32))


@pytest.fixture
def implementation() -> str:
    return "triton"


def both(case: Any) -> tuple[Any, Any]:
    return case.run(), replace(case, implementation="blocked").run()


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "inputs",
    [
        {"tokens": 110},
        {"tokens": 118, "batch": 2, "start": [0, 9], "length": [110, 101]},
        {"tokens": 130, "beam": 2, "fanout": 2, "nodes_per_span": 8},
        {"tokens": 111, "heads": 3, "kv_heads": 1, "block": 16, "sink": 16, "dense_until": 0},
        {"tokens": 120, "heads": 6, "query_block": 32, "dense_until": 0},
        {
            "tokens": 150,
            "heads": 8,
            "block": 16,
            "sink": 16,
            "node": 1,
            "fanout": 8,
            "query_block": 32,
            "dense_until": 0,
        },
        {"tokens": 110, "sinks": 0.5},
        {"tokens": 110, "sinks": 90.0},
        {"tokens": 130, "sliding_window": 85},
        {"tokens": 118, "sliding_window": 21, "batch": 2, "start": [0, 9], "length": [110, 101]},
    ],
    ids=[
        "plain",
        "padded",
        "levels",
        "wide blocks",
        "wide group",
        "many nodes",
        "sinks",
        "sinks beyond the range",
        "sliding window",
        "narrow sliding window",
    ],
)
def test_interpreted_kernels_equal_blocked(build: Callable[..., Any], inputs: dict[str, Any]) -> None:
    case = build(**{"heads": 2, "kv_heads": 1, **inputs})
    actual, expected = both(case)
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual.spans, expected.spans)
    assert torch.equal(actual.choices, expected.choices)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("inputs", "chunks"),
    [
        ({"tokens": 100}, [75, 76, 91]),
        # The last chunk begins behind the first row's tokens, in the block where they end.
        ({"tokens": 118, "batch": 2, "start": [0, 9], "length": [110, 101]}, [75, 76, 91, 111]),
    ],
    ids=["plain", "padded"],
)
def test_interpreted_chunks_equal_the_whole(
    build: Callable[..., Any], inputs: dict[str, Any], chunks: list[int], dtype: torch.dtype
) -> None:
    case = build(**{"heads": 2, "kv_heads": 1, **inputs}).to("cpu", dtype)
    whole, parts = case.run(), case.run_in_chunks(chunks)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(parts.out, whole.out, rtol=tolerance, atol=tolerance)
    assert torch.equal(parts.spans, whole.spans)
    assert torch.equal(parts.choices, whole.choices)


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize(
    ("slots", "tokens"), [(900, 900), (70_000, 70_000), (600_000, 600_000), (300_001, 7_777)]
)
def test_no_block_that_begins_at_a_level_is_left_out(slots: int, tokens: int, level: int) -> None:
    call = Call(1, 8, 2, tokens, slots, 64, 64, 2, 0, DEFAULT, DEFAULT.blocks(slots), 0, tuned.ROWS[9, 0])
    first, before = call.first_block(level), (slots - tokens) // DEFAULT.query_block
    assert 0 <= first < call.blocks
    for number in range(before, before + first):
        assert DEFAULT.top_level(DEFAULT.covered(number * DEFAULT.query_block)) < level


def outweighed(case: Any) -> Any:
    """The case with such a key four behind the sinks."""
    return case.outweighed(case.geometry.sink + 4)


@pytest.mark.interpreted
def test_interpreted_rows_beyond_the_range_are_done_again(build: Callable[..., Any]) -> None:
    case = outweighed(build(110, heads=2, kv_heads=1))
    actual, expected = both(case)
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-5, atol=1e-5)
    at = case.geometry.sink + 4
    assert (actual.out[:, :, 80:] - case.v[:, :, at : at + 1]).abs().max() < 1e-5


@pytest.mark.interpreted
def test_interpreted_kernels_with_the_settings_of_another_gpu(build: Callable[..., Any]) -> None:
    case = build(110, heads=4, kv_heads=1, query_block=32, dense_until=0)
    with tuned.using(case.q.device, tuned.ROWS[8, 6]):
        actual, expected = both(case)
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual.choices, expected.choices)


@pytest.mark.interpreted
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("change", [lambda case: case, outweighed], ids=["plain", "beyond the range"])
def test_interpreted_blocks_of_several_tiles(
    build: Callable[..., Any], narrow: tuned.Settings, kv_heads: int, change: Callable[[Any], Any]
) -> None:
    case = change(build(125, heads=2, kv_heads=kv_heads, query_block=32, dense_until=0))
    with tuned.using(case.q.device, narrow):
        actual, expected = both(case)
        chunks = case.run_in_chunks([75, 76, 101])
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual.choices, expected.choices)
    torch.testing.assert_close(chunks.out, actual.out, rtol=1e-5, atol=1e-5)
    assert torch.equal(chunks.choices, actual.choices)


@pytest.mark.interpreted
def test_interpreted_sinks_need_not_be_contiguous(build: Callable[..., Any]) -> None:
    every_second = torch.tensor([0.0, 9.0, 3.0, 9.0])[::2]
    case = replace(build(100, heads=2, kv_heads=1), rules=ScoreRules(0.0, every_second))
    actual, expected = both(case)
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-5, atol=1e-5)


def test_sinks_of_other_heads_are_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"each of the 4 query heads, got shape \[3\]"):
        replace(build(100), rules=ScoreRules(0.0, torch.zeros(3))).run()


def test_what_the_kernels_cannot_do_is_refused(build: Callable[..., Any]) -> None:
    for changes, words in (
        ({"causal": False}, "not causal"),
        ({"rules": ScoreRules(2.0)}, "a softcap"),
        ({"geometry": replace(DEFAULT, window=32, budget=32, query_block=128)}, "a dense start that ends"),
    ):
        with pytest.raises(ConfigError, match=f"{words}.*use implementation='auto' or 'blocked'"):
            replace(build(100), **changes).run()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "inputs",
    [
        {"tokens": 3001, "heads": 9, "kv_heads": 3, "dim": 64, "geometry": DEFAULT},
        {"tokens": 2500, "heads": 8, "kv_heads": 2, "dim": 128, "geometry": DEFAULT},
        {"tokens": 2049, "heads": 16, "kv_heads": 1, "dim": 80, "geometry": DEFAULT},
        {
            "tokens": 1800,
            "heads": 2,
            "kv_heads": 2,
            "dim": 256,
            "geometry": replace(DEFAULT, query_block=128),
        },
        {"tokens": 2900, "heads": 4, "kv_heads": 4, "dim": 64, "geometry": replace(DEFAULT, query_block=128)},
        {
            "tokens": 2300,
            "batch": 2,
            "start": [0, 333],
            "length": [2200, 1960],
            "dim": 32,
            "geometry": DEFAULT,
        },
        {"tokens": 1500, "heads": 8, "kv_heads": 2, "dim": 64, "geometry": replace(DEFAULT, node=2)},
        {"tokens": 2300, "heads": 16, "kv_heads": 2, "dim": 64, "sinks": 1.0, "geometry": DEFAULT},
        {"tokens": 3000, "heads": 8, "kv_heads": 2, "dim": 128, "sliding_window": 1500, "geometry": DEFAULT},
        {"tokens": 1000},
        {"tokens": 700, "batch": 2, "start": [0, 40], "length": [690, 660], "beam": 2, "fanout": 2},
    ],
    ids=[
        "smollm2",
        "llama",
        "wide group",
        "wide heads",
        "heads alone",
        "padded",
        "many nodes",
        "sinks",
        "sliding window",
        "tiny",
        "levels",
    ],
)
def test_on_a_gpu_equals_blocked(
    build: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype
) -> None:
    inputs = dict(inputs)
    geometry = inputs.pop("geometry", None)
    case = build(inputs.pop("tokens"), **inputs)
    case = replace(case, geometry=geometry or case.geometry).to("cuda", dtype)
    actual, expected = both(case)
    exact = replace(case, implementation="blocked").to("cuda", torch.float64).run()
    risen = [case.geometry.risen(x.choices) for x in (actual, expected)]
    assert ((risen[0] - risen[1]).abs() <= FADE // 64).all(-1).float().mean() > 0.999
    error, bound = ((x.out.double() - exact.out).norm() / exact.out.norm() for x in (actual, expected))
    assert error <= 1.5 * bound + 1e-6
    chunks = case.run_in_chunks([case.tokens - 37, case.tokens - 1])
    assert torch.equal(chunks.spans, actual.spans)
    assert torch.equal(chunks.choices, actual.choices)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(chunks.out, actual.out, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_rows_beyond_the_range_are_done_again(build: Callable[..., Any], dtype: torch.dtype) -> None:
    case = outweighed(replace(build(1500, dim=64), geometry=DEFAULT)).to("cuda", dtype)
    out = case.run().out[:, :, 900:]
    at = DEFAULT.sink + 4
    value = case.v.repeat_interleave(2, 1)[:, :, at : at + 1]
    torch.testing.assert_close(out, value.expand_as(out), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [
        ({"heads": 8}, {}),
        ({"heads": 3, "kv_heads": 1, "tokens": 2049, "sinks": 1.0}, {}),
        ({"heads": 8, "kv_heads": 1, "batch": 2}, {"block": 16}),
        ({"heads": 4}, {"query_block": 64, "block": 64, "budget": 704, "sink": 64}),
        ({"heads": 2}, {"query_block": 128}),
        ({"heads": 16, "tokens": 1801}, {"query_block": 16}),
        ({"heads": 4, "kv_heads": 1}, {"window": 64, "budget": 512}),
    ],
    ids=[
        "llama",
        "group of 3, sinks",
        "group of 8, small leaves",
        "group of 2",
        "heads alone",
        "small blocks",
        "window",
    ],
)
def test_roles_on_a_gpu_change_a_rounding_at_most(
    build: Callable[..., Any], inputs: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype
) -> None:
    case = build(**{"tokens": 2500, "dim": 128, **inputs})
    case = replace(case, geometry=replace(DEFAULT, **sizes), padded=False).to("cuda", dtype)
    by_token = {name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    own = tuned.settings(case.q.device)
    if not own.attend_by_roles:
        pytest.skip("is for Hopper")
    for varied in (case, replace(case, **by_token), outweighed(case)):
        call = Call.of(varied.q, varied.k, varied.v, varied.geometry, sliding_window=0, padded=False)
        assert hopper.can_run(call.attend_by_roles, varied.q, varied.k, varied.v)
        found = []
        for row in (own, replace(own, attend_by_roles=None)):
            with tuned.using(case.q.device, row):
                cuts = [1100, 1101, case.tokens - 40]
                found.append((varied.run().out, varied.run_in_chunks(cuts).out))
        eps, dense = torch.finfo(dtype).eps, case.geometry.dense_end
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual[:, :, dense:], expected[:, :, dense:], rtol=eps, atol=1e-7)
            assert (actual == expected)[:, :, dense:].float().mean() > 0.99
            # Where all is dense, weights are shifted by another score, so that they round otherwise.
            difference = (actual - expected)[:, :, :dense].float().norm(dim=-1)
            assert (difference <= eps * expected[:, :, :dense].float().norm(dim=-1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [
        ({"heads": 8, "dim": 128}, {}),
        ({"heads": 9, "kv_heads": 3, "dim": 64, "tokens": 2049, "sinks": 1.0}, {}),
        ({"heads": 4, "kv_heads": 1, "dim": 64, "batch": 2, "sharpness": 8.0}, {}),
        ({"heads": 8, "dim": 128}, {"node": 4}),
        ({"heads": 2, "dim": 64}, {"query_block": 128}),
    ],
    ids=["llama", "smollm2, sinks", "batch", "smaller nodes", "heads alone"],
)
def test_votes_by_roles_on_a_gpu_are_the_same_bits(
    build: Callable[..., Any], inputs: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype
) -> None:
    case = build(**{"tokens": 3000, **inputs})
    case = replace(case, geometry=replace(DEFAULT, **sizes), padded=False).to("cuda", dtype)
    own = tuned.settings(case.q.device)
    if own.vote_by_roles is None:
        pytest.skip("is for Hopper")
    call = Call.of(case.q, case.k, case.v, case.geometry, sliding_window=0, padded=False)
    assert call.vote_by_roles is not None
    actual, chunks = case.run(), case.run_in_chunks([1100, 1101, case.tokens - 40])
    with tuned.using(case.q.device, replace(own, vote_by_roles=None)):
        expected = case.run()
    for found in (actual, chunks):
        assert torch.equal(found.spans, expected.spans)
        assert torch.equal(found.choices, expected.choices)


@pytest.mark.gpu
@pytest.mark.parametrize("roles", [True, False], ids=["roles", "fused"])
@pytest.mark.parametrize("sinks", [None, 1.0], ids=["plain", "sinks"])
def test_on_a_gpu_a_long_dense_start_equals_blocked(
    build: Callable[..., Any], sinks: float | None, roles: bool
) -> None:
    case = build(4100, heads=8, dim=128, sinks=sinks)
    case = replace(case, geometry=replace(DEFAULT, dense_until=FUSED_FROM), padded=False)
    case = case.to("cuda", torch.bfloat16)
    own = tuned.settings(case.q.device)
    with tuned.using(case.q.device, own if roles else replace(own, attend_by_roles=None)):
        actual, expected = both(case)
    exact = replace(case, implementation="blocked").to("cuda", torch.float64).run()
    for part in (slice(FUSED_FROM), slice(FUSED_FROM, None)):
        error, bound = (
            (x.out.double() - exact.out)[:, :, part].norm() / exact.out[:, :, part].norm()
            for x in (actual, expected)
        )
        assert error <= 1.5 * bound


@pytest.mark.gpu
def test_on_a_gpu_no_bit_depends_on_later_tokens(build: Callable[..., Any]) -> None:
    case = replace(build(3000, dim=64), geometry=DEFAULT).to("cuda", torch.bfloat16)
    before = case.run().out
    for at in (1500, 2047, 2048, 2999):
        q, k, v = (x.clone() for x in (case.q, case.k, case.v))
        for x in (q, k, v):
            x[:, :, at:] = torch.randn_like(x[:, :, at:])
        after = replace(case, q=q, k=k, v=v).run().out
        assert torch.equal(after[:, :, :at], before[:, :, :at])


@pytest.mark.gpu
def test_a_call_is_captured_in_a_graph(build: Callable[..., Any]) -> None:
    case = replace(build(2000, dim=64), geometry=DEFAULT).to("cuda", torch.bfloat16)
    past = case.run(0, 1999)
    expected = case.run(1999, 2000, past).out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = case.run(1999, 2000, past).out
    actual.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sliding_window", [0, 150])
@pytest.mark.parametrize("threshold", [0.0, 0.002])
def test_rows_choose_the_highest_votes_that_fit(threshold: float, sliding_window: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"window": 32, "sink": 8, "budget": 40, "block": 8, "node": 4, "fanout": 4, "beam": 4}
    g = replace(DEFAULT, **sizes, query_block=16, threshold=threshold)
    q = torch.zeros(1, 1, 400, 16, dtype=torch.float16, device=device)
    call = Call.of(q, q, q, g, sliding_window=sliding_window, padded=False)
    least, most, first = g.least_vote(call.votes), call.votes.most, g.dense_end // g.query_block
    t0 = torch.arange(call.blocks)[:, None] * g.query_block
    edge = g.covered(t0) // g.fanout
    spans = torch.stack([torch.randperm(int(n) + g.beam)[: g.beam].sort()[0] for n in edge])
    spans = torch.where(spans < edge, spans, -1)
    leaf = torch.cat([spans, edge + torch.arange(g.leaf_width // g.fanout + 1 - g.beam)], 1)
    leaf = (leaf[..., None] * g.fanout + torch.arange(g.fanout)).flatten(1)[:, None, : g.leaf_width]
    t = (t0 + torch.arange(g.query_block))[..., None]
    is_open = (leaf >= 0) & (leaf < g.covered(t))
    if sliding_window:
        is_open &= g.sink + (leaf + 1) * g.block - 1 > t - sliding_window
    votes = torch.randint(-(2**15), 2**15, call.empty_votes(call.blocks, q.device).shape)
    vote = torch.randint(-most, most + 1, is_open.shape)
    ties = torch.tensor([-most, least, least + 1, most]).clamp(-most, most)
    vote[:, ::3] = ties[torch.randint(4, vote[:, ::3].shape)]
    votes[..., : g.leaf_width] = torch.where(is_open, vote, votes[..., : g.leaf_width])

    level = torch.where(is_open, vote - least, 0).clamp(min=0)
    wanted = level > level.sort(descending=True)[0][..., g.leaves_per_query, None]
    by_row = torch.where(wanted, torch.arange(g.query_block)[:, None], g.query_block).amin(1)
    packed = g.packed(by_row, torch.arange(g.leaf_width), FADE)
    expected = torch.where(by_row < g.query_block, packed, UNUSED).sort()[0]

    choices = torch.zeros(1, 1, call.blocks, call.choices, dtype=torch.int32, device=device)
    lists = call.empty_lists(q.device)
    settle[(call.blocks,)](
        *[torch.zeros(1, dtype=torch.int64, device=device)] * 2, spans.to(device, torch.int32), choices,
        votes.to(device, call.votes.dtype), *lists, *call.extent, call.total_blocks, 0, least,
        FRESH=True, **choosing(call), **call.listing, **SETTLING,
    )  # fmt: skip
    assert torch.equal(choices[0, 0, first:, : g.leaf_width].cpu(), expected[first:].to(torch.int32))
    assert (choices[0, 0, :first] == UNUSED).all()
    assert (choices[..., g.leaf_width :] == UNUSED).all()
