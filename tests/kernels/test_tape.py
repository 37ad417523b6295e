"""Functions that are done again from notes: what they return, and what they launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


import retrofit
from retrofit.attention_call import unpadded
from retrofit.cache import RetrofitLayer
from retrofit.kernels import launch, repeat, tape
from retrofit.kernels.hsa import hopper
from retrofit.kernels.hsa.triton_roles import gl
from retrofit.kernels.launch import Kernel, Launched
from retrofit.kernels.prepared import Prepared
from retrofit.kernels.pyramid import ops as pyramid
from retrofit.targets import hsa, maha
from retrofit.targets.hsa import HSAAttention
from retrofit.targets.maha import MAHAAttention

WIDTHS = (96, 160, 320)


@pytest.fixture(autouse=True)
def no_tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_tapes", type(tape._tapes)())


class Doubling:
    """Compiled: writes twice the floats at one address to another one."""

    function, packed_metadata = "function", "metadata"
    metadata = SimpleNamespace(
        num_ctas=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        global_scratch_size=0,
        profile_scratch_size=0,
    )

    def run(self, *arguments: Any) -> None:
        to, source, count, *_ = arguments[9:]
        floats = ctypes.c_float * count
        found, wanted = floats.from_address(source), floats.from_address(to)
        wanted[:] = [2 * x for x in found]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor], None]:
    """A kernel: to, source → to = 2 · source, for what lies in rows."""
    monkeypatch.setattr(launch.driver, "_active", SimpleNamespace(get_current_stream=lambda device: "stream"))
    compiled = Doubling()

    class Function:
        arg_names = ("to", "source", "count", "SIZE")

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(to: Tensor, source: Tensor, count: int, **constants: Any) -> Doubling:
                compiled.run(*[None] * 9, to.data_ptr(), source.data_ptr(), count)
                return compiled

            return run

    kernel = Kernel(Function())
    return lambda to, source: kernel[(1,)](to, source, source.numel(), SIZE=8)


def done(function: Callable[..., Any], *tensors: Tensor | None, about: str = "") -> Any:
    return tape.repeated(function, tensors, about)


def kept() -> list[Any]:
    """Tapes, and why there are none."""
    return [x for x in tape._tapes.values() if x != tape.ONCE]


def test_a_tape_does_what_the_function_does(double: Callable[[Tensor, Tensor], None]) -> None:
    calls = []

    def function(x: Tensor, y: Tensor | None) -> Any:
        calls.append(x)
        half, out = x.new_empty(3, 4), torch.empty(2, 6, 4)
        double(half, x[3:])
        double(out[0, :3], half)
        out[0, 3:] = x[:3]
        out[1] = torch.cat([half, half]) + 1
        levels = x.new_empty(24).split([8, 16])
        double(levels[1], out[1, :4])
        double(levels[0], x[1:3])
        return out.transpose(0, 1), [levels[0].view(2, 4), None, levels[1].view(4, 4)], x

    for i in range(5):
        x = torch.randn(6, 4)
        out, (first, nothing, second), same = done(function, x, None)
        half = 2 * x[3:]
        expected = torch.stack([torch.cat([2 * half, x[:3]]), torch.cat([half, half]) + 1])
        assert torch.equal(out.transpose(0, 1), expected), i
        assert torch.equal(first, 2 * x[1:3])
        assert torch.equal(second, 2 * expected[1, :4])
        assert nothing is None
        assert same is x
        assert out.stride() == (4, 24, 1)
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert len(calls) == 2
    (only,) = kept()
    assert [type(step).__name__ for step in only.steps].count("Launch") == 4


def test_what_only_kernels_use_is_allocated_at_once(double: Callable[[Tensor, Tensor], None]) -> None:
    def function(x: Tensor) -> Tensor:
        one, two, out = torch.empty(200), torch.empty(200), torch.empty(200)
        double(one, x)
        double(two, one)
        double(out, two)
        return out

    for _ in range(4):
        x = torch.randn(200)
        assert torch.equal(done(function, x), 8 * x)
    (only,) = kept()
    assert only.room == 2 * 2 * tape.PIECE
    assert len(only.shared) == 1


@pytest.fixture
def filled() -> Iterator[None]:
    """What is allocated is not what it happens to be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_zeros_are_cleared_with_what_is_allocated_at_once(
    double: Callable[[Tensor, Tensor], None], filled: None
) -> None:
    def function(x: Tensor) -> Tensor:
        one, ones = torch.empty(20), torch.zeros(30)
        other, out = torch.zeros_like(ones), x.new_zeros(3, 30)
        double(one, x)
        double(ones, one[:9])
        double(out[0], ones)
        double(out[1], other)
        out[2, 1:].add_(1)
        return out.t()

    for _ in range(4):
        x = torch.randn(9)
        expected = torch.zeros(3, 30)
        expected[0, :9] = 8 * x
        expected[2, 1:] = 1
        assert torch.equal(done(function, x), expected.t())
    (only,) = kept()
    assert only.cleared_room == 2 * tape.PIECE and only.room == 3 * tape.PIECE
    assert [cleared for *_, cleared in only.shared] == [True]
    assert sum(isinstance(step, tape.Operation) for step in only.steps) == 1


