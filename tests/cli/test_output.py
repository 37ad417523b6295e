from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from typer.testing import CliRunner

from retrofit.cli.options import assignments
from retrofit.cli.output import Shown, command, plain
from retrofit.errors import ConfigError, DataError


def _app(behaviour: object) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @command
    def act(name: Annotated[str, typer.Argument()], count: int = 2) -> Shown:
        """Acts."""
        print("a library talks")
        if isinstance(behaviour, Exception):
            raise behaviour
        return Shown({"name": name, "count": count}, [f"{name} times {count}"], "retrofit inspect x")

    @app.command()
    def other() -> None:
        """Keeps the first one a sub-command."""

    return app


def test_screen_shows_the_outcome_and_the_next_command() -> None:
    result = CliRunner().invoke(_app(None), ["act", "pears", "--count", "3"])
    assert result.exit_code == 0
    assert result.stdout == "pears times 3\nnext: retrofit inspect x\n"
    assert "a library talks" in result.stderr


def test_json_is_all_of_stdout() -> None:
    result = CliRunner().invoke(_app(None), ["act", "pears", "--json"])
    assert json.loads(result.stdout) == {"name": "pears", "count": 2, "next": "retrofit inspect x"}


def test_retrofit_errors_are_one_line_and_exit_1() -> None:
    result = CliRunner().invoke(_app(DataError("x.txt is empty;\n name another")), ["act", "pears", "--json"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == "error: x.txt is empty; name another"
    assert "Traceback" not in result.stderr


def test_unexpected_errors_name_their_type_and_the_way_to_the_trace() -> None:
    result = CliRunner().invoke(_app(KeyError("depth")), ["act", "pears"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "error: unexpected KeyError: 'depth'; run the command again with --debug for the trace"
    )
    result = CliRunner().invoke(_app(KeyError("depth")), ["act", "pears", "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_usage_errors_exit_2() -> None:
    assert CliRunner().invoke(_app(None), ["act"]).exit_code == 2
    assert CliRunner().invoke(_app(None), ["act", "pears", "--depth"]).exit_code == 2


@dataclass(frozen=True)
class _Row:
    path: Path
    dtype: torch.dtype
    values: tuple[float, ...]


def test_plain_turns_everything_into_json() -> None:
    row = _Row(Path("a/b"), torch.bfloat16, (1.5, float("nan"), float("inf")))
    document = plain({1: row, "tensor": torch.arange(3), "set": {"x"}})
    assert json.loads(json.dumps(document, allow_nan=False)) == {
        "1": {"path": "a/b", "dtype": "torch.bfloat16", "values": [1.5, None, None]},
        "tensor": [0, 1, 2],
        "set": ["x"],
    }


def test_assignments_read_numbers_words_lists_and_none() -> None:
    texts = ["budget=256", "pooling=learned", "widths=64,32", "dense-until=None", "summaries=true", "x=0.5"]
    assert assignments(texts) == {
        "budget": 256,
        "pooling": "learned",
        "widths": (64, 32),
        "dense_until": None,
        "summaries": True,
        "x": 0.5,
    }
    assert assignments(None) == {}


@pytest.mark.parametrize("texts", [["budget"], ["=3"], ["a=1", "a=2"]])
def test_assignments_refuse_what_is_no_assignment(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="--set"):
        assignments(texts)
