"""Puts converted sites into a model and takes them out again.

layer.self_attn = LlamaAttention   ⇄   layer.self_attn = RetrofittedAttention
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from retrofit import masks, outputs
from retrofit.capture.attend import Attend
from retrofit.capture.outline import Outline
from retrofit.capture.probes import is_transformers
from retrofit.captured_module import CapturedModule
from retrofit.site import RetrofittedAttention

_AROUND = "_around"
_NESTED = "_retrofit_use_nested_tensor"


class Outlined(CapturedModule):
    """Runs a module that has several attentions, each of them a child of its own.

    Args:
        original: The module whose place this takes.
        path: Where it is in the model.
        outline: The module without its attentions.
    """

    def __init__(self, original: nn.Module, path: str, outline: Outline) -> None:
        super().__init__(original, path, outline.plan, outline.attends)
        self.attends = tuple(outline.attends)
        for attend in outline.attends.values():
            vars(attend)[_AROUND] = (self,)


def outlined(converted: Sequence[RetrofittedAttention]) -> dict[str, Outlined]:
    """The modules with several attentions that ``converted`` are parts of, by path."""
    found = [vars(site.original)[_AROUND][0] for site in converted if isinstance(site.original, Attend)]
    return {around.path: around for around in found}


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
    exchange_all(model, [*outlined(converted).values(), *converted])
    masks.enable(model)
    _keep_padded(model)
    if is_transformers(model):
        outputs.guard(model)


def put_back(model: nn.Module) -> None:
    """Puts the originals of all sites back, with the children as they are now."""
    if not sites(model):
        return
    masks.restore(model)
    _release_padded(model)
    if is_transformers(model):
        outputs.release(model)
    exchange_back(model)


def exchange_all(model: nn.Module, captured: Sequence[CapturedModule]) -> None:
    """Puts each in the place of its original, and does no more."""
    for module in sorted(captured, key=lambda module: module.path.count(".")):  # the outer ones first
        _exchange(model, module.original, module)


def exchange_back(model: nn.Module) -> None:
    """Undoes :func:`exchange_all`."""
    captured = [module for module in model.modules() if isinstance(module, CapturedModule)]
    for module in reversed(captured):  # the outer ones last: they hand on the children they have
        _exchange(model, module, module.restored())


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
