"""Multiscale aggregated hierarchical attention as the target of a site.

q, k, v  →  cache  →  cells of keys and values  →  retrofit::maha_attention  →  out, and the next state
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retrofit.configs import MAHAConfig
from retrofit.errors import CacheError, ConfigError
from retrofit.kernels.dense.ops import dense_attention
from retrofit.kernels.maha import blocked
from retrofit.kernels.maha.account import keys_per_query
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.maha.ops import implementation_of, maha_attention
from retrofit.kernels.maha.paper import KERNEL, paper_attention
from retrofit.kernels.maha.state import MAHAState
from retrofit.kernels.pyramid.ops import extend_pyramid
from retrofit.kernels.repeat import repeated
from retrofit.targets.base import TargetAttention
from retrofit.targets.dense import attend_densely

if TYPE_CHECKING:
    from retrofit.attention_call import AttentionCall

EFFICIENT = MAHAConfig(scales=4, ratio=2, widths=(144, 1, 1), sink=8)
"""The paper's four scales of ratio 2 with at least 81% fewer FLOPs than dense causal attention at 4,096 tokens."""

_DILATION = 2


def bands_of(config: MAHAConfig) -> Bands:
    """Returns the geometry that ``config`` stands for."""
    return Bands(config.widths, config.last_width, config.sink, config.ratio)


