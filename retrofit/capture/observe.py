"""What a normalised module shows of its attention: its kind, and its mask on the probes and beyond them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from retrofit.capture.call import LeafPath, Signature, lookup
from retrofit.capture.evaluate import ancestors, concrete, evaluate, evaluate_for, symbols_of
from retrofit.capture.export import Captured, expanded
from retrofit.capture.mask_numbers import held_by, numbers_in
from retrofit.capture.record import OwnerCall
from retrofit.errors import CaptureError
from retrofit.passes.attention.arguments import shape
from retrofit.passes.attention.axes import size_of
from retrofit.passes.attention.masks import MaskSample
from retrofit.passes.attention.rule import Refusal

FAR = (2048, 1024, 512, 256, 128, 64)  # lengths at which a mask made of sizes alone is looked at again
MOST_SCORES = 2**25
MOST_SCORES_NEEDED = (
    2**27
)  # where a number in the mask, or a mask that the module holds, asks for that length


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
    """The mask as it is far beyond the example, if sizes alone make it: a window may be wider than the example.

    Raises:
        CaptureError: If a number in the mask is beyond the lengths that can be looked at.
    """
    attention = normalized.attention
    assert attention is not None
    q, mask = attention.args[0], attention.args[3]
    if not isinstance(mask, Node) or mask_paths_of(normalized):
        return []
    assert isinstance(q, Node)
    batch, _, queries, _ = shape(q) or ()
    if isinstance(queries, int):
        return []
    graph, constants = normalized.captured.graph, normalized.captured.constants
    known = symbols_of(graph, values_of(normalized.captured, call, signature))
    (seen,) = concrete((queries,), known)
    if not isinstance(batch, int) and batch.node.expr.is_Symbol:
        known[batch.node.expr] = 1  # all rows have the same mask, as no input makes it
    learned = dict(module.named_parameters())
    numbers = numbers_in(mask, module, constants, learned)
    held = _held_lengths(mask, module, constants)
    needed = {-(-(number + 1) // 256) * 256 for number in numbers} | {number + 1 for number in numbers} | held
    too_large: set[int] = set()
    for length in sorted({*FAR, *needed}, reverse=True):
        if length <= seen or (sizes := _of_length(queries, length, known)) is None:
            continue
        try:
            most = MOST_SCORES_NEEDED if length in needed else MOST_SCORES
            if math.prod(concrete(shape(mask) or (), sizes)) > most:
                too_large.add(length)
                continue
            rows, _, tokens, _ = concrete(shape(q) or (), sizes)
            with torch.no_grad():
                value = evaluate_for(graph, mask, module, sizes, constants)
        except (RuntimeError, IndexError):
            continue  # longer than what the module has a mask for
        if value.shape[-1] == tokens:
            seen, longer = tokens, [MaskSample(value, bool(attention.args[4]), rows, tokens, None)]
            break
    else:
        longer = []
    beyond = [number for number in numbers if number >= seen]
    if (whole := max(_held_masks(mask, module, constants) & too_large, default=0)) > seen:
        raise CaptureError(f"it holds a mask for {whole} tokens, more than can be looked at")
    if beyond and (too_large or not held):  # else what is held ends before
        raise CaptureError(
            f"its mask has the number {max(beyond)} in it, which the lengths that were looked at, {seen} tokens "
            "at most, do not reach"
        )
    return longer


def _of_length(
    queries: torch.SymInt, length: int, known: Mapping[sympy.Symbol, int]
) -> dict[sympy.Symbol, int] | None:
    """The sizes with which there are ``length`` queries, or a few more; None if they do not follow from it."""
    expr = queries.node.expr
    if len(expr.free_symbols) != 1:
        return None
    (symbol,) = expr.free_symbols
    step = expr.coeff(symbol)
    rest = expr - step * symbol
    if not step.is_Integer or step <= 0 or not rest.is_Integer:
        return None
    return {**known, symbol: int(-(-(length - rest) // step))}


def _held_lengths(mask: Node, module: nn.Module, constants: Mapping[str, Any]) -> set[int]:
    """How long what the module holds for its mask may be: cut to the tokens, or looked up by distance both ways."""
    sizes = {size for value in _held(mask, module, constants) for size in value.shape}
    return {part for size in sizes for part in (size, (size + 1) // 2) if part > 2}


def _held_masks(mask: Node, module: nn.Module, constants: Mapping[str, Any]) -> set[int]:
    """The lengths of masks [N, N] that the module holds."""
    square = (value for value in _held(mask, module, constants) if value.shape[-2:-1] == value.shape[-1:])
    return {value.shape[-1] for value in square}


def _held(mask: Node, module: nn.Module, constants: Mapping[str, Any]) -> list[Tensor]:
    nodes = (node for node in ancestors(mask, through_sizes=False) if node.op == "get_attr")
    values = (held_by(node, module, constants) for node in nodes)
    return [value for value in values if isinstance(value, Tensor) and value.dim()]


def holds_mask(attention: Node, constants: Mapping[str, Any]) -> bool:
    """Whether the module itself, not the graph that identical ones share, holds a part of the mask."""
    mask = attention.args[3]
    return isinstance(mask, Node) and any(
        node.op == "call_module" or (node.op == "get_attr" and str(node.target) not in constants)
        for node in ancestors(mask, through_sizes=False)
    )


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
