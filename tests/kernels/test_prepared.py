"""Launches whose parameters are read from a captured one, and launched for other addresses."""

from __future__ import annotations

import ctypes
import struct
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from retrofit.kernels import prepared, tape
from retrofit.kernels.prepared import MAP, MOST_STORAGES, Place, Prepared
from retrofit.kernels.tape import Description, Launch, Operation

STREAM, CAPTURING, GRAPH = 5, 6, 11


class Driver:
    """CUDA's driver, as far as kernels are captured and launched.

    Attributes:
        launched: The kernel, its sizes and its parameters, of each launch.
        graphs: Those that are there.
        kernels: How many there are in a graph, if not as many as were launched.
        statuses: What functions report, by their names.
    """

    def __init__(self) -> None:
        self.launched: list[tuple[int, tuple[int, ...], list[bytes]]] = []
        self.graphs = 0
        self.nodes: list[list[bytes]] | None = None
        self.kernels: int | None = None
        self.statuses: dict[str, int] = {}
        self.sizes: dict[int, list[int]] = {}

    def run(self, function: int, values: list[bytes]) -> None:
        """Triton's launch, onto a stream that is captured."""
        assert self.nodes is not None
        self.sizes[function] = [len(value) for value in values]
        self.nodes.append(values)
        self.function = function

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        assert stream.value == CAPTURING and mode == prepared.RELAXED and self.nodes is None
        status = self.statuses.get("begin", 0)
        if not status:
            self.nodes = []
        return status

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        assert self.nodes is not None and stream.value == CAPTURING
        self.captured, self.nodes = self.nodes, None
        graph._obj.value = GRAPH
        self.graphs += 1
        return 0

    def cuGraphGetNodes(self, graph: Any, node: Any, count: Any) -> int:
        count._obj.value = len(self.captured) if self.kernels is None else self.kernels
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, params: Any) -> int:
        (values,) = self.captured
        self.kept = [ctypes.create_string_buffer(value, len(value)) for value in values]
        self.array = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, self.kept))
        found = params._obj
        found.function, found.sizes = self.function, (3, 2, 1, 128, 1, 1, 4096)
        found.parameters = ctypes.cast(self.array, ctypes.POINTER(ctypes.c_void_p))
        return 0

    def cuFuncGetParamInfo(self, function: Any, index: Any, at: Any, size: Any) -> int:
        sizes = self.sizes[function.value]
        if index.value >= len(sizes):
            return self.statuses.get("parameter", prepared.INVALID_VALUE)
        size._obj.value = sizes[index.value]
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        assert graph.value == GRAPH
        self.graphs -= 1
        return 0

    def cuTensorMapReplaceAddress(self, described: Any, address: Any) -> int:
        assert described.value % MAP == 0
        ctypes.memmove(described.value, struct.pack("<q", address.value), 8)
        return 0

    def cuLaunchKernel(self, function: Any, *others: Any) -> int:
        *sizes, stream, pointers, extra = others
        assert stream.value == STREAM and extra is None
        values = [
            ctypes.string_at(pointer, size)
            for pointer, size in zip(pointers, self.sizes[function.value], strict=True)
        ]
        self.launched.append((function.value, tuple(x.value for x in sizes), values))
        return self.statuses.get("launch", 0)

    def cuGetErrorName(self, status: Any, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_OUT_OF_BOXES"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(prepared, "_driver", lambda: found)
    monkeypatch.setattr(prepared, "_stream", lambda device: CAPTURING)
    monkeypatch.setattr(prepared.torch.cuda, "current_device", lambda: 0)
    return found


def launch_of(driver: Driver, function: int, **options: Any) -> Launch:
    """A launch with addresses, a number of each width, and tensor maps among its arguments."""

    def run(stream: Any, arguments: list[Any]) -> None:
        values = []
        for x in arguments:
            for y in x if isinstance(x, tuple) else (x,):
                if isinstance(y, int):
                    values.append(struct.pack("<q" if y >= 2**31 or y < 0 else "<i", y))
                else:
                    values += [
                        struct.pack("<q", y.base.data_ptr()) + bytes(MAP - 8),
                        struct.pack("<i", y.rows),
                    ]
        driver.run(function, values)

    return Launch(run, **{"plain": True, **options})


def writing(driver: Driver, function: int, number: int = 0) -> Launch:
    """A launch that is given the begin of a storage, and nothing else."""
    return launch_of(driver, function, arguments=[None], places=[(0, Place(number, 0))])


def described(number: int, offset: int) -> Description:
    return Description(Place(number, offset), {"rows": 9})


def test_addresses_are_put_where_they_were(driver: Driver) -> None:
    far = 100 * 2**30  # bytes from a storage's begin
    one = launch_of(
        driver, 21, arguments=[None, 7, None, 2**40, -3], places=[(0, Place(0, 0)), (2, Place(2, far))]
    )
    other = launch_of(
        driver,
        22,
        arguments=[None, None, 1, None],
        places=[(0, Place(1, 8)), (1, described(2, 32)), (3, (described(0, 16), 5, Place(1, 24)))],
    )
    (step,) = tape.with_prepared([one, other])
    assert isinstance(step, Prepared) and not driver.launched and not driver.graphs
    for begins in ([2**44, 2**45, 2**46], [4096, 8192, 2**33]):
        driver.launched.clear()
        step.launch(STREAM, begins)
        (first, sizes, values), (second, _, more) = driver.launched
        assert (first, second) == (21, 22) and sizes == (3, 2, 1, 128, 1, 1, 4096)
        a, b, c = begins
        assert values == [
            struct.pack("<q", a),
            struct.pack("<i", 7),
            struct.pack("<q", c + far),
            struct.pack("<q", 2**40),
            struct.pack("<q", -3),
        ]
        rows, rest = struct.pack("<i", 9), bytes(MAP - 8)
        assert more == [
            struct.pack("<q", b + 8),
            struct.pack("<q", c + 32) + rest,
            rows,
            struct.pack("<i", 1),
            struct.pack("<q", a + 16) + rest,
            rows,
            struct.pack("<i", 5),
            struct.pack("<q", b + 24),
        ]


def test_operations_stand_between(driver: Driver) -> None:
    launches = [writing(driver, number) for number in (1, 2, 3)]
    operation = Operation(None, ((), {}), [])
    found = tape.with_prepared([launches[0], operation, *launches[1:]])
    assert [type(step) for step in found] == [Prepared, Operation, Prepared]
    assert isinstance(found[2], Prepared)
    found[2].launch(STREAM, [2**40])
    assert [function for function, *_ in driver.launched] == [2, 3]
    assert tape.with_prepared(found) == found


def test_threads_keep_their_addresses_apart(driver: Driver) -> None:
    (step,) = tape.with_prepared([writing(driver, number) for number in range(1, 21)])
    assert isinstance(step, Prepared)

    def launch(begin: int) -> None:
        for _ in range(50):
            step.launch(STREAM, [begin])

    threads = [threading.Thread(target=launch, args=(2**40 + number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    addresses = [values[0] for _, _, values in driver.launched]
    assert len(addresses) == 4 * 50 * 20
    assert all(len({*addresses[i : i + 20]}) == 1 for i in range(0, len(addresses), 20))


@pytest.mark.parametrize("kernels", [0, 2])
def test_what_is_not_one_kernel_is_left_to_triton(driver: Driver, kernels: int) -> None:
    launch = writing(driver, 1)
    driver.kernels = kernels
    assert tape.with_prepared([launch]) == [launch]
    assert not driver.graphs


def test_what_is_more_than_parameters_is_left_to_triton(driver: Driver) -> None:
    plain = writing(driver, 1)
    other = replace(plain, plain=False)
    assert [type(step) for step in tape.with_prepared([plain, other, plain])] == [Prepared, Launch, Prepared]


@pytest.mark.parametrize("what", ["begin", "parameter"])
def test_what_the_driver_does_not_tell_is_left_to_triton(driver: Driver, what: str) -> None:
    launch = writing(driver, 1)
    driver.statuses[what] = 999
    assert tape.with_prepared([launch]) == [launch]
    assert not driver.graphs


def test_places_that_are_not_found_are_left_to_triton(driver: Driver) -> None:
    many = writing(driver, 1, MOST_STORAGES)
    hidden = launch_of(driver, 2, arguments=[3], places=[])
    hidden = replace(hidden, run=lambda stream, arguments: driver.run(2, [bytes(16)]))
    unseen = replace(hidden, places=[(0, Place(0, 0))])
    no_map = replace(hidden, arguments=[None], places=[(0, described(0, 0))])
    unknown_map = replace(hidden, run=lambda stream, arguments: driver.run(2, [bytes(MAP)]))
    for launch in (many, unseen, no_map, unknown_map):
        assert tape.with_prepared([launch]) == [launch]
    assert [type(step) for step in tape.with_prepared([hidden])] == [Prepared]


def test_a_launch_that_fails_leaves_no_graph(driver: Driver) -> None:
    def fail(stream: Any, arguments: list[Any]) -> None:
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        tape.with_prepared([replace(writing(driver, 1), run=fail)])
    assert driver.nodes is None and not driver.graphs


def test_the_driver_is_named_by_what_it_reports(driver: Driver) -> None:
    (step,) = tape.with_prepared([writing(driver, 1)])
    assert isinstance(step, Prepared)
    driver.statuses["launch"] = 719
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_OUT_OF_BOXES \(719\)"):
        step.launch(STREAM, [2**40])


@pytest.mark.parametrize(
    ("initialized", "captures", "missing", "expected"),
    [
        (True, False, "", True),
        (False, False, "", False),
        (True, True, "", False),
        (True, False, "cuLaunchKernel", False),
    ],
    ids=["can", "no GPU in use", "being captured", "an old driver"],
)
def test_where_launches_can_be_captured(
    initialized: bool, captures: bool, missing: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = SimpleNamespace(**{name: None for name in prepared.FUNCTIONS if name != missing})
    monkeypatch.setattr(prepared, "_driver", lambda: driver)
    monkeypatch.setattr(prepared.torch.version, "cuda", "13.0")
    monkeypatch.setattr(prepared.torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(prepared.torch.cuda, "is_current_stream_capturing", lambda: captures)
    prepared._has_functions.cache_clear()
    assert prepared.can_capture() is expected
    prepared._has_functions.cache_clear()


def test_a_tape_is_prepared_once_and_not_while_it_is_captured(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    launch = replace(writing(driver, 1), run=lambda stream, arguments: runs.append(stream))
    found = tape.Tape(0, {}, [launch], None, [])
    monkeypatch.setattr(tape, "current_stream", lambda: STREAM)
    monkeypatch.setattr(tape, "can_capture", lambda: False)
    x = torch.zeros(3)
    for _ in range(2):
        found.play([x])
    assert runs == [STREAM] * 2
    found.steps = [writing(driver, 1)]
    monkeypatch.setattr(tape, "can_capture", lambda: True)
    for _ in range(2):
        found.play([x])
    assert [type(step) for step in found.steps] == [Prepared]
    assert [values for _, _, values in driver.launched] == [[struct.pack("<q", x.data_ptr())]] * 2
