"""Counts what each converted site executes, query by query, while a model runs.

with counting(model) as counts:
    model(ids)
counts.sites()      # per site: keys executed and nodes scored, mean over the queries counted
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.targets.hsa import HSAAttention


@dataclass(frozen=True, kw_only=True)
class SiteAccount:
    """Work of one site, mean over queries and key-value heads.

    Attributes:
        path: Of the site in the model.
        keys: Keys a query attends to.
        nodes: Pooled nodes a query scores to choose them.
        dense_keys: Keys the same queries attend to in dense attention.
    """

    path: str
    keys: float
    nodes: float
    dense_keys: float


class Counts:
    """Sums of a run; filled by ``counting``."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.sums: dict[str, Tensor] = {}  # keys, nodes, dense keys, queries
        self.sparse = False

    def add(self, path: str, target: Any, seen: Mapping[str, Tensor]) -> None:
        """Adds one forward of a site; ``seen`` is what ``TargetAttention.observer`` receives."""
        keys, nodes, valid = seen["keys"], seen["nodes"], seen["valid"]
        # No padding in what is measured: query t of a forward over the whole sequence is at position t.
        position = torch.arange(valid.shape[1], device=valid.device)
        visible = position + 1 if target.causal else torch.full_like(position, valid.shape[1])
        if target.causal and target.sliding_window:
            visible = visible.clamp(max=target.sliding_window)
        counted = valid & (position >= self.first)
        self.sparse = self.sparse or bool((keys[:, 0] < visible)[valid].any())
        row = torch.stack(
            [
                keys.double().mean(1)[counted].sum(),
                nodes.double().mean(1)[counted].sum(),
                visible.double().expand_as(valid)[counted].sum(),
                counted.sum().double(),
            ]
        ).cpu()
        self.sums[path] = self.sums.get(path, torch.zeros(4, dtype=torch.float64)) + row

    def sites(self) -> tuple[SiteAccount, ...]:
        """The accounts, in the model's order; empty where no query was counted."""
        return tuple(
            SiteAccount(path=path, keys=keys / count, nodes=nodes / count, dense_keys=visible / count)
            for path, (keys, nodes, visible, count) in ((p, s.tolist()) for p, s in self.sums.items())
            if count
        )


@contextmanager
def counting(model: nn.Module, first: int = 0) -> Iterator[Counts]:
    """Counts the work of all converted sites inside the block, for queries at positions from ``first`` on."""
    from retrofit.api import sites

    counts = Counts(first)
    targets = [(path, site.retrofit) for path, site in sites(model)]
    before = [target.observer for _, target in targets]
    try:
        for path, target in targets:
            target.observer = partial(counts.add, path, target)
        yield counts
    finally:
        for (_, target), observer in zip(targets, before, strict=True):
            target.observer = observer


def dense_until(target: Any) -> int:
    """The position before which a site's target is dense by its settings."""
    return target.geometry.dense_until if isinstance(target, HSAAttention) else 0
