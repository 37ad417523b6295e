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

MADE_UP, APART, MOST_STORAGES = 1 << 44, 1 << 39, 128
"""Address at which the first storage is said to begin; bytes from one to the next, more than a GPU has; and how many
there may be, so that all is below 2⁴⁷, as addresses are."""
MAP = 128
"""Bytes of a tensor map, by which blocks are copied, and what it begins at multiples of; no other parameter of a kernel
is as long."""
NON_BLOCKING, RELAXED, INVALID_VALUE = 1, 2, 1
"""CU_STREAM_NON_BLOCKING; CU_STREAM_CAPTURE_MODE_RELAXED; CUDA_ERROR_INVALID_VALUE."""
FUNCTIONS = (
    *("cuStreamCreate", "cuStreamBeginCapture_v2", "cuStreamEndCapture"),
    *("cuGraphGetNodes", "cuGraphKernelNodeGetParams_v2", "cuFuncGetParamInfo", "cuGraphDestroy"),
    *("cuTensorMapReplaceAddress", "cuLaunchKernel", "cuGetErrorName"),
)
"""What is asked of CUDA's driver; it has all of it since 12.4."""
_capturing = threading.Lock()


@dataclass(frozen=True)
class Place:
    """An address.

    Attributes:
        number: Of the storage.
        offset: Bytes from its begin.
    """

    number: int
    offset: int

    def among(self, begins: Sequence[int]) -> int:
        """The address, where storages begin at ``begins``."""
        return begins[self.number] + self.offset


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
        owner: Keeps the kernel loaded.
        function: Handle of the kernel.
        sizes: Its grid and its block, by x, y and z, and bytes of dynamic shared memory.
        parameters: The bytes of each.
        addresses: Which parameter is an address, and of which place.
        maps: Which one is a tensor map, and of which place.
    """

    owner: Any
    function: int
    sizes: tuple[int, ...]
    parameters: list[bytes]
    addresses: list[tuple[int, Place]]
    maps: list[tuple[int, Place]]


class Prepared:
    """Launches, one after the other."""

    def __init__(self, launches: Sequence[Captured]) -> None:
        begins: list[list[int]] = []
        size = 0
        for launch in launches:
            begins.append([])
            for value in launch.parameters:
                size += -size % (MAP if len(value) == MAP else 8)
                begins[-1].append(size)
                size += len(value)
        size += -size % 8
        self._owners = [launch.owner for launch in launches]
        self._memory = np.zeros(size + MAP, np.uint8)
        first = -self._memory.ctypes.data % MAP
        memory = self._memory[first : first + size]
        self._words = memory.view(np.int64)
        self._maps: list[tuple[c_void_p, Place]] = []
        self._calls: list[tuple[Any, ...]] = []
        self._lock = threading.Lock()
        places = []
        for launch, at in zip(launches, begins, strict=True):
            for begin, value in zip(at, launch.parameters, strict=True):
                memory[begin : begin + len(value)] = np.frombuffer(value, np.uint8)
            pointers = [memory.ctypes.data + begin for begin in at]
            places += [(at[i] // 8, place.number, place.offset) for i, place in launch.addresses]
            self._maps += [(c_void_p(pointers[i]), place) for i, place in launch.maps]
            self._calls.append(
                (c_void_p(launch.function), *map(c_uint, launch.sizes), (c_void_p * len(at))(*pointers))
            )
        self._at, self._numbers, self._offsets = np.array(places, np.int64).reshape(-1, 3).T.copy()

    def launch(self, stream: int, begins: Sequence[int]) -> None:
        """Launches on a stream for storages that begin at ``begins``.

        Raises:
            RuntimeError: If the driver reports an error.
        """
        driver = _driver()
        on = c_void_p(stream)
        with self._lock:  # other threads put other addresses into the same parameters
            self._words[self._at] = np.array(begins, np.int64)[self._numbers] + self._offsets
            for described, place in self._maps:
                _check(driver.cuTensorMapReplaceAddress(described, c_void_p(place.among(begins))))
            for *kernel, pointers in self._calls:
                _check(driver.cuLaunchKernel(*kernel, on, pointers, None))


def can_capture() -> bool:
    """Whether launches can be captured: by a driver that has all it takes, while this thread's stream is not captured."""
    return torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing() and _has_functions()


