"""The module that takes an attention module's place, and what it hands to its target.

    layer.self_attn = LlamaAttention(q_proj, k_proj, …)
        →  RetrofittedAttention(q_proj, k_proj, …, retrofit=HSAAttention(…))

It adopts the children, parameters and buffers of the original under the same names, so that state dicts,
optimisers, PEFT and hooks find everything where it was. Its forward has the original's signature and runs the
captured graph on itself; mask and cache go around the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retrofit.attention_call import AttentionCall, call_of, over_holes
from retrofit.capture.call import CACHE_NAMES, is_cache, lookup, spelled
from retrofit.capture.export import expanded
from retrofit.capture.ignored import GOES_AROUND, MEANINGFUL
from retrofit.capture.site_plan import SitePlan, compiled
from retrofit.capture.standin import is_tensor_slot
from retrofit.capture.unread import unread_parameters
from retrofit.cross import as_scores, keys_and_values
from retrofit.dropout import check_trainable, dropout_of
from retrofit.errors import CaptureError
from retrofit.positions import COLUMNS, slope_columns, with_positions
from retrofit.targets.base import TargetAttention
from retrofit.targets.cross import CrossAttention
from retrofit.targets.dense import attend_densely

if TYPE_CHECKING:
    from retrofit.cache import RetrofitLayer

TARGET = "retrofit"
_SLOPES = "slopes"
_SHARED_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class _Context:
    """What goes around the graph: the mask as it came, the cache layer, and the arguments of the call."""

    mask: Tensor | None
    layer: RetrofitLayer | None
    values: Mapping[str, Any]


class RetrofittedAttention(nn.Module):
    """Runs a captured attention module with its attention exchanged.

    Args:
        original: The attention module whose place this takes.
        path: Where it is in the model.
        plan: What was found out about it.
        target: The attention that serves it; its learned parameters are those of the model.

    Attributes:
        path: Where the site is in the model.
        plan: What was found out about the original.
        retrofit: The target.
        dense_mode: While True, the site attends densely: the teacher in distillation.
        tap: If set, is called with (q, k, v, call, out) after each attention, dense or not.
    """

    retrofit: TargetAttention

    def __init__(self, original: nn.Module, path: str, plan: SitePlan, target: TargetAttention) -> None:
        super().__init__()
        shared = vars(original)
        # The dictionaries themselves are shared: what moves or replaces a parameter here does so there.
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            vars(self)[name] = shared[name]
        for name in _SHARED_HOOKS:
            if name in shared:
                vars(self)[name] = shared[name]
        self._modules.update(original._modules)
        self.retrofit = target
        vars(self)["_original"] = (original,)
        self.path = path
        self.plan = plan
        self.layer_idx = plan.slot.layer
        self.dense_mode = False
        self.fingerprint: tuple[tuple[str, float], ...] = ()
        self.tap: Callable[[Tensor, Tensor, Tensor, AttentionCall, Tensor], None] | None = None
        vars(self)["_constants"] = dict(plan.constants)
        if plan.mask.slopes:
            columns = slope_columns(plan.mask.slopes, plan.heads, plan.scale)
            vars(self)["_constants"][_SLOPES] = columns.to(next(original.parameters(), columns).device)
        self._compile()
        self.training = original.training
        if isinstance(original, nn.MultiheadAttention):
            # nn.TransformerEncoderLayer then calls this module instead of a fused kernel with its weights.
            vars(self)["_qkv_same_embed_dim"] = False

    @property
    def original(self) -> nn.Module:
        """The module whose place this took."""
        module: nn.Module = vars(self)["_original"][0]
        return module

    def restored(self) -> nn.Module:
        """Returns the original with the children as they are now."""
        original = self.original
        for name, child in self._modules.items():
            if name != TARGET:
                original._modules[name] = child
        original.training = self.training
        return original

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            constants = vars(self).get("_constants", {})
            if name in constants:
                return constants[name]
            if "plan" in vars(self) and name in self.plan.unkept:
                return None
            if "_original" in vars(self) and name in vars(self.original):
                return vars(self.original)[name]
            if "_original" in vars(self) and hasattr(type(self.original), name):
                return getattr(self.original, name)
            raise

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        for name in ("_run", "_run_keys", "_run_training", "_run_step"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def _compile(self) -> None:
        plan = self.plan
        vars(self)["_run"] = compiled(plan.source)
        vars(self)["_unread"] = unread_parameters(self.original)
        vars(self)["_run_keys"] = None if plan.keys is None else compiled(plan.keys)
        vars(self)["_run_step"] = None if plan.step is None else compiled(plan.step.source)
        vars(self)["_run_training"] = None if plan.training is None else compiled(plan.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RetrofittedAttention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        constants = vars(self)["_constants"]
        vars(self)["_constants"] = {name: fn(value) for name, value in constants.items()}
        return self

    def extra_repr(self) -> str:
        """Names the class whose place this took."""
        return f"{type(self.original).__name__}, mask={self.plan.mask}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the original took and returns what it returned; attention weights become None."""
        plan = self.plan
        run = self._graph()
        values = plan.signature.bind(args, kwargs)
        for path, first in plan.same:
            if not _same(lookup(values, path), lookup(values, first)):
                raise CaptureError(
                    f"{self.path} was captured with {spelled(path)} and {spelled(first)} the same tensor, got two; "
                    "convert with an example that has two"
                )
        tensors: list[Tensor] = []
        for path in plan.inputs:
            tensor = lookup(values, path)
            if tensor is None:
                raise CaptureError(
                    f"{self.path} needs {spelled(path)}, which it was captured with, got None; "
                    "convert with an example that leaves it out"
                )
            tensors.append(expanded(tensor, tensors[0]) if path in plan.rows else tensor)
        if 0 in tensors[0].shape:
            raise CaptureError(
                f"{self.path} needs at least one row and one token, got {spelled(plan.inputs[0])} of shape "
                f"{list(tensors[0].shape)}; leave empty batches out"
            )
        self._check_rest(values)
        given = plan.mask_argument
        mask = given.read(lookup(values, given.path)) if given is not None else None
        results = iter(run(self, *tensors, _Context(mask, self._layer(values), values)))
        return pytree.tree_map(lambda leaf: next(results) if is_tensor_slot(leaf) else leaf, plan.output)

    def _graph(self) -> Callable[..., Any]:
        """The function that runs: in training one that drops out what the original does."""
        if self.training:
            check_trainable(self)
        dropping = self.training and self.plan.training is not None
        function: Callable[..., Any] = vars(self)["_run_training" if dropping else "_run"]
        return function

    def _check_rest(self, values: Mapping[str, Any]) -> None:
        plan = self.plan
        of_mask = plan.mask_argument.path if plan.mask_argument is not None else None
        for path, sizes in plan.sizes:
            tensor = lookup(values, path) if path[0] not in self._unread else None
            if isinstance(tensor, Tensor) and not _fits(tensor, sizes):
                raise CaptureError(
                    f"{self.path} was captured with {spelled(path)} of shape {_shape(sizes)}, got "
                    f"{list(tensor.shape)}; convert with an example of such a shape"
                )
        for path, recorded in plan.known:
            if path[0] in self._unread or not (plan.only or path[0] in plan.signature.names):
                continue
            value = lookup(values, path)
            if isinstance(value, Tensor):
                differs = recorded is None and path != of_mask and path not in plan.inputs
            else:
                differs = _plain(value) and _plain(recorded) and value != recorded
            if differs:
                shown = "a tensor" if isinstance(value, Tensor) else repr(value)
                raise CaptureError(
                    f"{self.path} was captured with {spelled(path)}={recorded!r}, got {shown}; "
                    "convert with an example that has it"
                )
        for name in values.keys() - plan.only if plan.only else ():
            if values[name] is not None and name not in GOES_AROUND:
                raise CaptureError(
                    f"{self.path} was captured without {name}, got {values[name]!r}; convert with an example that "
                    "has it"
                )
        for name in MEANINGFUL:
            if name == "position_bias" and (plan.mask.slopes or (name,) in plan.inputs):
                continue  # it was seen to be the slopes'
            if name in values and (name,) not in plan.inputs:
                recorded = next((value for path, value in plan.known if path == (name,)), None)
                if values[name] is not recorded and values[name] != recorded:
                    raise CaptureError(
                        f"{self.path} was captured with {name}={recorded}, got {values[name]!r}; leave it "
                        "out, or leave this site out with where=…"
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

    def bias_of_step(self, bias: Tensor, q: Tensor, context: _Context) -> Tensor:
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

    def attend(
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


def _fits(tensor: Tensor, sizes: Sequence[int | None]) -> bool:
    """Whether ``tensor`` has the given sizes, where they are given."""
    return tensor.dim() == len(sizes) and all(
        size is None or size == own for size, own in zip(sizes, tensor.shape, strict=True)
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _shape(sizes: Sequence[int | None]) -> str:
    """``[*, *, 64]``, with a star where any size will do."""
    return f"[{', '.join('*' if size is None else str(size) for size in sizes)}]"


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are one tensor; copies of it that share its memory count."""
    if a is b:
        return True
    if torch.compiler.is_compiling() or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


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
