"""The module that takes an attention module's place, and what it hands to its target.

    layer.self_attn = LlamaAttention(q_proj, k_proj, …)
        →  RetrofittedAttention(q_proj, k_proj, …, retrofit=HSAAttention(…))

Mask and cache go around the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retrofit.attention_call import AttentionCall, call_of, over_holes
from retrofit.capture.call import CACHE_NAMES, LeafPath, is_cache, lookup
from retrofit.capture.site_plan import SitePlan, compiled
from retrofit.captured_module import CapturedModule
from retrofit.cross import as_scores, keys_and_values
from retrofit.dropout import dropout_of
from retrofit.errors import CaptureError
from retrofit.positions import COLUMNS, slope_columns, with_positions
from retrofit.targets.base import TargetAttention
from retrofit.targets.cross import CrossAttention
from retrofit.targets.dense import attend_densely

if TYPE_CHECKING:
    from retrofit.cache import RetrofitLayer

TARGET = "retrofit"
_SLOPES = "slopes"


@dataclass(frozen=True)
class _Context:
    """What goes around the graph: the mask as it came, the cache layer, and the arguments of the call."""

    mask: Tensor | None
    layer: RetrofitLayer | None
    values: Mapping[str, Any]


class RetrofittedAttention(CapturedModule):
    """Runs a captured attention module with its attention exchanged.

    Args:
        original: The attention module whose place this takes.
        path: Where it is in the model.
        plan: What was found out about it.
        target: The attention that serves it; its learned parameters are those of the model.

    Attributes:
        retrofit: The target.
        dense_mode: While True, the site attends densely: the teacher in distillation.
        tap: If set, is called with (q, k, v, call, out) after each attention, dense or not.
    """

    plan: SitePlan
    retrofit: TargetAttention

    def __init__(self, original: nn.Module, path: str, plan: SitePlan, target: TargetAttention) -> None:
        super().__init__(original, path, plan, {TARGET: target})
        self.layer_idx = plan.slot.layer
        self.dense_mode = False
        self.fingerprint: tuple[tuple[str, float], ...] = ()
        self.tap: Callable[[Tensor, Tensor, Tensor, AttentionCall, Tensor], None] | None = None
        if plan.mask.slopes:
            columns = slope_columns(plan.mask.slopes, plan.heads, plan.scale)
            vars(self)["_constants"][_SLOPES] = columns.to(next(original.parameters(), columns).device)
        if isinstance(original, nn.MultiheadAttention):
            # nn.TransformerEncoderLayer then calls this module instead of a fused kernel with its weights.
            vars(self)["_qkv_same_embed_dim"] = False

    def _compile(self) -> None:
        super()._compile()
        plan = self.plan
        vars(self)["_run_keys"] = None if plan.keys is None else compiled(plan.keys)
        vars(self)["_run_step"] = None if plan.step is None else compiled(plan.step.source)

    def extra_repr(self) -> str:
        """Names the class whose place this took."""
        return f"{type(self.original).__name__}, mask={self.plan.mask}"

    def _around(self, values: Mapping[str, Any]) -> tuple[_Context]:
        given = self.plan.mask_argument
        mask = given.read(lookup(values, given.path)) if given is not None else None
        return (_Context(mask, self._layer(values), values),)

    def _goes_around(self, path: LeafPath) -> bool:
        given = self.plan.mask_argument
        # A position bias was seen to be the slopes'.
        return (given is not None and path == given.path) or (
            path == ("position_bias",) and bool(self.plan.mask.slopes)
        )

    def _layer(self, values: Mapping[str, Any]) -> RetrofitLayer | None:
        if self.plan.kind == "cross":
            return None
        # Whatever the argument is called: a cache that is left out would be noticed by nobody.
        others = [
            name for name, value in values.items() if hasattr(value, "get_seq_length") and is_cache(value)
        ]
        for name in (*CACHE_NAMES, *others):
            cache = values.get(name)
            if cache is not None and (is_cache(cache) or name in self.plan.signature.names):
                from retrofit.cache import layer_for

                layer = self.plan.slot.in_call(values)
                if layer is None:
                    raise CaptureError(f"{self.path} got a cache but has no layer_idx to find its layer with")
                return layer_for(cache, layer, self.path)
        return None

    def retrofit_bias_of_step(self, bias: Tensor, q: Tensor, context: _Context) -> Tensor:
        """The position bias of the new tokens to all keys, the cached ones included.

        Args:
            bias: What the graph computed for the new tokens alone, or was handed for them.
            q: Their queries [B, Hq, T, D].
            context: What came around the graph.
        """
        past = 0 if context.layer is None else context.layer.get_seq_length()
        step = self.plan.step
        if step is None or not past:
            return bias
        tensors = []
        for path, dims in step.inputs:
            like = lookup(context.values, path)
            size = [past + q.shape[2] if dim in dims else size for dim, size in enumerate(like.shape)]
            tensors.append(like.new_zeros(()).expand(size))  # only its size is read
        found: Tensor
        (found,) = vars(self)["_run_step"](self, q.shape[2], *tensors)
        return found

    def retrofit_attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        context: _Context,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """What the captured graph calls in the place of attention.

        Args:
            q: Queries [B, Hq, T, D].
            k: New keys [B, Hkv, T, D]; None for cross-attention, which has or makes them.
            v: New values [B, Hkv, T, Dv]; None for cross-attention.
            context: What came around the graph.
            mask: The mask the graph computed, where it does.
            sinks: One more logit of each query head [Hq], where there are any.
            bias: What is added to the scores, broadcast to [B, Hq, T, N], where there is a position bias.
        """
        if k is None or v is None:
            k, v = keys_and_values(self, context.values)
        device = q.device.type
        if torch.is_autocast_enabled(device):
            # As autocast does to SDPA; inside, the targets choose the width of each step themselves.
            q, k, v = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (q, k, v))
            with torch.autocast(device, enabled=False):
                return self._attend(q, k, v, context, mask, sinks, bias)
        return self._attend(q, k, v, context, mask, sinks, bias)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: _Context,
        mask: Tensor | None,
        sinks: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        mask = context.mask if mask is None else mask
        if self.plan.kind == "cross":
            return self._attend_across(q, k, v, as_scores(mask), bias)
        pattern = self.plan.mask
        if bias is not None and mask is not None and mask.dim() > 2 and not pattern.causal:
            mask, bias = over_holes(mask, bias, q.shape[2])
        call = call_of(self.plan.mask, q, k, context.layer, mask)
        if self.plan.mask.slopes:
            past = context.layer.get_seq_length() if context.layer is not None else 0
            columns = vars(self)["_constants"][_SLOPES]
            q, k = with_positions(q, k, columns, call.start, past, self.path)
        call = replace(call, sinks=sinks, dropout=dropout_of(self), bias=bias)
        out: Tensor = (
            attend_densely(self.retrofit, q, k, v, call) if self.dense_mode else self.retrofit(q, k, v, call)
        )
        if self.tap is not None:
            self.tap(q, k, v, call, out)
        return out

    def _attend_across(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        start = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        call = AttentionCall(start, start + k.shape[2], dropout=dropout_of(self), mask=mask, bias=bias)
        out: Tensor = self.retrofit(q, k, v, call)
        return out


def build_target(
    plan: SitePlan, config: Any, like: Tensor, *, implementation: str = "auto"
) -> TargetAttention:
    """Makes the target of a site, on the device and in the dtype of ``like``."""
    from retrofit.targets import target_class

    target = (CrossAttention if plan.kind == "cross" else target_class(config))(
        config,
        heads=plan.heads,
        kv_heads=plan.kv_heads,
        head_dim=plan.head_dim + (COLUMNS if plan.mask.slopes else 0),
        value_dim=plan.value_dim,
        scale=plan.scale,
        softcap=plan.softcap,
        sinks=plan.sinks,
        causal=plan.mask.causal,
        sliding_window=plan.mask.sliding_window,
        implementation=implementation,
    )
    return target.to(device=like.device, dtype=like.dtype if like.is_floating_point() else torch.float32)
