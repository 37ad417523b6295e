from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from retrofit.kernels.threads import spread

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_piece_is_worked_on_without_gradients(threads: int) -> None:
    x = torch.ones(7, requires_grad=True)
    out, recorded = torch.zeros(7), []

    def work(piece: int) -> None:
        doubled = x[piece] * 2
        recorded.append(doubled.requires_grad)
        out[piece] = doubled.detach()

    with torch.no_grad():
        spread(work, range(7), CPU)
    assert torch.equal(out, torch.full((7,), 2.0))
    assert not any(recorded)
    assert torch.get_num_threads() == threads


def test_an_error_comes_out_and_the_threads_are_as_before(threads: int) -> None:
    def work(piece: int) -> None:
        if piece == 3:
            raise ValueError("piece 3")

    with pytest.raises(ValueError, match="piece 3"):
        spread(work, range(5), CPU)
    assert torch.get_num_threads() == threads
