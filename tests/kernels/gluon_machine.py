"""Runs Gluon kernels for Hopper without a GPU, as Triton's interpreter runs Triton's.

Numbers are PyTorch's. Each role of ``warp_specialize`` is a thread, barriers have phases as on the hardware, and matrix
products read their operands when they are waited for, at the latest moment that the hardware may. So a kernel that
releases memory too early, waits for what never comes, or reads or writes beyond its tensors fails here as well.

    Machine(module)[grid](*arguments, **constants)
"""

from __future__ import annotations

import builtins
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import constexpr

PATIENCE = 20.0
"""Seconds after which a wait counts as one for ever."""
PAUSE = 3e-3
"""Seconds that a wait for products takes, so that others use meanwhile what they have been given."""
SLAB = 64
"""Columns of 2 bytes that are swizzled together: wider matrices lie slab after slab."""


class Pointer:
    """Places of a tensor's memory."""

    def __init__(self, memory: Tensor, at: Tensor | int = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, n: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.at + n)

    def __sub__(self, n: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.at - n)

    def places(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        at = torch.as_tensor(self.at)
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
        inside = (at >= 0) & (at < self.memory.numel())
        assert bool((inside | ~mask).all()), "memory beyond a tensor is accessed"
        return at.where(mask, 0), mask


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.changed = machine, machine.changed
        self.count = self.missing = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, count: int = 1, expected: int = 0, come: int = 0) -> None:
        with self.changed:
            self.missing -= count
            self.bytes += expected - come
            assert self.missing >= 0, "more arrive at a barrier than it counts"
            if not self.missing and not self.bytes:
                self.missing, self.phase = self.count, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase & 1 != int(parity), PATIENCE)
        assert done, "a barrier is never passed"


