"""What each dimension of a tensor stands for, kept through views, permutations and expansions.

scores [s0·8, t, s] = view of [s0, 8, t, s]   →   axes ((batch, head), (query,), (key,))

An axis is a tuple of atoms, most of them one long; a view that merges dimensions makes a longer tuple, one that
splits an atom refines it everywhere at once. A dimension of size 1 is the empty axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv

from retrofit.passes.attention.arguments import arguments, is_call, shape

aten = torch.ops.aten
SAME = (
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
)
RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_PERMUTES = (
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.mT.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.numpy_T.default,
)


class Mixed(Exception):
    """A view that cuts through an axis in a way that has no name."""


class Atom:
    """One independent index; ``parts`` once a view has split it."""

    def __init__(self, size: Any) -> None:
        self.size = size
        self.parts: tuple[Atom, ...] = ()

    def __repr__(self) -> str:
        return f"<{self.size}>"


Axis = tuple[Atom, ...]


def leaves(axis: Iterable[Atom]) -> Axis:
    """The finest atoms of ``axis``."""
    found: list[Atom] = []
    for atom in axis:
        found.extend(leaves(atom.parts) if atom.parts else (atom,))
    return tuple(found)


def size_of(value: Any) -> Any:
    """A size as a number or a sympy expression."""
    return sympy.Integer(value) if isinstance(value, int) else sympy.expand(value.node.expr)


def sizes(node: Any) -> tuple[Any, ...]:
    """The sizes of the tensor ``node`` stands for.

    Raises:
        Mixed: If they are not known.
    """
    found = shape(node)
    if found is None:
        raise Mixed("a tensor of unknown shape")
    return tuple(size_of(size) for size in found)


def fresh(shape_of: Sequence[Any]) -> list[Axis]:
    """An axis of its own for each dimension that is not 1."""
    return [() if size == 1 else (Atom(size),) for size in shape_of]


def reshaped(axes: Sequence[Axis], new: Sequence[Any]) -> list[Axis]:
    """The axes of a view of sizes ``new``; splits atoms where it has to.

    Raises:
        Mixed: If a new dimension is no product of atoms or of a part of one.
    """
    pending = [atom for axis in axes for atom in leaves(axis)]
    same = _same_at_end(pending, new)
    if len(pending) - same == 1 < len(new) - same and _by_quotients(pending[0].size, new[: len(new) - same]):
        pending[0].parts = tuple(Atom(size) for size in new[: len(new) - same])
        pending = [atom for one in pending for atom in leaves((one,))]
    result: list[Axis] = []
    for size in new:
        taken: list[Atom] = []
        missing = size
        while missing != 1:
            if not pending:
                raise Mixed(f"a view to {list(new)}")
            atom = pending.pop(0)
            if _divides(atom.size, missing):
                missing = _quotient(missing, atom.size)
                taken.append(atom)
            elif _divides(missing, atom.size):
                atom.parts = (Atom(missing), Atom(_quotient(atom.size, missing)))
                taken.append(atom.parts[0])
                pending.insert(0, atom.parts[1])
                missing = sympy.Integer(1)
            else:
                raise Mixed(f"a view to {list(new)}")
        result.append(tuple(taken))
    if pending:
        raise Mixed(f"a view to {list(new)}")
    return result


def _same_at_end(atoms: Sequence[Atom], new: Sequence[Any]) -> int:
    """How many of the last dimensions are one atom each."""
    pairs = zip(reversed(atoms), reversed(new), strict=False)
    return next(
        (count for count, (atom, size) in enumerate(pairs) if atom.size != size), min(len(atoms), len(new))
    )


def _by_quotients(whole: Any, new: Sequence[Any]) -> bool:
    """Whether a dimension is split by a size that another input has: a view fails where that does not divide it."""
    return 1 not in new and any(isinstance(size, FloorDiv) and size.args[0] == whole for size in new)


def permutation(node: Any) -> list[int] | None:
    """The order of dimensions ``node`` gives its input; None if it is no permutation."""
    if not is_call(node, *_PERMUTES):
        return None
    rank = len(shape(node) or ())
    given = arguments(node)
    order = list(range(rank))
    if is_call(node, aten.permute.default):
        return [dim % rank for dim in given["dims"]]
    if is_call(node, aten.transpose.int, aten.swapaxes.default):
        first, second = (dim % rank for dim in list(given.values())[1:3])
        order[first], order[second] = second, first
    elif is_call(node, aten.movedim.int, aten.movedim.intlist):
        source, destination = (
            [dim % rank for dim in (value if isinstance(value, (list, tuple)) else [value])]
            for value in (given["source"], given["destination"])
        )
        rest = iter(dim for dim in range(rank) if dim not in source)
        order = [
            source[destination.index(place)] if place in destination else next(rest) for place in range(rank)
        ]
    elif is_call(node, aten.numpy_T.default):
        order.reverse()
    else:
        order[-2:] = order[:-3:-1]
    return order


def forward(node: Node, axes: Sequence[Axis]) -> list[Axis] | None:
    """The axes of ``node``, whose first input has ``axes``; None if it is no change of layout.

    Raises:
        Mixed: If the layout cannot be followed.
    """
    if is_call(node, *SAME):
        return list(axes)
    order = permutation(node)
    if order is not None:
        return [axes[dim] for dim in order]
    if is_call(node, *RESHAPES):
        return reshaped(axes, sizes(node))
    return None


def backward(node: Node, axes: Sequence[Axis]) -> list[Axis] | None:
    """The axes of the first input of ``node``, which has ``axes``; None if it is no change of layout.

    Raises:
        Mixed: If the layout cannot be followed.
    """
    if is_call(node, *SAME):
        return list(axes)
    order = permutation(node)
    if order is not None:
        return [axes[order.index(dim)] for dim in range(len(order))]
    if is_call(node, *RESHAPES):
        return reshaped(axes, sizes(node.args[0]))
    return None


def _divides(part: Any, whole: Any) -> bool:
    """Whether the quotient is a sum of whole multiples, of whatever a size is made of: a symbol, a floor, a remainder."""
    quotient = sympy.cancel(whole / part)
    terms = sympy.expand(quotient).as_coefficients_dict()
    return sympy.fraction(quotient)[1] == 1 and all(number.is_integer for number in terms.values())


def _quotient(whole: Any, part: Any) -> Any:
    return sympy.expand(sympy.cancel(whole / part))
