"""Views are followed whatever their sizes are made of."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from retrofit.passes.attention.axes import Mixed, fresh, leaves, reshaped

N = sympy.Symbol("n", integer=True, positive=True)
WINDOWS = FloorDiv(N + Mod(4 - Mod(N, 4), 4), 4)


def numbers(*sizes):
    return [sympy.expand(size) for size in sizes]


@pytest.mark.parametrize("length", [N, 2 * N + 1, WINDOWS], ids=str)
def test_a_dimension_is_split_and_put_together(length):
    (merged, width) = fresh(numbers(6 * length, 8))
    split = reshaped([merged, width], numbers(2, length, 3, 8))
    assert [tuple(atom.size for atom in axis) for axis in split] == [(2,), (length,), (3,), (8,)]
    (rows, last) = reshaped(split, numbers(2 * length, 24))
    assert leaves(rows) == (*split[0], *split[1])
    assert leaves(last) == (*split[2], *split[3])


@pytest.mark.parametrize("length", [N, WINDOWS], ids=str)
def test_half_of_an_unknown_number_is_no_dimension(length):
    with pytest.raises(Mixed, match="a view to"):
        reshaped(fresh(numbers(length, 8)), numbers(2, length / 2, 8))


def test_a_dimension_is_split_by_the_size_of_another_input():
    windows = sympy.Symbol("w", integer=True, positive=True)
    images = FloorDiv(N, windows)
    each = FloorDiv(N, images)
    (rows, heads, keys) = fresh(numbers(N, 4, 49))
    split = reshaped([rows, heads, keys], numbers(images, each, 4, 49))
    assert [tuple(atom.size for atom in axis) for axis in split] == [(images,), (each,), (4,), (49,)]
    assert leaves(rows) == (*split[0], *split[1])
    assert split[2:] == [heads, keys]
    (again, _, _) = reshaped(split, numbers(images * each, 4, 49))
    assert leaves(again) == leaves(rows)


def test_two_dimensions_are_not_split_by_the_size_of_another_input():
    images = FloorDiv(N, sympy.Symbol("w", integer=True, positive=True))
    with pytest.raises(Mixed, match="a view to"):
        reshaped(fresh(numbers(N, 6)), numbers(images, FloorDiv(6 * N, images)))
