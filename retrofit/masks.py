"""Masks of a converted model: two-dimensional padding instead of [n, n].

transformers builds its masks for the attention implementation that the configuration names. Under ``sdpa``
a padded batch of n tokens gets a boolean [n, n]; under ``retrofit``, registered here, it stays what it was:

    attention_mask [B, n]  →  create_causal_mask(config, …)  →  int32 [B, n], or None where nothing is padded

Converted sites turn it into the start and the length of each row. Attention modules of the same model that
are left dense keep a configuration of their own with the original implementation, and a hook rebuilds their
mask with transformers' own functions. A two-dimensional mask carries its kind (causal, bidirectional, sliding
window) in its dtype, which unlike an attribute survives checkpointing, hooks and copies between devices.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.capture.call import Signature
from retrofit.errors import MaskError, ModelLoadError

IMPLEMENTATION = "retrofit"
"""The attention implementation of a model whose masked attention modules are all converted."""

ORIGINALS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Implementations that modules left dense may have; then the name is ``retrofit|ORIGINAL``."""

KINDS = {
    "causal": torch.int32,
    "bidirectional": torch.int8,
    "sliding": torch.int16,
    "bidirectional sliding": torch.uint8,
    "whole causal": torch.uint16,
}
"""The kinds of two-dimensional masks and the dtype that tells them apart; nonzero is a real token.

A whole causal mask is one that the model wants as a tensor even where nothing is padded, as for an indexer of keys. No
kind is bool or int64: such masks models make themselves, as for attention at sampled points.
"""

_FUNCTIONS = {
    "causal": "create_causal_mask",
    "bidirectional": "create_bidirectional_mask",
    "sliding": "create_sliding_window_causal_mask",
    "bidirectional sliding": "create_bidirectional_sliding_window_mask",
    "whole causal": "create_causal_mask",
}
_ORIGINAL = "retrofit_attn_implementation"
_MASK_ARGUMENTS = ("attention_mask", "mask")


def kind(mask: Tensor | None) -> str | None:
    """Returns the kind of a two-dimensional mask made here; None for any other mask."""
    if mask is None or mask.dim() != 2:
        return None
    return next((name for name, dtype in KINDS.items() if mask.dtype == dtype), None)


# What a converted site does with its mask.


