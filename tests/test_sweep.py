"""The committed sweep over transformers' architectures does not shrink, and says what is so."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
LEAST_CONVERTED = {
    "causal-lm": 161,
    "encoder": 46,
    "encoder-decoder": 31,
    "vision": 68,
    "audio": 34,
    "multimodal": 96,
}
LARGEST_FILE = 2**20


def rows_of(family: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"sweep-{family}.json").read_text())["rows"]
    return rows


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("family", LEAST_CONVERTED)
def test_the_table_does_not_shrink(family: str) -> None:
    rows = rows_of(family)
    verdicts = [row["verdict"] for row in rows]
    assert verdicts.count("converted") >= LEAST_CONVERTED[family]
    assert "missed" not in verdicts
    assert "crashed" not in verdicts
    for row in rows:
        if row["verdict"] in ("converted", "in part"):
            assert row["reverted"]
            assert row["site_error"] <= 1e-5
            assert row["prefill_error"] <= 1e-4
            assert row.get("hsa_error", 0.0) <= 1e-4
            assert ("hsa_error" in row) == (row.get("hsa_sites") != 0)
            assert all(same for name, same in row.items() if name.startswith("generate_"))
        if row["verdict"] == "converted":
            assert row["convertible"] == row["sites"] > 0
        if row["verdict"] in ("refused", "in part"):
            assert all(reason for reason in row["refused"])


def test_nearly_every_architecture_is_settled(script: Any) -> None:
    table = script("sweep_table")
    ran = [row for family in LEAST_CONVERTED for row in table.ran(rows_of(family))]
    assert sum(map(table.settled, ran)) >= 0.95 * len(ran)


def test_most_causal_language_models_convert_in_full() -> None:
    attending = [row for row in rows_of("causal-lm") if row.get("counted") or "sites" not in row]
    attending = [row for row in attending if row["verdict"] not in ("not built", "not run")]
    in_full = (row for row in attending if row["verdict"] == "converted")
    converted = [row for row in in_full if row.get("hsa_sites", row["sites"]) == row["sites"]]
    assert len(converted) >= 0.85 * len(attending)


@pytest.mark.parametrize("family", LEAST_CONVERTED)
def test_the_page_is_what_its_rows_say(family: str, script: Any) -> None:
    path = RESULTS / f"sweep-{family}.json"
    result = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == script("sweep_table").page(family, result)
    assert all(
        row["verdict"] == script("sweep_check").verdict(row) for row in result["rows"] if "sites" in row
    )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("sweep*")), ids=lambda path: path.name)
def test_a_file_is_small_and_names_no_folder_of_a_machine(path: Path) -> None:
    text = path.read_text()
    assert len(text) < LARGEST_FILE
    assert not any(f"{folder}/" in text for folder in ("/tmp", "/work", "/root", "/home", "site-packages"))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("causal-lm", "mvp"),
        ("causal-lm", "gpt_bigcode"),
        ("causal-lm", "diffllama"),
        ("multimodal", "llava"),
    ],
)
def test_an_architecture_is_what_the_table_says(family: str, name: str, script: Any) -> None:
    (found,) = script("sweep_families").architectures(family, [name])
    row = script("sweep_check").check(*found)
    (kept,) = [row for row in rows_of(family) if row["architecture"] == name]
    assert row["verdict"] == kept["verdict"]
    assert row["sites"] == kept["sites"]


def test_sites_that_only_dense_attention_takes_are_converted_and_named(script: Any) -> None:
    (found,) = script("sweep_families").architectures("encoder", ["mpnet"])
    row = script("sweep_check").check(*found)
    assert (row["verdict"], row["convertible"], row["hsa_sites"]) == ("converted", 2, 0)
    (reason,) = row["hsa_refused"]
    assert "a position bias is added to its scores, which DenseConfig() alone carries" in reason
