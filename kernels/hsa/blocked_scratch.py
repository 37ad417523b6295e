"""Memory that the steps of a call use again: fresh pages cost more than what is computed in them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Scratch:
    """Buffers by name, for work on a few lists of leaves at a time."""

    LISTS = 4
    """Lists at a time, at least: more leave the cache, fewer leave cores idle."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def few(self, lists: int) -> Iterator[slice]:
        """Yields the lists 0 … lists a few at a time, one or more for each thread."""
        step = max(self.LISTS, torch.get_num_threads())
        for begin in range(0, lists, step):
            yield slice(begin, min(begin + step, lists))

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Returns a tensor in the buffer ``name``: what it held before is lost, and it is, with the next call."""
        size, kept = math.prod(shape), self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype:
            room = 1 << (size - 1).bit_length()  # growing often would touch fresh pages each time
            kept = self._kept[name] = torch.empty(room, dtype=like.dtype, device=like.device)
        return kept[:size].view(shape)
