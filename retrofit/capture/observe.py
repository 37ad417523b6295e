"""What a normalised module shows of its attention: its kind, and its mask on the probes and beyond them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from retrofit.capture.call import LeafPath, Signature, lookup
from retrofit.capture.evaluate import ancestors, concrete, evaluate, evaluate_for, symbols_of
from retrofit.capture.export import Captured, expanded
from retrofit.capture.record import OwnerCall
from retrofit.passes.attention.arguments import shape
from retrofit.passes.attention.axes import size_of
from retrofit.passes.attention.masks import MaskSample
from retrofit.passes.attention.rule import Refusal

FAR = (2048, 1024, 512, 256, 128, 64)  # lengths at which a mask made of sizes alone is looked at again
MOST_SCORES = 2**25


@dataclass(frozen=True)
class ProbedCall:
    """One call of a module, with what the probe says about its rows.

    Attributes:
        call: The call and its result.
        keep: bool [B, N], the real tokens; None if the probe does not say.
    """

    call: OwnerCall
    keep: Tensor | None


@dataclass(frozen=True)
class Normalized:
    """A captured module after normalisation.

    Attributes:
        attention: Its one canonical node; None if there is none that can be converted.
        reason: Why there is none.
        kind: What kind of module it is then.
        nearest: The refusal of the rule that came nearest to it.
        several: The canonical nodes, if there are more than one.
    """

    captured: Captured
    attention: Node | None
    reason: str
    kind: str = "unknown"
    nearest: Refusal | None = None
    several: tuple[Node, ...] = ()


def kind_of(attention: Node) -> str:
    """``self`` where queries and keys come from the same tokens, else ``cross``.

    Of a module that is handed both ready-made, their lengths say so: capture makes those of the same tokens one.
    """
    q, k = attention.args[0], attention.args[1]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    q_shape, k_shape = shape(q), shape(k)
    if q_shape is None or k_shape is None or str(q_shape[2]) != str(k_shape[2]):
        return "cross"
    before, earlier = (ancestors(node, through_sizes=False) for node in (q, k))
    if not any(node.op in ("call_module", "get_attr") for node in before | earlier):
        return "self"
    first = [node for node in before if node.op == "placeholder"]
    hidden = max(first, key=lambda node: len(shape(node) or ()), default=None)
    lead = min(first, key=lambda node: list(q.graph.nodes).index(node), default=None)
    return "self" if lead is None or lead in earlier or hidden in earlier else "cross"


def is_pooled(attention: Node) -> bool:
    """Whether keys that are not the tokens of the queries are made from the same, or the queries from none."""
    of_q, of_k = (
        {item for item in ancestors(node, through_sizes=False) if item.op == "placeholder"}
        for node in attention.args[:2]
        if isinstance(node, Node)
    )
    return not of_q or of_k <= of_q


def too_short(attention: Node) -> str | None:
    """Why an example of one block of a sequence, or of one token, does not show what a module does; None if it does."""
    heads = (shape(attention.args[0]) or ())[1]
    keys = (shape(attention.args[1]) or ())[2]
    if not size_of(heads).is_number:
        return "the sequence is cut into blocks, and the example is no longer than one; convert with a longer example"
    if size_of(keys) == 1:
        return "the example has one key alone, which shows nothing of the mask; convert with a longer example"
    return None


def values_of(captured: Captured, call: OwnerCall, signature: Signature) -> dict[str, Any]:
    """The tensors of a call by the names of the graph's placeholders."""
    bound = signature.bind(call.args, call.kwargs)
    values = {name: lookup(bound, path) for name, path in captured.inputs.items()}
    first = next(iter(values.values()))
    for name, path in captured.inputs.items():
        if path in captured.rows:
            values[name] = expanded(values[name], first)
    return values


def sample_of(
    module: nn.Module, normalized: Normalized, probed: ProbedCall, signature: Signature
) -> MaskSample:
    """The mask that the module had or built in one recorded call."""
    attention = normalized.attention
    assert attention is not None
    mask, is_causal = attention.args[3], attention.args[4]
    values = values_of(normalized.captured, probed.call, signature)
    graph, constants = normalized.captured.graph, normalized.captured.constants
    value = None
    with torch.no_grad():
        if isinstance(mask, Node):
            value = evaluate(graph, mask, module, values, constants)
    batch, length = _rows_and_keys(normalized, values)
    keep = probed.keep if probed.keep is not None and probed.keep.shape == (batch, length) else None
    return MaskSample(value, bool(is_causal), batch, length, keep)


def _rows_and_keys(normalized: Normalized, values: Mapping[str, Any]) -> tuple[int, int]:
    assert normalized.attention is not None
    k = normalized.attention.args[1]
    assert isinstance(k, Node)
    batch, _, length, _ = concrete(shape(k) or (), symbols_of(normalized.captured.graph, values))
    return batch, length


def longer_samples(
    module: nn.Module, normalized: Normalized, call: OwnerCall, signature: Signature
) -> list[MaskSample]:
    """The mask as it is far beyond the example, if sizes alone make it: a window may be wider than the example."""
    attention = normalized.attention
    assert attention is not None
    q, mask = attention.args[0], attention.args[3]
    if not isinstance(mask, Node) or mask_paths_of(normalized):
        return []
    assert isinstance(q, Node)
    queries = (shape(q) or ())[2]
    if isinstance(queries, int) or not queries.node.expr.is_Symbol:
        return []
    graph = normalized.captured.graph
    known = symbols_of(graph, values_of(normalized.captured, call, signature))
    for length in FAR:
        sizes = {**known, queries.node.expr: length}
        try:
            if math.prod(concrete(shape(mask) or (), sizes)) > MOST_SCORES:
                continue
            with torch.no_grad():
                value = evaluate_for(graph, mask, module, sizes, normalized.captured.constants)
            batch = concrete(shape(q) or (), sizes)[0]
        except (RuntimeError, IndexError):
            continue  # longer than what the module has a mask for
        if value.shape[-1] == length:
            return [MaskSample(value, bool(attention.args[4]), batch, length, None)]
    return []


def mask_paths_of(normalized: Normalized) -> set[LeafPath]:
    """The inputs whose values, not only sizes, make the mask."""
    assert normalized.attention is not None
    mask = normalized.attention.args[3]
    if not isinstance(mask, Node):
        return set()
    inputs = normalized.captured.inputs
    return {inputs[node.name] for node in ancestors(mask, through_sizes=False) if node.op == "placeholder"}


def selection(attention: Node) -> str | None:
    """What chooses the keys that the mask leaves visible, if the module makes it by a search; None if it does not."""
    mask = attention.args[3]
    for node in ancestors(mask, through_sizes=False) if isinstance(mask, Node) else ():
        if node.target is torch.ops.aten.topk.default:
            return "another score (topk)"
        values = pytree.tree_leaves(node.meta.get("val")) if node.op == "call_module" else []
        if any(isinstance(value, Tensor) and not value.is_floating_point() for value in values):
            return f"its child {node.target} ({node.meta['module_class'].__name__})"
    return None


def learned_mask(module: nn.Module, attention: Node) -> str | None:
    """The parameter or child of ``module`` that the values of the mask come from; None if there is none."""
    mask, learned = attention.args[3], dict(module.named_parameters())
    for node in ancestors(mask, through_sizes=False) if isinstance(mask, Node) else ():
        if node.op == "call_module" or (node.op == "get_attr" and node.target in learned):
            return str(node.target)
    return None
