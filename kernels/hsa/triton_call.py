"""What the Triton kernels of a call have in common: shapes, constants, and the list of leaves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from retrofit.kernels.hsa.geometry import FADE, Geometry, Votes
from retrofit.kernels.hsa.triton_choose import MOST_KEYS, list_blocks
from retrofit.kernels.hsa.triton_select import ENDING, PADDED, WHOLE
from retrofit.kernels.tuned import Settings, Tile, Tiles, processors, settings

CALLS = 256
"""Calls of different sizes that are remembered."""


def power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def padded(dim: int) -> int:
    """Dims of a tile."""
    return max(16, power(dim))


@dataclass(frozen=True, eq=False)
class Call:
    """The sizes of one call. Calls of the same sizes are one object, so that what follows from them is found once."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    slots: int
    dim: int
    value_dim: int
    bytes: int
    layout: int
    geometry: Geometry
    total_blocks: int
    sliding_window: int
    settings: Settings

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        geometry: Geometry,
        *,
        sliding_window: int,
        padded: bool = True,
        ending: bool = False,
        total_blocks: int | None = None,
    ) -> Call:
        """Reads the sizes of the inputs.

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            geometry: The sizes of the site.
            sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
            padded: As ``triton_select`` says of layouts.
            ending: As ``triton_select`` says of layouts.
            total_blocks: Query blocks that the selection has room for; None for those of the slots.
        """
        batch, heads, tokens, dim = q.shape
        slots, value_dim = k.shape[2], v.shape[3]
        layout = (ENDING if ending else PADDED if padded else WHOLE).value
        room = geometry.blocks(slots) if total_blocks is None else total_blocks
        return _call(
            batch, heads, k.shape[1], tokens, slots, dim, value_dim, q.element_size(), layout, geometry, room,
            sliding_window, settings(q.device),
        )  # fmt: skip

    @cached_property
    def group(self) -> int:
        """Query heads to a kv head."""
        return self.heads // self.kv_heads

    @cached_property
    def rows(self) -> int:
        """Batch rows times kv heads."""
        return self.batch * self.kv_heads

    @cached_property
    def blocks(self) -> int:
        """Query blocks that the new queries of a row can reach into."""
        size = self.geometry.query_block
        if self.layout == WHOLE.value:
            return -(-self.slots // size) - (self.slots - self.tokens) // size
        return self.reached(size)

    def reached(self, size: int) -> int:
        """Groups of so many neighbouring queries that the new ones of a row can reach into, wherever it begins."""
        return (self.tokens + 2 * size - 2) // size

    def first_block(self, level: int) -> int:
        """The first of the blocks whose coarse steps may begin at ``level`` or above, as far as the host knows that;
        the last block at most."""
        if level == 1 or self.layout != WHOLE.value:
            return 0
        g = self.geometry
        covered = (g.beam * g.fanout + 1) * g.span_size(level - 1)
        number = (g.sink + covered + g.window - 1) // g.query_block
        return max(0, min(number - (self.slots - self.tokens) // g.query_block, self.blocks - 1))

    @cached_property
    def tiles(self) -> tuple[int, int]:
        """Grid of the kernels that attend."""
        return self.grid(self.tile(self.settings.attend).rows, self.blocks)

    def programs(self, device: torch.device) -> int:
        """Programs of a kernel whose programs take one tile after another, at most."""
        return self.settings.programs * processors(device)

    def grid(self, rows: int, blocks: int) -> tuple[int, int]:
        """Grid of a kernel with tiles of so many rows, for so many query blocks."""
        heads = self.heads_per_tile(rows)
        return blocks * self.tiles_per_block(rows), -(-self.group // heads) * self.rows

    @cached_property
    def attend_by_roles(self) -> Tile | None:
        """The tile of the kernel of this name; None if this GPU does not have it, or it cannot do these sizes."""
        return self._attending_by_roles(self.settings.attend_by_roles)

    @cached_property
    def query_gradients_by_roles(self) -> Tile | None:
        """As ``attend_by_roles``."""
        return self._attending_by_roles(self.settings.query_gradients_by_roles)

    @cached_property
    def key_gradients_by_roles(self) -> Tile | None:
        """As ``attend_by_roles``."""
        if self.votes.parts != FADE:
            return None
        g = self.geometry
        tile = self._by_roles(self.settings.key_gradients_by_roles, 64, self.queries_of_entry)
        if tile is None or self.dim != self.value_dim:
            return None
        return tile if tile.keys <= min(4, g.fanout) * g.block else None  # an entry has bits for 4 leaves

    @cached_property
    def vote_by_roles(self) -> Tile | None:
        """As ``attend_by_roles``."""
        tile, g = self._by_roles(self.settings.vote_by_roles), self.geometry
        if tile is None or self.group > self.heads_per_tile(tile.rows):
            return None
        if tile.keys % (g.fanout * g.nodes_in_span(0)) or g.nodes_in_span(0) < 2:
            return None
        if g.fanout % 8 or g.query_block % g.block:
            return None
        # Those that decode add up in steps of so many keys.
        return tile if tile.keys == self.settings.vote[self.bytes, padded(self.dim)].keys else None

    def _attending_by_roles(self, tiles: Tiles | None) -> Tile | None:
        tile = self._by_roles(tiles)
        if tile is None or self.dim != self.value_dim:
            return None
        # Tiles that are done again by ``attend_run`` are its own.
        alike = self.heads_per_tile(tile.rows) == self.heads_per_tile(self.tile(self.settings.attend).rows)
        return tile if alike else None

    def _by_roles(self, tiles: Tiles | None, rows: int = 128, queries: int | None = None) -> Tile | None:
        """The tile for these heads, of so many rows, if it fits; for so many queries of a block, all by default."""
        tile = (tiles or {}).get((self.bytes, self.dim))
        if tile is None or self.dim not in (64, 128) or self.layout != WHOLE.value or self.sliding_window:
            return None
        if (
            (tile.rows, tile.warps) != (rows, 4)
            or tile.keys % self.geometry.block
            or self.geometry.block < 16
        ):
            return None
        queries = queries or self.geometry.query_block
        return tile if self.heads_per_tile(tile.rows, queries) * queries == tile.rows else None

    @cached_property
    def votes(self) -> Votes:
        """How finely votes are counted."""
        return Votes.of(torch.float32 if self.bytes == 4 else torch.bfloat16)

    @property
    def is_whole(self) -> bool:
        """Whether rows have all slots, and all are new."""
        return self.layout == WHOLE.value and self.tokens == self.slots

    @property
    def is_dense(self) -> bool:
        """Whether no row can have a query behind the dense start."""
        return self.slots <= self.geometry.dense_end

    @property
    def extent(self) -> tuple[int, int, int]:
        """What every kernel is told of the lengths."""
        return self.slots, self.tokens, self.blocks

    @cached_property
    def shared(self) -> dict[str, Any]:
        """Constants of every kernel."""
        g = self.geometry
        return {
            "KV_HEADS": self.kv_heads,
            "WINDOW": g.window,
            "SINK": g.sink,
            "BLOCK": g.block,
            "QUERY_BLOCK": g.query_block,
            "DENSE_END": g.dense_end,
            "LAYOUT": self.layout,
        }

    @cached_property
    def reach(self) -> dict[str, int]:
        """Constants of the kernels that ask what lies within a sliding window."""
        return {"REACH": self.sliding_window}

    @cached_property
    def listing(self) -> dict[str, Any]:
        """Constants of the kernels that list leaves."""
        return {**self.shared, **self.leaves, "LIST": self.list_width}

    @cached_property
    def leaves(self) -> dict[str, Any]:
        """Constants of the kernels that meet leaf candidates."""
        return {**self.candidates, "CHOICES": self.choices}

    @cached_property
    def choices(self) -> int:
        """Choices of a query block, at most."""
        return self.geometry.choices(self.votes)

    @cached_property
    def candidates(self) -> dict[str, Any]:
        """Constants of the kernels that vote for them."""
        g = self.geometry
        return {
            "FANOUT": g.fanout,
            "BEAM": g.beam,
            "WIDTH": g.leaf_width,
            "WIDTH_PAD": power(g.leaf_width),
        }

    @cached_property
    def product(self) -> dict[str, Any]:
        """Constants of products with queries."""
        precision = "ieee" if self.bytes == 4 else "tf32"
        return {"DIM": self.dim, "DIM_PAD": padded(self.dim), "PRECISION": precision}

    @cached_property
    def values(self) -> dict[str, Any]:
        """Constants of products with values."""
        return {"VALUE_DIM": self.value_dim, "VALUE_PAD": padded(self.value_dim)}

    def tile(self, tiles: Tiles) -> Tile:
        """The tile of a kernel that reads keys and values."""
        return tiles[self.bytes, padded(max(self.dim, self.value_dim))]

    def options(self, tile: Tile, queries: int | None = None) -> dict[str, int]:
        """What the compiler is told of a kernel whose tiles are of so many queries, as many of a block as fit by
        default."""
        queries = queries or self.queries_per_tile(tile.rows)
        return tile.options(self.heads_per_tile(tile.rows, queries) * queries)

    def heads_per_tile(self, rows: int, queries: int | None = None) -> int:
        """Heads of a group in a tile of so many rows; of so many queries, as many of a block as fit by default."""
        return max(1, min(power(self.group), rows // (queries or self.queries_per_tile(rows))))

    def queries_per_tile(self, rows: int) -> int:
        """Queries of a block in a tile of so many rows."""
        return min(self.geometry.query_block, rows)

    def tiles_per_block(self, rows: int) -> int:
        """Tiles of so many rows that the queries of a block take."""
        return self.geometry.query_block // self.queries_per_tile(rows)

    @cached_property
    def queries_of_entry(self) -> int:
        """Queries of an entry of the backward pass, as ``triton_inverse`` says."""
        return self.queries_per_tile(self.tile(self.settings.key_gradients).rows)

    @cached_property
    def entries_per_block(self) -> int:
        """Entries of a query block in a tile of keys, at most, where leaves are chosen whole."""
        return self.geometry.query_block // self.queries_of_entry

    @cached_property
    def by_entries(self) -> dict[str, Any]:
        """``shared`` for the kernels whose blocks are of as many queries as entries."""
        return {**self.shared, "QUERY_BLOCK": self.queries_of_entry}

    @cached_property
    def list_width(self) -> int:
        """Places of the list of a block: sinks, window, all choices, and room to read on."""
        g = self.geometry
        room = MOST_KEYS.value // g.block
        return power(self.choices + room) + (g.sink + g.window) // g.block + 1

    def empty_selection(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """``spans`` and ``choices`` as in ``Geometry.selection``, to be filled."""
        shape, g = (self.batch, self.kv_heads, self.total_blocks), self.geometry
        spans, choices = (k.new_empty(*shape, size, dtype=torch.int32) for size in (g.beam, self.choices))
        return spans, choices

    def empty_votes(self, blocks: int, device: torch.device) -> Tensor:
        """Votes of so many query blocks, as ``triton_vote`` says."""
        g = self.geometry
        shape = (blocks, g.query_block, power(g.leaf_width) + g.fanout)
        return torch.empty(shape, dtype=self.votes.dtype, device=device)

    def empty_lists(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """What each query block executes by who sees it first, and how much more of it these see then,
        [B·Hkv, blocks, list_width]; how many of the list each query sees, [B·Hkv, blocks, query_block]."""
        shape = (self.rows, self.blocks)
        ordered = torch.empty(*shape, self.list_width, dtype=torch.int32, device=device)
        counts = torch.empty(*shape, self.geometry.query_block, dtype=torch.int32, device=device)
        return ordered, torch.empty_like(ordered, dtype=torch.float32), counts

    def list_blocks(
        self, start: Tensor, length: Tensor, spans: Tensor, choices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The lists, filled."""
        lists = self.empty_lists(choices.device)
        list_blocks[(self.blocks, self.rows)](
            start, length, spans, choices, *lists, *self.extent, self.total_blocks, **self.listing, num_warps=1
        )  # fmt: skip
        return lists


_call = lru_cache(CALLS)(Call)
