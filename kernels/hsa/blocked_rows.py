"""Rows of a key, value or node tensor, many tokens to a row, fetched by number.

    x [B, Hkv, n, D]  →  table [M, group·D], and (batch row, kv head, i) → table[base + i·step]

A leaf or a span of nodes is one contiguous row, so that gathering it is one block copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """A table of rows.

    Attributes:
        table: [M, group·D].
        base: Row of the table at which a batch row and kv head begin, int64 [B, Hkv].
        step: Rows of the table from one row to the next.
        group: Tokens (or nodes) in a row.
        last: Last row of each batch row, int64 [B]; what lies behind it is nobody's to see and fetches it.
    """

    table: Tensor
    base: Tensor
    step: int
    group: int
    last: Tensor

    def flat(self, index: Tensor) -> Tensor:
        """Rows of the table of ``index`` [B, Hkv, …], flattened."""
        extra = [1] * (index.dim() - 2)
        index = index.clamp(min=0).minimum(self.last.reshape(-1, 1, *extra))
        return (self.base.reshape(*self.base.shape, *extra) + index * self.step).flatten()

    def numbers(self, index: Tensor, tokens: int) -> Tensor:
        """Numbers of the rows with the ``tokens`` tokens in each of ``index`` [..., S]: [..., S], or all of them."""
        if self.group != 1 or tokens == 1:
            return index
        return (index[..., None] * tokens + torch.arange(tokens, device=index.device)).flatten(-2)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table for ``index`` [B, Hkv, R, S], flat, and what is in them, [B·Hkv·R, S·group, D]."""
        flat = self.flat(index)
        found = self.table.index_select(0, flat)
        return flat, found.reshape(-1, index.shape[-1] * self.group, self.table.shape[1] // self.group)


def padded_rows(x: Tensor, group: int) -> Rows:
    """Rows of ``group`` of x [B, Hkv, n, D] by a copy that ends with a whole row; exportable."""
    batch, heads, count, width = x.shape
    rows = count // group + 1
    table = F.pad(x, (0, 0, 0, group))[:, :, : rows * group].reshape(-1, group * width)
    base = torch.arange(batch * heads, device=x.device).reshape(batch, heads) * rows
    return Rows(table, base, 1, group, _last(x, rows - 1))


def complete_rows(x: Tensor, group: int) -> Rows:
    """The complete rows of ``group`` of x [B, Hkv, n, D], without a copy where heads lie whole tokens apart."""
    count, width = x.shape[2:]
    if count < group:  # nothing to fetch: a row for the unused places
        base = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        return Rows(x.new_zeros(1, group * width), base, 0, group, _last(x, 0))
    x, base, extent = _by_token(x)
    table = x.as_strided((extent - group + 1, group * width), (width, 1))
    return Rows(table, base, group, group, _last(x, count // group - 1))


def aligned_rows(x: Tensor, start: Tensor, length: Tensor, group: int, tokens: int) -> Rows:
    """Rows by position of x [B, Hkv, N, D], by a copy; zeros behind the row's end; exportable.

    Args:
        x: The tensor in index space.
        start: Index of each row's first real token, int64 [B].
        length: Number of real tokens of each row, int64 [B].
        group: Tokens to a row.
        tokens: Positions to provide at least.
    """
    batch, heads, slots, width = x.shape
    rows = (tokens + group - 1) // group + 1
    position = torch.arange(rows * group, device=x.device)
    index = (start[:, None] + position).clamp(max=slots - 1)
    found = x.gather(2, index[:, None, :, None].expand(-1, heads, -1, width))
    found = found.masked_fill((position >= length[:, None])[:, None, :, None], 0)
    base = torch.arange(batch * heads, device=x.device).reshape(batch, heads) * rows
    return Rows(found.reshape(-1, group * width), base, 1, group, _last(x, rows - 1))


def token_rows(x: Tensor, start: Tensor, length: Tensor) -> Rows:
    """Single tokens of x [B, Hkv, N, D] by position, without a copy where heads lie whole tokens apart."""
    slots, width = x.shape[2:]
    x, base, extent = _by_token(x)
    table = x.as_strided((extent, width), (width, 1))
    return Rows(table, base + start.clamp(max=slots - 1)[:, None], 1, 1, (length - 1).clamp(min=0))


def _by_token(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """x [B, Hkv, n, D] or a copy, the token at which each head begins [B, Hkv], and how many there are in all."""
    batch, heads, count, width = x.shape
    steps = x.stride()
    if steps[3] != 1 or steps[2] != width or steps[1] % width or steps[0] % width:
        x = x.contiguous()
        steps = x.stride()
    by_row, by_head = steps[0] // width, steps[1] // width
    row = torch.arange(batch, device=x.device)[:, None] * by_row
    base = row + torch.arange(heads, device=x.device) * by_head
    return x, base, (batch - 1) * by_row + (heads - 1) * by_head + count


def _last(x: Tensor, row: int) -> Tensor:
    return torch.full((x.shape[0],), row, device=x.device)
