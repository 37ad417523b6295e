"""What a function does on a GPU, once more with other tensors, in a fraction of the host's time.

    at first    function(*tensors)
    then once   the same, and what it allocates, launches and calls is noted: a tape
    from then   the tape is played, its launches prepared (``prepared``)

Up to some thousand tokens the host takes longer to find out what to launch than the GPU takes to run it, and it finds
the same for every layer of a model. A tape knows each launch but for the addresses, and allocates at once whatever only
kernels use. It is for tensors of the same shapes, strides, dtypes and alignments.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from retrofit.kernels.autograd import is_watched
from retrofit.kernels.launch import Launched, current_device, current_stream, has_hooks, listening
from retrofit.kernels.prepared import Captured, Place, Prepared, can_capture, captured
from retrofit.kernels.repeat import PYTHON
from retrofit.kernels.tuned import settings

MOST_TAPES = 256
"""Tapes that are kept."""
PIECE = 512
"""Bytes that what is allocated at once begins at multiples of."""
ALLOCATING = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
"""Operators that do nothing else."""
CLEARING = {"aten::zeros", "aten::zeros_like", "aten::new_zeros"}
"""Those that fill it with zeros, and do nothing else."""
DEPENDING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operators whose outputs have other shapes, or are other numbers on the host, for other numbers."""
ONCE = "it was done once"
_tapes: OrderedDict[Hashable, Tape | str] = OrderedDict()
"""By what they are for, those that were played last behind the others; or why there is none."""


def repeated(function: Callable[..., Any], tensors: Sequence[Tensor | None], about: Hashable) -> Any:
    """See :func:`retrofit.kernels.repeat.repeated`; tensors are on a GPU."""
    if not _is_plain(tensors):
        return function(*tensors)
    device = _device(tensors)
    key = (about, device, settings(device), *map(_kind, tensors))
    found = _tapes.pop(key, None)
    if isinstance(found, Tape):
        _tapes[key] = found
        return found.play(tensors) if found.fits(tensors) else function(*tensors)
    _tapes[key] = found or ONCE
    if len(_tapes) > MOST_TAPES:
        _tapes.popitem(last=False)
    if found != ONCE:
        return function(*tensors)
    _tapes[key] = "it was not finished"
    result, _tapes[key] = noted(function, tensors)
    return result


def noted(function: Callable[..., Any], tensors: Sequence[Tensor | None]) -> tuple[Any, Tape | str]:
    """Returns ``function(*tensors)``, and the tape of it, or what it does that a tape cannot."""
    notes = Notes(tensors)
    with notes, listening(notes.launched):
        result = function(*tensors)
    return result, notes.tape(result)


def _device(tensors: Sequence[Tensor | None]) -> torch.device:
    assert tensors[0] is not None
    return tensors[0].device


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the current GPU's work is all that is asked for: no gradients, no transforms of functions, and nobody who
    watches operators or launches."""
    if is_watched(tensors) or has_hooks() or _device(tensors).index != current_device():
        return False
    return not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))


def _kind(x: Tensor | None) -> Hashable:
    """What a tape goes by of a tensor."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.storage_offset(), x.data_ptr() & 15


@dataclass(frozen=True)
class Piece:
    """A tensor, as the part of a storage that it is.

    Attributes:
        number: The storage's.
        shape: The tensor's.
        stride: The tensor's.
        begin: The tensor's storage offset.
    """

    number: int
    shape: torch.Size
    stride: tuple[int, ...]
    begin: int

    def of(self, owner: Tensor) -> Tensor:
        """The tensor, from another one in its storage."""
        if (
            owner.shape == self.shape
            and owner.stride() == self.stride
            and owner.storage_offset() == self.begin
        ):
            return owner
        return owner.as_strided(self.shape, self.stride, self.begin)