class Shared:
    """A view of shared memory."""

    def __init__(self, memory: Tensor, at: Tensor) -> None:
        self.memory, self.at = memory, at
        self.dtype, self.shape, self.numel = memory.dtype, list(at.shape), at.numel()

    def index(self, i: Any) -> Shared:
        return Shared(self.memory, self.at[int(i)])

    def slice(self, begin: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory, self.at.narrow(dim, begin, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory, self.at.permute(*order))

    def reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        assert dtype == self.dtype
        rows, columns = shape[-2:]
        slabs = torch.arange(self.numel).view(-1, columns // SLAB, rows, SLAB)
        return Shared(self.memory, int(self.at.min()) + slabs.transpose(1, 2).reshape(*shape))

    _reinterpret = reinterpret

    def meets(self, other: Shared) -> bool:
        """Whether two views have memory in common."""
        apart = self.at.max() < other.at.min() or other.at.max() < self.at.min()
        return self.memory is other.memory and not bool(apart)

    def load(self, layout: Any = None) -> Tensor:
        return self.memory[self.at]

    def store(self, value: Tensor) -> None:
        self.memory[self.at] = value


class Product:
    """A matrix product that has begun."""

    def __init__(self, a: Tensor | Shared, b: Shared, before: Tensor | Product | None) -> None:
        self.operands: tuple[Tensor | Shared, Shared] | None = (a, b)
        self.before = before
        self.value: Tensor | None = None

    def finish(self) -> None:
        assert self.operands is not None
        a, b = (x.load() if isinstance(x, Shared) else x for x in self.operands)
        value = a.float() @ b.float()
        self.value = value if self.before is None else value + finished(self.before)
        self.operands = self.before = None

    @property
    def reads(self) -> list[Shared]:
        """What it still reads of shared memory."""
        return [x for x in self.operands or () if isinstance(x, Shared)]


def finished(x: Tensor | Product) -> Tensor:
    if isinstance(x, Tensor):
        return x
    assert x.value is not None, "a product is used before it has been waited for"
    return x.value


class Machine:
    """Runs the kernel of a module, whose functions then see this machine in place of Gluon.

    Functions of the module that PyTorch has other words for are given by name.

    Attributes:
        programs: How many the last grid had.
        added: What atomic additions have added so far, by place.
    """

    def __init__(self, module: ModuleType, kernel: str, **functions: Callable[..., Any]) -> None:
        self.changed, self.of_thread = threading.Condition(), threading.local()
        self.programs = self.program = 0
        self.added: Counter[int] = Counter()
        self.running: list[Product] = []
        scope: dict[str, Any] = {}
        for name, value in everything(module):
            if isinstance(value, GluonJITFunction):
                scope[name] = FunctionType(value.fn.__code__, scope, name, value.fn.__defaults__)
            else:
                scope[name] = value.value if isinstance(value, constexpr) else value
        barriers = SimpleNamespace(
            init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, phase: barrier.wait(phase),
            arrive=lambda barrier, count=1: barrier.arrive(count),
            expect=lambda barrier, bytes: barrier.arrive(expected=int(bytes)),
            MBarrierLayout=lambda: None,
        )
        language = {name: getattr(self, f"_{name}") for name in LANGUAGE} | SIMPLE
        products = {name: getattr(self, f"_{name}") for name in ("warpgroup_mma", "warpgroup_mma_wait")}
        scope.update(gl=SimpleNamespace(**language), hopper=SimpleNamespace(**products), mbarrier=barriers)
        scope.update(copy=copy, range=counted, **functions)
        function = getattr(module, kernel).function.fn
        self.kernel = FunctionType(function.__code__, scope, kernel)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            constants = {name: value for name, value in constants.items() if name.isupper()}
            taken = [Pointer(memory_of(x)) if isinstance(x, Tensor) else x for x in arguments]
            for x in taken:
                if isinstance(x, TensorDescriptor):
                    x.dtype = x.base.dtype  # as it has one within a kernel
            self.programs = grid[0]
            for self.program in range(grid[0]):
                self.kernel(*taken, **constants)

        return launch

    def _program_id(self, axis: int) -> Tensor:
        return torch.tensor(self.program)

    def _num_programs(self, axis: int) -> int:
        return self.programs

    def _allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout is None:
            return SimpleNamespace(index=[Barrier(self) for _ in range(shape[0])].__getitem__)
        at = torch.arange(torch.Size(shape).numel()).view(*shape)
        nothing = torch.nan if dtype.is_floating_point else -1
        return Shared(torch.full((at.numel(),), nothing, dtype=dtype), at)

    def _atomic_add(self, pointer: Pointer, n: int) -> Tensor:
        with self.changed:
            self.added[int(pointer.at)] += n
            before = _load(pointer).clone()
            _store(pointer, before + n)
        return before

    def _warp_specialize(self, roles: Sequence[Any], warps: Sequence[int], registers: Sequence[int]) -> None:
        failures: list[BaseException] = []

        def play(function: Callable[..., None], arguments: Sequence[Any]) -> None:
            self.of_thread.begun = []
            try:
                with torch.no_grad():
                    function(*arguments)
                assert not self.of_thread.begun, "products that nothing waits for"
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=play, args=role, daemon=True) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _warpgroup_mma(
        self, a: Tensor | Shared, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool
    ) -> Product:
        assert is_async
        product = Product(a, b, acc if use_acc else None)
        self.of_thread.begun.append(product)
        self.running.append(product)
        return product

    def _warpgroup_mma_wait(self, others: int, deps: Sequence[Any]) -> Any:
        time.sleep(PAUSE)
        begun = self.of_thread.begun
        while len(begun) > others:
            begun[0].finish()
            self.running.remove(begun.pop(0))
        values = [finished(x) for x in deps]
        return values[0] if len(values) == 1 else tuple(values)


def memory_of(x: Tensor) -> Tensor:
    """The memory that a tensor reaches over."""
    end = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((end,), (1,))


def copy(described: Any, at: Sequence[Any], barrier: Barrier, to: Shared) -> None:
    """A block of a described tensor to shared memory, zero beyond the tensor."""
    x, box = described.base.detach(), described.block_shape
    begin = [int(n) for n in at]
    block = torch.zeros(box, dtype=x.dtype)
    inside = [
        slice(max(b, 0), min(b + n, size)) for b, n, size in zip(begin, box, described.shape, strict=True)
    ]
    if all(part.start < part.stop for part in inside):
        block[tuple(slice(p.start - b, p.stop - b) for p, b in zip(inside, begin, strict=True))] = x[
            tuple(inside)
        ]
    reading = [memory for product in barrier.machine.running for memory in product.reads]
    assert not any(to.meets(operand) for operand in reading), "memory is written that a product reads"
    to.memory[to.at] = block
    barrier.arrive(0, come=block.numel() * block.element_size())


def everything(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """All names of a module, and of those that its Gluon functions are from."""
    functions = [value.fn for value in vars(module).values() if isinstance(value, GluonJITFunction)]
    scopes = {function.__module__: function.__globals__ for function in functions}
    yield from chain.from_iterable(scope.items() for scope in (*scopes.values(), vars(module)))


def counted(*bounds: Any) -> Iterator[Tensor]:
    """A range of numbers that have a tensor's methods."""
    return (torch.tensor(i) for i in builtins.range(*(int(n) for n in bounds)))


def _load(pointer: Pointer, mask: Tensor | None = None, other: float = 0) -> Tensor:
    at, mask = pointer.places(mask)
    return pointer.memory[at].where(mask, torch.as_tensor(other, dtype=pointer.memory.dtype))


def _store(pointer: Pointer, value: Any, mask: Tensor | None = None) -> None:
    at, mask = pointer.places(mask)
    value = torch.as_tensor(value, dtype=pointer.memory.dtype).expand(at.shape)
    pointer.memory[at[mask]] = value[mask]


def _where(condition: Any, one: Any, other: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), torch.as_tensor(one), torch.as_tensor(other))


def _layout(*parameters: Any) -> SimpleNamespace:
    return SimpleNamespace(parameters=parameters)


LANGUAGE = ("program_id", "num_programs", "allocate_shared_memory", "atomic_add", "warp_specialize")
SIMPLE: dict[str, Any] = {
    **{name: getattr(torch, name) for name in ("float32", "int32", "int64", "exp2", "log2", "reshape")},
    **{
        name: _layout
        for name in (
            *("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"),
            "SwizzledSharedLayout",
        )
    },
    "DistributedLinearLayout": _layout,
    "permute": torch.permute,
    "split": lambda x: tuple(part.contiguous() for part in x.unbind(-1)),
    "expand_dims": torch.unsqueeze,
    "constexpr": lambda x: x,
    "static_range": range,
    "arange": lambda begin, end, layout=None: torch.arange(begin, end),
    "full": lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    "zeros": lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    "convert_layout": lambda x, layout: x,
    "maximum": lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    "minimum": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    "sum": lambda x, axis: x.sum(axis),
    "max": lambda x, axis: x.amax(axis),
    "load": _load,
    "store": _store,
    "where": _where,
}