class MAHAAttention(TargetAttention):
    """Attends to the recent past in full and to the rest in ever larger cells.

    A site whose sliding window lies within sink + widths[0] attends densely: there is nothing to pool.

    Attributes:
        bands: The geometry.
        key_weights: Convolutions that pool the keys, one per scale from 1 on; empty for ``max`` and ``mean``.
        value_weights: The same for the values.
        query_weights: The same for the queries of ``mode="paper"``.
        offsets: Added to each scale's log-mass [Hq, L].
        branch: Taps [Hkv, Dv, 3] of the dilated convolution on the values, or None.
        branch_gate: Its weight for each query head, or None.
    """

    config: MAHAConfig

    def __init__(self, config: MAHAConfig, *, heads: int, **options: Any) -> None:
        super().__init__(config, heads=heads, **options)
        if config.mode == "paper" and self.causal:
            raise ConfigError(
                'mode="paper" pools queries with later tokens and needs an encoder, got a causal site; '
                'use mode="causal"'
            )
        if config.mode == "causal" and not self.causal:
            raise ConfigError('mode="causal" needs a causal site, got an encoder\'s; use mode="paper"')
        if self.sliding_window and not self.always_dense:
            raise ConfigError(
                f"sliding_window must be at most sink + widths[0] = {config.sink + self._full_width} for MAHA, "
                f"got {self.sliding_window}; leave the site out with where=… or give it DenseConfig()"
            )
        if (self.softcap or self.sinks) and not self.always_dense:
            what = "a softcap of the scores" if self.softcap else "attention sinks"
            raise ConfigError(
                f"MAHA does not carry {what}; leave the site out with where=… or give it DenseConfig() or HSAConfig()"
            )
        self.bands = bands_of(config)
        taps = KERNEL if config.mode == "paper" else config.ratio
        self.key_weights = self._convolutions(self.kv_heads, self.head_dim, taps)
        self.value_weights = self._convolutions(self.kv_heads, self.value_dim, taps)
        self.query_weights = nn.ParameterList()
        if config.mode == "paper":
            self.query_weights = self._convolutions(heads, self.head_dim, taps)
        self.offsets = nn.Parameter(torch.zeros(heads, config.scales))
        self.branch: nn.Parameter | None = None
        self.branch_gate: nn.Parameter | None = None
        if config.dilated_branch:
            self.branch = nn.Parameter(torch.full((self.kv_heads, self.value_dim, 3), 1 / 3))
            self.branch_gate = nn.Parameter(torch.zeros(heads))

    @property
    def drops_weights(self) -> bool:
        """Only where the site attends densely: a sparse kernel has no weights to drop one by one."""
        return self.always_dense

    @property
    def always_dense(self) -> bool:
        """Whether the sliding window leaves nothing to pool."""
        return 0 < self.sliding_window <= self.config.sink + self._full_width

    @property
    def _full_width(self) -> int:
        return self.config.widths[0] if self.config.widths else 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See :meth:`TargetAttention.forward`."""
        if self.always_dense:
            return attend_densely(self, q, k, v, call)
        new, layer = q.shape[2], call.layer
        state: MAHAState | None = None
        if layer is not None:
            if self.config.mode == "paper":
                raise CacheError('mode="paper" has no cache, got a cache layer; call the encoder without one')
            k, v = layer.update(k, v)
            state = layer.state
            if state is None and k.shape[2] != new:
                raise CacheError(
                    f"the cache layer holds {k.shape[2] - new} tokens but not this site's cells of them; "
                    "fill the cache through the converted model, or start from an empty one"
                )
        out, cells = self._attend(q, k, v, call, state)
        if layer is not None:
            layer.state = cells
        if self.observer is not None:
            self.observer(self._counts(new, k.shape[2], call))
        return out

    def layer_loss(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Squared error of the output relative to the dense output's squares, over all real tokens."""
        if self.always_dense:
            return q.new_zeros(())
        q, k, v = (x.detach() for x in (q, k, v))
        with torch.no_grad():
            dense = dense_attention(
                q,
                k,
                v,
                call.start,
                call.length,
                scale=self.scale,
                causal=self.causal,
                sliding_window=self.sliding_window,
            ).float()
        error = self._attend(q, k, v, call, None)[0].float() - dense
        return error.square().sum() / dense.square().sum().clamp(min=torch.finfo(dense.dtype).tiny)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MAHAState | None
    ) -> tuple[Tensor, MAHAState | None]:
        config, cells = self.config, None
        if config.mode == "paper":
            out = paper_attention(
                q,
                k,
                v,
                call.start,
                call.length,
                self._paper_weights(),
                self.offsets,
                scale=self.scale,
                ratio=config.ratio,
                aggregation=config.aggregation,
                regularizer=config.regularizer,
            )
        else:
            keeps = call.layer is not None
            attend = partial(self._attend_to_scales, state=state, keeps=keeps)
            tensors = q, k, v, call.start, call.length, self.offsets
            if state is None and self._by_kernels(q, v):
                # Going through a ParameterList takes as long as a launch.
                weights = (*self.key_weights._parameters.values(), *self.value_weights._parameters.values())
                out, pooled = repeated(attend, (*tensors, *weights), ("maha", keeps, config, self.scale))
            else:
                out, pooled = attend(*tensors)
            if pooled is not None:
                keys, values = pooled
                cells = MAHAState(keys, values, config.ratio)
        if self.branch is not None and self.branch_gate is not None:
            own = self._branch(v, q.shape[2], call, self.branch)
            own = own.repeat_interleave(self.heads // self.kv_heads, 1)
            out = out + self.branch_gate[:, None, None].to(own.dtype) * own
        return out, cells

    def _by_kernels(self, q: Tensor, v: Tensor) -> bool:
        """Whether Triton's kernels do all of it."""
        if not q.is_cuda or torch.compiler.is_compiling():
            return False
        rules = self.config.aggregation, self.config.regularizer
        return implementation_of(self.implementation, q, v, *rules) is not blocked

    def _attend_to_scales(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        length: Tensor,
        offsets: Tensor,
        *_weights: Tensor | None,
        state: MAHAState | None,
        keeps: bool,
    ) -> tuple[Tensor, tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None]:
        """The output, and the cells of keys and values if anybody ``keeps`` them."""
        new, config = q.shape[2], self.config
        keys = self._pool(k, self.key_weights, start, new, state.keys if state else None)
        values = self._pool(v, self.value_weights, start, new, state.values if state else None)
        out = maha_attention(
            q,
            k,
            v,
            start,
            length,
            keys,
            values,
            offsets,
            scale=self.scale,
            causal=self.causal,
            widths=config.widths,
            last_width=config.last_width,
            sink=config.sink,
            ratio=config.ratio,
            aggregation=config.aggregation,
            regularizer=config.regularizer,
            implementation=self.implementation,
        )
        return out, (tuple(keys), tuple(values)) if keeps else None

    def _convolutions(self, heads: int, dim: int, taps: int) -> nn.ParameterList:
        """Parameters with which pooling is the mean."""
        learned = self.config.downsampling == "conv"
        count = self.config.scales - 1 if learned else 0
        return nn.ParameterList(torch.full((heads, dim, taps), 1 / taps) for _ in range(count))

    def _pool(
        self,
        x: Tensor,
        weights: nn.ParameterList,
        start: Tensor,
        new: int,
        levels: tuple[Tensor, ...] | None,
    ) -> list[Tensor]:
        pooling = "learned" if self.config.downsampling == "conv" else self.config.downsampling
        count = self.config.scales - 1
        return extend_pyramid(
            x,
            levels,
            start,
            new=new,
            ratios=(self.config.ratio,) * count,
            offset=0,
            pooling=pooling,
            weights=list(weights) or [None] * count,
        )

    def _paper_weights(self) -> list[tuple[Tensor, Tensor, Tensor] | None]:
        if self.config.downsampling == "conv":
            return list(zip(self.query_weights, self.key_weights, self.value_weights, strict=True))
        if self.config.downsampling == "max":
            return [None] * (self.config.scales - 1)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        dims = (self.head_dim, self.head_dim, self.value_dim)
        one, two, three = (
            self.offsets.new_full((h, d, KERNEL), 1 / KERNEL) for h, d in zip(heads, dims, strict=True)
        )
        return [(one, two, three)] * (self.config.scales - 1)

    def _branch(self, v: Tensor, queries: int, call: AttentionCall, taps: Tensor) -> Tensor:
        """ReLU of the convolution with dilation 2 over the last ``queries`` values; causal if the site is."""
        index = torch.arange(v.shape[2] - queries, v.shape[2], device=v.device)
        total = torch.zeros_like(v[:, :, -queries:])
        for i in range(taps.shape[2]):
            back = _DILATION * (taps.shape[2] - 1 - i) - (0 if self.causal else _DILATION)
            position = index - back - call.start[:, None]
            real = (position >= 0) & (position < call.length[:, None])
            shifted = v[:, :, (index - back).clamp(0, v.shape[2] - 1)]
            shifted = shifted.masked_fill(~real[:, None, :, None], 0.0)
            total = total + taps[:, None, :, i].to(v.dtype) * shifted
        position = index - call.start[:, None]
        real = (position >= 0) & (position < call.length[:, None])
        return total.relu().masked_fill(~real[:, None, :, None], 0.0)

    @torch.no_grad()
    def _counts(self, queries: int, slots: int, call: AttentionCall) -> dict[str, Tensor]:
        position = torch.arange(slots - queries, slots, device=call.start.device) - call.start[:, None]
        valid = (position >= 0) & (position < call.length[:, None])
        if self.config.mode == "paper":
            # Every token takes part in one attention over all cells of each scale.
            ratio = self.config.ratio
            keys = torch.stack([-(-call.length // ratio**i) for i in range(self.config.scales)]).sum(0)
            keys = keys[:, None].expand_as(position)
        else:
            keys = keys_per_query(self.bands, position.clamp(min=0))
        keys = torch.where(valid, keys, 0)[:, None].expand(-1, self.kv_heads, -1)
        return {"keys": keys, "nodes": torch.zeros_like(keys), "valid": valid}
