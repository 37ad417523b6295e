"""Gives each attention of a module that has several a module of its own.

y = sdpa(q, k, v) … z = sdpa(r, l, w)   →   y = self.attention_0(q, k, v) … z = self.attention_1(r, l, w)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, Node

from retrofit.capture.assemble import function_of
from retrofit.capture.attend import Attend
from retrofit.capture.call import Signature
from retrofit.capture.call_plan import parts_of_call
from retrofit.capture.export import capture
from retrofit.capture.guards import guards_of, guards_of_one
from retrofit.capture.ignored import GOES_AROUND
from retrofit.capture.observe import kind_of
from retrofit.capture.plan import normalized_of
from retrofit.capture.record import OwnerCall
from retrofit.capture.site_plan import CallPlan
from retrofit.capture.training import differs
from retrofit.passes.attention.arguments import arguments
from retrofit.passes.attention.rewrite import free_layout


@dataclass(frozen=True)
class Outline:
    """A module without its attentions.

    Attributes:
        plan: How it is run.
        attends: The attentions that its graph calls, by name.
    """

    plan: CallPlan
    attends: dict[str, Attend]


def outline(module: nn.Module, call: OwnerCall) -> Outline | None:
    """Takes the attentions out of ``module``; None if it has none that all rules agree on, or returns weights.

    Args:
        module: The module, with several attentions.
        call: A call of it.
    """
    signature = Signature.of(module)
    normalized = normalized_of(capture(module, call))
    captured = normalized.captured
    guards = (
        *guards_of(captured),
        *guards_of_one(module, normalized, call, rows_alone=False),
    )
    attends: dict[str, Attend] = {}
    for number, node in enumerate(normalized.several):
        name = f"attention_{number}"
        while hasattr(module, name):
            name += "_"
        attends[name] = _taken_out(captured.graph, node, name)
    (results,) = next(node for node in captured.graph.nodes if node.op == "output").args
    assert isinstance(results, tuple)
    if not attends or None in results:
        return None
    source = function_of(captured.graph, results)
    plan = CallPlan(
        **parts_of_call(captured, source, signature, call, GOES_AROUND, closed=True, guards=guards),
        training=None,
        untrainable="it has several attentions" if differs(module, call) else None,
        unkept=frozenset(),
    )
    return Outline(plan, attends)


def _taken_out(graph: Graph, node: Node, name: str) -> Attend:
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
    return Attend(given["scale"], given["is_causal"], given["softcap"], alone, trace)