def test_what_is_cleared_or_filled_later_is_so_from_a_tape(
    double: Callable[[Tensor, Tensor], None], filled: None
) -> None:
    def function(x: Tensor) -> tuple[Any, Tensor, Tensor]:
        written, zeros = torch.empty(9), torch.zeros(4)
        double(written, x)
        torch.zeros(9, out=written)
        zeros.add_(x[:4])
        return x.topk(3), written + 0, zeros.as_strided((2, 2), (0, 3))

    for _ in range(4):
        x = torch.randn(9)
        best, written, apart = done(function, x)
        assert torch.equal(best.values, x.topk(3).values) and torch.equal(best.indices, x.topk(3).indices)
        assert torch.equal(written, torch.zeros(9))
        assert torch.equal(apart, x[:4].as_strided((2, 2), (0, 3)))
    assert [type(x) for x in kept()] == [tape.Tape]


def test_tensors_of_another_kind_have_their_own_tape(double: Callable[[Tensor, Tensor], None]) -> None:
    def function(x: Tensor) -> Tensor:
        out = torch.empty(x.numel())
        double(out, x)
        return out

    wide = torch.randn(4, 9)
    for x in (wide[0, :8], wide[1, :8], wide.t().contiguous()[0], wide[0, 1:], wide[2, :8], wide[3, :8]):
        for _ in range(3):
            assert torch.equal(done(function, x), 2 * x)
    assert torch.equal(done(function, wide[0, :8], about="another"), 2 * wide[0, :8])
    assert len(kept()) == 6
    assert len(tape._tapes) == 7


def test_tensors_in_one_storage_are_told_from_those_in_two(double: Callable[[Tensor, Tensor], None]) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty(8)
        double(out[:4], x)
        double(out[4:], y)
        return out

    for begin in range(3):
        both = torch.randn(8)
        apart = torch.cat([torch.zeros(4), both[4:]])
        pair = both[:4], (both if begin < 2 else apart)[4:]
        for _ in range(2):
            assert torch.equal(done(function, *pair), 2 * both)
    assert torch.equal(
        done(function, torch.zeros(8)[:4], both[4:]), torch.cat([torch.zeros(4), 2 * both[4:]])
    )
    (only,) = kept()
    assert only.alike == [(0, 1)]


def test_a_part_without_elements_is_where_its_storage_is(double: Callable[[Tensor, Tensor], None]) -> None:
    calls = []

    def function(nothing: Tensor, x: Tensor, y: Tensor) -> Tensor:
        calls.append(x)
        out = torch.empty(8)
        double(out[:4], x)
        double(out[4:], y)
        return out + nothing.sum()

    for i in range(4):
        both = torch.randn(9)
        assert torch.equal(done(function, both[9:], both[:4], both[4:8]), 2 * both[:8]), i
    assert len(calls) == 2
    (only,) = kept()
    assert only.alike == [(0, 1), (0, 2)]


def test_tensors_without_storage(double: Callable[[Tensor, Tensor], None]) -> None:
    calls = []

    def function(x: Tensor, nothing: Tensor, whole: Tensor) -> Any:
        calls.append(x)
        out, empty = torch.empty(4), torch.empty(0, 3, dtype=torch.int32)
        double(out, x)
        double(empty, nothing)
        return out + nothing.sum() + torch.cat([nothing, x]), empty, nothing, x[:0].clone(), whole

    for i in range(4):
        x, nothing, whole = torch.randn(4), torch.empty(0), torch.empty(0, 2, dtype=torch.int64)
        out, *others = done(function, x, nothing, whole)
        assert torch.equal(out, 3 * x), i
        assert [(y.shape, y.dtype) for y in others] == [
            ((0, 3), torch.int32),
            ((0,), torch.float32),
            ((0,), torch.float32),
            ((0, 2), torch.int64),
        ]
    assert len(calls) == 2


