"""Where a converted cross-attention finds its keys and values, and what its mask says.

first step   keys of the encoder's output  →  EncoderDecoderCache.cross_attention_cache
then         taken from there
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retrofit.capture.call import CACHE_NAMES, is_cache, lookup, spelled
from retrofit.errors import CacheError, CaptureError

if TYPE_CHECKING:
    from retrofit.site import RetrofittedAttention


def keys_and_values(site: RetrofittedAttention, values: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] of a call with arguments ``values``.

    Raises:
        CaptureError: If what they are made of is missing.
        CacheError: If there is a cache that has no place for them.
    """
    cache, layer = _cache(site, values), site.plan.slot.in_call(values)
    if cache is not None and layer is not None and cache.is_updated.get(layer):
        held = cache.cross_attention_cache.layers[layer]
        return held.keys, held.values
    tensors = []
    for path in site.plan.key_inputs:
        tensor = lookup(values, path)
        if tensor is None:
            raise CaptureError(
                f"{site.path} needs {spelled(path)} for its keys, got None; pass the encoder's output"
            )
        tensors.append(tensor)
    k, v = vars(site)["_run_keys"](site, *tensors)
    if cache is not None and layer is not None:
        k, v = cache.cross_attention_cache.update(k, v, layer)
        cache.is_updated[layer] = True
    return k, v


def _cache(site: RetrofittedAttention, values: Mapping[str, Any]) -> Any:
    """The cache of encoder and decoder among the arguments of a call; None if there is none."""
    caches = [value for name, value in values.items() if name in CACHE_NAMES or is_cache(value)]
    found: Any = next((value for value in caches if value is not None), None)
    if found is not None and not hasattr(found, "cross_attention_cache"):
        raise CacheError(
            f"{site.path} attends to the encoder and needs an EncoderDecoderCache, got {type(found).__name__}; "
            "leave past_key_values out"
        )
    return found


def as_scores(mask: Tensor | None) -> Tensor | None:
    """A mask [B, N], nonzero at real tokens, as bool [B, 1, 1, N]; any other as it is."""
    return mask if mask is None or mask.dim() != 2 else (mask != 0)[:, None, None, :]
