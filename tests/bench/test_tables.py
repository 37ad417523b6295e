"""The tables of the README files are what the results say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


def test_tables_are_what_was_measured(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("tables").main(["--check"]) == 0, capsys.readouterr().err


def test_every_table_has_a_place(script: Script) -> None:
    tables = script("tables")
    named = [
        name for page in tables.PAGES for _, name, _ in tables.TABLE.findall(page.read_text(encoding="utf-8"))
    ]
    assert sorted(named) == sorted(tables.TABLES)


def test_a_table_that_says_something_else_is_named_and_written_anew(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = script("tables")
    page = tmp_path / "page.md"
    page.write_text(
        "Before\n\n<!-- table: hsa-scaling -->\n| tokens | 1 |\n|---|---|\n| HSA ms | 0.01 |\n\nbehind\n"
    )
    monkeypatch.setattr(tables, "PAGES", (page,))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert "page.md: hsa-scaling is not what the results say" in capsys.readouterr().err
    assert "0.01" in page.read_text()
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    text = page.read_text()
    assert text.startswith("Before\n\n<!--") and text.endswith("|\n\nbehind\n") and "0.01" not in text
