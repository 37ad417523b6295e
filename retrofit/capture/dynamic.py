"""Which sizes of a call vary from one to the next, told from one example.

x [2, 45, 64], mask [2, 1, 45, 45]   →   rows and tokens vary, 64 channels do not
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor


def dynamic(example: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """Marks batch and length: the sizes of the first tensor's dimension 0 and of its length dimension.

    Further sequences, as those that cross-attention sees, have lengths of their own. A size of 2 away from the
    front is more likely a pair than a batch.
    """
    first = example[0]
    batch = first.shape[0]
    lengths = {first.shape[2] if first.dim() == 4 else first.shape[1] if first.dim() > 1 else 0}
    lengths |= {example[place].shape[1 - dim] for place, dim in batches(example)}
    lengths |= {tensor.shape[2] for tensor in example if tensor.dim() == first.dim() == 4} - {1}
    lengths |= {sum(pair) for pair in combinations(lengths, 2)}  # of sequences that attend as one
    # A sequence [B, N, C] of as many tokens as channels has no second length.
    square = first.shape if first.dim() == 3 and first.shape[1] == first.shape[2] else None
    heads = 3 if _are_ready_made(example) else 0  # whose widths are no lengths, whatever numbers they are
    auto = torch.export.Dim.AUTO
    return tuple(
        {
            dim: auto
            for dim, size in enumerate(tensor.shape[: 3 if place < heads else None])
            if size > 1
            and (
                (size == batch and (dim == 0 or size > 2))
                or (size in lengths and not (dim == 2 and tensor.shape == square))
                or (dim == 0 and tensor.dim() > 2 and size % batch == 0)  # (batch heads) …
                or _counts_blocks(tensor, dim, lengths)
            )
        }
        for place, tensor in enumerate(example)
    )


def _are_ready_made(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a call begins with queries, keys and values [B, H, N, D]."""
    return len(tensors) >= 3 and all(tensor.dim() == 4 for tensor in tensors[:3])


def _counts_blocks(tensor: Tensor, dim: int, lengths: set[int]) -> bool:
    """Whether a sequence in blocks, as of [B, H, blocks, 16, 48], has as many as ``tensor`` has in ``dim``."""
    count, blocks = tensor.shape[dim], tensor.shape[dim + 1 :]
    return tensor.dim() > 4 and any(
        (count - 1) * block < length <= count * block for block in blocks for length in lengths
    )


def batches(tensors: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    """Which tensors are sequences of another length than the first, and which of their dimensions is its batch."""
    first = tensors[0]
    found = []
    for place, tensor in enumerate(tensors):
        if tensor.is_floating_point() and tensor.dim() == first.dim() == 3:
            same = [dim for dim in (0, 1) if _hint(tensor.shape[dim]) == _hint(first.shape[dim])]
            if len(same) == 1:
                found.append((place, same[0]))
    return found


def keys_of_queries(tensors: tuple[Tensor, ...]) -> list[int]:
    """Which tensors [B, H, N, D] are as long as the first one, of a call that is handed ready-made q, k and v."""
    if not _are_ready_made(tensors):
        return []
    return [place for place in (1, 2) if _hint(tensors[place].shape[2]) == _hint(tensors[0].shape[2])]


def _hint(size: int | torch.SymInt) -> int | None:
    """The size in the example, whether or not it is a symbol now."""
    return size if isinstance(size, int) else size.node.hint
