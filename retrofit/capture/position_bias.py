"""What is added to the scores of a site besides its mask: learned relative positions, or what a caller hands in.

mask of the probes  →  the part that hides, for the class  +  the part that is added, which stays in the graph
                       and, where a cache holds earlier tokens, is computed again for the new ones
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from retrofit.capture.assemble import copied, function_of
from retrofit.capture.call import LeafPath, Signature, lookup, spelled
from retrofit.capture.evaluate import ancestors, evaluate
from retrofit.capture.observe import Normalized, ProbedCall, learned_mask, values_of
from retrofit.passes.attention.added import added
from retrofit.passes.attention.arguments import is_call, shape
from retrofit.passes.attention.bias import adds
from retrofit.passes.attention.masks import MaskSample
from retrofit.passes.attention.rule import Reject
from retrofit.passes.attention.scores import HIDDEN

aten = torch.ops.aten
_INDEX = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_MIXED = "the bias added to the scores cannot be told from what the mask hides"
_MOST_INDICES = 6
_STEPS = (1, 3)  # tokens of the steps on which a shorter computation is tried


@dataclass(frozen=True)
class StepBias:
    """How the bias of new tokens is computed where a cache holds earlier ones.

    Attributes:
        source: Python source of a function from ``tokens`` and tensors, of which only the sizes count.
        inputs: Where these are found in a call, and which of their dimensions number the tokens.
    """

    source: str
    inputs: tuple[tuple[LeafPath, tuple[int, ...]], ...]


def is_biased(
    module: nn.Module, attention: Node, samples: Sequence[MaskSample], mask_paths: Set[LeafPath]
) -> bool:
    """Whether the mask adds something, or may do so with other weights or another caller.

    Args:
        module: The module.
        attention: Its canonical node.
        samples: Its masks.
        mask_paths: The arguments that they are made from.
    """
    masks = [sample.mask for sample in samples if sample.mask is not None]
    if not masks or not masks[0].is_floating_point():
        return False
    handed_in = len({is_mask(path) for path in mask_paths}) > 1
    return handed_in or learned_mask(module, attention) is not None or any(map(adds, masks))


def is_mask(path: LeafPath) -> bool:
    """Whether an argument is one that hides, by its name."""
    return "mask" in str(path[0])


def hides_by(path: LeafPath, calls: Sequence[ProbedCall], signature: Signature) -> bool:
    """Whether an argument is a mask that hides and no more, as those with −100 in them, for other windows, are not."""
    given = (lookup(signature.bind(item.call.args, item.call.kwargs), path) for item in calls)
    floats = (mask for mask in given if isinstance(mask, Tensor) and mask.is_floating_point())
    return is_mask(path) and not any(map(adds, floats))


def hiding(sample: MaskSample) -> MaskSample:
    """``sample`` with the part of its mask that hides, bool."""
    mask = sample.mask
    return replace(sample, mask=mask > HIDDEN) if mask is not None and mask.is_floating_point() else sample


def dependence(normalized: Normalized) -> str | None:
    """By which inputs the mask depends on the tokens that queries or keys are made from; None if it does not."""
    attention, inputs = normalized.attention, normalized.captured.inputs
    assert attention is not None
    q, k, mask = (_values(attention.args[place]) for place in (0, 1, 3))
    shared = sorted(spelled(inputs[node.name]) for node in (q | k) & mask)
    return (
        f"the bias added to the scores depends on the tokens, by way of {', '.join(shared)}"
        if shared
        else None
    )


def bias_reason(
    module: nn.Module,
    normalized: Normalized,
    calls: Sequence[ProbedCall],
    samples: Sequence[MaskSample],
    hides: str | None,
) -> str | None:
    """Why the bias cannot be carried over; None if it can.

    Args:
        module: The module.
        normalized: Its graph.
        calls: Its calls on the probes.
        samples: The masks that it had in them.
        hides: The placeholder of what hides, if that is given to the site.
    """
    graph, attention = copied(normalized)
    try:
        bias = added(graph, attention, hides)
    except Reject as reject:
        return reject.reason
    signature, captured = Signature.of(module), normalized.captured
    for probed, sample in zip(calls, samples, strict=True):
        if sample.mask is None:
            continue
        values = values_of(captured, probed.call, signature)
        try:
            with torch.no_grad():
                value = evaluate(graph, bias, module, values, captured.constants)
        except RuntimeError:  # without the mask its sizes do not fit
            return _MIXED
        own, found = torch.broadcast_tensors(sample.mask, value)
        if not torch.equal(own.masked_fill(own <= HIDDEN, 0), found.masked_fill(own <= HIDDEN, 0)):
            return _MIXED
    return None


def _values(node: Any) -> set[Node]:
    """The inputs that give ``node`` its values."""
    found = ancestors(node, through_sizes=False) if isinstance(node, Node) else set()
    return {item for item in found if item.op == "placeholder"}


def step_bias(
    module: nn.Module, normalized: Normalized, probed: ProbedCall, hides: str | None
) -> StepBias | None:
    """How the bias of new tokens is computed; None where the caller hands it in as they need it.

    Rows of earlier tokens are left out of the computation if a shorter one, in which some of the indices are those
    of the new tokens, is seen to give the same.
    """
    captured, signature = normalized.captured, Signature.of(module)
    graph, attention = copied(normalized)
    bias = added(graph, attention, hides)
    if _values(bias):
        return None
    q = attention.args[0]
    assert isinstance(q, Node)
    length = str((shape(q) or ())[2])
    values = values_of(captured, probed.call, signature)
    with torch.no_grad():
        whole = evaluate(graph, bias, module, values, captured.constants)
    for rows in _row_indices(bias):
        cut, result = _cut(normalized, hides, rows)
        if not _gives_last_rows(cut, result, whole, module, values, captured.constants):
            continue
        source = function_of(cut, (result,))
        places = {
            node.name: tuple(dim for dim, size in enumerate(shape(node) or ()) if str(size) == length)
            for node in cut.nodes
            if node.op == "placeholder" and node.name in captured.inputs
        }
        inputs = tuple((captured.inputs[name], places[name]) for name in source.inputs if name in places)
        return StepBias(source.code, inputs)
    raise AssertionError("slicing the whole bias gives its last rows")


def _row_indices(bias: Node) -> Iterator[tuple[str, ...] | None]:
    """Which indices may be those of the queries, fewest first; None at last, for none."""
    indices = [node.name for node in bias.graph.nodes if is_call(node, *_INDEX) and node in ancestors(bias)]
    if len(indices) <= _MOST_INDICES:
        for count in range(1, len(indices)):
            yield from combinations(indices, count)
    yield None


def _cut(normalized: Normalized, hides: str | None, rows: tuple[str, ...] | None) -> tuple[Graph, Node]:
    """The bias of the last ``tokens`` queries, where the indices ``rows`` are those of queries."""
    graph, attention = copied(normalized)
    bias = added(graph, attention, hides)
    first = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(first):
        tokens = graph.placeholder("tokens")
    for node in [bias] if rows is None else [node for node in graph.nodes if node.name in rows]:
        users = list(node.users)
        with graph.inserting_after(node):
            start = graph.call_function(operator.neg, (tokens,))
        with graph.inserting_after(start):
            last = graph.call_function(aten.slice.Tensor, (node, -2 if rows is None else 0, start))
        for user in users:
            user.replace_input_with(node, last)
        bias = last if node is bias else bias
    return graph, bias


def _gives_last_rows(
    graph: Graph,
    result: Node,
    whole: Tensor,
    module: nn.Module,
    values: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> bool:
    for tokens in _STEPS:
        try:
            with torch.no_grad():
                got = evaluate(graph, result, module, {**values, "tokens": tokens}, constants)
        except RuntimeError:  # indices of keys among them: the sizes do not fit
            return False
        last = whole[..., -tokens:, :]
        if got.shape != last.shape or not torch.equal(got, last):
            return False
    return True