def captured(
    launch: Callable[[int, Sequence[int]], None],
    addresses: Sequence[Place],
    maps: Sequence[Place],
    owner: Any = None,
) -> Captured | None:
    """What the driver gets when a kernel is launched; it does not run.

    Args:
        launch: Launches one kernel on a stream, for storages that begin where they are said to.
        addresses: Of which places the kernel is given addresses.
        maps: Of which places it is given tensor maps, in their order.
        owner: Keeps the kernel loaded.

    Returns:
        The launch; None if it is of more storages than can be told apart, or not every place is found in it.
    """
    if any(place.number >= MOST_STORAGES for place in (*addresses, *maps)):
        return None
    begins = [MADE_UP + number * APART for number in range(MOST_STORAGES)]
    driver = _driver()
    with _capturing:
        stream = _stream(torch.cuda.current_device())
        if driver.cuStreamBeginCapture_v2(c_void_p(stream), RELAXED):
            return None
        try:
            launch(stream, begins)
        finally:
            read = _ended(driver, stream)
    if read is None:
        return None
    function, sizes, values = read
    known = {place.among(begins): place for place in addresses}
    found = [
        (i, known[address])
        for i, value in enumerate(values)
        if len(value) == 8 and (address := int.from_bytes(value, "little")) in known
    ]
    described = [i for i, value in enumerate(values) if len(value) == MAP]
    if {place for _, place in found} != {*addresses} or len(described) != len(maps):
        return None
    return Captured(owner, function, sizes, values, found, list(zip(described, maps, strict=True)))


def _ended(driver: Any, stream: int) -> tuple[int, tuple[int, ...], list[bytes]] | None:
    """Ends a capture; what ``_read`` says of it."""
    graph = c_void_p()
    driver.cuStreamEndCapture(c_void_p(stream), byref(graph))
    if not graph.value:
        return None
    try:
        return _read(driver, graph)
    finally:
        _check(driver.cuGraphDestroy(graph))


def _read(driver: Any, graph: c_void_p) -> tuple[int, tuple[int, ...], list[bytes]] | None:
    """The only kernel of a graph, its sizes and its parameters; None if there is no such thing."""
    node, count, params = c_void_p(), c_size_t(), NodeParams()
    if driver.cuGraphGetNodes(graph, None, byref(count)) or count.value != 1:
        return None
    if driver.cuGraphGetNodes(graph, byref(node), byref(count)):
        return None
    if driver.cuGraphKernelNodeGetParams_v2(node, byref(params)) or not (
        params.function and params.parameters
    ):
        return None
    values: list[bytes] = []
    at, size, status = c_size_t(), c_size_t(), 0
    while not status:
        function, i = c_void_p(params.function), c_size_t(len(values))
        status = driver.cuFuncGetParamInfo(function, i, byref(at), byref(size))
        if not status:
            values.append(ctypes.string_at(params.parameters[len(values)], size.value))
    if status != INVALID_VALUE or not values:
        return None
    return params.function, tuple(params.sizes), values


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _has_functions() -> bool:
    if torch.version.cuda is None:
        return False
    try:
        return all(hasattr(_driver(), name) for name in FUNCTIONS)
    except OSError:  # there is no such library
        return False


@cache
def _stream(device: int) -> int:
    """A stream of the current device on which nobody else puts anything."""
    found = c_void_p()
    _check(_driver().cuStreamCreate(byref(found), c_uint(NON_BLOCKING)))
    assert found.value is not None
    return found.value


def _check(status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(c_int(status), byref(name))
        raise RuntimeError(f"CUDA's driver reports {(name.value or b'?').decode()} ({status})")
