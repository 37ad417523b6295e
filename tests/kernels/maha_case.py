"""Inputs of MAHA for the tests of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.maha.ops import maha_attention
from retrofit.kernels.pyramid.blocked import extend_pyramid

GROWING = Bands((224, 252, 504, 1008), None, 32, 2)
"""More scales the further back: all but the last hold about 128 cells."""


@dataclass(frozen=True)
class Case:
    """Inputs over N index slots and how the op is to be called."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor
    offsets: Tensor
    bands: Bands
    implementation: str = "triton"

    def run(self, begin: int = 0, end: int | None = None) -> Tensor:
        """The op on the queries at index begin … end, with the keys up to end."""
        end = self.k.shape[2] if end is None else end
        k, v = self.k[:, :, :end], self.v[:, :, :end]
        levels = [self.cells(k), self.cells(v)]
        return self.call(self.q[:, :, begin:end], k, v, *levels, self.offsets)

    def gradients(self) -> list[Tensor]:
        """Of q, k, v, the cells and the offsets, for a random gradient of the output."""
        cells = [self.cells(self.k), self.cells(self.v)]
        q, k, v, offsets = own = [x.clone().requires_grad_() for x in (self.q, self.k, self.v, self.offsets)]
        keys, values = ([x.clone().requires_grad_() for x in part] for part in cells)
        out = self.call(q, k, v, keys, values, offsets)
        above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return list(torch.autograd.grad(out, [*own, *keys, *values], above))

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor], offsets: Tensor
    ) -> Tensor:
        return maha_attention(
            q,
            k,
            v,
            self.start,
            torch.minimum(self.length, k.shape[2] - self.start).clamp(min=0),
            keys,
            values,
            offsets,
            scale=self.q.shape[3] ** -0.5,
            widths=self.bands.widths,
            last_width=self.bands.last_width,
            sink=self.bands.sink,
            ratio=self.bands.ratio,
            implementation=self.implementation,
        )

    def run_in_chunks(self, cuts: Sequence[int]) -> Tensor:
        return torch.cat([self.run(*part) for part in pairwise([0, *cuts, self.k.shape[2]])], 2)

    def cells(self, x: Tensor) -> list[Tensor]:
        count = self.bands.scales - 1
        return extend_pyramid(
            x,
            None,
            self.start,
            new=x.shape[2],
            ratios=(self.bands.ratio,) * count,
            offset=0,
            pooling="mean",
            weights=[None] * count,
        )

    def on(self, device: str, dtype: torch.dtype) -> Case:
        names = ("q", "k", "v", "start", "length", "offsets")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **(moved | {name: moved[name].to(dtype) for name in ("q", "k", "v")}))


def build(
    tokens: int,
    *,
    bands: Bands = GROWING,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 16,
    value_dim: int | None = None,
    start: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
) -> Case:
    begin = torch.tensor(start if start is not None else [0] * batch)
    return Case(
        q=torch.randn(batch, heads, tokens, dim) * 2,
        k=torch.randn(batch, kv_heads, tokens, dim),
        v=torch.randn(batch, kv_heads, tokens, value_dim or dim),
        start=begin,
        length=torch.tensor(length) if length is not None else tokens - begin,
        offsets=torch.randn(heads, bands.scales),
        bands=bands,
    )
