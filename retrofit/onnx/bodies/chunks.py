"""A loop over chunks that becomes a Scan node.

[step(x[i], …, held) for i in range(chunks)]  →  one graph of the step, run once per chunk
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.scan import scan_op


def scan_chunks(
    step: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], held: Mapping[str, Tensor]
) -> list[Tensor]:
    """Applies ``step`` along the first axis of ``inputs``.

    The operator is called directly, not through ``torch``'s wrapper, which would compile the step by Dynamo:
    plain tracing takes any Python and is quicker.

    Args:
        step: Takes the members of ``inputs`` without their first axis, then ``held``. Every tensor and every
            size that it uses must come from its arguments. No result may be one of them.
        inputs: Tensors [chunks, …].
        held: Tensors that each step reads whole, by name.

    Returns:
        Each result of the step, stacked: [chunks, …].
    """

    def combine(carry: Tensor, *arguments: Tensor) -> list[Tensor]:
        # The operator wants something to carry.
        members, whole = arguments[: len(inputs)], arguments[len(inputs) :]
        return [carry + 1, *step(*members, dict(zip(held, whole, strict=True)))]

    _, *outputs = scan_op(combine, [torch.zeros((), dtype=torch.int64)], list(inputs), tuple(held.values()))
    return list(outputs)


def run_if(
    needed: Tensor,
    run: Callable[[dict[str, Tensor]], Sequence[Tensor]],
    otherwise: Sequence[Tensor],
    held: Mapping[str, Tensor],
) -> list[Tensor]:
    """``run(held)`` if ``needed``, a boolean of no dimensions, and else ``otherwise``, of the same shapes and types.

    Every tensor that ``run`` uses must come from ``held``, and no result may be one of them.
    """

    def yes(*arguments: Tensor) -> list[Tensor]:
        return list(run(dict(zip(held, arguments, strict=False))))

    def no(*arguments: Tensor) -> list[Tensor]:
        return [value.clone() for value in arguments[len(held) :]]

    return list(cond_op(needed, yes, no, (*held.values(), *otherwise)))


def split(x: Tensor, size: int | torch.SymInt) -> Tensor:
    """[B, H, T, D] → [chunks, B, H, size, D], the last chunk filled up with zeros."""
    chunks = (x.shape[2] + size - 1) // size
    missing: Any = chunks * size - x.shape[2]
    padded: Tensor = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return padded.unflatten(2, (chunks, size)).permute(2, 0, 1, 3, 4).contiguous()


def join(chunks: Tensor, tokens: int | torch.SymInt) -> Tensor:
    """[chunks, B, H, size, D] → [B, H, tokens, D]."""
    return chunks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :tokens]
