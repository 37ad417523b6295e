"""Memory that the steps of one thread use again: fresh pages cost more than what is computed in them."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Buffers by name, for each thread its own."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Returns a tensor in the buffer ``name``: what it held before is lost, and it is, with the next call."""
        size, kept = math.prod(shape), self._kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype:
            room = 1 << (size - 1).bit_length()  # growing often would touch fresh pages each time
            kept = self._kept[name] = torch.empty(room, dtype=like.dtype, device=like.device)
        return kept[:size].view(shape)
