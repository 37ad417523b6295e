"""The cache of a converted model: keys, values, and what the target keeps besides.

Keys and values do not determine what the next token sees: a site also keeps its pooled levels, its choices,
and where each row starts. All of it follows whatever transformers does to a cache layer:

    update, crop, reorder_cache, batch_repeat_interleave, batch_select_indices, reset, offload, prefetch

``generate()`` makes a plain ``DynamicCache``; its empty layers are replaced as the sites first meet them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from retrofit.errors import CacheError

S = TypeVar("S", bound="SiteState")


class SiteState(Protocol):
    """What a target keeps of the past besides keys and values."""

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """Returns the state with ``function`` applied to each of its tensors, all of which are batch first."""
        ...

    def crop(self: S, start: Tensor, tokens: int) -> S:
        """Returns the state as it was when there were ``tokens`` index slots.

        Args:
            start: int64 [B], index of each row's first real token.
            tokens: Index slots that remain, padding included.
        """
        ...


class RetrofitLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys, values and state of one converted site.

    Keys and values are views [B, Hkv, n, D] of buffers with room to grow, so that a decoded token costs no
    copy of the past.

    Attributes:
        start: int64 [B], index of each row's first real token; set by the site at prefill, kept since.
        padded: Whether there has been a mask, so that some row may have padding.
        state: What the target keeps; None before its first call, or where it keeps nothing.
    """

    start: Tensor | None
    padded: bool
    state: Any

    def __init__(self, **options: Any) -> None:
        self._tokens = 0
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._owned = False
        self.start = None
        self.padded = False
        self.state = None
        super().__init__(**options)  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> Tensor | None:
        """Keys of all tokens so far [B, Hkv, n, D]."""
        return None if self._buffers is None else self._buffers[0].narrow(-2, 0, self._tokens)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            raise CacheError(
                "keys of a RetrofitLayer cannot be set, they belong to its state; use update and crop"
            )

    @property
    def values(self) -> Tensor | None:
        """Values of all tokens so far [B, Hkv, n, Dv]."""
        return None if self._buffers is None else self._buffers[1].narrow(-2, 0, self._tokens)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            raise CacheError(
                "values of a RetrofitLayer cannot be set, they belong to its state; use update and crop"
            )

    @property
    def room(self) -> tuple[Tensor, Tensor]:
        """The buffers of keys [B, Hkv, N, D] and values [B, Hkv, N, Dv], of whose N slots the first hold tokens."""
        if self._buffers is None:
            raise CacheError("an empty RetrofitLayer has no room; call update first")
        return self._buffers

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = (key_states[..., :0, :], value_states[..., :0, :])
        self._owned = False
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends new keys and values [B, Hkv, T, D] and returns all of them, as views."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        assert self._buffers is not None
        keys, values = self._buffers
        if keys.shape[0] != key_states.shape[0]:
            raise CacheError(
                f"the cache holds {keys.shape[0]} rows, got keys of {key_states.shape[0]}; "
                "start a new cache for another batch"
            )
        if self._tokens == 0 and not self._owned:
            # The prompt is kept as it came; the first token after it moves it into a buffer.
            self._buffers = (key_states, value_states)
        elif _recorded(keys, values, key_states, value_states):
            # Autograd, tracing and export cannot follow writes into a buffer.
            self._buffers = (
                torch.cat([keys.narrow(-2, 0, self._tokens), key_states], dim=-2),
                torch.cat([values.narrow(-2, 0, self._tokens), value_states], dim=-2),
            )
            self._owned = False
        else:
            self._append(key_states, value_states)
        self._tokens += key_states.shape[-2]
        keys, values = self._buffers
        return keys.narrow(-2, 0, self._tokens), values.narrow(-2, 0, self._tokens)

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self._buffers is not None
        needed = self._tokens + key_states.shape[-2]
        # What was allocated in inference mode cannot be written to outside of it.
        frozen = self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if not self._owned or frozen or self._buffers[0].shape[-2] < needed:
            keys, values = self._buffers
            room = needed + needed // 4 + 64
            self._buffers = (_grown(keys, self._tokens, room), _grown(values, self._tokens, room))
            self._owned = True
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.narrow(-2, self._tokens, new.shape[-2]).copy_(new)

    def get_seq_length(self) -> int:
        """Returns the number of index slots, padding included."""
        return self._tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; continuing afterwards is as if they had never been.

        Args:
            tokens_to_remove: A negative number of tokens to remove. A positive number, as transformers before
                5.20 passes it, is the length to keep.
        """
        length = self._tokens + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if not self.is_initialized or length >= self._tokens:
            return
        if length <= 0:
            self.reset()
            return
        if self.state is not None:
            self.state = self.state.crop(self.start, length)
        self._tokens = length

    def reset(self) -> None:
        """Forgets everything."""
        self._buffers = None
        self._tokens = 0
        self._owned = False
        self.start = None
        self.padded = False
        self.state = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows in the order of ``beam_idx``."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows ``indices``, an index or a boolean tensor."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Moves everything to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves everything back to the layer's device."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._buffers is not None:
            before = self._buffers
            self._buffers = (function(before[0]), function(before[1]))
            self._owned = self._owned or self._buffers[0] is not before[0]
        if self.start is not None:
            self.start = function(self.start)
        if self.state is not None:
            self.state = self.state.map(function)


class RetrofitHybridLayer(LinearAttentionLayer, RetrofitLayer):  # type: ignore[misc, override, no-untyped-call]
    """A layer that also keeps the states of a linear mixer, which runs beside the attention of its block.

    Args:
        like: The layer whose linear states it takes over; none where it is left out.
    """

    is_compileable = False

    def __init__(self, like: Any = None) -> None:
        RetrofitLayer.__init__(self)
        own = set(vars(self))
        LinearAttentionLayer.__init__(self)
        if like is not None:
            vars(self).update(
                {name: value for name, value in vars(like).items() if name in vars(self).keys() - own}
            )
            self.device, self.dtype = like.device, like.dtype

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Starts with the first keys and values, or with the first linear states, given by name."""
        (RetrofitLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens from both."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        RetrofitLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forgets everything."""
        LinearAttentionLayer.reset(self)
        RetrofitLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows in the order of ``beam_idx``."""
        RetrofitLayer.reorder_cache(self, beam_idx)

    def offload(self) -> None:
        """Moves everything to the CPU."""
        RetrofitLayer.offload(self)

    def prefetch(self) -> None:
        """Moves everything back to the layer's device."""
        LinearAttentionLayer.prefetch(self)  # type: ignore[no-untyped-call]
        RetrofitLayer.prefetch(self)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        RetrofitLayer._map(self, function)
        for states in (self.conv_states, self.recurrent_states):
            for place, state in states.items():
                if state is not None:
                    states[place] = function(state)


def _recorded(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _grown(tensor: Tensor, tokens: int, room: int) -> Tensor:
    grown = tensor.new_empty((*tensor.shape[:-2], room, tensor.shape[-1]))
    grown.narrow(-2, 0, tokens).copy_(tensor.narrow(-2, 0, tokens))
    return grown


_REPLACED = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer)


def layer_for(cache: Any, layer_idx: int, site: str) -> RetrofitLayer:
    """Returns the layer of ``cache`` that belongs to a site, put in place of an empty plain one.

    Args:
        cache: What the model was called with as ``past_key_values``.
        layer_idx: The site's place in the cache.
        site: Path of the site, for messages.

    Raises:
        CacheError: If the cache is of another kind, or holds tokens whose state is not known.
    """
    remedy = "leave past_key_values and cache_implementation out, or pass RetrofitCache(model)"
    if hasattr(cache, "self_attention_cache"):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise CacheError(f"{site} needs a transformers Cache, got {type(cache).__name__}; {remedy}")
    if cache.offloading:
        raise CacheError(f"{site} cannot use an offloaded cache; {remedy}")
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    if layer_idx >= len(cache.layers):
        raise CacheError(f"{site} needs cache layer {layer_idx}, the cache has {len(cache.layers)}; {remedy}")
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, RetrofitLayer):
        return layer
    if type(layer) not in _REPLACED:
        raise CacheError(f"{site} cannot use a {type(layer).__name__}; {remedy}")
    if layer.get_seq_length() > 0:
        raise CacheError(
            f"{site} was handed a {type(layer).__name__} that already holds {layer.get_seq_length()} tokens, "
            f"from before the conversion or from another model; run the prompt again: {remedy}"
        )
    fresh = _like(layer)
    cache.layers[layer_idx] = fresh
    return fresh


def _like(layer: Any) -> RetrofitLayer:
    """An empty layer that takes the place of ``layer``."""
    return RetrofitHybridLayer(layer) if isinstance(layer, LinearAttentionLayer) else RetrofitLayer()


class RetrofitCache(Cache):
    """An empty cache for a converted model; sites left dense get the layers they always have.

        cache = RetrofitCache(model)
        model(ids, past_key_values=cache)

    Args:
        model: A converted transformers model.

    Raises:
        CacheError: If the model has no converted sites with a cache.
    """

    def __init__(self, model: nn.Module) -> None:
        from retrofit.api import sites

        config: Any = model.config
        layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
        indices = [getattr(site, "layer_idx", None) for _, site in sites(model)]
        found = [index for index in indices if index is not None and index < len(layers)]
        if not found:
            raise CacheError(
                f"{type(model).__name__} has no converted site that keeps a cache; run retrofit.convert first"
            )
        for index in found:
            layers[index] = _like(layers[index])
        super().__init__(layers=layers)
