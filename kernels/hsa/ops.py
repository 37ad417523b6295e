"""``retrofit::hsa_attention``: schema, fake, autograd and flop formulas.

hsa_attention(q, k, v, nodes=…, scale=…, geometry=…)  →  out, spans, choices, lse

The last, the log-sum-exp of each query's scores, is for the implementation whose backward pass uses it; it is empty from
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from retrofit.errors import ConfigError
from retrofit.kernels.autograd import Differentiable, check_kinds, direct
from retrofit.kernels.dense.ops import visible_pairs
from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa import account, blocked, reference
from retrofit.kernels.hsa.geometry import Geometry, Votes
from retrofit.kernels.repeat import PYTHON, has_triton, repeated_call

IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Found = TypeVar("Found")

_OPTIONS = f"float scale, float softcap, bool causal, int sliding_window, bool padded, {Geometry.schema()}"
_LIBRARY = torch.library.Library("retrofit", "FRAGMENT")
_LIBRARY.define(
    "hsa_attention(Tensor q, Tensor k, Tensor v, Tensor start, Tensor length, Tensor[] nodes, Tensor? spreads, "
    "Tensor[] value_nodes, Tensor? gate, Tensor? past_spans, Tensor? past_choices, Tensor? sinks, *, "
    f"{_OPTIONS}, str implementation) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "hsa_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor start, Tensor length, "
    "Tensor[] nodes, Tensor[] value_nodes, Tensor? gate, Tensor spans, Tensor choices, Tensor? out, Tensor? lse, "
    f"Tensor? sinks, *, {_OPTIONS}) -> Tensor[]"
)


@torch.library.impl(_LIBRARY, "hsa_attention", "CompositeExplicitAutograd")
def _hsa_attention(
    *tensors: Any, scale: float, softcap: float, causal: bool, sliding_window: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, sinks = tensors
    q, v, gate = arguments[0], arguments[2], arguments[8]
    geometry, rules = Geometry.of_options(options), ScoreRules(softcap, sinks)
    given: dict[str, Any] = {
        "scale": scale,
        "causal": causal,
        "sliding_window": sliding_window,
        "geometry": geometry,
    }
    name = implementation_of(options["implementation"], q, v, gate, causal, geometry, softcap)
    if name == "triton":
        given["padded"] = options["padded"]
        return repeated_call(triton_kernels().hsa_attention, tensors, given)
    run = reference.hsa_attention if name == "reference" else blocked.hsa_attention
    return *run(*arguments, **given, rules=rules), q.new_empty(0, dtype=torch.float32)


PYTHON[torch.ops.retrofit.hsa_attention.default] = _hsa_attention


def implementation_of(
    name: str,
    q: Tensor,
    v: Tensor,
    gate: Tensor | None,
    causal: bool,
    geometry: Geometry,
    softcap: float,
) -> str:
    """The implementation of that name; ``auto`` is ``triton`` for what it can do on a GPU, and else ``blocked``."""
    if name in ("reference", "blocked"):
        return name
    if name == "auto" and not (q.device.type == "cuda" and has_triton()):
        return "blocked"
    options = {"causal": causal, "gate": gate, "geometry": geometry}
    missing = "a softcap" if softcap else triton_kernels().unsupported(q, v, **options)
    if missing is None:
        return "triton"
    if name == "auto":
        return "blocked"
    raise ConfigError(
        f"implementation='triton' does not do {missing}; use implementation='auto' or 'blocked'"
    )


def triton_kernels() -> ModuleType:
    """The Triton kernels; ConfigError without Triton."""
    if not has_triton():
        raise ConfigError(
            "implementation='triton' needs the package triton; install it with pip install triton"
        )
    from retrofit.kernels.hsa import triton  # not at import time: it is optional and slow to import

    return triton


def _fake(
    *tensors: Any, scale: float, softcap: float, causal: bool, sliding_window: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, gate, g = *tensors[:3], tensors[8], Geometry.of_options(options)
    shape = (k.shape[0], k.shape[1], g.blocks(k.shape[2]))
    name = implementation_of(options["implementation"], q, v, gate, causal, g, softcap)
    batch, heads, tokens, _ = q.shape
    if name == "triton":
        out = q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    else:
        out = q.new_empty(batch, heads, tokens, v.shape[3])
    return (
        out,
        q.new_empty((*shape, g.beam), dtype=torch.int32),
        q.new_empty((*shape, g.choices(Votes.of(q.dtype))), dtype=torch.int32),
        q.new_empty(q.shape[:3] if name == "triton" else (0,), dtype=torch.float32),
    )


torch.library.register_fake("retrofit::hsa_attention", _fake, lib=_LIBRARY)


@torch.library.impl(_LIBRARY, "hsa_attention_backward", "CompositeExplicitAutograd")
def _hsa_attention_backward(
    *tensors: Any, scale: float, softcap: float, causal: bool, sliding_window: int, **options: Any
) -> list[Tensor]:
    """Gradients of q, k, v, the nodes, the value nodes and, if there is one, the gate.

    Triton kernels compute them if the forward pass left the output and the log-sum-exp of the scores.
    """
    *arguments, gate, spans, choices, out, lse, sinks = tensors
    geometry = Geometry.of_options(options)
    if out is not None and lse is not None:
        saved = spans, choices, out, lse, sinks
        given = {"scale": scale, "sliding_window": sliding_window, "padded": options["padded"]}
        found = repeated_call(
            triton_kernels().hsa_attention_backward, (*arguments, *saved), {**given, "geometry": geometry}
        )
    else:
        found = blocked.hsa_attention_backward(
            *(*arguments, gate, spans, choices),
            scale=scale,
            causal=causal,
            sliding_window=sliding_window,
            geometry=geometry,
            rules=ScoreRules(softcap, sinks),
        )
    grad_q, grad_k, grad_v, grad_nodes, grad_value_nodes, *by_head = found
    return [grad_q, grad_k, grad_v, *grad_nodes, *grad_value_nodes, *(x for x in by_head if x is not None)]


def _backward_fake(*tensors: Any, **options: Any) -> list[Tensor]:
    _, q, k, v, _, _, nodes, value_nodes, gate, *_, sinks = tensors
    by_head = [x for x in (gate, sinks) if x is not None]
    return [torch.empty_like(x) for x in (q, k, v, *nodes, *value_nodes, *by_head)]


torch.library.register_fake("retrofit::hsa_attention_backward", _backward_fake, lib=_LIBRARY)
_backward_operator = direct("hsa_attention_backward", _hsa_attention_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
    q, k, v, start, length, nodes, _, value_nodes, gate, _, _, sinks = inputs
    out, spans, choices, lse, *_ = output
    if gate is None and not any(x.requires_grad for x in (*nodes, *value_nodes)):
        nodes = value_nodes = ()  # they have only selected
    ctx.counts = len(nodes), len(value_nodes)
    used = (out, lse) if lse.ndim > 1 else (None, None)
    ctx.save_for_backward(q, k, v, start, length, *nodes, *value_nodes, gate, spans, choices, *used, sinks)
    ctx.options = {name: value for name, value in options.items() if name != "implementation"}
    ctx.mark_non_differentiable(spans, choices, lse)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, v, start, length, *rest = ctx.saved_tensors
    levels, value_levels = ctx.counts
    nodes, value_nodes = rest[:levels], rest[levels : levels + value_levels]
    gate, spans, choices, out, lse, sinks = rest[levels + value_levels :]
    saved = q, k, v, start, length, nodes, value_nodes, gate, spans, choices, out, lse, sinks
    grads = _backward_operator(grad, *saved, **ctx.options)
    end = 3 + levels
    grad_nodes, grad_value_nodes = grads[3:end] or None, grads[end : end + value_levels] or None
    by_head = iter(grads[end + value_levels :])
    grad_gate, grad_sinks = (None if x is None else next(by_head) for x in (gate, sinks))
    return (*grads[:3], None, None, grad_nodes, None, grad_value_nodes, grad_gate, None, None, grad_sinks)


_operator = Differentiable(_LIBRARY, "hsa_attention", _hsa_attention, _backward, _setup_context)


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: Tensor | None = None,
    length: Tensor | None = None,
    nodes: Sequence[Tensor],
    spreads: Tensor | None = None,
    value_nodes: Sequence[Tensor] = (),
    gate: Tensor | None = None,
    past_spans: Tensor | None = None,
    past_choices: Tensor | None = None,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    padded: bool = True,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hierarchical sparse attention over each row's real tokens.

    Args:
        q: Queries, the last T of the N index slots, [B, Hq, T, D].
        k: Keys, [B, Hkv, N, D].
        v: Values, [B, Hkv, N, Dv].
        start: Index of each row's first real token, int64 [B]; None for 0.
        length: Number of real tokens of each row, int64 [B]; None for all from ``start`` on.
        nodes: Pooled keys per level, [B, Hkv, M_level, D], as ``extend_pyramid`` makes them with
            ``geometry.ratios`` and ``geometry.sink``.
        spreads: How far keys lie from their node of level 0, [B, Hkv, M_0], as ``extend_spreads`` makes them with
            ``geometry.node`` and ``geometry.sink``; needed where ``geometry.spread`` is not 0.
        value_nodes: Pooled values per level, [B, Hkv, M_level, Dv]; empty without summaries.
        gate: Weight of the summaries, [Hq], clamped at 0 with a straight-through gradient; None without.
        past_spans: ``spans`` of the call before; None at the start of a row.
        past_choices: ``choices`` of the call before; None at the start of a row.
        scale: Factor on the scores.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        padded: Whether ``start`` and ``length`` may say anything but that every row has all index slots.
        geometry: The sizes.
        rules: What else happens to the scores: a softcap, of nodes as of keys, and sinks, which take their share.
        implementation: ``reference``, ``blocked``, ``triton``, or ``auto``: ``triton`` on a GPU for what it can
            do (causal, no summaries, no softcap, sizes that are powers of two) and else ``blocked``.

    Returns:
        The output [B, Hq, T, Dv], zero for padding; per query block the kept spans of level 1, int32
        [B, Hkv, NB, beam]; what each block attends to since which of its queries, int32 [B, Hkv, NB, E], as
        ``geometry`` says of choices; and the log-sum-exp of each query's scores, float32 [B, Hq, T], or nothing, [0].
        Differentiable in q, k, v, nodes, value_nodes, gate and sinks.

    Raises:
        ConfigError: If an argument does not fit the others, or the dtype or implementation is unknown.
    """
    optional = {"start": start, "length": length, "gate": gate, "sinks": rules.sinks}
    check_kinds({"q": q, "k": k, "v": v, **optional}, {"sliding_window": sliding_window})
    _check(
        q, k, v, nodes, spreads, value_nodes, gate, past_spans, past_choices, rules.sinks, geometry, implementation
    )  # fmt: skip
    padded = padded and not (start is None and length is None)
    if start is None:
        start = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    if length is None:
        length = k.shape[2] - start
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _operator(
        q,
        k,
        v,
        start,
        length,
        list(nodes),
        spreads if geometry.spread else None,
        list(value_nodes),
        gate,
        past_spans,
        past_choices,
        rules.sinks,
        scale=float(scale),
        softcap=float(rules.softcap),
        causal=bool(causal),
        sliding_window=sliding_window,
        padded=padded,
        implementation=implementation,
        **geometry.options,
    )
    return found


