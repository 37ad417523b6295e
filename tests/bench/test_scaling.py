"""The exponent with which a time grows is the slope of a line through logarithms."""

from __future__ import annotations

import pytest

from retrofit.bench.scaling import exponent
from retrofit.errors import BenchmarkError


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1024: 3.0, 4096: 48.0}, 2.0),
        ({1000: 1.0, 2000: 2.0, 4000: 4.0, 8000: 8.0}, 1.0),
        ({1024: 1.0, 2048: 4.0, 4096: 4.0}, 1.0),  # neither point lies on the line
    ],
    ids=["square", "linear", "least squares"],
)
def test_the_slope_is_found(times: dict[int, float], expected: float) -> None:
    assert exponent(times) == pytest.approx(expected)


def test_one_length_has_no_slope() -> None:
    with pytest.raises(BenchmarkError, match="at least two lengths"):
        exponent({1024: 1.0})
