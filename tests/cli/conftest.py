"""A way to run the command line, and a small model converted by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from retrofit.cli import app

TINY_HSA = [
    f"--set={option}"
    for option in (
        "window=32",
        "sink=8",
        "budget=32",
        "block=8",
        "node=2",
        "fanout=4",
        "nodes_per_span=8",
        "beam=4",
        "query_block=8",
    )
]


@pytest.fixture
def retrofit() -> Callable[..., Any]:
    """Runs ``retrofit`` with the arguments given, in this process."""

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def converted_folder(tiny_folder: Path) -> Path:
    """The same model, converted by the command line; read only."""
    folder = tiny_folder.parent / "tiny-hsa"
    result = CliRunner().invoke(app, ["convert", str(tiny_folder), str(folder), *TINY_HSA])
    assert result.exit_code == 0, result.stderr
    return folder
