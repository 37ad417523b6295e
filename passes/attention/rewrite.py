"""Turns the one canonical attention of a module into a call of its target.

retrofit::attention(q, k, v, mask, …, sinks)   →   call_module "retrofit_attend"(q, k, v, context[, mask[, sinks[, bias]]])
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from retrofit.passes.attention.arguments import arguments
from retrofit.passes.attention.canonical import ATTENTION
from retrofit.passes.attention.merged import merge_values
from retrofit.passes.attention.rule import PassReport, Rule, calls, remove_dead, run_rules
from retrofit.passes.attention.sigmoid import SigmoidAttention
from retrofit.passes.attention.spelled_eager import EagerSpelling
from retrofit.passes.attention.spelled_mass import SinkAsFactor
from retrofit.passes.attention.spelled_sdpa import SdpaSpelling
from retrofit.passes.attention.spelled_softmax import SpelledSoftmax

CONTEXT = "context"
ATTEND = "retrofit_attend"
BIAS_OF_STEP = "retrofit_bias_of_step"
# What export asserts about the example's dtypes and sizes; it would tie the graph to them.
_CHECKS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
)
SPELLINGS: tuple[Rule[Any], ...] = (
    SpelledSoftmax(),
    SinkAsFactor(),
    SdpaSpelling(),
    EagerSpelling(),
    SigmoidAttention(),
)


def normalize(graph: Graph) -> PassReport:
    """Rewrites every spelling of attention in ``graph`` to the canonical node."""
    for check in list(calls(graph, *_CHECKS)):
        graph.erase_node(check)
    report = run_rules(graph, SPELLINGS)
    report.counts["merged"] = merge_values(graph)
    remove_dead(graph)
    graph.lint()
    return report


def attentions(graph: Graph) -> list[Node]:
    """The canonical nodes of ``graph``."""
    return list(calls(graph, ATTENTION))


def target_call(
    graph: Graph, node: Node, *, keep_mask: bool, keep_keys: bool = True, bias: Node | None = None
) -> Node:
    """Replaces the canonical ``node`` by a call of the site's target; returns that call.

    The graph gets a last placeholder, ``context``: what the site passes around it. The mask's own
    computation becomes dead and is removed unless ``keep_mask``, and that of keys and values unless ``keep_keys``.
    A ``bias`` is handed over as well, by way of ``BIAS_OF_STEP``, which knows of earlier tokens.
    """
    q, k, v, mask = node.args[:4]
    if not keep_keys:
        k = v = None
    last = [item for item in graph.nodes if item.op == "placeholder"][-1]
    with graph.inserting_after(last):
        context = graph.placeholder(CONTEXT)
    with graph.inserting_before(node):
        whole = None if bias is None else graph.call_module(BIAS_OF_STEP, (bias, q, context))
        given = (q, k, v, context, *_rest(mask if keep_mask else None, sinks_of(node), whole))
        call = graph.call_module(ATTEND, given)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    if bias is not None:
        output = next(item for item in graph.nodes if item.op == "output")
        output.replace_input_with(bias, whole)
    graph.erase_node(node)
    free_layout(call)
    remove_dead(graph)
    for item in list(graph.nodes):
        if item.op == "placeholder" and not item.users and item is not context:
            graph.erase_node(item)
    graph.lint()
    return call


def sinks_of(node: Node) -> Any:
    """The sinks of a canonical ``node``; None if it has none."""
    return arguments(node)["sinks"]


def _rest(*values: Any) -> tuple[Any, ...]:
    """``values`` without those at the end that are None."""
    kept = list(values)
    while kept and kept[-1] is None:
        kept.pop()
    return tuple(kept)


def free_layout(call: Node) -> None:
    """Turns views of what the target returns into reshapes: its strides are not those of SDPA.

    Export drops a ``contiguous()`` where SDPA's own strides make it superfluous.
    """
    pending, seen = [call], {call}
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            pending.append(user)
            if user.op == "call_function" and user.target is torch.ops.aten.view.default:
                user.target = torch.ops.aten.reshape.default