def hsa_attention_within(
    run: Callable[[], Found],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    padded: bool,
    geometry: Geometry,
) -> Found:
    """What ``run`` returns, as one node of a graph of gradients.

    Args:
        run: Returns what ``hsa_attention`` does of these tensors and of nodes that have no gradients, and whatever else
            that has none.
        q: As ``hsa_attention`` has it, as all that follow.
        k: Keys.
        v: Values.
        start: Index of each row's first real token.
        length: Number of real tokens of each row.
        sinks: One more logit of each head, or None.
        scale: Factor on the scores.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        padded: Whether ``start`` and ``length`` may say anything but that every row has all index slots.
        geometry: The sizes.
    """
    tensors = q, k, v, start, length, (), None, (), None, None, None, sinks
    found: Found = _operator.within(
        run,
        *tensors,
        scale=scale,
        softcap=0.0,
        causal=causal,
        sliding_window=sliding_window,
        padded=padded,
        **geometry.options,
    )
    return found


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    nodes: Sequence[Tensor],
    spreads: Tensor | None,
    value_nodes: Sequence[Tensor],
    gate: Tensor | None,
    past_spans: Tensor | None,
    past_choices: Tensor | None,
    sinks: Tensor | None,
    geometry: Geometry,
    implementation: str,
) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise ConfigError(
                f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; "
                f"convert it with {name}.to(torch.float32)"
            )
        if x.dtype != q.dtype:
            raise ConfigError(
                f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}; convert one of them"
            )
    if q.shape[1] % k.shape[1]:
        raise ConfigError(f"query heads must be a multiple of the {k.shape[1]} kv heads, got {q.shape[1]}")
    if len(nodes) != geometry.levels:
        raise ConfigError(
            f"nodes must have the {geometry.levels} levels of the geometry, got {len(nodes)}; "
            "make them with extend_pyramid and geometry.ratios"
        )
    if geometry.spread and (spreads is None or spreads.shape != nodes[0].shape[:3]):
        raise ConfigError(
            f"spreads must have the shape {list(nodes[0].shape[:3])} of the nodes of level 0 where spread="
            f"{geometry.spread}, got {None if spreads is None else list(spreads.shape)}; make them with extend_spreads"
        )
    if gate is not None and len(value_nodes) != len(nodes):
        raise ConfigError(
            f"value_nodes must have {len(nodes)} levels as nodes have when there is a gate, "
            f"got {len(value_nodes)}; pass gate=None to leave summaries out"
        )
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ConfigError(
            f"sinks must have a logit for each of the {q.shape[1]} query heads, got shape {list(sinks.shape)}"
        )
    if (past_spans is None) != (past_choices is None):
        raise ConfigError("past_spans and past_choices come from the same call: pass both or neither")


