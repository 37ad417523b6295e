"""Counts the operations of attention as it runs, whatever rule later recognises it or not.

bmm(q, k) [B·H, T, N] → softmax → bmm(weights, v)   →   2·B·H·T·N·(D + Dv)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten
_PRODUCTS = (aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default)
_MORE_LOGITS = 1.5  # a softmax may take some learned logits besides the scores


def _makes_weights(name: str) -> bool:
    return "softmax" in name or name.startswith(("exp.", "exp_.", "sigmoid"))


class Counted(Protocol):
    """What operations are credited to."""

    flops: int


@dataclass(frozen=True, eq=False)
class _Softmax:
    owner: Counted
    sizes: tuple[int, int]  # of what went in, and of the scores in it
    flops: int  # of the product that made the scores


class AttentionFlops:
    """Watches kernels one after the other; a softmax between two products is attention."""

    def __init__(self) -> None:
        self._products: deque[tuple[int, int]] = deque(maxlen=16)  # size of the result, terms of each sum
        self._open: deque[_Softmax] = deque(maxlen=4)

    def saw(self, func: Any, args: Any, result: Any, owner: Counted | None) -> None:
        """Takes note of a kernel that ran.

        Args:
            func: The kernel.
            args: What it took.
            result: What it gave.
            owner: Whose attention it belongs to, if it is a softmax, exponentials or a fused attention.
        """
        if func in _PRODUCTS:
            self._product(args[-2], args[-1], result)
        elif owner is not None and isinstance(result, Tensor) and _makes_weights(func.__name__):
            self._softmax(result.numel(), owner)
        elif owner is not None and len(args) >= 3 and all(isinstance(value, Tensor) for value in args[:3]):
            q, k, v = args[:3]
            owner.flops += 2 * (q.numel() // q.shape[-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> None:
        terms = left.shape[-1]
        for softmax in reversed(self._open):
            if left.numel() in softmax.sizes or right.numel() in softmax.sizes:
                softmax.owner.flops += softmax.flops + 2 * result.numel() * terms
                self._open.remove(softmax)
                break
        self._products.append((result.numel(), terms))

    def _softmax(self, size: int, owner: Counted) -> None:
        fitting = [product for product in self._products if product[0] == size]
        fitting = fitting or [(n, terms) for n, terms in self._products if n < size <= _MORE_LOGITS * n]
        if fitting:
            scores, terms = fitting[-1]
            self._open.append(_Softmax(owner, (size, scores), 2 * scores * terms))
