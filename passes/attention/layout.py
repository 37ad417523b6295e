"""Brings the parts of an attention into the canonical layout, and its result back into its own.

q [t, b, h, d], k [b, s, h, d]   →   permute, reshape   →   q [B, H, T, D], k [B, H, S, D]
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.axes import Atom, Axis, leaves, size_of, sizes

aten = torch.ops.aten
_SIZE = aten.sym_size.int


class Editor:
    """Adds nodes before a given one, each with the value it stands for."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self.graph = graph
        self.before = before

    def call(self, target: Any, *args: Any) -> Node:
        """A call of ``target``, its fake value worked out from those of its arguments."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args)
        self.value(node)
        return node

    def value(self, node: Node) -> None:
        """Works out the fake value of ``node`` from those of its arguments."""
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
        with torch.no_grad(), _mode_of(node.all_input_nodes):
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def size(self, expression: Any, *near: Node) -> Any:
        """A size as an argument: a number, or a node that holds it."""
        if expression.is_number:
            return int(expression)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node in self.graph.nodes:
            if node is self.before:
                break
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and size_of(value) == expression:
                return node
        for node in (*near, *placeholders):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(sizes(node)):
                    if size == expression:
                        return self.call(_SIZE, node, dim)
        if expression.is_Mul:
            product: Any = 1
            for factor in expression.args:
                product = self.call(operator.mul, product, self.size(factor, *near))
            return product
        raise LookupError(f"no tensor has a dimension of size {expression}")

    def reshape(self, node: Node, new: Sequence[Any]) -> Node:
        """``node`` as a tensor of sizes ``new``; itself if it has them."""
        if list(sizes(node)) == list(new):
            return node
        symbolic = [size for size in new if not size.is_number]
        given = [-1 if len(symbolic) == 1 and not size.is_number else self.size(size, node) for size in new]
        return self.call(aten.reshape.default, node, given)

    def permute(self, node: Node, order: Sequence[int]) -> Node:
        """``node`` with its dimensions in ``order``; a transpose where two change places."""
        order = list(order)
        if order == list(range(len(order))):
            return node
        moved = [dim for dim, source in enumerate(order) if dim != source]
        if len(moved) == 2:
            return self.call(aten.transpose.int, node, *moved)
        return self.call(aten.permute.default, node, order)

    def to_groups(
        self, node: Node, axes: Sequence[Axis], groups: Sequence[Axis], *, broadcast: Sequence[int] = ()
    ) -> Node:
        """``node``, whose dimensions are ``axes``, as one dimension for each of ``groups``.

        An atom that ``node`` lacks is expanded, or stays a dimension of 1 if its whole group is lacking and
        listed in ``broadcast``.
        """
        own = [leaves(axis) for axis in axes]
        wanted = [leaves(group) for group in groups]
        present = {atom for axis in own for atom in axis}
        kept = [
            () if place in broadcast and not any(atom in present for atom in group) else group
            for place, group in enumerate(wanted)
        ]
        whole = [axis for axis in own if axis]
        if sorted(map(id, sum(whole, ()))) == sorted(map(id, sum(kept, ()))) and all(
            group in own for group in kept if group
        ):
            return self._moved(node, own, kept)
        node = self.reshape(node, [atom.size for axis in own for atom in axis])
        flat = [atom for axis in own for atom in axis]
        target = [atom for group in kept for atom in group]
        node = self.permute(node, [flat.index(atom) for atom in target if atom in present])
        for dim, atom in enumerate(target):
            if atom not in present:
                node = self.call(aten.unsqueeze.default, node, dim)
        if any(atom not in present for atom in target):
            full = [-1 if atom in present else self.size(atom.size, node) for atom in target]
            node = self.call(aten.expand.default, node, full)
        return self.reshape(node, [_product(group) for group in kept])

    def _moved(self, node: Node, own: Sequence[Axis], groups: Sequence[Axis]) -> Node:
        """``node`` with its dimensions, those of 1 included, where ``groups`` has them."""
        spare = [dim for dim, axis in enumerate(own) if not axis]
        order: list[int] = []
        new: list[Any] = []
        for place, group in enumerate(groups):
            new.append(sizes(node)[own.index(group)] if group else sympy.Integer(1))
            if group:
                order.append(own.index(group))
            elif spare:
                # A dimension of 1 may come from anywhere: one that need not move, if there is one.
                order.append(place if place in spare else spare[0])
                spare.remove(order[-1])
        return self.reshape(self.permute(node, [*order, *spare]), new)


def _product(group: Sequence[Atom]) -> Any:
    return sympy.expand(sympy.prod(atom.size for atom in group))


def _mode_of(inputs: Sequence[Node]) -> AbstractContextManager[Any]:
    """The fake mode of the first tensor among ``inputs``."""
    modes = (getattr(node.meta["val"], "fake_mode", None) for node in inputs)
    return next((mode for mode in modes if mode is not None), nullcontext())
