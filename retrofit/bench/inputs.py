"""What is timed: the queries, keys and values of one site on real text, in the model's shape or in another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.data import Source, tokens
from retrofit.errors import BenchmarkError
from retrofit.evaluate.perplexity import positions_of, text_config
from retrofit.progress import track


@dataclass(frozen=True)
class Inputs:
    """q [1, Hq, N, D], k [1, Hkv, N, D], v [1, Hkv, N, Dv], and the factor on their scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def first(self, length: int) -> Inputs:
        """The first ``length`` tokens."""
        q, k, v = (x[:, :, :length].contiguous() for x in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.scale)

    def shaped(self, heads: int, kv_heads: int, dim: int) -> Inputs:
        """The same attention in another shape: heads, kv heads and dims are repeated, scores stay what they are.

        Query head h of a kv head repeats head h modulo the group of the recorded one.

        Raises:
            BenchmarkError: If the shape does not divide.
        """
        group, recorded = heads // kv_heads, self.q.shape[1] // self.k.shape[1]
        times, rest = divmod(dim, self.q.shape[3])
        if heads % kv_heads or rest or self.q.shape[3] != self.v.shape[3]:
            raise BenchmarkError(
                f"a shape must have whole groups and a multiple of the site's {self.q.shape[3]} dims, "
                f"got {heads} heads, {kv_heads} kv heads, {dim} dims"
            )
        source = torch.arange(heads, device=self.q.device)
        of = source // group % self.k.shape[1]
        q = self.q[:, of * recorded + source % group % recorded]
        k, v = (x[:, torch.arange(kv_heads, device=x.device) % x.shape[1]] for x in (self.k, self.v))
        q, k, v = (x.repeat(1, 1, 1, times) for x in (q, k, v))
        return Inputs(q, k, v, self.scale / times)

    def random(self) -> Inputs:
        """Independent normal numbers of the same shapes and variances."""
        generator = torch.Generator(self.q.device).manual_seed(0)

        def like(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
            return (noise * x.float().std()).to(x.dtype)

        return Inputs(like(self.q), like(self.k), like(self.v), self.scale)


def record(
    model: nn.Module, path: str, tokenizer: Any, source: Source | Tensor, length: int, scale: float
) -> Inputs:
    """Records what the target at ``path`` receives on ``source``.

    Beyond the positions that the model was trained for, rotary angles go on. Where positions are a table, segments
    recorded one after the other are joined: each then has first tokens and neighbours of its own.

    Raises:
        BenchmarkError: If the text has fewer tokens than ``length``, or the site is not reached.
    """
    ids = tokens(source, tokenizer, limit=length).flatten()[None, :length]
    if ids.shape[1] < length:
        raise BenchmarkError(f"the text has {ids.shape[1]} tokens, {length} are needed; give a longer text")
    step = length if _angles_go_on(model.config) else min(length, positions_of(model) or length)
    device = next(model.parameters()).device
    segments = [
        _record_once(model, path, ids[:, begin : min(begin + step, length)].to(device))
        for begin in track(range(0, length, step), "record")
    ]
    q, k, v = (torch.cat(parts, dim=2).contiguous() for parts in zip(*segments, strict=True))
    return Inputs(q, k, v, scale)


def _angles_go_on(config: Any) -> bool:
    """Whether positions are rotary angles, which have no end."""
    text = text_config(config)
    return any(getattr(text, name, None) is not None for name in ("rope_parameters", "rope_theta"))


class _Recorded(Exception):
    """Ends a forward pass as soon as the wanted site has been reached."""


def _record_once(model: nn.Module, path: str, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from retrofit.api import sites

    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.extend(tensor.detach() for tensor in args[:3])
        raise _Recorded

    handle = dict(sites(model))[path].retrofit.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except _Recorded:
        assert kept  # the forward pass has done what it was for
    finally:
        handle.remove()
    if not kept:
        raise BenchmarkError(f"the forward pass never reached {path}")
    return kept[0], kept[1], kept[2]
