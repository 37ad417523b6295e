"""Conditions on sizes by which a module chose what it does: its graph holds where they do.

    return short(x) if x.shape[1] <= 16 else long(x)   →   x.shape[1] <= 16
    x * math.log(x.shape[1])                           →   x.shape[1] == 11

Export keeps them apart from the graph. Those of torch's own code say how an operation is done, not what (the operation
in the graph decides again), unless a size has become a number. Sizes of 1 it takes for another matter, which it does
not look into; they are tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from retrofit.capture.call import LeafPath, Signature, rebuild, same_tensors, spelled
from retrofit.capture.evaluate import concrete, evaluate, input_dims, symbols_of
from retrofit.capture.export import Captured, fixes_a_size, set_training, symbolic, without_cache
from retrofit.capture.kept import restored
from retrofit.capture.observe import Normalized, values_of
from retrofit.capture.probes import same_draws
from retrofit.capture.record import OwnerCall, slow_path
from retrofit.capture.standin import chosen

_ABOUT_HOW = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/")
_ABOUT_WHAT = f"{Path(nn.__file__).parent}/"


@dataclass(frozen=True)
class Guard:
    """One condition.

    Attributes:
        text: For people: ``x.shape[1] <= 16``.
        source: Source of ``forward(self, *sizes)``, which says whether it holds.
        sizes: The sizes it is about: where their tensors are found in a call, and which dimension of them is meant.
    """

    text: str
    source: str
    sizes: tuple[tuple[LeafPath, int], ...]


def guards_of(captured: Captured) -> tuple[Guard, ...]:
    """The conditions that the model's own code put on the sizes of its inputs."""
    graph, inputs, rows = captured.graph, captured.inputs, captured.rows
    dims = input_dims(graph)
    found: dict[Any, Guard] = {}
    for guard in captured.conditions:
        if not fixes_a_size(guard.expr) and not _is_of_the_model(guard):
            continue
        places = [dims.get(symbol) for symbol in sorted(guard.expr.free_symbols, key=str)]
        if any(place is not None and place[1] == 0 and inputs[place[0]] in rows for place in places):
            continue  # as many as there are rows
        sizes = tuple((inputs[place[0]], place[1]) for place in places if place is not None)
        if len(sizes) == len(places):
            found[guard.expr] = _guard(guard.expr, sizes)
    return tuple(found.values())


def guards_of_one(
    module: nn.Module, normalized: Normalized, call: OwnerCall, *, rows_alone: bool
) -> tuple[Guard, ...]:
    """The sizes that must not be 1, as the graph then does something else than the module.

    Args:
        module: The module.
        normalized: Its graph.
        call: A call of it.
        rows_alone: Whether only the number of rows is tried.
    """
    signature, captured = Signature.of(module), normalized.captured
    graph, values = captured.graph, values_of(captured, call, signature)
    dims, known = input_dims(graph), symbols_of(graph, values)
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    found = []
    for symbol in {size.node.expr: None for node in graph.nodes for size in _inputs(node)}:
        if not symbol.is_Symbol or known.get(symbol, 1) == 1 or symbol not in dims:
            continue
        name, dim = dims[symbol]
        if (rows_alone and dim != 0) or (dim == 0 and captured.inputs[name] in captured.rows):
            continue
        cut = {
            node.name: _cut(values[node.name], node.meta["val"].shape, {**known, symbol: 1})
            for node in graph.nodes
            if node.op == "placeholder"
        }
        few = len(next(iter(cut.values())))
        cut = {
            name: value[:few] if captured.inputs[name] in captured.rows else value
            for name, value in cut.items()
        }
        with set_training(module, False), torch.no_grad():
            replaced = {captured.inputs[name]: value for name, value in cut.items()}
            expected = _results_of_module(module, call, replaced)
            if expected is None:
                continue
            try:
                got = [
                    None if node is None else evaluate(graph, node, module, cut, captured.constants)
                    for node in results
                ]
            except RuntimeError:  # other shapes than the module then has
                got = [None]
        if not _agree(got, expected):
            found.append(_guard(sympy.Gt(symbol, 1, evaluate=False), ((captured.inputs[name], dim),)))
    return tuple(found)


def _inputs(node: Node) -> list[torch.SymInt]:
    return symbolic(node.meta.get("val")) if node.op == "placeholder" else []


def _cut(tensor: Tensor, sizes: Sequence[Any], known: Mapping[sympy.Symbol, int]) -> Tensor:
    """``tensor`` without what is beyond ``sizes``."""
    for dim, size in enumerate(concrete(tuple(sizes), known)):
        tensor = tensor.narrow(dim, 0, min(size, tensor.shape[dim]))
    return tensor


def _results_of_module(
    module: nn.Module, call: OwnerCall, replaced: Mapping[LeafPath, Tensor]
) -> list[Tensor] | None:
    """The tensors that ``module`` gives for ``call`` with some of its tensors exchanged; None if it takes no such."""
    values = without_cache(Signature.of(module).bind(call.args, call.kwargs))
    for path, first in same_tensors(values).items():
        replaced = {**replaced, path: replaced[first]}
    with restored(module.modules()), same_draws(), slow_path():
        try:
            leaves = pytree.tree_leaves(module.forward(**rebuild(values, replaced)))
        except Exception:  # as the module wants it
            return None
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _agree(got: Sequence[Any], expected: Sequence[Tensor]) -> bool:
    """Whether results are the same but for rounding; None stands for weights, which nobody gets."""
    return len(got) == len(expected) and all(
        a is None or (a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True))
        for a, b in zip(got, expected, strict=True)
    )


def _guard(condition: Any, sizes: tuple[tuple[LeafPath, int], ...]) -> Guard:
    """``condition`` on ``sizes``, which are those of its symbols in the order of their names."""
    symbols = sorted(condition.free_symbols, key=str)
    names = [sympy.Symbol(f"n{number}", integer=True, positive=True) for number in range(len(symbols))]
    code = PythonPrinter().doprint(condition.xreplace(dict(zip(symbols, names, strict=True))))
    text = code
    for name, (path, dim) in zip(names, sizes, strict=True):
        text = text.replace(str(name), f"{spelled(path)}.shape[{dim}]")
    parameters = "".join(f", {name}" for name in names)
    return Guard(text, f"import math\ndef forward(self{parameters}):\n    return {code}\n", sizes)


def _is_of_the_model(guard: Any) -> bool:
    place = guard.sloc.framework_loc
    path = getattr(place, "filename", "")
    if path == chosen.__code__.co_filename and place.name == chosen.__name__:
        return True
    return path.startswith(_ABOUT_WHAT) or not path.startswith(_ABOUT_HOW)
