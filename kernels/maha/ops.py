"""``retrofit::maha_attention``: schema, fake, autograd and flop formula."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from retrofit.errors import ConfigError
from retrofit.kernels.autograd import Differentiable, check_kinds, direct
from retrofit.kernels.maha import backward, blocked, reference
from retrofit.kernels.maha.account import visible_pairs
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.repeat import PYTHON, has_triton, repeated_call

_IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")


_OPTIONS = (
    "float scale, {causal}int[] widths, int? last_width, int sink, int ratio, str aggregation, str regularizer, "
    "str implementation"
)
_LIBRARY = torch.library.Library("retrofit", "FRAGMENT")
_LIBRARY.define(
    "maha_attention(Tensor q, Tensor k, Tensor v, Tensor start, Tensor length, Tensor[] keys, Tensor[] values, "
    f"Tensor offsets, *, {_OPTIONS.format(causal='bool causal, ')}) -> Tensor"
)
_LIBRARY.define(
    "maha_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor start, Tensor length, "
    f"Tensor[] keys, Tensor[] values, Tensor offsets, *, {_OPTIONS.format(causal='')}) "
    "-> (Tensor, Tensor[], Tensor[], Tensor)"
)


@torch.library.impl(_LIBRARY, "maha_attention", "CompositeExplicitAutograd")
def _maha_attention(
    *tensors: Any,
    scale: float,
    causal: bool,
    widths: Sequence[int],
    last_width: int | None,
    sink: int,
    ratio: int,
    aggregation: str,
    regularizer: str,
    implementation: str,
) -> Tensor:
    options: dict[str, Any] = {"scale": scale, "aggregation": aggregation, "regularizer": regularizer}
    if implementation == "reference":
        sizes: dict[str, Any] = {"widths": widths, "last_width": last_width, "sink": sink, "ratio": ratio}
        run: Any = reference.maha_attention
        found: Tensor = run(*tensors, **options, **sizes).contiguous()
        return found
    kernels = implementation_of(implementation, tensors[0], tensors[2], aggregation, regularizer)
    options["bands"] = Bands(tuple(widths), last_width, sink, ratio)
    out: Tensor
    if kernels is blocked:
        out = blocked.maha_attention(*tensors, **options)
    else:
        out = repeated_call(kernels.maha_attention, tensors, options)
    return out


PYTHON[torch.ops.retrofit.maha_attention.default] = _maha_attention


def implementation_of(name: str, q: Tensor, v: Tensor, aggregation: str, regularizer: str) -> ModuleType:
    """The module of that name; ``auto`` is ``triton`` for what it can do on a GPU, and else ``blocked``.

    Gradients of the reference, too, are those of the blocked form.
    """
    if name in ("reference", "blocked") or (name == "auto" and not (q.is_cuda and has_triton())):
        return blocked
    kernels = _triton()
    missing = kernels.unsupported(q, v, aggregation=aggregation, regularizer=regularizer)
    if missing is None:
        return kernels
    if name == "auto":
        return blocked
    raise ConfigError(
        f"implementation='triton' does not do {missing}; use implementation='auto' or 'blocked'"
    )


def _triton() -> ModuleType:
    if not has_triton():
        raise ConfigError(
            "implementation='triton' needs the package triton; install it with pip install triton"
        )
    from retrofit.kernels.maha import triton  # not at import time: it is optional and slow to import

    return triton


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


torch.library.register_fake("retrofit::maha_attention", _fake, lib=_LIBRARY)


@torch.library.impl(_LIBRARY, "maha_attention_backward", "CompositeExplicitAutograd")
def _maha_attention_backward(
    *tensors: Any,
    scale: float,
    widths: Sequence[int],
    last_width: int | None,
    sink: int,
    ratio: int,
    aggregation: str,
    regularizer: str,
    implementation: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    kernels = implementation_of(implementation, tensors[1], tensors[3], aggregation, regularizer)
    options: dict[str, Any] = {"scale": scale, "aggregation": aggregation, "regularizer": regularizer}
    options["bands"] = Bands(tuple(widths), last_width, sink, ratio)
    grads: tuple[Tensor, list[Tensor], list[Tensor], Tensor]
    if kernels is blocked:
        grads = backward.maha_attention_backward(*tensors, **options)
    else:
        grads = repeated_call(kernels.maha_attention_backward, tensors, options)
    return grads


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    **_: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    return (
        torch.empty_like(q),
        [torch.empty_like(x) for x in (k, *keys)],
        [torch.empty_like(x) for x in (v, *values)],
        torch.empty_like(offsets),
    )


torch.library.register_fake("retrofit::maha_attention_backward", _backward_fake, lib=_LIBRARY)
_backward_operator = direct("maha_attention_backward", _maha_attention_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
    q, k, v, start, length, keys, values, offsets = inputs
    ctx.save_for_backward(q, k, v, start, length, offsets, *keys, *values)
    ctx.options = {name: value for name, value in options.items() if name != "causal"}


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, start, length, offsets, *levels = ctx.saved_tensors
    half = len(levels) // 2
    grad_q, grad_keys, grad_values, grad_offsets = _backward_operator(
        grad, q, k, v, start, length, levels[:half], levels[half:], offsets, **ctx.options
    )
    return (
        grad_q,
        grad_keys[0],
        grad_values[0],
        None,
        None,
        grad_keys[1:],
        grad_values[1:],
        grad_offsets,
    )


_operator = Differentiable(_LIBRARY, "maha_attention", _maha_attention, _backward, _setup_context)


def _pairs(q: Tensor, k: Tensor, start: Tensor, length: Tensor, options: dict[str, Any]) -> int:
    bands = Bands(tuple(options["widths"]), options["last_width"], options["sink"], options["ratio"])
    if isinstance(start, FakeTensor) or start.device.type == "meta":
        # Without values nothing counts as padded.
        start = torch.zeros(q.shape[0], dtype=torch.int64)
        length = start + k.shape[2]
    return visible_pairs(bands, start, length, queries=q.shape[2], slots=k.shape[2])


@register_flop_formula(torch.ops.retrofit.maha_attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *_: Any, **options: Any) -> int:
    return 2 * q.shape[1] * _pairs(q, k, start, length, options) * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.retrofit.maha_attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *_: Any, **options: Any
) -> int:
    # q·k again, then the gradients of values, shares, queries and keys.
    return 2 * q.shape[1] * _pairs(q, k, start, length, options) * (3 * q.shape[3] + 2 * v.shape[3])


def maha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: Tensor,
    *,
    scale: float,
    causal: bool = True,
    widths: Sequence[int],
    last_width: int | None = None,
    sink: int,
    ratio: int,
    aggregation: str = "convex",
    regularizer: str = "entropy",
    implementation: str = "auto",
) -> Tensor:
    """Attention over scales that partition each query's past.

    Args:
        q: Queries [B, Hq, T, D]: the last T of the N index slots.
        k: Keys [B, Hkv, N, D], the cells of scale 0.
        v: Values [B, Hkv, N, Dv].
        start: int64 [B], index of each row's first real token.
        length: int64 [B], number of real tokens of each row.
        keys: Cells of the scales from 1 on, scale l: [B, Hkv, ⌊N/ratio**l⌋, D] by position.
        values: The same of the values.
        offsets: Added to each scale's log-mass [Hq, L].
        scale: Factor on q · k.
        causal: Must be true.
        widths: Tokens of every scale but the last.
        last_width: Tokens of the last scale; None reaches the sinks.
        sink: First tokens, kept in scale 0; a multiple of ratio**(L−1).
        ratio: Ratio of the cells of neighbouring scales.
        aggregation: ``convex`` or ``nash``.
        regularizer: ``entropy`` or ``euclidean``.
        implementation: ``reference``, ``blocked``, ``triton``, or ``auto``: ``triton`` on a GPU for what it can
            do (the convex aggregation with entropy) and else ``blocked``.

    Returns:
        [B, Hq, T, Dv]; zeros in rows that are padding.

    Raises:
        ConfigError: If an option is unknown, the shapes contradict each other, ``causal`` is false, or the
            implementation cannot do what is asked.
    """
    scales = len(widths) + 1
    tensors = {"q": q, "k": k, "v": v, "start": start, "length": length, "offsets": offsets}
    check_kinds(tensors, {"sink": sink, "ratio": ratio, **{f"widths[{i}]": w for i, w in enumerate(widths)}})
    if implementation not in _IMPLEMENTATIONS:
        raise ConfigError(
            f"implementation must be one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if not causal:
        raise ConfigError('maha_attention must be causal, got causal=False; use mode="paper" for encoders')
    if aggregation not in ("convex", "nash"):
        raise ConfigError(f"aggregation must be convex or nash, got {aggregation!r}")
    if regularizer not in ("entropy", "euclidean"):
        raise ConfigError(f"regularizer must be entropy or euclidean, got {regularizer!r}")
    if q.shape[1] % k.shape[1]:
        raise ConfigError(f"query heads must be a multiple of the {k.shape[1]} kv heads, got {q.shape[1]}")
    if len(keys) != scales - 1 or len(values) != scales - 1:
        raise ConfigError(
            f"keys and values must have scales-1={scales - 1} levels, got {len(keys)} and {len(values)}"
        )
    if tuple(offsets.shape) != (q.shape[1], scales):
        raise ConfigError(f"offsets must be [{q.shape[1]}, {scales}], got {list(offsets.shape)}")
    if sink % ratio ** (scales - 1):
        raise ConfigError(f"sink must be a multiple of ratio**(scales-1)={ratio ** (scales - 1)}, got {sink}")
    out: Tensor = _operator(
        q,
        k,
        v,
        start,
        length,
        list(keys),
        list(values),
        offsets,
        scale=float(scale),
        causal=causal,
        widths=list(widths),
        last_width=last_width,
        sink=sink,
        ratio=ratio,
        aggregation=aggregation,
        regularizer=regularizer,
        implementation=implementation,
    )
    return out