def _work(
    k: Tensor,
    queries: int,
    selection: tuple[Tensor, Tensor, Tensor, Tensor],
    options: dict[str, Any],
    gate: Any,
) -> tuple[float, float, float]:
    """Keys executed, nodes scored and nodes of the cover, summed over batch, kv heads and queries.

    Without values (fake or meta tensors) nothing is selected: counted as dense, the upper bound.
    """
    spans, choices, start, length = selection
    causal, sliding_window, slots = options["causal"], options["sliding_window"], k.shape[2]
    if any(isinstance(x, FakeTensor) or x.is_meta for x in selection):
        pairs = visible_pairs(queries, slots, start, length, causal=causal, sliding_window=sliding_window)
        return float(pairs * k.shape[1]), 0.0, 0.0

    def total(summaries: bool) -> tuple[float, float]:
        keys, nodes = account.count(
            spans,
            choices,
            start,
            length,
            queries=queries,
            tokens=slots,
            causal=causal,
            sliding_window=sliding_window,
            summaries=summaries,
            geometry=Geometry.of_options(options),
        )
        return float(keys.sum(dtype=torch.float64)), float(nodes.sum(dtype=torch.float64))

    keys, scored = total(False)
    return keys, scored, 0.0 if gate is None else total(True)[1] - scored


@register_flop_formula(torch.ops.retrofit.hsa_attention, get_raw=True)
def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    spreads: Tensor | None,
    value_nodes: Sequence[Tensor],
    gate: Tensor | None,
    *_: Any,
    out_val: tuple[Tensor, ...],
    **options: Any,
) -> int:
    selection = (out_val[1], out_val[2], start, length)
    keys, scored, cover = _work(k, q.shape[2], selection, options, gate)
    group, width, value_width = q.shape[1] // k.shape[1], q.shape[3], v.shape[3]
    return round(2 * group * ((keys + cover) * (width + value_width) + scored * width))


@register_flop_formula(torch.ops.retrofit.hsa_attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    value_nodes: Sequence[Tensor],
    gate: Tensor | None,
    spans: Tensor,
    choices: Tensor,
    *saved: Any,
    **options: Any,
) -> int:
    keys, _, cover = _work(k, q.shape[2], (spans, choices, start, length), options, gate)
    group, width, value_width = q.shape[1] // k.shape[1], q.shape[3], v.shape[3]
    return round(2 * group * (keys + cover) * (3 * width + 2 * value_width))
