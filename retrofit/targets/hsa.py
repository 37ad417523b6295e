"""Hierarchical sparse attention as the target of a site.

q, k, v  →  cache  →  pyramid of the keys (and values)  →  retrofit::hsa_attention  →  out, and the next state
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retrofit.configs import SMALLEST_QUERY_BLOCK, HSAConfig
from retrofit.errors import CacheError, ConfigError
from retrofit.kernels.dense.scores import ScoreRules
from retrofit.kernels.hsa.account import count
from retrofit.kernels.hsa.decode import can_decode, hsa_decode
from retrofit.kernels.hsa.geometry import MAX_POSITIONS, MOST_PLACES, Geometry
from retrofit.kernels.hsa.ops import hsa_attention, hsa_attention_within, implementation_of
from retrofit.kernels.hsa.selector import sample_positions, selector_loss
from retrofit.kernels.hsa.state import HSAState
from retrofit.kernels.pyramid.ops import build_with_spreads, extend_pyramid, extend_spreads
from retrofit.kernels.repeat import repeated
from retrofit.targets.base import TargetAttention
from retrofit.targets.dense import attend_densely

if TYPE_CHECKING:
    from retrofit.attention_call import AttentionCall

Known = tuple[tuple[Tensor, ...], Tensor | None, tuple[Tensor, ...], Tensor, Tensor]
"""Nodes, spreads, value nodes, spans and choices."""
Attended = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Known | None]
"""Output; spans, choices and log-sum-exp of the scores; and what is known for the next call."""
SAMPLES = 64
"""Queries of a row that ``layer_loss`` looks at."""


def geometry_of(config: HSAConfig, group: int = 1) -> Geometry:
    """Returns the sizes that ``config`` stands for at a site with so many query heads to a kv head."""
    query_block = config.query_block_of(group)
    geometry = _geometry(config, query_block)
    # Of sizes that are not the usual ones, smaller blocks may do where larger ones do not.
    while config.query_block is None and query_block > SMALLEST_QUERY_BLOCK and not _is_usual(geometry):
        query_block //= 2
        geometry = _geometry(config, query_block)
    if geometry.places > MOST_PLACES:
        raise ConfigError(
            f"query_block times the leaves to choose from, beam·fanout and a few, must be at most {MOST_PLACES:,}, "
            f"got {geometry.query_block} times {geometry.leaf_width:,}; lower beam, fanout or query_block"
        )
    return geometry


def _geometry(config: HSAConfig, query_block: int) -> Geometry:
    dense_until = config.dense_until
    if dense_until is None:
        reach = config.sink + config.window + config.budget
        dense_until = -(-reach // query_block) * query_block
    return Geometry(
        window=config.window,
        sink=config.sink,
        budget=config.budget,
        block=config.block,
        node=config.node,
        fanout=config.fanout,
        nodes_per_span=config.nodes_per_span,
        beam=config.beam,
        query_block=query_block,
        dense_until=dense_until,
        threshold=config.threshold,
        spread=config.spread,
    )


def _is_usual(geometry: Geometry) -> bool:
    """Whether choices have bits for all leaves, and some leaf ends within a dense start of no more than what fits."""
    return geometry.places <= MOST_PLACES and geometry.fitting_end >= geometry.sink + geometry.block


class HSAAttention(TargetAttention):
    """Attends to sinks, window and the leaves that a top-down search finds.

    A site whose sliding window lies within sink + window + budget attends densely: there is nothing to leave out.

    Attributes:
        geometry: The sizes.
        key_pooling: What pools the keys, per level; empty for ``mean`` and ``max``.
        value_pooling: What pools the values for the summaries, per level; empty without them. Where keys are
            pooled by ``max``, values are pooled by their mean.
        gate: Weight of the summaries of each query head, or None.
    """

    config: HSAConfig

    def __init__(self, config: HSAConfig, *, heads: int, **options: Any) -> None:
        super().__init__(config, heads=heads, **options)
        self.geometry = geometry_of(config, heads // self.kv_heads)
        self.key_pooling = self._pooling_parameters(self.head_dim)
        self.value_pooling = nn.ParameterList()
        self.gate: nn.Parameter | None = None
        if config.summaries:
            self.value_pooling = self._pooling_parameters(self.value_dim)
            self.gate = nn.Parameter(torch.zeros(heads))

    @property
    def drops_weights(self) -> bool:
        """Only where the site attends densely: a sparse kernel has no weights to drop one by one."""
        return self.always_dense

    @property
    def always_dense(self) -> bool:
        """Whether the sliding window leaves nothing to select."""
        g = self.geometry
        return 0 < self.sliding_window <= g.sink + g.window + g.budget

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See :meth:`TargetAttention.forward`."""
        if self.always_dense or self._needs_no_search(k, call):
            return attend_densely(self, q, k, v, call)
        new, layer, g = q.shape[2], call.layer, self.geometry
        state: HSAState | None = None
        if layer is not None:
            k, v = layer.update(k, v)
            state = layer.state
            if state is None and k.shape[2] - new > g.dense_end:
                raise CacheError(
                    f"the cache layer holds {k.shape[2] - new} tokens but not what this site selected for them; "
                    "fill the cache through the converted model, or start from an empty one"
                )
        if k.shape[2] > MAX_POSITIONS:
            raise ConfigError(
                f"a row must have at most {MAX_POSITIONS:,} tokens for HSA, got {k.shape[2]:,}; leave the sites out "
                "with where=… or give them DenseConfig()"
            )
        if state is not None and self._decodes(q, k, v, call):
            return self._decode(q, k, v, call, state)
        if state is None:
            new = k.shape[2]  # what came before attended densely: nothing has been pooled yet
        else:
            state = state.narrowed(k.shape[2] - new)
        keeps = layer is not None or self.observer is not None
        if state is None and self._by_kernels(q, v):
            out, *_, known = self._attend_at_once(q, k, v, call, keeps=keeps)
        else:
            tensors = q, k, v, call.start, call.length, call.sinks
            out, *_, known = self._attend(*tensors, new=new, state=state, padded=call.padded, keeps=keeps)
        if known is None:
            return out
        nodes, spreads, value_nodes, spans, choices = known
        if layer is not None:
            layer.state = HSAState(nodes, spreads, value_nodes, spans, choices, g)
        if self.observer is not None:
            self.observer(self._counts(spans, choices, q.shape[2], k.shape[2], call))
        return out

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        length: Tensor,
        sinks: Tensor | None,
        *_parameters: Tensor | None,
        new: int,
        state: HSAState | None,
        padded: bool,
        keeps: bool,
        saves: bool = False,
    ) -> Attended:
        """The output; the selection and the log-sum-exp of the scores if somebody ``saves`` them for a backward pass; and
        what the next state is made of if anybody ``keeps`` it."""
        # Nothing flows back through a selection; summaries are made of the nodes themselves.
        scored = k.detach() if self.gate is None and k.requires_grad else k
        nodes, spreads = self._pool_scored(scored, k, start, new, state)
        value_nodes = self._pool_values(v, start, new, state)
        out, spans, choices, lse = hsa_attention(
            q,
            k,
            v,
            start=start,
            length=length,
            nodes=nodes,
            spreads=spreads,
            value_nodes=value_nodes,
            gate=self.gate,
            past_spans=None if state is None else state.spans,
            past_choices=None if state is None else state.choices,
            scale=self.scale,
            causal=self.causal,
            sliding_window=self.sliding_window,
            padded=padded,
            geometry=self.geometry,
            rules=ScoreRules(self.softcap, sinks),
            implementation=self.implementation,
        )
        saved = (spans, choices, lse) if saves else (None, None, None)
        return out, *saved, (tuple(nodes), spreads, tuple(value_nodes), spans, choices) if keeps else None

    def _attend_at_once(
        self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, *, keeps: bool
    ) -> Attended:
        """What ``_attend`` returns of kernels and for no state, as one tape, and where nothing but attention has gradients
        as one node of their graph."""
        saves = torch.is_grad_enabled() and not any(weight.requires_grad for weight in self.key_pooling)
        tensors = q, k, v, call.start, call.length, call.sinks
        attend = partial(
            self._attend, new=k.shape[2], state=None, padded=call.padded, keeps=keeps, saves=saves
        )
        about = "hsa", keeps, saves, *self._about(call)

        def run() -> Attended:
            found: Attended = repeated(attend, (*tensors, *self.key_pooling), about)
            return found

        if not saves:
            return run()
        return hsa_attention_within(
            run,
            *tensors,
            scale=self.scale,
            causal=self.causal,
            sliding_window=self.sliding_window,
            padded=call.padded,
            geometry=self.geometry,
        )

    def _by_kernels(self, q: Tensor, v: Tensor) -> bool:
        """Whether Triton's kernels do all of it."""
        if not q.is_cuda or torch.compiler.is_compiling() or self.config.pooling == "attention":
            return False
        options = self.gate, self.causal, self.geometry, self.softcap
        return implementation_of(self.implementation, q, v, *options) == "triton"

    def _about(self, call: AttentionCall) -> tuple[Hashable, ...]:
        """What kernels go by besides tensors."""
        return self.geometry, self.config.pooling, self.scale, self.causal, self.sliding_window, call.padded

    def _needs_no_search(self, k: Tensor, call: AttentionCall) -> bool:
        """Whether every query so far attends densely; then nothing has to be kept but keys and values."""
        if self.gate is not None or self.keeps_state or torch.compiler.is_exporting():
            return False
        past = 0
        if call.layer is not None:
            if call.layer.state is not None:
                return False
            past = call.layer.get_seq_length()
        return past + k.shape[2] <= self.geometry.dense_end

    def _decodes(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
        """Whether the state can be brought up to date in place, by the kernels for a few tokens."""
        if self.implementation not in ("auto", "triton") or self.softcap:
            return False
        if torch.compiler.is_compiling() or self.config.pooling == "attention":
            return False
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, call.sinks, *self.key_pooling)
        ):
            return False
        return can_decode(
            q,
            v,
            causal=self.causal,
            gate=self.gate,
            geometry=self.geometry,
        )

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: HSAState) -> Tensor:
        """Attention of a few new tokens.

        Where every row has all slots, the kernels are told of the room, which stays the same from token to token.
        """
        assert call.layer is not None
        keys, values = call.layer.room if not call.padded else (k, v)
        state = call.layer.state = state.with_room(call.layer.room[0])
        kept = *state.nodes, state.spreads, state.spans, state.choices
        tensors = q, keys, values, call.start, call.length, call.sinks
        decode = partial(self._attend_in_place, state=state, padded=call.padded)
        about = "hsa, decoding", *self._about(call)
        out: Tensor = repeated(decode, (*tensors, *kept, *self.key_pooling), about)
        if self.observer is not None:
            known = state.narrowed(k.shape[2])
            self.observer(self._counts(known.spans, known.choices, q.shape[2], k.shape[2], call))
        return out

    def _attend_in_place(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor,
        length: Tensor,
        sinks: Tensor | None,
        *_kept: Tensor | None,
        state: HSAState,
        padded: bool,
    ) -> Tensor:
        """The output; brings the state up to date."""
        return hsa_decode(
            q,
            k,
            v,
            state,
            start=start,
            length=length,
            weights=list(self.key_pooling),
            sinks=sinks,
            scale=self.scale,
            pooling=self.config.pooling,
            sliding_window=self.sliding_window,
            padded=padded,
            ending=not padded,
        )

    def layer_loss(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Divergence of what the search would find from where the dense model's attention lies.

        On some queries of the sparse part; 0 where there is none. Only the pooling of the keys gets gradients.
        Values beyond what a score can hold are clamped.
        """
        if not len(self.key_pooling):
            raise ConfigError(
                f"pooling={self.config.pooling!r} has nothing to train; "
                "convert with HSAConfig(pooling='learned') or 'attention'"
            )
        if self.always_dense:
            return q.new_zeros(())
        q, k = (_bounded(x.detach().to(torch.promote_types(x.dtype, torch.float32))) for x in (q, k))
        at, real = sample_positions(
            SAMPLES,
            call.start,
            call.length,
            queries=q.shape[2],
            tokens=k.shape[2],
            causal=self.causal,
            geometry=self.geometry,
        )
        nodes = self._pool_keys(k, call.start, k.shape[2], None)
        return selector_loss(
            q,
            k,
            nodes,
            self._spreads(k, nodes[0], call.start, k.shape[2], None),
            call.start,
            call.length,
            at,
            real,
            scale=self.scale,
            softcap=self.softcap,
            causal=self.causal,
            sliding_window=self.sliding_window,
            geometry=self.geometry,
        )

    def _pooling_parameters(self, dim: int) -> nn.ParameterList:
        """Parameters with which pooling is the mean."""
        if self.config.pooling == "attention":
            return nn.ParameterList(torch.zeros(self.kv_heads, dim) for _ in self.geometry.ratios)
        if self.config.pooling == "learned":
            shape = (self.kv_heads, dim)
            return nn.ParameterList(torch.full((*shape, r), 1 / r) for r in self.geometry.ratios)
        return nn.ParameterList()

    def _pool_keys(self, k: Tensor, start: Tensor, new: int, state: HSAState | None) -> list[Tensor]:
        past = None if state is None else state.nodes
        return self._pool(k, past, start, new, self.config.pooling, self.key_pooling)

    def _pool_scored(
        self, scored: Tensor, k: Tensor, start: Tensor, new: int, state: HSAState | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Nodes of the keys that are scored, and their spreads, which have no gradients."""
        g = self.geometry
        if state is None and g.spread:
            built = build_with_spreads(
                scored,
                start,
                ratios=g.ratios,
                offset=g.sink,
                pooling=self.config.pooling,
                weights=list(self.key_pooling) or [None] * g.levels,
            )
            if built is not None:
                return built
        nodes = self._pool_keys(scored, start, new, state)
        return nodes, self._spreads(k.detach(), nodes[0].detach(), start, new, state)

    def _spreads(
        self, k: Tensor, nodes: Tensor, start: Tensor, new: int, state: HSAState | None
    ) -> Tensor | None:
        g, past = self.geometry, None if state is None else state.spreads
        if not g.spread:
            return None
        return extend_spreads(k, nodes, past, start, new=new, ratio=g.node, offset=g.sink)

    def _pool_values(self, v: Tensor, start: Tensor, new: int, state: HSAState | None) -> list[Tensor]:
        if self.gate is None:
            return []
        past = None if state is None else state.value_nodes
        pooling = "mean" if self.config.pooling == "max" else self.config.pooling
        return self._pool(v, past, start, new, pooling, self.value_pooling)

    def _pool(
        self,
        x: Tensor,
        past: Sequence[Tensor] | None,
        start: Tensor,
        new: int,
        pooling: str,
        weights: nn.ParameterList,
    ) -> list[Tensor]:
        g = self.geometry
        return extend_pyramid(
            x,
            past,
            start,
            new=new,
            ratios=g.ratios,
            offset=g.sink,
            pooling=pooling,
            weights=list(weights) or [None] * g.levels,
        )

    @torch.no_grad()
    def _counts(
        self, spans: Tensor, choices: Tensor, queries: int, tokens: int, call: AttentionCall
    ) -> dict[str, Tensor]:
        keys, nodes = count(
            spans,
            choices,
            call.start,
            call.length,
            queries=queries,
            tokens=tokens,
            causal=self.causal,
            sliding_window=self.sliding_window,
            summaries=self.gate is not None,
            geometry=self.geometry,
        )
        position = torch.arange(tokens - queries, tokens, device=spans.device) - call.start[:, None]
        valid = (position >= 0) & (position < call.length[:, None])
        return {"keys": keys, "nodes": nodes, "valid": valid}


def _bounded(x: Tensor) -> Tensor:
    """x with its products over a head within the range of its dtype."""
    limit = (torch.finfo(x.dtype).max / x.shape[-1]) ** 0.5 / 8
    return x.nan_to_num(0.0, limit, -limit).clamp(-limit, limit)
