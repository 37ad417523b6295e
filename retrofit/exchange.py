"""Puts converted sites into a model and takes them out again.

layer.self_attn = LlamaAttention   ⇄   layer.self_attn = RetrofittedAttention
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from retrofit import masks, outputs
from retrofit.capture.probes import is_transformers
from retrofit.site import RetrofittedAttention

_NESTED = "_retrofit_use_nested_tensor"


def sites(model: nn.Module) -> list[tuple[str, RetrofittedAttention]]:
    """Returns the converted sites of ``model`` by path."""
    return [
        (path, module) for path, module in model.named_modules() if isinstance(module, RetrofittedAttention)
    ]


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Runs every converted site with dense attention: the original model, as a teacher."""
    found = [site for _, site in sites(model)]
    before = [site.dense_mode for site in found]
    for site in found:
        site.dense_mode = True
    try:
        yield
    finally:
        for site, mode in zip(found, before, strict=True):
            site.dense_mode = mode


@contextmanager
def originals(model: nn.Module) -> Iterator[None]:
    """Has the original attention in place for a while."""
    before = [site for _, site in sites(model)]
    put_back(model)
    try:
        yield
    finally:
        put_in(model, before)


def put_in(model: nn.Module, converted: Sequence[RetrofittedAttention]) -> None:
    """Puts sites in the place of their originals and has what surrounds them deal with them."""
    if not converted:
        return
    for site in sorted(converted, key=lambda site: site.path.count(".")):  # what is around another one first
        _exchange(model, site.original, site)
    masks.enable(model)
    _keep_padded(model)
    if is_transformers(model):
        outputs.guard(model)


def put_back(model: nn.Module) -> None:
    """Puts the originals of all sites back, with the children as they are now."""
    found = sites(model)
    if not found:
        return
    masks.restore(model)
    _release_padded(model)
    if is_transformers(model):
        outputs.release(model)
    for _, site in found:
        _exchange(model, site, site.restored())


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        if module is new:
            continue
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _keep_padded(model: nn.Module) -> None:
    """Has torch's encoders hand padded rows and their mask to converted layers, in place of a nested tensor."""
    for module in model.modules():
        if (
            isinstance(module, nn.TransformerEncoder)
            and module.use_nested_tensor
            and any(isinstance(child, RetrofittedAttention) for child in module.modules())
        ):
            vars(module)[_NESTED] = True
            vars(module)["use_nested_tensor"] = False


def _release_padded(model: nn.Module) -> None:
    """Undoes :func:`_keep_padded`."""
    for module in model.modules():
        if vars(module).pop(_NESTED, False):
            vars(module)["use_nested_tensor"] = True
