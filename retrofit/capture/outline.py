"""Gives each attention of a module that has several a module of its own.

y = sdpa(q, k, v) … z = sdpa(r, l, w)   →   y = self.attention_0(q, k, v) … z = self.attention_1(r, l, w)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from retrofit.capture.assemble import copied_graph, function_of
from retrofit.capture.attend import Attend
from retrofit.capture.call import Signature
from retrofit.capture.call_plan import parts_of_call
from retrofit.capture.export import capture
from retrofit.capture.guards import guards_of, guards_of_one
from retrofit.capture.identity import identity
from retrofit.capture.ignored import GOES_AROUND
from retrofit.capture.observe import Normalized, kind_of, longer_samples
from retrofit.capture.plan import normalized_of
from retrofit.capture.record import OwnerCall
from retrofit.capture.site_plan import CallPlan
from retrofit.capture.training import differs
from retrofit.errors import CaptureError
from retrofit.passes.attention.arguments import arguments
from retrofit.passes.attention.masks import MaskSample
from retrofit.passes.attention.rewrite import free_layout


@dataclass(frozen=True)
class Outline:
    """A module without its attentions.

    Attributes:
        plan: How it is run.
        attends: The attentions that its graph calls, by name.
        far: The mask of each as it is far beyond the example, where sizes alone make it.
    """

    plan: CallPlan
    attends: Mapping[str, Attend]
    far: Mapping[str, Sequence[MaskSample]]


@dataclass(frozen=True)
class _Parted:
    """What identical modules share: their graph before and after, and how to make each of the attentions."""

    whole: Normalized
    plan: CallPlan
    attends: Mapping[str, Callable[[], Attend]]


class Outliner:
    """Takes the attentions out of modules; identical modules share one graph."""

    def __init__(self) -> None:
        self._parted: dict[Any, _Parted | CaptureError] = {}

    def outline(self, module: nn.Module, call: OwnerCall) -> Outline:
        """Takes the attentions out of ``module``.

        Args:
            module: The module, with several attentions.
            call: A call of it.

        Raises:
            CaptureError: If it returns attention weights, or cannot be captured.
        """
        signature = Signature.of(module)
        key = identity(module, call, signature)
        if key not in self._parted:
            try:
                self._parted[key] = _parted(module, call, signature)
            except CaptureError as error:
                self._parted[key] = error
        parted = self._parted[key]
        if isinstance(parted, CaptureError):
            raise parted
        far = {
            name: longer_samples(module, replace(parted.whole, attention=node), call, signature)
            for name, node in zip(parted.attends, parted.whole.several, strict=True)
        }
        return Outline(parted.plan, {name: make() for name, make in parted.attends.items()}, far)


def _parted(module: nn.Module, call: OwnerCall, signature: Signature) -> _Parted:
    whole = normalized_of(capture(module, call))
    if not whole.several:
        raise CaptureError(whole.reason)
    if any(arguments(node)["dropout_p"] for node in whole.several):
        raise CaptureError("it drops out attention weights in evaluation as well, not in training alone")
    guards = (*guards_of(whole.captured), *guards_of_one(module, whole, call, rows_alone=False))
    graph, copies = copied_graph(whole.captured.graph)
    attends: dict[str, Callable[[], Attend]] = {}
    for number, node in enumerate(whole.several):
        name = f"attention_{number}"
        while hasattr(module, name):
            name += "_"
        attends[name] = _taken_out(graph, copies[node], name)
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    assert isinstance(results, tuple)
    if None in results:
        raise CaptureError(f"{type(module).__name__}.forward returns attention weights")
    source = function_of(graph, results)
    plan = CallPlan(
        **parts_of_call(whole.captured, source, signature, call, GOES_AROUND, closed=True, guards=guards),
        training=None,
        untrainable="it has several attentions, and does more in training" if differs(module, call) else None,
        unkept=frozenset(),
    )
    return _Parted(whole, plan, attends)


def _taken_out(graph: Graph, node: Node, name: str) -> Callable[[], Attend]:
    given = arguments(node)
    alone = kind_of(node) == "self"
    taken = [given[part] for part in ("q", "k", "v", "mask", "sinks")]
    with graph.inserting_before(node):
        call = graph.call_module(name, tuple(taken))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    free_layout(call)
    trace = node.meta.get("stack_trace")
    return partial(Attend, given["scale"], given["is_causal"], given["softcap"], alone, trace)
