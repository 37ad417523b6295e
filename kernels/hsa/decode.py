"""``retrofit::hsa_decode``: the last few tokens of each row on a GPU, the state brought up to date in place.

hsa_decode(q, k, v, state tensors with room for what comes)  →  out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrofit.errors import ConfigError
from retrofit.kernels.hsa import ops
from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.hsa.state import HSAState
from retrofit.kernels.repeat import PYTHON, has_triton

MOST_TOKENS = 16
"""New tokens of a row from which the kernels for whole sequences are the better ones."""

_LIBRARY = torch.library.Library("retrofit", "FRAGMENT")
_LIBRARY.define(
    "hsa_decode(Tensor q, Tensor k, Tensor v, Tensor start, Tensor length, Tensor(a!)[] nodes, "
    "Tensor(b!)? spreads, Tensor(c!) spans, Tensor(d!) choices, Tensor? sinks, Tensor[] weights, *, float scale, "
    f"str pooling, int sliding_window, bool padded, bool ending, {Geometry.schema()}) -> Tensor"
)


@torch.library.impl(_LIBRARY, "hsa_decode", "CompositeExplicitAutograd")
def _hsa_decode(
    *tensors: Any, scale: float, pooling: str, sliding_window: int, padded: bool, ending: bool, **sizes: Any
) -> Tensor:
    from retrofit.kernels.hsa import triton_decode  # not at import time: it is optional and slow to import

    nodes, weights = tensors[5], tensors[-1]
    arguments = (*tensors[:-1], list(weights) or [None] * len(nodes))
    return triton_decode.hsa_decode(
        *arguments,
        scale=scale,
        pooling=pooling,
        sliding_window=sliding_window,
        padded=padded,
        ending=ending,
        geometry=Geometry.of_options(sizes),
    )


PYTHON[torch.ops.retrofit.hsa_decode.default] = _hsa_decode


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


torch.library.register_fake("retrofit::hsa_decode", _fake, lib=_LIBRARY)


def can_decode(q: Tensor, v: Tensor, *, causal: bool, gate: Tensor | None, geometry: Geometry) -> bool:
    """Whether ``hsa_decode`` takes queries like these."""
    if not q.is_cuda or q.shape[2] > MOST_TOKENS or not has_triton():
        return False
    options = {"causal": causal, "gate": gate, "geometry": geometry}
    return ops.triton_kernels().unsupported(q, v, **options) is None


def hsa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: HSAState,
    *,
    start: Tensor,
    length: Tensor,
    weights: Sequence[Tensor] = (),
    sinks: Tensor | None = None,
    scale: float,
    pooling: str = "mean",
    sliding_window: int = 0,
    padded: bool = True,
    ending: bool = False,
) -> Tensor:
    """Attention of the last T tokens, without gradients; brings ``state`` up to date in place.

    With ``ending`` nothing depends on how many tokens there are but values on the device: a CUDA graph of a call can
    be replayed once new keys and values have been written and ``length`` has been raised.

    Args:
        q: Queries of the last T tokens, [B, Hq, T, D].
        k: Keys, [B, Hkv, N, D].
        v: Values, [B, Hkv, N, Dv].
        state: Of the tokens before, with room for at least N slots, as ``HSAState.with_room`` makes it.
        start: Index of each row's first real token, int64 [B].
        length: Number of real tokens of each row, the new ones included, int64 [B].
        weights: What pools the keys per level, for ``learned``.
        sinks: Logit of each head [Hq] that takes part in the softmax and has no value; None for none.
        scale: Factor on the scores.
        pooling: ``mean``, ``max`` or ``learned``.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        padded: Whether ``start`` and ``length`` may say anything but that every row has all slots of ``k``.
        ending: Whether the queries are the last tokens of their rows, behind which slots are free; else they are
            those of the last T slots.

    Returns:
        The output [B, Hq, T, Dv], zero where there is no token.

    Raises:
        ConfigError: If ``state`` has not enough room.
    """
    if not state.has_room(k.shape[2]):
        raise ConfigError(
            f"state must have room for the {k.shape[2]} slots of k and has less; make it with state.with_room(k)"
        )
    out: Tensor = torch.ops.retrofit.hsa_decode(
        q,
        k,
        v,
        start,
        length,
        list(state.nodes),
        state.spreads,
        state.spans,
        state.choices,
        sinks,
        list(weights),
        scale=scale,
        pooling=pooling,
        sliding_window=sliding_window,
        padded=padded,
        ending=ending,
        **state.geometry.options,
    )
    return out
