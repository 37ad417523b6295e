"""The blocked implementation against the definition: selections, outputs, gradients, chunks, padding, causality."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from retrofit.kernels.hsa import blocked, reference
from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.pyramid.blocked import extend_pyramid, extend_spreads

TINY = Geometry(
    window=32,
    sink=8,
    budget=32,
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


def pyramid(x: Tensor, start: Tensor, g: Geometry) -> list[Tensor]:
    return extend_pyramid(
        x,
        None,
        start,
        new=x.shape[2],
        ratios=g.ratios,
        offset=g.sink,
        pooling="mean",
        weights=[None] * g.levels,
    )


def spreads_of(x: Tensor, nodes: Tensor, start: Tensor, g: Geometry) -> Tensor | None:
    if not g.spread:
        return None
    return extend_spreads(x, nodes, None, start, new=x.shape[2], ratio=g.node, offset=g.sink)


class Case:
    """Inputs of one call."""

    def __init__(
        self,
        slots: int,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        starts: tuple[int, ...] = (0,),
        lengths: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        summaries: bool = False,
        geometry: Geometry = TINY,
        **options: Any,
    ) -> None:
        batch = len(starts)
        self.start = torch.tensor(starts)
        self.length = torch.tensor(lengths) if lengths else slots - self.start
        self.q = torch.randn(batch, heads, slots, 16, dtype=dtype)
        self.k = torch.randn(batch, kv_heads, slots, 16, dtype=dtype)
        self.v = torch.randn(batch, kv_heads, slots, 12, dtype=dtype)
        self.geometry, self.summaries = geometry, summaries
        self.options = {"scale": 0.25, "causal": True, "sliding_window": 0, **options}
        self.gate = torch.linspace(-0.3, 0.8, heads, dtype=dtype) if summaries else None

    def run(
        self,
        module: Any,
        *,
        low: int = 0,
        high: int | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q[:, :, low:high], self.k[:, :, :high], self.v[:, :, :high]
        spans, first = past if past else (None, None)
        nodes = pyramid(self.k[:, :, :high], self.start, self.geometry)
        values = pyramid(self.v[:, :, :high], self.start, self.geometry) if self.summaries else []
        length = self.length.clamp(max=k.shape[2] - self.start)
        result: tuple[Tensor, Tensor, Tensor] = module.hsa_attention(
            q,
            k,
            v,
            self.start,
            length,
            nodes,
            spreads_of(k, nodes[0], self.start, self.geometry),
            values,
            self.gate,
            spans,
            first,
            geometry=self.geometry,
            **self.options,
        )
        return result


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


CASES = {
    "1": lambda: Case(1),
    "63": lambda: Case(63),
    "65": lambda: Case(65),
    "200": lambda: Case(200),
    "one group": lambda: Case(200, heads=2, kv_heads=2),
    "three": lambda: Case(200, heads=3, kv_heads=1),
    "four": lambda: Case(150, heads=8, kv_heads=2),
    "by the nodes alone": lambda: Case(200, geometry=replace(TINY, threshold=0.0, spread=0.0)),
    "few share": lambda: Case(200, geometry=replace(TINY, threshold=0.3)),
    "padded": lambda: Case(200, starts=(0, 37, 70), lengths=(200, 163, 100)),
    "empty row": lambda: Case(130, starts=(0, 130), lengths=(130, 0)),
    "sliding": lambda: Case(220, starts=(0, 11), sliding_window=90),
    "not causal": lambda: Case(220, starts=(0, 11), lengths=(220, 150), causal=False),
    "no sinks": lambda: Case(200, geometry=replace(TINY, sink=0, window=8)),
    "odd blocks": lambda: Case(200, starts=(5,), geometry=replace(TINY, query_block=12)),
    "levels": lambda: Case(1100, heads=2, kv_heads=1, geometry=replace(TINY, beam=2, budget=16)),
    "dense start": lambda: Case(300, starts=(0, 9), geometry=replace(TINY, dense_until=160)),
    "summaries": lambda: Case(200, starts=(0, 9), summaries=True),
    "summaries, one node to a leaf": lambda: Case(
        200, summaries=True, geometry=replace(TINY, node=8, nodes_per_span=4)
    ),
    "summaries, levels": lambda: Case(
        900, heads=2, kv_heads=1, summaries=True, geometry=replace(TINY, beam=2, budget=16)
    ),
    "summaries, sliding": lambda: Case(260, summaries=True, sliding_window=130),
    "summaries, not causal": lambda: Case(260, summaries=True, causal=False),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str) -> None:
    case = CASES[name]()
    expected, actual = case.run(reference), case.run(blocked)
    assert torch.equal(actual[1], expected[1])
    # In float32 either may round a vote to the next of the steps in which a leaf fades in.
    risen = [case.geometry.risen(x) for x in (actual[2], expected[2])]
    assert (risen[0] - risen[1]).abs().max() <= 2
    assert error(actual[0], expected[0]) < 1e-5
    case.q, case.k, case.v = case.q.double(), case.k.double(), case.v.double()
    expected, actual = case.run(reference), case.run(blocked)
    assert all(torch.equal(*pair) for pair in zip(actual[1:], expected[1:], strict=True))
    assert error(actual[0], expected[0]) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype: torch.dtype) -> None:
    case = Case(200, dtype=dtype)
    out, spans, first = case.run(blocked)
    expected = case.run(reference)
    assert out.dtype == dtype
    assert torch.equal(spans, expected[1]) and torch.equal(first, expected[2])
    assert error(out.float(), expected[0].float()) < 1e-2


GRADIENTS = (
    "200",
    "three",
    "padded",
    "sliding",
    "not causal",
    "dense start",
    "summaries",
    "summaries, levels",
)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_those_of_the_reference(name: str) -> None:
    case = CASES[name]()
    g = case.geometry
    q, k, v = (x.double().requires_grad_() for x in (case.q, case.k, case.v))
    nodes = [x.detach().requires_grad_() for x in pyramid(k, case.start, g)]
    values = [x.detach().requires_grad_() for x in pyramid(v, case.start, g)] if case.summaries else []
    gate = None if case.gate is None else case.gate.double().requires_grad_()
    at = (case.start, case.length)
    options: dict[str, Any] = {**case.options, "geometry": g}
    spreads = spreads_of(k, nodes[0], case.start, g)
    out, spans, first = reference.hsa_attention(
        q, k, v, *at, nodes, spreads, values, gate, None, None, **options
    )
    grad = torch.randn_like(out)
    wanted = [q, k, v, *nodes, *values] + ([] if gate is None else [gate])
    expected = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    with torch.no_grad():
        found = blocked.hsa_attention_backward(
            grad, q, k, v, *at, nodes, values, gate, spans, first, **options
        )
    actual = [*found[:3], *found[3], *found[4]] + ([] if found[5] is None else [found[5]])
    for a, b in zip(actual, expected, strict=True):
        assert a.norm() == 0 if b is None else error(a, b) < 1e-12 or (a.norm() == 0 and b.norm() == 0)


@pytest.mark.parametrize("name", ["200", "padded", "sliding", "levels", "summaries", "dense start"])
def test_chunks_and_single_tokens_select_the_same(name: str) -> None:
    case = CASES[name]()
    slots = case.q.shape[2]
    whole = case.run(blocked)
    past, outs, low = None, [], 0
    first_chunk = slots - 41
    for high in (first_chunk, first_chunk + 3, first_chunk + 29, *range(slots - 11, slots + 1)):
        out, *past_list = case.run(blocked, low=low, high=high, past=past)
        past = (past_list[0], past_list[1])
        outs.append(out)
        low = high
    assert past is not None
    assert torch.equal(past[0], whole[1])
    assert torch.equal(past[1], whole[2])
    assert error(torch.cat(outs, 2), whole[0]) < 2e-6


@pytest.mark.parametrize("geometry", [TINY, replace(TINY, dense_until=160)])
@pytest.mark.parametrize("token", [150, 247, 300])
def test_later_tokens_change_no_bit(geometry: Geometry, token: int) -> None:
    case = Case(330, geometry=geometry)
    before = case.run(blocked)[0][:, :, :token]
    for x in (case.q, case.k, case.v):
        x[:, :, token:] = 3 * torch.randn_like(x[:, :, token:])
    assert torch.equal(case.run(blocked)[0][:, :, :token], before)


def test_the_number_of_threads_changes_no_bit() -> None:
    case, threads = Case(1500, starts=(0, 7)), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run(blocked))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_padding_holds_does_not_matter() -> None:
    case = Case(260, starts=(0, 37), lengths=(200, 180))
    expected = case.run(blocked)
    nodes = pyramid(case.k, case.start, TINY)
    spreads = spreads_of(case.k, nodes[0], case.start, TINY)
    for b, (start, length) in enumerate(zip(case.start.tolist(), case.length.tolist(), strict=True)):
        for x in (case.q, case.k, case.v):
            x[b, :, :start] = torch.nan
            x[b, :, start + length :] = torch.nan
    out, spans, first = blocked.hsa_attention(
        case.q,
        case.k,
        case.v,
        case.start,
        case.length,
        nodes,
        spreads,
        [],
        None,
        None,
        None,
        geometry=TINY,
        **case.options,
    )
    assert torch.equal(out, expected[0])
    assert torch.equal(spans, expected[1]) and torch.equal(first, expected[2])


def test_padded_rows_give_what_they_give_alone() -> None:
    case = Case(230, starts=(0, 37), lengths=(230, 170))
    out, _, first = case.run(blocked)
    alone = Case(170)
    alone.q, alone.k, alone.v = (x[1:, :, 37:207] for x in (case.q, case.k, case.v))
    expected = alone.run(blocked)
    assert torch.equal(first[1:, :, : expected[2].shape[2]], expected[2])
    assert error(out[1:, :, 37:207], expected[0]) < 2e-6
    assert not out[1, :, :37].any() and not out[1, :, 207:].any()


def test_a_cache_with_room_to_grow_is_read_in_place() -> None:
    case = Case(260)
    expected = case.run(blocked, low=255)
    for name in ("k", "v"):
        x = getattr(case, name)
        room = torch.full((*x.shape[:2], 400, x.shape[3]), torch.nan)
        room[:, :, :260] = x
        setattr(case, name, room[:, :, :260])
    assert torch.equal(case.run(blocked, low=255)[0], expected[0])


def test_a_budget_for_all_is_dense_attention() -> None:
    case = Case(190, geometry=replace(TINY, budget=256))
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.q, case.k, case.v, is_causal=True, scale=0.25, enable_gqa=True
    )
    assert error(case.run(blocked)[0], expected) < 2e-6


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                self.seen[storage] = weakref.finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return result

    def add(self, count: int) -> None:
        self.live += count
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize("summaries", [False, True])
def test_memory_is_linear_in_the_length(summaries: bool) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a dispatch mode sees its own thread alone
    try:
        peaks = []
        for slots in (1500, 3000):
            case = Case(slots, heads=2, kv_heads=1, summaries=summaries)
            with LiveBytes() as count:
                case.run(blocked)
            peaks.append(count.peak)
    finally:
        torch.set_num_threads(threads)
    output = 2 * 12 * 4  # bytes a token
    assert peaks[0] >= 1500 * output
    assert peaks[1] - peaks[0] <= 1500 * 10 * output
