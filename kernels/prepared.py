"""Launches whose parameters lie ready in memory, so that only addresses have to be put into them.

    launches for made-up addresses, into CUDA graphs that never run  →  their parameters, and where addresses are in them
    addresses                                                        →  cuTensorMapReplaceAddress, cuLaunchKernel

To hand a kernel its arguments costs Triton several times what the launch costs. What it hands over, and in which order,
is read here from what it has handed over once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

MADE_UP, APART, MOST_STORAGES = 0x5A00_0000_0000, 1 << 36, 256
"""Address at which the first storage is said to begin; bytes from one storage to the next; and how many there may be, so
that all is below 2⁴⁷, as addresses are."""
MAP = 128
"""Bytes of a tensor map, by which blocks are copied; no other parameter of a kernel has as many."""
ALIGNED = 64
"""Bytes that a tensor map begins at multiples of."""
RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED: what this thread and others do meanwhile is their own concern."""
CLUSTER, COOPERATIVE = 4, 2
"""CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, _COOPERATIVE."""


class NodeParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("function", c_void_p),
        ("sizes", c_uint * 7),
        ("parameters", ctypes.POINTER(c_void_p)),
        ("extra", c_void_p),
        ("kernel", c_void_p),
        ("context", c_void_p),
    )


@dataclass(frozen=True)
class Captured:
    """A launch as the driver has got it.

    Attributes:
        function: Handle of the kernel.
        sizes: Its grid and its block, by x, y and z, and bytes of dynamic shared memory.
        parameters: The bytes of each.
    """

    function: int
    sizes: tuple[int, ...]
    parameters: list[bytes]


class Prepared:
    """Launches, one after the other.

    Args:
        launches: Each as it was captured for the addresses that ``made_up`` gives, and what its tensor maps describe: a
            storage's number, and the bytes from its begin.
    """

    def __init__(self, launches: Sequence[tuple[Captured, Sequence[tuple[int, int]]]]) -> None:
        begins: list[list[int]] = []
        size = 0
        for launch, _ in launches:
            begins.append([])
            for value in launch.parameters:
                size += -size % (ALIGNED if len(value) >= ALIGNED else 8)
                begins[-1].append(size)
                size += len(value)
        size += -size % 8
        self._memory = np.zeros(size + ALIGNED, np.uint8)
        first = -self._memory.ctypes.data % ALIGNED
        memory = self._memory[first : first + size]
        self._words = memory.view(np.int64)
        self._maps: list[tuple[c_void_p, int, int]] = []
        self._calls: list[tuple[Any, ...]] = []
        self._lock = threading.Lock()
        places = []
        for (launch, described), at in zip(launches, begins, strict=True):
            own = iter(described)
            for begin, value in zip(at, launch.parameters, strict=True):
                memory[begin : begin + len(value)] = np.frombuffer(value, np.uint8)
                if len(value) == MAP:
                    self._maps.append((c_void_p(memory.ctypes.data + begin), *next(own)))
                elif (place := _place(value)) is not None:
                    places.append((begin // 8, *place))
            addresses = (c_void_p * len(at))(*(memory.ctypes.data + begin for begin in at))
            self._calls.append((c_void_p(launch.function), *map(c_uint, launch.sizes), addresses))
        self._at, self._numbers, self._offsets = np.array(places, np.int64).reshape(-1, 3).T.copy()

    def launch(self, stream: int, begins: Sequence[int]) -> None:
        """Launches on a stream for storages that begin at ``begins``."""
        driver = _driver()
        on = c_void_p(stream)
        with self._lock:  # other threads put other addresses into the same parameters
            self._words[self._at] = np.array(begins, np.int64)[self._numbers] + self._offsets
            for described, number, offset in self._maps:
                _check(driver.cuTensorMapReplaceAddress(described, c_void_p(begins[number] + offset)))
            for *kernel, addresses in self._calls:
                _check(driver.cuLaunchKernel(*kernel, on, addresses, None))


def made_up(storages: int) -> list[int]:
    """Where storages are said to begin."""
    return [MADE_UP + number * APART for number in range(storages)]


def captured(launch: Callable[[int], None]) -> Captured | None:
    """What the driver gets when ``launch`` launches one kernel on a stream; it does not run. None if there is more to the
    launch than its parameters and sizes."""
    driver, stream, graph = _driver(), torch.cuda.Stream(), c_void_p()
    handle = c_void_p(stream.cuda_stream)
    _check(driver.cuStreamBeginCapture_v2(handle, RELAXED))
    try:
        launch(stream.cuda_stream)
    finally:
        status = driver.cuStreamEndCapture(handle, byref(graph))
    _check(status)
    try:
        return _read(driver, graph)
    finally:
        _check(driver.cuGraphDestroy(graph))


def can_capture() -> bool:
    """Whether launches can be captured here and now: on a GPU of NVIDIA's, and by nobody else at the same time."""
    return (
        torch.version.cuda is not None
        and torch.cuda.is_initialized()
        and not torch.cuda.is_current_stream_capturing()
    )


def _read(driver: Any, graph: c_void_p) -> Captured | None:
    """The only kernel of a graph."""
    node, count, params = c_void_p(), c_size_t(1), NodeParams()
    _check(driver.cuGraphGetNodes(graph, None, byref(count)))
    if count.value != 1:
        return None
    _check(driver.cuGraphGetNodes(graph, byref(node), byref(count)))
    _check(driver.cuGraphKernelNodeGetParams_v2(node, byref(params)))
    cluster, cooperative = (_attribute(driver, node, kind) for kind in (CLUSTER, COOPERATIVE))
    if not params.function or not params.parameters or max(cluster) > 1 or cooperative[0]:
        return None
    values: list[bytes] = []
    at, size = c_size_t(), c_size_t()
    while (
        driver.cuFuncGetParamInfo(c_void_p(params.function), c_size_t(len(values)), byref(at), byref(size))
        == 0
    ):
        values.append(ctypes.string_at(params.parameters[len(values)], size.value))
    return Captured(params.function, tuple(params.sizes), values)


def _attribute(driver: Any, node: c_void_p, kind: int) -> tuple[int, ...]:
    """The first three numbers of an attribute of a launch."""
    value = (c_uint * 16)()
    _check(driver.cuGraphKernelNodeGetAttribute(node, c_int(kind), byref(value)))
    return tuple(value[:3])


def _place(value: bytes) -> tuple[int, int] | None:
    """The storage, and the bytes from its begin, that a parameter is the address of; None if it is none."""
    number, offset = divmod(int.from_bytes(value, "little") - MADE_UP, APART)
    return (number, offset) if len(value) == 8 and 0 <= number < MOST_STORAGES else None


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    """Raises RuntimeError if the driver reports an error."""
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, byref(name))
        raise RuntimeError(f"CUDA's driver reports {(name.value or b'?').decode()} ({status})")
