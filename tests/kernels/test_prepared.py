"""Launches whose parameters are read from a captured one, and launched for other addresses."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from retrofit.kernels import prepared, tape
from retrofit.kernels.prepared import MAP, MOST_STORAGES
from retrofit.kernels.tape import Description, Launch, Operation, Place

STREAM = 5


class Driver:
    """CUDA's driver, as far as kernels are captured and launched.

    Attributes:
        launched: The kernel, its sizes and its parameters, of each launch.
    """

    def __init__(self) -> None:
        self.launched: list[tuple[int, tuple[int, ...], list[bytes]]] = []
        self.nodes: list[list[bytes]] | None = None
        self.cluster, self.status = 1, 0
        self.sizes: dict[int, list[int]] = {}

    def run(self, function: int, values: list[bytes]) -> None:
        """Triton's launch, onto a stream that is captured."""
        assert self.nodes is not None
        self.sizes[function] = [len(value) for value in values]
        self.nodes.append(values)
        self.function = function

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        assert stream.value == STREAM and mode == prepared.RELAXED and self.nodes is None
        self.nodes = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        assert self.nodes is not None
        self.captured, self.nodes = self.nodes, None
        graph._obj.value = 11
        return 0

    def cuGraphGetNodes(self, graph: Any, node: Any, count: Any) -> int:
        count._obj.value = len(self.captured)
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, params: Any) -> int:
        (values,) = self.captured
        self.kept = [ctypes.create_string_buffer(value, len(value)) for value in values]
        self.array = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, self.kept))
        found = params._obj
        found.function, found.sizes = self.function, (3, 2, 1, 128, 1, 1, 4096)
        found.parameters = ctypes.cast(self.array, ctypes.POINTER(ctypes.c_void_p))
        return 0

    def cuGraphKernelNodeGetAttribute(self, node: Any, kind: Any, value: Any) -> int:
        value._obj[0] = self.cluster if kind.value == prepared.CLUSTER else 0
        return 0

    def cuFuncGetParamInfo(self, function: Any, index: Any, at: Any, size: Any) -> int:
        sizes = self.sizes[function.value]
        if index.value >= len(sizes):
            return 1
        size._obj.value = sizes[index.value]
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        assert graph.value == 11
        return 0

    def cuTensorMapReplaceAddress(self, described: Any, address: Any) -> int:
        assert described.value % prepared.ALIGNED == 0
        ctypes.memmove(described.value, struct.pack("<q", address.value), 8)
        return 0

    def cuLaunchKernel(self, function: Any, *others: Any) -> int:
        *sizes, stream, addresses, extra = others
        assert stream.value == STREAM and extra is None
        values = [
            ctypes.string_at(address, size)
            for address, size in zip(addresses, self.sizes[function.value], strict=True)
        ]
        self.launched.append((function.value, tuple(x.value for x in sizes), values))
        return self.status

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_OUT_OF_BOXES"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(prepared, "_driver", lambda: found)
    monkeypatch.setattr(prepared.torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=STREAM))
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

    return Launch(run, **options)


def described(number: int, offset: int) -> Description:
    return Description(Place(number, offset), {"rows": 9})


def test_addresses_are_put_where_they_were(driver: Driver) -> None:
    one = launch_of(
        driver, 21, arguments=[None, 7, None, 2**40, -3], addresses=[(0, 0, 0), (2, 2, 512)], nested=[]
    )
    other = launch_of(
        driver,
        22,
        arguments=[None, None, 1, None],
        addresses=[(0, 1, 8)],
        nested=[(1, described(2, 32)), (3, (described(0, 16), 5, Place(1, 24)))],
    )
    (step,) = tape.prepared([one, other], 3)
    assert isinstance(step, prepared.Prepared) and not driver.launched
    for begins in ([2**44, 2**45, 2**46], [4096, 8192, 2**33]):
        driver.launched.clear()
        step.launch(STREAM, begins)
        (first, sizes, values), (second, _, more) = driver.launched
        assert (first, second) == (21, 22) and sizes == (3, 2, 1, 128, 1, 1, 4096)
        a, b, c = begins
        assert values == [
            struct.pack("<q", a),
            struct.pack("<i", 7),
            struct.pack("<q", c + 512),
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
    launches = [
        launch_of(driver, number, arguments=[None], addresses=[(0, 0, 0)], nested=[]) for number in (1, 2, 3)
    ]
    operation = Operation(None, ((), {}), [])
    found = tape.prepared([launches[0], operation, *launches[1:]], 1)
    assert [type(step) for step in found] == [prepared.Prepared, Operation, prepared.Prepared]
    found[2].launch(STREAM, [2**40])
    assert [function for function, *_ in driver.launched] == [2, 3]


def test_what_is_more_than_parameters_is_left_to_triton(driver: Driver) -> None:
    launch = launch_of(driver, 1, arguments=[None], addresses=[(0, 0, 0)], nested=[])
    assert tape.prepared([launch], MOST_STORAGES + 1) == [launch]
    driver.cluster = 2
    assert tape.prepared([launch], 1) == [launch]


def test_the_driver_is_named_by_what_it_reports(driver: Driver) -> None:
    launch = launch_of(driver, 1, arguments=[None], addresses=[(0, 0, 0)], nested=[])
    (step,) = tape.prepared([launch], 1)
    driver.status = 719
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_OUT_OF_BOXES \(719\)"):
        step.launch(STREAM, [2**40])


def test_nothing_is_captured_without_a_gpu() -> None:
    if not prepared.torch.cuda.is_available():
        assert not prepared.can_capture()
