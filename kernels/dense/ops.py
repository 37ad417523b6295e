"""``retrofit::dense_attention``: schema, fake, autograd and flop formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from retrofit.errors import ConfigError
from retrofit.kernels.dense import blocked, dropped, fused, reference
from retrofit.kernels.dense.scores import PLAIN, ScoreRules

_IMPLEMENTATIONS = ("auto", "reference", "blocked")


@torch.library.custom_op("retrofit::dense_attention", mutates_args=())
def _dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
    causal: bool,
    sliding_window: int,
    implementation: str,
) -> Tensor:
    run = reference.dense_attention if implementation == "reference" else blocked.dense_attention
    options: dict[str, Any] = {"scale": scale, "causal": causal, "sliding_window": sliding_window}
    return run(q, k, v, start, length, rules=ScoreRules(softcap, sinks), **options).contiguous()


@_dense_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
    causal: bool,
    sliding_window: int,
    implementation: str,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


@torch.library.custom_op("retrofit::dense_attention_backward", mutates_args=())
def _dense_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
    causal: bool,
    sliding_window: int,
) -> list[Tensor]:
    """Gradients of q, k, v and, if there are any, the sinks."""
    options: dict[str, Any] = {"scale": scale, "causal": causal, "sliding_window": sliding_window}
    found = blocked.dense_attention_backward(
        grad, q, k, v, start, length, rules=ScoreRules(softcap, sinks), **options
    )
    return [x for x in found if x is not None]


@_dense_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float,
    causal: bool,
    sliding_window: int,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, sinks) if x is not None]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = {
        name: keyword_only_inputs[name] for name in ("scale", "softcap", "causal", "sliding_window")
    }


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _dense_attention_backward(grad, *ctx.saved_tensors, **ctx.options)
    return (*grads[:3], None, None, grads[3] if len(grads) > 3 else None)


_dense_attention.register_autograd(_backward, setup_context=_setup_context)


def visible_pairs(
    tokens: int, slots: int, start: Tensor, length: Tensor, *, causal: bool, sliding_window: int
) -> int:
    """Counts the (query, key) pairs of one head over the whole batch, exactly.

    ``start`` and ``length`` without values (fake or meta tensors) count as nothing padded.
    """
    batch = start.shape[0]
    if _has_values(start) and _has_values(length):
        rows = list(zip(start.tolist(), length.tolist(), strict=True))
    else:
        rows = [(0, slots)] * batch
    pairs = 0
    for first, count in rows:
        low = max(0, slots - tokens - first)  # position of the first real query
        high = count
        if high <= low:
            continue
        if not causal:
            pairs += (high - low) * count
        elif not sliding_window:
            pairs += (low + 1 + high) * (high - low) // 2
        else:
            ramp = min(max(low, sliding_window), high)  # before it, the window is not yet full
            pairs += (low + 1 + ramp) * (ramp - low) // 2 if ramp > low else 0
            pairs += (high - ramp) * sliding_window
    return pairs


def _has_values(x: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(x, FakeTensor) and x.device.type != "meta"


@register_flop_formula(torch.ops.retrofit.dense_attention, get_raw=True)
def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    *_: Any,
    causal: bool,
    sliding_window: int,
    **__: Any,
) -> int:
    pairs = visible_pairs(q.shape[2], k.shape[2], start, length, causal=causal, sliding_window=sliding_window)
    return 2 * q.shape[1] * pairs * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.retrofit.dense_attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    *_: Any,
    causal: bool,
    sliding_window: int,
    **__: Any,
) -> int:
    pairs = visible_pairs(q.shape[2], k.shape[2], start, length, causal=causal, sliding_window=sliding_window)
    return 2 * q.shape[1] * pairs * (3 * q.shape[3] + 2 * v.shape[3])


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    scale: float,
    causal: bool,
    sliding_window: int = 0,
    padded: bool = True,
    rules: ScoreRules = PLAIN,
    dropout_p: float = 0.0,
    implementation: str = "auto",
) -> Tensor:
    """Dense attention over each row's real tokens.

    Args:
        q: Queries [B, Hq, T, D]: the last T of the N index slots.
        k: Keys [B, Hkv, N, D].
        v: Values [B, Hkv, N, Dv].
        start: int64 [B], index of each row's first real token.
        length: int64 [B], number of real tokens of each row.
        scale: Factor on the scores.
        causal: Whether keys after the query are hidden.
        sliding_window: If w > 0, key j is visible to query t only if t − w < j; causal only.
        padded: Whether ``start`` and ``length`` may say anything but that every row has all index slots.
        rules: What else happens to the scores.
        dropout_p: Probability with which each weight is dropped.
        implementation: ``auto``, ``reference`` or ``blocked``.

    Returns:
        [B, Hq, T, Dv]; zeros in rows that are padding.

    Raises:
        ConfigError: If the implementation is unknown, the heads do not divide, or a window is asked for
            without causality.
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ConfigError(
            f"implementation must be one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if q.shape[1] % k.shape[1]:
        raise ConfigError(f"query heads must be a multiple of the {k.shape[1]} kv heads, got {q.shape[1]}")
    if sliding_window and not causal:
        raise ConfigError(f"sliding_window={sliding_window} needs causal=True; pass sliding_window=0")
    if dropout_p:
        return dropped.dense_attention(
            q,
            k,
            v,
            start,
            length,
            p=dropout_p,
            scale=scale,
            causal=causal,
            sliding_window=sliding_window,
            padded=padded,
            rules=rules,
        )
    causal_here = causal and q.shape[2] > 1  # the last query sees all keys
    simple = (
        rules.plain and not padded and not sliding_window and (not causal_here or q.shape[2] == k.shape[2])
    )
    if simple and q.is_cuda and implementation == "auto" and not torch.compiler.is_exporting():
        return fused.attend_with_gradients(q, k, v, scale, causal_here)
    out: Tensor = _dense_attention(
        q,
        k,
        v,
        start,
        length,
        rules.sinks,
        scale=scale,
        softcap=rules.softcap,
        causal=causal,
        sliding_window=sliding_window,
        implementation=implementation,
    )
    return out