def test_what_a_tape_cannot_do_is_done_by_the_function(double: Callable[[Tensor, Tensor], None]) -> None:
    known = torch.ones(4)

    def reads(x: Tensor) -> Tensor:
        return x * x.sum().item()

    def knows(x: Tensor) -> Tensor:
        out = torch.empty(4)
        double(out, known)
        return out + x

    def counts(x: Tensor) -> Tensor:
        return x[x > 0]

    def turns(x: Tensor) -> Tensor:
        return x.view(torch.int32) + 1

    for function, why in (
        (reads, "depends on numbers"),
        (counts, "depends on numbers"),
        (turns, "another dtype"),
        (knows, "that was not given"),
    ):
        tape._tapes.clear()
        for _ in range(4):
            x = torch.randn(4)
            assert torch.equal(done(function, x), function(x))
        (only,) = kept()
        assert why in only


def test_who_watches_sees_the_function(double: Callable[[Tensor, Tensor], None]) -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x + 1

    x = torch.zeros(3)
    for _ in range(3):
        done(function, x)
    assert len(calls) == 2
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        done(function, x)
    with torch.profiler.profile():
        done(function, x)
    assert len(calls) == 4
    assert done(function, x.clone().requires_grad_()).requires_grad
    assert len(calls) == 5
    done(function, x)
    assert len(calls) == 5