@dataclass(frozen=True)
class Nothing:
    """A tensor whose storage has no address, for it has no elements.

    Attributes:
        shape: The tensor's.
        stride: The tensor's.
        dtype: The tensor's.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def beside(self, x: Tensor) -> Tensor:
        """Such a tensor, on the device of ``x``."""
        return x.new_empty_strided(self.shape, self.stride, dtype=self.dtype)


@dataclass
class Storage:
    """What tensors lie in.

    Attributes:
        dtype: Of the elements.
        size: Elements of one that nothing but an allocation made; None for others.
        cleared: Whether it begins as zeros.
        shared: Whether more than kernels use it.
        layout: Shape and stride of a tensor that is all of it, if there is one.
    """

    dtype: torch.dtype
    size: int | None = None
    cleared: bool = False
    shared: bool = False
    layout: tuple[torch.Size, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Launch:
    """A launch, without addresses.

    Attributes:
        run: Launches for a stream and arguments.
        arguments: What has no address.
        places: Which argument is an address or has some, with places for them.
        plain: As ``Launched`` has it.
    """

    run: Callable[..., None]
    arguments: list[Any]
    places: list[tuple[int, Any]]
    plain: bool

    def launch(self, stream: Any, begins: Sequence[int]) -> None:
        """Launches on a stream for storages that begin at ``begins``."""
        arguments = self.arguments.copy()
        for i, x in self.places:
            arguments[i] = among(x, begins)
        self.run(stream, arguments)

    def captured(self) -> Captured | None:
        """What ``Prepared`` is made of; None if there is more to it than its parameters and its grid."""
        if not self.plain:
            return None
        found = tree_leaves([x for _, x in self.places])
        addresses = [x for x in found if isinstance(x, Place)]
        maps = [x.place for x in found if isinstance(x, Description)]
        return captured(self.launch, addresses, maps, self.run)


@dataclass(frozen=True)
class Description:
    """A tensor whose blocks are copied.

    Attributes:
        place: Where it begins.
        others: What else its descriptor has.
    """

    place: Place
    others: dict[str, Any]

    def among(self, begins: Sequence[int]) -> TensorDescriptor:
        """The descriptor, which launches read."""
        found: TensorDescriptor = object.__new__(TensorDescriptor)
        vars(found).update(self.others, base=Address(self.place.among(begins)))
        return found


def among(x: Any, begins: Sequence[int]) -> Any:
    """What has addresses, with those for storages that begin at ``begins``."""
    if isinstance(x, tuple):
        return tuple([among(y, begins) for y in x])
    return x.among(begins) if isinstance(x, (Place, Description)) else x


@dataclass(frozen=True)
class Operation:
    """A call of an operator.

    Attributes:
        operator: The operator.
        arguments: Its arguments and those by name, with pieces for tensors.
        made: Which of its outputs has which new storage.
    """

    operator: Any
    arguments: tuple[Any, Any]
    made: list[tuple[int, int]]


Step = Launch | Operation | Prepared


class Notes(TorchDispatchMode):
    """Takes notes of what is done with tensors.

    Attributes:
        why: What a tape cannot do of it; None if there is nothing.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.why: str | None = None
        self._numbers: dict[int, int] = {}
        self._alike: list[tuple[int, int]] = []
        self._storages: dict[int, Storage] = {}
        self._steps: list[Launch | Operation] = []
        self._device = _device(tensors)
        self._given = self._next = len(tensors)
        self._kept: list[Any] = []  # so that no address is one of two tensors
        for number, x in enumerate(tensors):
            if x is not None and (address := begin_of(x)):
                if address in self._numbers:
                    self._alike.append((self._numbers[address], number))
                else:
                    self._numbers[address], self._storages[number] = number, Storage(x.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`TorchDispatchMode`."""
        named = kwargs or {}
        if func in PYTHON:
            with self:
                return PYTHON[func](*args, **named)
        out = func(*args, **named)
        self._called(func, (args, named), out)
        return out

    def _called(self, operator: Any, arguments: tuple[Any, Any], out: Any) -> None:
        if self.why is not None:
            return
        self._kept.append(out)
        outputs = [(i, x) for i, x in enumerate(tree_leaves(out)) if isinstance(x, Tensor)]
        if DEPENDING & {*operator.tags}:
            self._cannot(f"{operator} returns what depends on numbers")
            return
        for _, x in outputs:
            if x.device != self._device:
                self._cannot(f"{operator} returns a tensor on {x.device}")
                return
        new = [(i, x) for i, x in outputs if begin_of(x) and self._number(x) is None]
        name = operator.name().split(".")[0]
        if name in ALLOCATING | CLEARING and not operator._schema.is_mutable:
            for _, x in new:
                self._add(x, x.untyped_storage().nbytes() // x.element_size(), cleared=name in CLEARING)
        elif new or operator._schema.is_mutable:
            if any(x.storage_offset() for _, x in new):
                self._cannot(f"{operator} returns a part of something")
                return
            pieces = tree_map(self._piece, arguments)
            self._steps.append(Operation(operator, pieces, [(i, self._add(x)) for i, x in new]))

    def launched(self, launch: Launched) -> None:
        """Notes a launch."""
        if self.why is not None:
            return
        arguments = [*launch.arguments, *launch.others]
        placed = [(i, self._placed(x)) for i, x in enumerate(launch.arguments)]
        places = [(i, x) for i, x in placed if x is not launch.arguments[i]]
        for i, _ in places:
            arguments[i] = None
        if launch.run is None:
            self._cannot("a launch is interpreted")
            return
        self._steps.append(Launch(launch.run, arguments, places, launch.plain))

    def tape(self, result: Any) -> Tape | str:
        """The tape of a function that has returned ``result``, or what it cannot do."""
        pieces = tree_map(self._piece, result)
        if self.why is not None:
            return self.why
        return Tape(self._next - self._given, self._storages, self._steps, pieces, self._alike)

    def _cannot(self, why: str) -> None:
        if self.why is None:
            self.why = why
            self._kept.clear()
            self._steps.clear()

    def _number(self, x: Tensor) -> int | None:
        return self._numbers.get(begin_of(x))

    def _add(self, x: Tensor, size: int | None = None, *, cleared: bool = False) -> int:
        number = self._numbers[begin_of(x)] = self._next
        self._storages[number] = Storage(x.dtype, size, cleared)
        self._next += 1
        return number

    def _placed(self, x: Any) -> Any:
        """An argument of a launch with places for addresses; itself if it has none."""
        if isinstance(x, tuple):
            found = tuple([self._placed(y) for y in x])
            return x if all(y is z for y, z in zip(x, found, strict=True)) else found
        if isinstance(x, TensorDescriptor):
            others = {name: value for name, value in vars(x).items() if name != "base"}
            return Description(self._placed(x.base), others)
        if not isinstance(x, Tensor):
            return x
        if not begin_of(x):
            return 0
        number = self._number(x)
        if number is None:
            self._cannot("a tensor is used that was not given")
            return None
        return Place(number, int(x.storage_offset()) * x.element_size())

    def _piece(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not begin_of(x):
            return Nothing(x.shape, x.stride(), x.dtype)
        number = self._number(x)
        if number is None:
            self._cannot("a tensor is used that was not given")
            return None
        storage = self._storages[number]
        storage.shared = True
        if x.numel() == storage.size and torch.ops.aten.is_non_overlapping_and_dense(x):
            storage.layout = x.shape, x.stride()
        if storage.dtype != x.dtype:
            self._cannot("a tensor is seen as another dtype")
        return Piece(number, x.shape, x.stride(), int(x.storage_offset()))


class Tape:
    """What a function did; numbers of storages are those of the given tensors, and then of the new ones."""

    def __init__(
        self,
        new: int,
        storages: dict[int, Storage],
        steps: list[Launch | Operation],
        result: Any,
        alike: list[tuple[int, int]],
    ) -> None:
        self.new = new
        self.steps: list[Step] = [*steps]
        self.result, self.alike, self.prepared = result, alike, False
        self.shared: list[tuple[int, Sequence[int], Sequence[int], torch.dtype, bool]] = []
        self.places: list[tuple[int, int]] = []
        self.room = self.cleared_room = 0
        # What is cleared comes first, all of it at once: nothing else has been there.
        for i, x in sorted(storages.items(), key=lambda item: not item[1].cleared):
            if x.size is None:
                continue
            if x.shared:
                shape, stride = x.layout or ((x.size,), (1,))
                self.shared.append((i, shape, stride, x.dtype, x.cleared))
                continue
            self.places.append((i, self.room))
            self.room += -(-x.size * x.dtype.itemsize // PIECE) * PIECE
            if x.cleared:
                self.cleared_room = self.room

    def fits(self, tensors: Sequence[Any]) -> bool:
        """Whether those of the given tensors share a storage that did."""
        return all(begin_of(tensors[i]) == begin_of(tensors[j]) for i, j in self.alike)

    def play(self, tensors: Sequence[Any]) -> Any:
        """Does it with other tensors."""
        if not self.prepared and can_capture():
            self.steps, self.prepared = with_prepared(self.steps), True
        owners = [*tensors, *[None] * self.new]
        begins = [0 if x is None else begin_of(x) for x in tensors]
        begins += [0] * self.new
        if self.room:
            room = tensors[0].new_empty(self.room, dtype=torch.uint8)
            if self.cleared_room:
                room.narrow(0, 0, self.cleared_room).zero_()
            at = room.data_ptr()
            for number, place in self.places:
                begins[number] = at + place
        for number, shape, stride, dtype, cleared in self.shared:
            owner = owners[number] = tensors[0].new_empty_strided(shape, stride, dtype=dtype)
            begins[number] = owner.data_ptr()
            if cleared:
                owner.zero_()

        stream = current_stream()
        for step in self.steps:
            if not isinstance(step, Operation):
                step.launch(stream, begins)
            else:
                plain, named = put_together(step.arguments, owners)
                outputs = tree_leaves(step.operator(*plain, **named))
                for i, number in step.made:
                    owners[number], begins[number] = outputs[i], begin_of(outputs[i])
        return put_together(self.result, owners)


def with_prepared(steps: Sequence[Step]) -> list[Step]:
    """The steps; launches that follow one another are prepared together, where that can be."""
    found: list[Any] = []
    for step in steps:  # of which another thread may have prepared some
        got = step.captured() if isinstance(step, Launch) else None
        if got is None:
            found.append(step)
        elif found and isinstance(found[-1], list):
            found[-1].append(got)
        else:
            found.append([got])
    return [Prepared(step) if isinstance(step, list) else step for step in found]


def put_together(x: Any, owners: Sequence[Any]) -> Any:
    """Puts tensors in the places of pieces, of which each has an owner by its number, in less time than ``tree_map``.

    The first owner is on the device of all.
    """
    kind = type(x)
    if kind is Piece:
        return x.of(owners[x.number])
    if isinstance(x, (tuple, list)):
        return kind([put_together(y, owners) for y in x])
    if kind is dict:
        return {name: put_together(y, owners) for name, y in x.items()}
    return x.beside(owners[0]) if kind is Nothing else x


def begin_of(x: Tensor) -> int:
    """Address of a tensor's storage."""
    return x.untyped_storage().data_ptr()


class Address(int):
    """In the place of a tensor that is described."""

    def data_ptr(self) -> int:
        """The address."""
        return self
