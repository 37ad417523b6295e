"""The committed sweep over transformers' causal language models does not shrink, and says what is so."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = json.loads((ROOT / "benchmarks/results/sweep-causal-lm.json").read_text())
LEAST_CONVERTED = 137


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(
        "sweep_transformers", ROOT / "scripts/sweep_transformers.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_does_not_shrink():
    verdicts = [row["verdict"] for row in ROWS]
    assert verdicts.count("converted") >= LEAST_CONVERTED
    assert "missed" not in verdicts
    assert "crashed" not in verdicts
    for row in ROWS:
        if row["verdict"] == "converted":
            assert row["convertible"] == row["sites"] > 0
            assert row["reverted"]
            assert row["site_error"] <= 1e-5
            assert row.get("generate_equal", True)
        if row["verdict"] in ("refused", "in part"):
            assert all(reason for reason in row["refused"])


def test_the_table_is_what_its_rows_say(sweep):
    text = (ROOT / "benchmarks/results/sweep-causal-lm.md").read_text()
    for row in ROWS:
        assert f"| {row['architecture']} |" in text
    assert all(row["verdict"] == sweep.verdict(row) for row in ROWS if "sites" in row and "trace" not in row)


@pytest.mark.parametrize("name", ["mvp", "gpt_bigcode", "diffllama"])
def test_an_architecture_is_what_the_table_says(name, sweep):
    ((_, config, model),) = sweep.architectures([name])
    row = sweep.sweep(name, config, model)
    (kept,) = [row for row in ROWS if row["architecture"] == name]
    assert row["verdict"] == kept["verdict"]
    assert row["sites"] == kept["sites"]