def test_tapes_that_were_not_played_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "MOST_TAPES", 2)
    for about in ("a", "b", "a", "c"):
        done(lambda x: x + 1, torch.zeros(3), about=about)
    assert [key[0] for key in tape._tapes] == ["a", "c"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is launched, on a GPU that does nothing."""
    log: list[Any] = []

    def launched(kernel: Kernel, grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]) -> None:
        def run(stream: Any, values: list[Any]) -> None:
            log.append((kernel.function.fn.__name__, grid, values))

        run(None, [*map(addressed, arguments), *constants.values()])
        if launch._thread.listener is not None:
            launch._thread.listener(Launched(run, arguments, tuple(constants.values()), True))

    monkeypatch.setattr(Kernel, "_launch", launched)
    monkeypatch.setattr(launch.driver, "_active", SimpleNamespace(get_current_stream=lambda device: None))
    monkeypatch.setattr(hopper, "INTERPRETED", gl.constexpr(False))
    monkeypatch.setattr("retrofit.kernels.maha.hopper.INTERPRETED", gl.constexpr(False))
    monkeypatch.setattr(pyramid, "_on_gpu", lambda x: True)
    monkeypatch.setattr(hsa, "can_decode", lambda *_, **__: True)
    for target in (HSAAttention, MAHAAttention):
        monkeypatch.setattr(target, "_by_kernels", lambda *_: True)
    for module in (hsa, maha, repeat):
        monkeypatch.setattr(module, "repeated", tape.repeated)
    yield log


def addressed(x: Any) -> Any:
    """An argument of a launch with addresses in the places of tensors."""
    if isinstance(x, tuple):
        return tuple(map(addressed, x))
    return x.data_ptr() if isinstance(x, Tensor) else x


def told(log: list[Any], tensors: list[Tensor]) -> list[Any]:
    """Launches with names in the places of addresses."""
    names = {x.data_ptr(): f"input {i}" for i, x in enumerate(tensors)}

    def name(x: Any) -> Any:
        if hasattr(x, "base"):
            return name(x.base.data_ptr()), list(x.shape), list(x.strides)
        if isinstance(x, int) and abs(x) > 2**32:  # no number of a kernel is as large
            return names.setdefault(x, f"allocation {len(names)}")
        if isinstance(x, (tuple, list)):
            return tuple(map(name, x))
        return x

    return [(kernel, grid, tuple(map(name, values))) for kernel, grid, values in log]


def inputs(tokens: int, seed: int, packed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    if packed:
        all_ = torch.randn(1, tokens, 8, 128, generator=random).bfloat16()
        q, k, v = all_.transpose(1, 2).split([4, 2, 2], 1)
        return q, k, v
    q, k, v = (torch.randn(1, heads, tokens, 128, generator=random).bfloat16() for heads in (4, 2, 2))
    return q, k, v


OPTIONS: dict[str, Any] = {
    **{"heads": 4, "kv_heads": 2, "head_dim": 128, "value_dim": 128, "scale": 0.1, "causal": True},
    **{"sliding_window": 0, "softcap": 0.0, "sinks": False},
}
TARGETS: dict[str, Callable[[], Any]] = {
    "hsa": lambda: HSAAttention(retrofit.HSAConfig(dense_until=0), **OPTIONS),
    "hsa, learned pooling": lambda: HSAAttention(
        retrofit.HSAConfig(dense_until=0, pooling="learned"), **OPTIONS
    ),
    "maha": lambda: MAHAAttention(retrofit.MAHAConfig(scales=4, widths=WIDTHS), **OPTIONS),
}


def target_of(name: str, device: str, implementation: str) -> Any:
    target = TARGETS[name]().to(device, torch.bfloat16).eval()
    target.implementation = implementation
    return target


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that does something")
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_targets_launch_the_same_from_a_tape(launches: list[Any], name: str, packed: bool) -> None:
    target = target_of(name, "cpu", "triton")
    found = []
    for seed in range(4):
        q, k, v = inputs(2100, seed, packed)
        call, parameters = unpadded(q), [*target.parameters()]
        launches.clear()
        out = target(q, k, v, call)
        assert out.shape == q.shape
        found.append(told(launches, [q, k, v, call.start, call.length, *parameters]))
    assert len(found[0]) >= 3
    assert [x[:2] for x in found[0]] == [x[:2] for x in found[1]]
    assert found[2] == found[1]
    assert found[3] == found[1]
    assert [type(x) for x in kept()] == [tape.Tape]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that does something")
@torch.no_grad()
def test_a_state_from_a_tape_is_as_large(launches: list[Any]) -> None:
    target, shapes = target_of("hsa", "cpu", "triton"), []
    for seed in range(3):
        q, k, v = inputs(2100, seed)
        layer = RetrofitLayer()
        target(q, k, v, unpadded(q, layer))
        state = layer.state
        tensors = [*state.nodes, state.spreads, state.spans, state.choices]
        shapes.append([(x.shape, x.stride(), x.dtype) for x in tensors])
        assert len({x.untyped_storage().data_ptr() for x in tensors[-3:]}) == 3
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that does something")
@torch.no_grad()
def test_tokens_launch_the_same_from_a_tape(launches: list[Any]) -> None:
    target, layer, found = target_of("hsa", "cpu", "triton"), RetrofitLayer(), []
    q, k, v = inputs(2100, 0)
    target(*(x[:, :, :2080] for x in (q, k, v)), unpadded(q[:, :, :2080], layer))
    for at in range(2080, 2086):
        own, call = q[:, :, at : at + 1].clone(), unpadded(q[:, :, : at + 1], layer)
        launches.clear()
        out = target(own, k[:, :, at : at + 1], v[:, :, at : at + 1], call)
        assert out.shape == own.shape
        state = layer.state
        kept_ = [*state.nodes, state.spreads, state.spans, state.choices]
        found.append(told(launches, [own, *layer.room, call.start, call.length, *kept_]))
    assert len(found[0]) == 5
    assert [x[:2] for x in found[0]] == [x[:2] for x in found[1]]
    assert all(x == found[1] for x in found[2:])
    assert [type(x) for x in kept()] == [tape.Tape]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that does something")
@pytest.mark.parametrize(
    ("name", "least", "tapes"), [("hsa", (5, 7), 2), ("hsa, learned pooling", (5, 7), 3), ("maha", (3, 4), 3)]
)
def test_both_passes_launch_the_same_from_tapes(
    launches: list[Any], name: str, least: tuple[int, int], tapes: int
) -> None:
    target, found = target_of(name, "cpu", "triton"), []
    for seed in range(5):
        given = [x.requires_grad_() for x in inputs(2100, seed)]
        call, leaves = unpadded(given[0]), [*given, *target.parameters()]
        launches.clear()
        out = target(*given, call)
        forward = len(launches)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert [x.shape for x in grads] == [x.shape for x in leaves]
        assert forward >= least[0]
        assert len(launches) >= forward + least[1]
        names = told(launches, [*leaves, call.start, call.length])
        found.append([tuple(map(without_allocations, x)) for x in names])
    assert all(x == found[0] for x in found[1:])
    assert [type(x) for x in kept()] == [tape.Tape] * tapes


def leave_tapes_out(patch: pytest.MonkeyPatch) -> None:
    """Has functions called, whatever has been noted of them."""
    for module in (hsa, maha, repeat):
        patch.setattr(module, "repeated", lambda function, tensors, about: function(*tensors))


def without_allocations(x: Any) -> Any:
    """Names of launches in which all allocations have the same one."""
    if isinstance(x, tuple):
        return tuple(map(without_allocations, x))
    return "allocation" if isinstance(x, str) and x.startswith("allocation") else x


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "tapes"), [("hsa", 2), ("hsa, learned pooling", 3), ("maha", 3)])
def test_on_a_gpu_gradients_from_tapes_are_the_same(name: str, tapes: int) -> None:
    target = target_of(name, "cuda", "auto")
    for seed in range(5):
        found = []
        for repeats in (True, False):
            given = [x.cuda().requires_grad_() for x in inputs(5000, seed)]
            leaves = [*given, *target.parameters()]
            with pytest.MonkeyPatch.context() as patch:
                if not repeats:
                    leave_tapes_out(patch)
                out = target(*given, unpadded(given[0]))
                found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        for own, other in zip(*found, strict=True):
            assert torch.equal(own, other), seed
    assert [type(x) for x in kept()] == [tape.Tape] * tapes


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_tokens_from_a_tape_are_the_same() -> None:
    target, layers = target_of("hsa", "cuda", "auto"), (RetrofitLayer(), RetrofitLayer())
    q, k, v = (x.cuda() for x in inputs(3000, 0))
    for layer in layers:
        target(*(x[:, :, :2900] for x in (q, k, v)), unpadded(q[:, :, :2900], layer))
    for at in range(2900, 3000):
        outs = []
        for layer in layers:
            with pytest.MonkeyPatch.context() as patch:
                if layer is layers[0]:
                    patch.setattr(hsa, "repeated", lambda function, tensors, about: function(*tensors))
                new = (x[:, :, at : at + 1].clone() for x in (q, k, v))
                outs.append(target(*new, unpadded(q[:, :, : at + 1], layer)))
        assert torch.equal(*outs), at
    states = [tensors_of(layer.state.narrowed(3000)) for layer in layers]
    for own, other in zip(*(x[-2:] for x in states), strict=True):
        assert torch.equal(own, other)
    assert tape.Tape in [type(x) for x in kept()]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "dense_until"), [(1001, 0), (9001, 0), (9001, 4096)])
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_on_a_gpu_tapes_change_nothing(name: str, packed: bool, tokens: int, dense_until: int) -> None:
    target = target_of(name, "cuda", "auto")
    if isinstance(target, HSAAttention):
        target = HSAAttention(
            retrofit.HSAConfig(dense_until=dense_until, pooling=target.config.pooling), **OPTIONS
        ).to("cuda", torch.bfloat16)
    for seed in range(5):
        q, k, v = (x.cuda() for x in inputs(tokens, seed, packed))
        layers = RetrofitLayer(), RetrofitLayer()
        out = target(q, k, v, unpadded(q, layers[0]))
        with pytest.MonkeyPatch.context() as patch:
            leave_tapes_out(patch)
            expected = target(q, k, v, unpadded(q, layers[1]))
        assert torch.equal(out, expected), seed
        for own, other in zip(*(tensors_of(layer.state) for layer in layers), strict=True):
            assert torch.equal(own, other), seed
    (only,) = kept()
    assert {type(step) for step in only.steps} <= {Prepared, tape.Operation}


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [False, True], ids=["as noted", "prepared"])
@torch.no_grad()
def test_on_a_gpu_a_tape_is_played_into_a_graph(prepared: bool) -> None:
    target = target_of("hsa", "cuda", "auto")
    given, others = ([x.cuda() for x in inputs(1001, seed)] for seed in range(2))
    call = unpadded(given[0])
    expected = target(*others, call).clone()
    for _ in range(1 + prepared):
        target(*given, call)
    (only,) = kept()
    assert isinstance(only, tape.Tape) and only.prepared is prepared
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = target(*given, call)
    assert only.prepared is prepared
    for x, y in zip(given, others, strict=True):
        x.copy_(y)
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(target(*given, call), expected)
    assert {type(step) for step in only.steps} <= {Prepared, tape.Operation}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hsa", "maha"])
@torch.no_grad()
def test_on_another_gpu_than_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = []
    for device in ("cuda:0", "cuda:1"):
        target = target_of(name, device, "auto")
        for _ in range(4):
            q, k, v = (x.to(device) for x in inputs(3000, 0))
            out = target(q, k, v, unpadded(q))
        found.append(out.cpu())
    assert torch.equal(*found)


def tensors_of(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    state.map(lambda x: found.append(x) or x)
    return found
