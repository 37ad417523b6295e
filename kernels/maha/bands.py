"""Where the scales begin and end.

t = 99, widths (32, 16), ratio 2, sink 8  →  scale 0: [0, 8) and [68, 100), scale 1: [52, 68), scale 2: [8, 52)

e_{−1} = t+1 and e_l(t) = r^(l+1)·⌊max(0, t+1−w_0−…−w_l)/r^(l+1)⌋; scale l covers [max(e_l, sink), e_{l−1}) in
cells of r^l tokens, and the last one [sink, e_{L−2}) unless it has a width of its own. All edges are multiples
of the cells on both sides, and the sinks are a multiple of the largest cell, so no cell straddles an edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar, cast

from torch import Tensor

Position = TypeVar("Position", bound="int | Tensor")


@dataclass(frozen=True)
class Bands:
    """The geometry of a configuration.

    Attributes:
        widths: Tokens of every scale but the last.
        last_width: Tokens of the last scale; None reaches the sinks.
        sink: Tokens at the start of the row that belong to scale 0.
        ratio: Ratio r of the cells of neighbouring scales.
    """

    widths: tuple[int, ...]
    last_width: int | None
    sink: int
    ratio: int

    @property
    def scales(self) -> int:
        """Number of scales L."""
        return len(self.widths) + 1

    @property
    def reaches(self) -> list[int]:
        """Tokens back to the end of each scale that has a width: w_0 + … + w_l."""
        own = [] if self.last_width is None else [self.last_width]
        return list(accumulate([*self.widths, *own]))

    def cell(self, scale: int) -> int:
        """Tokens of a cell."""
        size: int = self.ratio**scale
        return size

    def edge(self, scale: int, position: Position) -> Position:
        """Returns e_scale for queries at ``position``; e_{−1} is the query's own end."""
        if scale < 0:
            return cast(Position, position + 1)
        if scale >= len(self.reaches):
            return cast(Position, position * 0)
        cell = self.ratio ** (scale + 1)
        past = cast(Position, position + 1 - self.reaches[scale])
        return cast(Position, at_least(past, 0) // cell * cell)

    def count(self, scale: int, position: Tensor) -> Tensor:
        """Returns how many keys or cells of ``scale`` queries at ``position`` ≥ 0 attend to."""
        low = self.edge(scale, position).clamp(min=self.sink)
        cells = (self.edge(scale - 1, position) - low).clamp(min=0) // self.cell(scale)
        return cells + (position + 1).clamp(max=self.sink) if scale == 0 else cells


def at_least(value: Position, least: int) -> Position:
    """Returns the larger of the two."""
    larger = value.clamp(min=least) if isinstance(value, Tensor) else max(value, least)
    return cast(Position, larger)
