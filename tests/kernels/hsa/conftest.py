"""Random cases for hierarchical sparse attention, and the ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa import ops
from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.pyramid.blocked import extend_pyramid, extend_spreads

TINY = Geometry(
    window=32,
    sink=8,
    budget=32,
    block=8,
    node=2,
    fanout=4,
    nodes_per_span=8,
    beam=4,
    query_block=8,
    dense_until=72,
    threshold=0.01,
    spread=1.2,
)


@dataclass(frozen=True)
class Result:
    out: Tensor
    spans: Tensor
    choices: Tensor


@dataclass(frozen=True)
class Case:
    """Inputs over N index slots and how the op is to be called."""

    q: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor
    geometry: Geometry
    gate: Tensor | None = None
    causal: bool = True
    sliding_window: int = 0
    rules: ScoreRules = PLAIN
    padded: bool = True
    implementation: str = "reference"

    @property
    def tokens(self) -> int:
        return self.k.shape[2]

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """The same on another device and in another dtype."""
        tensors = {name: getattr(self, name).to(device, dtype) for name in ("q", "k", "v")}
        rows = {name: getattr(self, name).to(device) for name in ("start", "length")}
        sinks = self.rules.sinks
        rules = self.rules._replace(sinks=None if sinks is None else sinks.to(device, dtype))
        return replace(self, **tensors, **rows, rules=rules)

    def pool(self, x: Tensor) -> list[Tensor]:
        g = self.geometry
        return extend_pyramid(
            x,
            None,
            self.start,
            new=x.shape[2],
            ratios=g.ratios,
            offset=g.sink,
            pooling="mean",
            weights=[None] * g.levels,
        )

    def spreads(self, x: Tensor, nodes: Tensor) -> Tensor | None:
        g = self.geometry
        if not g.spread:
            return None
        return extend_spreads(x, nodes, None, self.start, new=x.shape[2], ratio=g.node, offset=g.sink)

    def run(self, begin: int = 0, end: int | None = None, past: Result | None = None) -> Result:
        """The op on the queries at index begin … end, with the keys up to end."""
        end = self.tokens if end is None else end
        k, v = self.k[:, :, :end], self.v[:, :, :end]
        nodes = self.pool(k)
        return Result(
            *ops.hsa_attention(
                self.q[:, :, begin:end],
                k,
                v,
                start=self.start,
                length=torch.minimum(self.length, end - self.start).clamp(min=0),
                nodes=nodes,
                spreads=self.spreads(k, nodes[0]),
                value_nodes=self.pool(v) if self.gate is not None else [],
                gate=self.gate,
                past_spans=past.spans if past else None,
                past_choices=past.choices if past else None,
                scale=self.scale,
                causal=self.causal,
                sliding_window=self.sliding_window,
                padded=self.padded,
                geometry=self.geometry,
                rules=self.rules,
                implementation=self.implementation,
            )[:3]
        )

    def run_in_chunks(self, cuts: Sequence[int]) -> Result:
        """The same by several calls, each continuing from the state of the one before."""
        outs, past = [], None
        edges = [0, *cuts, self.tokens]
        for begin, end in pairwise(edges):
            past = self.run(begin, end, past)
            outs.append(past.out)
        assert past is not None
        return replace(past, out=torch.cat(outs, dim=2))

    def outweighed(self, key: int) -> Case:
        """The same with a key of more weight than a float holds beside the others."""
        q, k = self.q.clone(), self.k.clone()
        q[..., 0], k[:, :, key, 0] = 10, 60
        return replace(self, q=q, k=k)

    def alone(self, row: int) -> Case:
        """One row of the batch without its padding."""
        begin, count = int(self.start[row]), int(self.length[row])
        part = slice(begin, begin + count)
        return replace(
            self,
            q=self.q[row : row + 1, :, part],
            k=self.k[row : row + 1, :, part],
            v=self.v[row : row + 1, :, part],
            start=torch.zeros(1, dtype=torch.int64),
            length=torch.tensor([count]),
        )


@pytest.fixture(params=["reference", "blocked"])
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny() -> Geometry:
    """Sparse from 72 tokens on."""
    return TINY


@pytest.fixture
def build(implementation: str) -> Callable[..., Case]:
    """A factory of random cases; ``geometry`` overrides go by name."""

    def case(
        tokens: int,
        *,
        batch: int = 1,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        sharpness: float = 2.0,
        gate: float | None = None,
        causal: bool = True,
        sliding_window: int = 0,
        softcap: float = 0.0,
        sinks: float | None = None,
        start: Sequence[int] | None = None,
        length: Sequence[int] | None = None,
        **sizes: Any,
    ) -> Case:
        random = torch.Generator().manual_seed(seed)

        def normal(count: int) -> Tensor:
            return torch.randn(batch, count, tokens, dim, generator=random, dtype=torch.float64).to(dtype)

        begin = torch.tensor(start if start is not None else [0] * batch)
        return Case(
            q=normal(heads) * sharpness,
            k=normal(kv_heads),
            v=normal(kv_heads),
            start=begin,
            length=torch.tensor(length) if length is not None else tokens - begin,
            geometry=replace(TINY, **sizes),
            gate=None if gate is None else torch.full((heads,), gate, dtype=dtype),
            causal=causal,
            sliding_window=sliding_window,
            rules=ScoreRules(
                softcap, None if sinks is None else sinks + torch.arange(heads, dtype=dtype) / heads
            ),
            padded=start is not None or length is not None,
            implementation=implementation,
        )

    return case


@pytest.fixture
def narrow() -> Any:
    """Settings with tiles of 16 rows, of which a query block takes several."""
    tuned = pytest.importorskip("retrofit.kernels.tuned")
    names = ("vote", "attend", "query_gradients", "key_gradients")
    listed = {name: getattr(tuned.SM_90, name) for name in names}
    return replace(
        tuned.SM_90,
        **{
            name: {at: replace(tile, rows=16, few=None) for at, tile in tiles.items()}
            for name, tiles in listed.items()
        },
    )
