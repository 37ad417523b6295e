"""The script that measures launch settings, without a GPU: times are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from retrofit.kernels import tuned
from retrofit.kernels.tuned import Pooling, Settings, Tile, tiles

CPU = torch.device("cpu")
KIND = (2, 128)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import tune_kernels

    return tune_kernels


@pytest.fixture
def search(script: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Settings, dict[Any, float]]]:
    """Searches for tiles of ``vote`` that are fastest at 4 warps, 3 stages and 128 keys."""

    def milliseconds(run: Any, kernels: Sequence[str]) -> float:
        tile = tuned.settings(CPU).vote[KIND]
        return (
            1.0 + abs(tile.warps - 4) + abs(tile.stages - 3) + 128 / tile.keys + (tile.registers is not None)
        )

    monkeypatch.setattr(script, "milliseconds", milliseconds)

    def run(operation: Callable[[], Sequence[Tensor]]) -> tuple[Settings, dict[Any, float]]:
        row = tuned.ROWS[9, 0]
        return script.search(row, "vote", KIND, operation, ("vote",), 1e-4, CPU)

    return run


def test_the_fastest_neighbours_are_followed_and_nothing_else_changes(search: Any) -> None:
    before = tuned.ROWS[9, 0]
    row, tried = search(lambda: [torch.ones(3)])
    assert row.vote[KIND] == Tile(128, 128, 4, 3, None, few=(4, 2))
    assert min(tried, key=tried.__getitem__) == row.vote[KIND]
    assert {kind: tile for kind, tile in row.vote.items() if kind != KIND} == {
        kind: tile for kind, tile in before.vote.items() if kind != KIND
    }
    assert row.attend is before.attend
    assert tuned.settings(CPU) is before


def test_what_does_not_fit_is_passed_over(search: Any) -> None:
    def run() -> Sequence[Tensor]:
        if tuned.settings(CPU).vote[KIND].keys > 64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return [torch.ones(3)]

    row, tried = search(run)
    assert row.vote[KIND].keys == 64
    assert torch.inf in tried.values()


def test_other_results_end_the_search(search: Any) -> None:
    with pytest.raises(SystemExit, match=r"results differ by 1\.00e-03"):
        search(lambda: [torch.ones(3) + 1e-3 * (tuned.settings(CPU).vote[KIND].warps == 4)])


@pytest.mark.parametrize("name", ["programs", "pooling"])
def test_settings_without_tiles_are_searched_too(
    script: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def milliseconds(run: Any, kernels: Sequence[str]) -> float:
        row = tuned.settings(CPU)
        return abs(row.programs - 4) + abs(row.pooling.cells - 64) + 1.0

    monkeypatch.setattr(script, "milliseconds", milliseconds)
    row, _ = script.search(tuned.ROWS[9, 0], name, KIND, lambda: [torch.ones(3)], ("vote",), 1e-4, CPU)
    assert (row.programs, row.pooling.cells) == ((4, 32) if name == "programs" else (2, 64))


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
def test_what_is_printed_is_the_row(script: Any, capability: tuple[int, int]) -> None:
    row = replace(tuned.ROWS[capability], measured="a GPU")
    names = {"Settings": Settings, "Tile": Tile, "Pooling": Pooling, "tiles": tiles}
    exec(script.printed("SM", row), names)
    found = names["SM"]
    for field in Settings.__dataclass_fields__:
        assert getattr(found, field) == getattr(row, field)


@pytest.mark.interpreted
@pytest.mark.slow
def test_decoding_is_timed_on_the_state_of_the_whole(script: Any) -> None:
    q, k, v = (torch.randn(1, heads, 680, 16) for heads in (2, 1, 1))
    operations = script.operations(q, k, v)
    assert set(operations) == {operation for operation, _ in script.TIMED.values()}
    (whole,), (last,) = operations["hsa"](), operations["decode"]()
    torch.testing.assert_close(last, whole[:, :, -1:], rtol=1e-5, atol=1e-5)
