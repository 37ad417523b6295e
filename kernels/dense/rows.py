"""Cuts dense attention into tiles of queries and the keys in their reach, without an [n, n] mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 512


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one row (or of all rows alike), by index.

    Attributes:
        queries: Slice of the T queries.
        keys: Slice of the N slots.
        ahead: Index slot of the first query minus that of the first key.
        causal: Whether keys after the query are hidden.
        window: Keys this far back and further are hidden; 0 means none.
    """

    queries: slice
    keys: slice
    ahead: int
    causal: bool
    window: int

    @property
    def _shape(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def triangular(self) -> bool:
        """Whether the mask is a plain lower triangle, which needs no tensor."""
        tokens, slots = self._shape
        return self.causal and self.ahead == 0 and tokens == slots > 1 and not self._windowed

    @property
    def _windowed(self) -> bool:
        tokens, _ = self._shape
        return bool(self.window) and self.ahead + tokens > self.window

    def full_mask(self, device: torch.device) -> Tensor | None:
        """Which keys each query sees, bool [tokens, slots]; None if all of them."""
        tokens, slots = self._shape
        causal = self.causal and self.ahead + 1 < slots
        if not causal and not self._windowed:
            return None
        key = torch.arange(slots, device=device)
        query = torch.arange(tokens, device=device)[:, None] + self.ahead
        seen = torch.ones(tokens, slots, dtype=torch.bool, device=device)
        if causal:
            seen &= key <= query
        if self._windowed:
            seen &= key > query - self.window
        return seen

    def mask(self, device: torch.device) -> Tensor | None:
        """As ``full_mask``, but None where ``triangular`` says it all."""
        return None if self.triangular else self.full_mask(device)


def row_tiles(
    tokens: int,
    slots: int,
    start: Tensor,
    length: Tensor,
    *,
    causal: bool,
    sliding_window: int,
    padded: bool,
    chunk: int | None = None,
) -> Iterator[tuple[slice, Tile]]:
    """Yields (rows, tile) that cover every real query once.

    ``chunk`` bounds the queries of a tile; None lets a plain triangle stay whole.
    """
    batch = start.shape[0]
    if not padded:
        spans = [(slice(0, batch), 0, slots)]
    else:
        starts, lengths = start.tolist(), length.tolist()
        spans = [(slice(b, b + 1), int(starts[b]), int(starts[b] + lengths[b])) for b in range(batch)]
    for rows, first_key, end in spans:
        first_query = max(first_key, slots - tokens)
        if first_query >= end:
            continue
        whole = chunk is None and not sliding_window and (not causal or first_query == first_key)
        step = end - first_query if whole else (chunk or CHUNK)
        for query in range(first_query, end, step):
            stop = min(end, query + step)
            key = max(first_key, query - sliding_window + 1) if sliding_window else first_key
            key_stop = stop if causal else end
            yield (
                rows,
                Tile(
                    queries=slice(query - (slots - tokens), stop - (slots - tokens)),
                    keys=slice(key, key_stop),
                    ahead=query - key,
                    causal=causal,
                    window=sliding_window,
                ),
            )
