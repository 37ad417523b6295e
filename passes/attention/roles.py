"""Decides which axes of an attention are batch, heads, queries, keys and width.

q (b, kv, group, t, d), k (b, kv, s, d), v (b, kv, s, e)
    →   batch (b), heads (kv), group (group), queries (t), keys (s), width (d), value width (e)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from retrofit.passes.attention.axes import Atom, Axis, leaves
from retrofit.passes.attention.operands import Operand


@dataclass(frozen=True)
class Roles:
    """The atoms of each canonical dimension, in order."""

    batch: Axis
    heads: Axis
    group: Axis
    queries: Axis
    keys: Axis
    width: Axis
    value_width: Axis

    @property
    def q(self) -> tuple[Axis, ...]:
        """The canonical dimensions of the queries."""
        return self.batch, (*self.heads, *self.group), self.queries, self.width

    @property
    def k(self) -> tuple[Axis, ...]:
        """The canonical dimensions of the keys."""
        return self.batch, self.heads, self.keys, self.width

    @property
    def v(self) -> tuple[Axis, ...]:
        """The canonical dimensions of the values."""
        return self.batch, self.heads, self.keys, self.value_width

    @property
    def scores(self) -> tuple[Axis, ...]:
        """The canonical dimensions of scores and masks."""
        return self.batch, (*self.heads, *self.group), self.queries, self.keys

    @property
    def out(self) -> tuple[Axis, ...]:
        """The canonical dimensions of the result."""
        return self.batch, (*self.heads, *self.group), self.queries, self.value_width


def assign(
    q: Operand, k: Operand, v: Operand, keys: Axis, width: Axis, outer_axes: Sequence[Axis]
) -> Roles | str:
    """Returns the roles of the axes, or why they are not those of attention.

    Args:
        q: The queries.
        k: The keys.
        v: The values.
        keys: What the softmax is over.
        width: What the scores are summed over.
        outer_axes: The dimensions of the scores as the product made them.
    """
    keys, width = leaves(keys), leaves(width)
    of_q, of_k, of_v = q.atoms, k.atoms, v.atoms
    if any(atom in of_q for atom in keys):
        return "the softmax is over an axis that queries and keys share, not over the keys"
    if any(atom not in of_k or atom not in of_v for atom in keys):
        return "the softmax is not over the axis that the product with values sums over"
    value_width = tuple(atom for atom in of_v if atom not in of_q and atom not in keys)
    outer = [atom for atom in of_q if atom not in width]
    own = [atom for atom in outer if atom not in of_k]
    if any(atom not in of_q and atom not in keys and atom not in width for atom in of_k):
        return "the keys have an axis of their own besides their number"
    queries = _queries(own, [leaves(axis) for axis in outer_axes])
    if isinstance(queries, str):
        return queries
    if any(atom in of_v for atom in queries):
        return "the values depend on the query"
    group = tuple(atom for atom in own if atom not in queries and atom not in of_v)
    shared = [atom for atom in outer if atom not in queries and atom not in group]
    batch = [atom for atom in shared if not atom.size.is_number]
    heads = [atom for atom in shared if atom.size.is_number]
    if not heads and not group and batch:
        last = batch[-1]
        count, rest = last.size.as_coeff_Mul()
        if count.is_integer and count > 1:
            last.parts = (Atom(rest), Atom(sympy.Integer(count)))
            batch, heads = [*batch[:-1], last.parts[0]], [last.parts[1]]
    if not batch and len(heads) > 1:
        batch, heads = heads[:1], heads[1:]
    return Roles(tuple(batch), tuple(heads), group, queries, keys, width, value_width)


def _queries(own: list[Atom], outer_axes: Sequence[Axis]) -> Axis | str:
    """The atoms among those that only the queries have that number the queries."""
    if not own:
        return ()  # one query attends
    varying = tuple(atom for atom in own if not atom.size.is_number)
    if len(varying) > 1 and not any(set(varying) <= set(axis) for axis in outer_axes):
        return "the keys are the same for every row of the batch"
    return varying or (own[-1],)
