"""Listens at the converted sites while a model runs.

with tapped(model, lambda path, site, q, k, v, call, out: …):
    model(ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from retrofit.api import sites
from retrofit.attention_call import AttentionCall
from retrofit.site import RetrofittedAttention

Listener = Callable[[str, RetrofittedAttention, Tensor, Tensor, Tensor, AttentionCall, Tensor], None]
"""Gets a site's path and module, its q, k, v and call, and its attention's output [B, Hq, T, Dv]."""


@contextmanager
def tapped(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Calls ``listener`` at each forward of each site inside the block."""
    found = sites(model)
    before = [site.tap for _, site in found]
    try:
        for path, site in found:
            site.tap = partial(listener, path, site)
        yield
    finally:
        for (_, site), tap in zip(found, before, strict=True):
            site.tap = tap


class Collector:
    """Keeps the attention outputs of one forward; deaf afterwards, when checkpointing runs parts again."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.open = True

    def __call__(
        self,
        path: str,
        site: RetrofittedAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        out: Tensor,
    ) -> None:
        """Listens."""
        if self.open:
            self.outputs[path] = out

    def close(self) -> dict[str, Tensor]:
        """Stops listening and hands the outputs over, by site."""
        self.open = False
        return self.outputs