def to_start_length(
    mask: Tensor | None,
    batch: int,
    key_length: int,
    query_length: int,
    device: torch.device | str,
    *,
    causal: bool = True,
    sliding_window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Reads where each row's tokens start and how many there are.

    Args:
        mask: [B, N], nonzero at real tokens; or a mask [B, 1, T, N] made by the model or the user, boolean
            or additive, which must say the same; or None where nothing is padded.
        batch: B.
        key_length: N, the cached keys included.
        query_length: T; the queries are the last T of the N index slots.
        device: Where the results go.
        causal: What the site was verified for; only a mask [B, 1, T, N] is checked against it.
        sliding_window: Likewise; 0 means none.

    Returns:
        start and length, int64 [B]. A row without real tokens has length 0.

    Raises:
        MaskError: If there are holes between real tokens, or the shape or the pattern does not fit.
    """
    if mask is None:
        start = torch.zeros(batch, dtype=torch.int64, device=device)
        return start, torch.full_like(start, key_length)
    if mask.dim() == 4:
        return _from_dense(mask.to(device), batch, key_length, query_length, causal, sliding_window)
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] != key_length:
        raise MaskError(
            f"attention_mask must be [batch={batch}, keys={key_length}] (with a cache it covers the cached tokens "
            f"as well), got {list(mask.shape)}"
        )
    made = kind(mask)
    if made == "bidirectional" and causal:
        raise MaskError(
            "attention mask must be causal, which this site was verified for, got one that is bidirectional; convert "
            "again with the configuration that the model now has"
        )
    if made == "sliding" and not sliding_window:
        raise MaskError(
            "attention mask has a sliding window, which this site was not verified for; convert again, with an "
            "example that is longer than the window"
        )
    return _extent(mask.to(device) != 0)


def check_continued(start: Tensor, found: Tensor, past: int) -> None:
    """Checks that a mask leaves the cached tokens as visible as they were when they were cached.

    Args:
        start: Where each row's tokens began when they were cached, int64 [B].
        found: Where they begin by the mask at hand, int64 [B].
        past: Number of cached index slots; a row that begins behind them has no tokens yet.

    Raises:
        MaskError: If a row begins somewhere else.
    """
    moved = (start < past) & (found != start)
    message = "attention_mask must hide the same cached tokens as when they were cached"
    if torch.compiler.is_compiling():
        torch._assert_async(~moved.any(), message)
    elif bool(moved.any()):
        row = int(moved.nonzero()[0])
        raise MaskError(
            f"{message}, got a row ({row}) that began at {int(start[row])} and now begins at {int(found[row])}; "
            "start from an empty cache"
        )


def _extent(real: Tensor) -> tuple[Tensor, Tensor]:
    """Returns start and length of each row of ``real``, bool [B, N]."""
    index = torch.arange(real.shape[1], device=real.device)
    length = real.sum(dim=1)
    start = torch.where(real, index, real.shape[1]).amin(dim=1)
    start = torch.where(length > 0, start, 0)
    last = torch.where(real, index, -1).amax(dim=1)
    holes = (length > 0) & (last - start + 1 != length)
    message = "attention_mask must have its padding at the ends of a row, got a row with padding between real tokens"
    if torch.compiler.is_compiling():
        torch._assert_async(~holes.any(), message)
    elif bool(holes.any()):
        row = int(holes.nonzero()[0])
        raise MaskError(
            f"{message} (row {row}); pad on the left when generating, and put packed sequences in rows of their own"
        )
    return start, length


def _from_dense(
    mask: Tensor, batch: int, key_length: int, query_length: int, causal: bool, sliding_window: int
) -> tuple[Tensor, Tensor]:
    """Reads a mask [B, 1, T, N], after checking that it is of the site's class and nothing else."""
    if mask.shape[0] not in (1, batch) or mask.shape[2] != query_length or mask.shape[3] < key_length:
        raise MaskError(
            f"attention mask must be [batch={batch}, 1, queries={query_length}, keys={key_length}], "
            f"got {list(mask.shape)}"
        )
    mask = mask[..., :key_length]
    if not mask.is_floating_point():
        mask = mask != 0
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if mask.dtype != torch.bool and bool((mask.masked_fill(~visible, 0) != 0).any()):
        raise MaskError(
            "attention mask carries a bias, which this site was not verified for; leave it out with where=…"
        )
    visible = visible.expand(batch, -1, -1, -1)
    seen = visible.any(dim=1).any(dim=1)
    if sliding_window and query_length < key_length:
        # Keys that have left every window are real as far as anybody can tell.
        first = seen.int().argmax(dim=1)
        outside = torch.arange(key_length, device=mask.device) <= key_length - query_length - sliding_window
        seen = seen | (outside & (first == outside.sum())[:, None])
    start, length = _extent(seen)
    queries = torch.arange(key_length - query_length, key_length, device=mask.device)[:, None]
    keys = torch.arange(key_length, device=mask.device)
    pattern = torch.ones_like(queries >= keys)
    if causal:
        pattern = queries >= keys
    if sliding_window:
        pattern = pattern & (queries - keys < sliding_window)
    real = (keys >= start[:, None]) & (keys < (start + length)[:, None])
    # What padding rows see is of no interest: transformers lets them see everything in some versions.
    rows = real[:, -query_length:, None]
    expected = pattern & real[:, None]
    if bool(((visible != expected[:, None]) & rows[:, None]).any()):
        name = ("causal" if causal else "bidirectional") + (
            f" within {sliding_window}" if sliding_window else ""
        )
        raise MaskError(
            f"attention mask is not {name} with padding, which this site was verified for; "
            "pass a two-dimensional attention_mask, or leave the site out with where=…"
        )
    return start, length


# What transformers calls to make a mask.


def _make(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    original: str | None = None,
    **options: Any,
) -> Tensor | None:
    """The entry in transformers' AttentionMaskInterface.

    Args:
        original: Implementation of the modules left dense, or of a model that always takes a mask; None if
            there are none.
    """
    try:
        made = _kind_of(
            mask_function,
            use_vmap,
            options.get("local_size"),
            "allow_is_bidirectional_skip" in options,
            batch_size,
            torch.arange(q_length, device=device) + q_offset,
            kv_length + kv_offset,
        )
    except MaskError:
        if original is None:
            raise
        # Modules left dense may know what to do with it; converted sites refuse a mask that is not theirs.
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        whole: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[original](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            device=device,
            **{**options, "allow_is_causal_skip": False},
        )
        return whole
    if made == "causal" and options.get("allow_is_causal_skip") is False:
        made = "whole causal"
    seen = kv_length + kv_offset
    # Every implementation leaves out a mask that hides nothing, where the caller can do without one.
    left_out = original is None or (made == "bidirectional" and bool(options["allow_is_bidirectional_skip"]))
    if attention_mask is None:
        if left_out:
            return None
        return torch.ones(batch_size, seen, dtype=KINDS[made], device=device)
    if attention_mask.shape[-1] < seen:
        raise MaskError(
            f"attention_mask must have {seen} columns, one for each token, the cached ones included, "
            f"got {attention_mask.shape[-1]}; if the cache is static, pass RetrofitCache(model) instead"
        )
    mask = attention_mask[:, :seen]
    if left_out and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask.to(KINDS[made])


def _kind_of(
    function: Callable[..., Any] | None,
    use_vmap: bool,
    window: int | None,
    bidirectional: bool,
    batch: int,
    queries: Tensor,
    seen: int,
) -> str:
    """Returns the kind of a mask function of transformers, after probing that it is that and nothing else.

    transformers' own causal function is known and not probed: nothing is then read back from the device. With any
    other, every query is asked about keys at distances 1, 4, 16, … from it on both sides. Packed sequences, chunks
    and bidirectional blocks all differ there from the plain patterns.

    Raises:
        MaskError: If it is none of the kinds known.
    """
    made = ("bidirectional" if bidirectional else "causal") if window is None else "sliding"
    if bidirectional and window is not None:
        made = "bidirectional sliding"
    message = (
        f"the attention mask must be {made} with padding at the ends of a row, got another; if position_ids start "
        "again within a row (packed sequences), give each sequence a row of its own; leave layers with chunks or "
        "bidirectional blocks out with where=…"
    )
    if use_vmap:
        raise MaskError(message)
    if function is None or (made == "causal" and _is_plain_causal(function)):
        return made
    edges = [] if window is None else [window - 1, window, window + 1]  # where chunks differ from windows
    distance = torch.tensor(
        [sign * size for size in (*(4**power for power in range(11)), *edges) for sign in (1, -1)],
        device=queries.device,
    )
    distance = distance[:, None, None]
    rows = torch.arange(batch, device=queries.device)[:, None]
    keys = queries - distance
    inside = (keys >= 0) & (keys < seen)
    got = function(rows, 0, queries.expand_as(keys), keys.clamp(0, seen - 1))
    expected = torch.ones_like(inside) if bidirectional else distance > 0
    if window is not None:
        expected = expected & (distance.abs() <= window if bidirectional else distance < window)
    same = (~inside | (got == expected)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(same, message)
    elif not bool(same):
        raise MaskError(message)
    return made


def _is_plain_causal(function: Callable[..., Any]) -> bool:
    from transformers.masking_utils import causal_mask_function

    return function is causal_mask_function


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The entry in transformers' AttentionInterface; whoever gets here was not converted."""
    raise ModelLoadError(
        f"{type(module).__name__} asks for attn_implementation={IMPLEMENTATION!r} but is not converted; load a "
        "converted folder with retrofit.from_pretrained, or set another with model.set_attn_implementation('sdpa')"
    )


def register() -> None:
    """Makes the implementations known to transformers; a second time changes nothing."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionMaskInterface.register(IMPLEMENTATION, _make)
    AttentionInterface.register(IMPLEMENTATION, _attend)
    for original in ORIGINALS:
        AttentionMaskInterface.register(f"{IMPLEMENTATION}|{original}", partial(_make, original=original))
        AttentionInterface.register(f"{IMPLEMENTATION}|{original}", _attend)


# Switching a model over and back.


def enable(model: nn.Module) -> None:
    """Has the model hand two-dimensional masks to its converted sites; modules left dense get theirs rebuilt.

    Called again, it starts from the original setting. A model that is not from transformers makes its masks
    itself and is left as it is.
    """
    from retrofit.site import RetrofittedAttention

    restore(model)
    register()
    sites = [module for module in model.modules() if isinstance(module, RetrofittedAttention)]
    for config in _configs(model, sites):
        original = config._attn_implementation_internal or "eager"
        dense = [
            (module, own)
            for module, own, of_model in ((m, *_configs_of(model, m)) for m in _masked(model))
            if config is own or config is of_model
        ]
        for module, own in dense:
            _keep_dense(module, config if own is None else own)
        vars(config)[_ORIGINAL] = original
        plain = not dense and not _wants_a_mask(model, config)
        config._attn_implementation_internal = IMPLEMENTATION if plain else f"{IMPLEMENTATION}|{original}"


def restore(model: nn.Module) -> None:
    """Undoes :func:`enable`."""
    for module in model.modules():
        hook = vars(module).pop("_retrofit_mask_hook", None)
        if hook is not None:
            hook.remove()
            own = vars(module).pop("_retrofit_config")
            if own is None:
                del vars(module)["config"]
            else:
                vars(module)["config"] = own
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        original = vars(config).pop(_ORIGINAL, None) if hasattr(config, "__dict__") else None
        if original is not None:
            config._attn_implementation_internal = original


def _configs(model: nn.Module, sites: list[Any]) -> list[Any]:
    """The configurations by which the masks of ``sites`` are made, each once: of the innermost models around them."""
    from transformers import PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, Any] = {}
    for site in sites:
        # Modules come parents first, so the last one around the site is the innermost.
        around = [module for module in models if any(child is site for child in module.modules())]
        if around:
            found[id(around[-1].config)] = around[-1].config
    return list(found.values())


def _configs_of(model: nn.Module, module: nn.Module) -> tuple[Any, Any]:
    """The configuration that ``module`` keeps, as one of its layer alone, and that of the innermost model around it."""
    from transformers import PreTrainedModel

    around = [
        above
        for above in model.modules()
        if isinstance(above, PreTrainedModel) and any(child is module for child in above.modules())
    ]
    return getattr(module, "config", None), around[-1].config if around else None


def _wants_a_mask(model: nn.Module, config: Any) -> bool:
    """Whether a model may do something with its mask besides handing it on: one written for eager attention alone."""
    return any(
        getattr(module, "config", None) is config and getattr(module, "_supports_sdpa", True) is False
        for module in model.modules()
    )


def _masked(model: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that take a mask and are not converted, and those around them that project and cache.

    Such an attention module hands its mask on to a child, as to an indexer of keys.
    """
    from retrofit.site import RetrofittedAttention

    def takes_mask(module: nn.Module) -> bool:
        return any(name in inspect.signature(module.forward).parameters for name in _MASK_ARGUMENTS)

    for module in model.modules():
        if takes_mask(module) and not isinstance(module, RetrofittedAttention):
            below = [child for child in module.modules() if child is not module]
            projects = any(isinstance(child, nn.Linear) for child in module.children())
            caches = getattr(module, "layer_idx", None) is not None
            if any(isinstance(child, RetrofittedAttention) for child in below):
                continue
            if (projects and caches) or not any(takes_mask(child) for child in below):
                yield module


def _keep_dense(module: nn.Module, config: Any) -> None:
    """Gives a module a configuration of its own, with the original implementation, and the hook for its mask."""
    vars(module)["_retrofit_config"] = vars(module).get("config")
    vars(module)["config"] = copy.copy(config)
    vars(module)["_retrofit_mask_hook"] = module.register_forward_pre_hook(_rebuild, with_kwargs=True)


def _rebuild(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a module left dense: gives it the mask it would have got without retrofit."""
    given = Signature.of(module).bind(args, kwargs)
    places = list(inspect.signature(module.forward).parameters)
    changed = False
    for name, mask in given.items():
        made = kind(mask) if isinstance(mask, Tensor) and name.endswith("mask") else None
        if made is None or (name not in _MASK_ARGUMENTS and made != "bidirectional"):
            continue  # those of other tokens, as of an encoder, are bidirectional
        hidden = next(value for value in given.values() if isinstance(value, Tensor) and value.dim() == 3)
        past = given.get("past_key_values") if made in ("causal", "whole causal", "sliding") else None
        rebuilt = _rebuilt(mask, made, module, hidden, past)
        if name in kwargs:
            kwargs = {**kwargs, name: rebuilt}
        else:
            place = places.index(name)
            args = (*args[:place], rebuilt, *args[place + 1 :])
        changed = True
    return (args, kwargs) if changed else None


def _rebuilt(mask: Tensor, made: str, module: nn.Module, hidden: Tensor, past: Any) -> Tensor | None:
    from transformers import masking_utils

    name = _FUNCTIONS[made]
    if made == "sliding" and getattr(module.config, "sliding_window", None) is None:
        name = "create_chunked_causal_mask"  # within the first chunk both are the same
        if getattr(module.config, "attention_chunk_size", None) is None:
            raise MaskError(
                f"{type(module).__name__} was left dense and is handed a mask with a sliding window, which its "
                f"{type(module.config).__name__} does not know; choose the sites that share the mask together with where=…"
            )
    function = getattr(masking_utils, name)
    options: dict[str, Any] = {}
    layer = getattr(module, "layer_idx", None)
    if past is not None and layer is not None and "layer_idx" in inspect.signature(function).parameters:
        options["layer_idx"] = layer
    if made == "whole causal" and "allow_is_causal_skip" in inspect.signature(function).parameters:
        options["allow_is_causal_skip"] = False
    rebuilt: Tensor | None = function(
        config=module.config, inputs_embeds=hidden, attention_mask=mask != 0, past_key_values=past, **options
    )
    return rebuilt
