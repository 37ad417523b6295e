"""What a module does in training besides: it drops out attention weights, and other things.

the module in training mode  →  the same graph but for its dropout  →  where each probability is read from
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, map_arg
from torch.utils import _pytree as pytree

from retrofit.capture.call import Signature
from retrofit.capture.export import Captured, capture, set_training, without_cache
from retrofit.capture.guards import guards_of
from retrofit.capture.kept import restored
from retrofit.capture.observe import Normalized
from retrofit.capture.record import OwnerCall
from retrofit.errors import CaptureError
from retrofit.passes.attention.arguments import arguments, is_call
from retrofit.passes.attention.axes import SAME
from retrofit.passes.attention.canonical import ATTENTION
from retrofit.passes.attention.rule import calls

aten = torch.ops.aten
_DROPOUT = aten.dropout.default


@dataclass(frozen=True)
class Training:
    """How a module differs in training from what it does in evaluation.

    Attributes:
        normalized: Its graph in training; None if it is that of evaluation.
        dropout: The probability of dropping an attention weight: where it is read from, as ``attn_drop.p``, or the
            number itself.
        reason: Why it cannot be trained as it is; None if it can.
    """

    normalized: Normalized | None = None
    dropout: str | float = 0.0
    reason: str | None = None


def training_of(
    module: nn.Module, call: OwnerCall, evaluated: Normalized, normalized: Callable[[Captured], Normalized]
) -> Training:
    """Returns what ``module`` does in training.

    Args:
        module: The module.
        call: A call of it.
        evaluated: Its graph in evaluation.
        normalized: Finds the one attention of a graph.
    """
    if not differs(module, call):
        return Training()
    with _marked(module) as names:
        try:
            captured = capture(module, call, training=True)
        except CaptureError as error:
            return Training(reason=str(error))
        for node in captured.graph.nodes:
            if node.op == "call_module" and issubclass(node.meta["module_class"], nn.Dropout):
                node.meta["dropout_p"] = module.get_submodule(str(node.target)).p
        found = normalized(captured)
    if found.attention is None:
        return Training(reason=found.reason)
    if not _same_but_for_dropout(found.captured, evaluated.captured):
        return Training(reason="in training it does more than drop out")
    p = float(arguments(found.attention)["dropout_p"])
    for node in list(calls(captured.graph, _DROPOUT)):
        name = names.get(float(arguments(node)["p"]))
        if name is not None:
            with captured.graph.inserting_before(node):
                node.args = (node.args[0], captured.graph.get_attr(name), *node.args[2:])
    return Training(found, names.get(p, p))


def differs(module: nn.Module, call: OwnerCall) -> bool:
    """Whether ``module`` draws random numbers in training, or gives something else than in evaluation."""
    values = without_cache(Signature.of(module).bind(call.args, call.kwargs))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
    options = (device,) if device.type == "cuda" else ()
    found = []
    with torch.random.fork_rng(options), torch.no_grad(), restored(module.modules()):
        before = state(*options)
        try:
            for training in (False, True):
                with set_training(module, training):
                    found.append(pytree.tree_leaves(module.forward(**values)))
        except Exception:  # what it is, the capture will say
            return True
        finally:
            for buffer, kept in buffers:
                buffer.copy_(kept)
        evaluated, trained = ([leaf for leaf in of if isinstance(leaf, Tensor)] for of in found)
        same = len(evaluated) == len(trained) and all(map(torch.equal, evaluated, trained))
        return not same or not torch.equal(before, state(*options))


@contextmanager
def _marked(module: nn.Module) -> Iterator[Mapping[float, str]]:
    """Gives every probability of ``module`` a value of its own for a while; yields where each is read from."""
    places: list[tuple[Any, str, str]] = [
        (module, name, name)
        for name, value in vars(module).items()
        if "drop" in name.lower() and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    places += [
        (child, "p", f"{path}.p") for path, child in module.named_modules() if isinstance(child, nn.Dropout)
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    names: dict[float, str] = {}
    try:
        for number, (owner, name, path) in enumerate(places):
            value = 0.25 + number / 4096  # exact in every floating type
            vars(owner)[name] = value
            names[value] = path
        yield names
    finally:
        for (owner, name, _), value in zip(places, before, strict=True):
            vars(owner)[name] = value


def _same_but_for_dropout(a: Captured, b: Captured) -> bool:
    return (a.inputs, a.same, a.rows) == (b.inputs, b.same, b.rows) and same_graph(a, b)


def same_graph(a: Captured, b: Captured) -> bool:
    """Whether two graphs do the same with the inputs that they use, but for dropout."""
    return (
        guards_of(a) == guards_of(b)
        and a.constants.keys() == b.constants.keys()
        and all(torch.equal(a.constants[name], b.constants[name]) for name in a.constants)
        and skeleton(a) == skeleton(b)
    )


def skeleton(captured: Captured) -> list[str]:
    """What each node of a graph does, by number, without dropout and inputs that it does not use.

    Nor is a copy told from none, or a view from a reshape: that goes by the strides that a kernel returns, and a
    fused one with dropout is another.
    """
    places: dict[Node, str] = {}
    found: list[str] = []
    for node in captured.graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        if is_call(node, _DROPOUT, *SAME):
            places[node] = places[node.args[0]]
            continue
        args = node.args
        if is_call(node, ATTENTION):
            args = (*args[:6], 0.0, *args[7:])
        given = map_arg((args, node.kwargs), places.__getitem__)
        places[node] = f"%{len(found)}"
        target = aten.reshape.default if is_call(node, aten.view.default) else node.target
        if node.op == "placeholder":
            target = captured.inputs[node.name]
        found.append(f"{node.op} {target} {given}")
    return found
