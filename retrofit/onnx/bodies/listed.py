"""Attention to a list of leaves of which only the first ones are in use.

    the list [X, C]  ──slice──▶  its first ``used`` leaves  ──▶  their keys and values  ──▶  one softmax

How many are in use depends on data. PyTorch would have to trace with a size it does not know; in ONNX a slice may
end anywhere, so this is an operator of its own with a translation by hand. Its cost is that of what is in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18
from torch import Tensor

op: Any = opset18  # its operators take what its type hints do not allow

HIDDEN = -1e30
"""Bias of a key that is not seen."""


@torch.library.custom_op("retrofit_onnx::attend_listed", mutates_args=())
def attend_listed(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    exact: Tensor,
    exact_seen: Tensor,
    listed: Tensor,
    listed_bias: Tensor,
    used: Tensor,
    beyond: Tensor | None,
    more_keys: Tensor | None,
    more_values: Tensor | None,
    more_bias: Tensor | None,
    *,
    block: int,
) -> Tensor:
    """One softmax over the exact keys, the leaves in use and what else is given, [X, G·P, Dv].

    Args:
        queries: Times the scale, [X, G·P, D].
        keys: A table of keys, [M, D].
        values: A table of values, [M, Dv].
        exact: Rows of the tables, int64 [X, E].
        exact_seen: Whether each place sees them, bool [X, P, E].
        listed: First row of each leaf of the list, int64 [X, C]; the tables end no sooner than the leaves seen.
        listed_bias: What is added to the scores of its keys, very negative where a place does not see it, [X, P, C].
        used: Leaves of the list that someone sees, at most; int64, at least 1.
        beyond: Leaves are seen only in rows behind this one, int64 [X, P]; None for all of them.
        more_keys: Further keys, [X, M, D].
        more_values: Their values, [X, M, Dv].
        more_bias: Added to their scores, [X, G·P, M].
        block: Tokens in a leaf.
    """
    places, count = exact_seen.shape[1], int(used)
    leaves = listed[:, :count, None] + torch.arange(block, device=listed.device)
    listed_bias = listed_bias[:, :, :count, None].expand(-1, -1, -1, block).flatten(2)
    rows = leaves.flatten(1)
    if beyond is not None:
        listed_bias = torch.where(rows[:, None] > beyond[..., None], listed_bias, HIDDEN)
    rows = torch.cat([exact, rows.clamp(max=keys.shape[0] - 1)], 1)
    bias = torch.cat([torch.where(exact_seen, 0.0, HIDDEN).to(queries.dtype), listed_bias], 2)
    found, contents = keys[rows].to(queries.dtype), values[rows].to(queries.dtype)
    scores = (queries @ found.transpose(1, 2)).unflatten(1, (-1, places)) + bias[:, None]
    scores = scores.flatten(1, 2)
    if more_keys is not None and more_values is not None and more_bias is not None:
        scores = torch.cat([scores, queries @ more_keys.transpose(1, 2) + more_bias], 2)
        contents = torch.cat([contents, more_values], 1)
    return scores.softmax(-1) @ contents


@attend_listed.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Tensor:
    return queries.new_empty(*queries.shape[:2], values.shape[1])


def _translation(
    queries: Any,
    keys: Any,
    values: Any,
    exact: Any,
    exact_seen: Any,
    listed: Any,
    listed_bias: Any,
    used: Any,
    beyond: Any = None,
    more_keys: Any = None,
    more_values: Any = None,
    more_bias: Any = None,
    block: int = 1,
) -> Any:
    """``attend_listed`` in nodes of ONNX."""
    end = op.Reshape(used, op.Constant(value_ints=[1]))
    zero, one, two = (op.Constant(value_ints=[number]) for number in range(3))
    within = op.Range(op.Constant(value_int=0), op.Constant(value_int=block), op.Constant(value_int=1))
    by_row = op.Constant(value_ints=[0, -1])
    by_place = op.Constant(value_ints=[0, 0, -1])
    leaves = op.Add(op.Unsqueeze(op.Slice(listed, zero, end, one), two), within)
    rows = op.Reshape(leaves, by_row)
    nothing, hidden = (op.CastLike(op.Constant(value_float=number), queries) for number in (0.0, HIDDEN))
    behind = op.Unsqueeze(op.Slice(listed_bias, zero, end, two), op.Constant(value_ints=[3]))
    behind = op.Reshape(op.Expand(behind, op.Constant(value_ints=[1, 1, 1, block])), by_place)
    if beyond is not None:
        behind = op.Where(op.Greater(op.Unsqueeze(rows, one), op.Unsqueeze(beyond, two)), behind, hidden)
    last = op.Sub(op.Shape(keys, start=0, end=1), one)
    rows = op.Concat(exact, op.Min(rows, last), axis=1)
    bias = op.Unsqueeze(op.Concat(op.Where(exact_seen, nothing, hidden), behind, axis=2), one)
    found = op.Transpose(op.CastLike(op.Gather(keys, rows, axis=0), queries), perm=[0, 2, 1])
    contents = op.CastLike(op.Gather(values, rows, axis=0), queries)
    scores = op.MatMul(queries, found)
    places = op.Shape(exact_seen, start=1, end=2)
    split = op.Concat(zero, op.Constant(value_ints=[-1]), places, op.Shape(bias, start=3, end=4), axis=0)
    scores = op.Reshape(op.Add(op.Reshape(scores, split), bias), op.Shape(scores))
    if more_keys is not None:
        extra = op.Add(op.MatMul(queries, op.Transpose(more_keys, perm=[0, 2, 1])), more_bias)
        scores = op.Concat(scores, extra, axis=2)
        contents = op.Concat(contents, more_values, axis=1)
    return op.MatMul(op.Softmax(scores, axis=-1), contents)


def _floor_divide(self: Any, other: Any) -> Any:
    """Floor division in three nodes; the exporter's own takes eight for integers."""
    if self.dtype.is_floating_point():
        return op.Floor(op.Div(self, other))
    return op.Div(op.Sub(self, op.Mod(self, other)), other)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.retrofit_onnx.attend_listed.default: _translation,
    torch.ops.aten.floor_divide.default: _floor_divide,
}
"""For ``custom_translation_table``."""
