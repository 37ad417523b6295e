"""A whole model is timed on both sides alike, and what fails is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from retrofit.configs import HSAConfig, config_to_dict

Script = Callable[[str], ModuleType]


@pytest.fixture
def arguments(tiny_folder: Path, tiny_hsa: HSAConfig, tmp_path: Path) -> list[str]:
    config = tmp_path / "hsa.json"
    config.write_text(json.dumps(config_to_dict(tiny_hsa)))
    sizes = f"--lengths 640 --prompts 96 --batches 1 2 --tokens 3 --repeats 1 --config {config}"
    where = f"--model {tiny_folder} --dtype float32 --output {tmp_path / 'out.json'}"
    return f"{sizes} {where}".split()


def test_prefill_and_generate_are_timed(script: Script, arguments: list[str], tmp_path: Path) -> None:
    assert script("whole_model").main([*arguments, "--dense-until", "72", "320"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["trained_positions"] == 512
    names = ["converted, dense until 72", "converted, dense until 320"]
    kinds = [(row["part"], row["batch"], row["length"]) for row in record["rows"]]
    assert kinds == [("prefill", 1, 640), ("generate", 1, 96), ("generate", 2, 96)]
    for row in record["rows"]:
        assert list(row["speedup"]) == names
        for name in names:
            assert row["speedup"][name] == pytest.approx(row["original"]["ms"] / row[name]["ms"])
    sparse, later = (record["rows"][0][name]["keys"] for name in names)
    assert sparse < later < 641 / 2


def test_graphs_are_refused_on_a_cpu(script: Script, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="needs --device cuda"):
        script("whole_model").main([*arguments, "--parts", "graph"])


def test_too_little_text_is_refused(script: Script, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="9,000,000 are needed"):
        script("whole_model").main([*arguments, "--parts", "prefill", "--lengths", "9000000"])


def test_a_failure_is_recorded(script: Script) -> None:
    def out_of_memory() -> Any:
        raise torch.OutOfMemoryError("out of memory\nand more")

    attempt = script("whole_model").attempt
    assert attempt(out_of_memory) == {"error": "OutOfMemoryError: out of memory"}
    assert attempt(lambda: {"ms": 1.0}) == {"ms": 1.0}
    with pytest.raises(TypeError):
        attempt(lambda: len(3))  # type: ignore[arg-type, return-value]


def test_the_fastest_counts(script: Script) -> None:
    speedups = script("whole_model")._speedups
    found = {
        "original": {"ms": 8.0},
        "dense": {"ms": 6.0},
        "converted": {"ms": 3.0},
        "other": {"error": "no"},
    }
    assert speedups(found) == {"converted": 2.0}
    assert speedups({"original": {"error": "no"}, "converted": {"ms": 3.0}}) == {}


@pytest.mark.gpu
def test_tokens_from_a_graph_are_those_without(
    script: Script, tiny_folder: Path, arguments: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    wide = [*arguments, "--device", "cuda", "--parts", "prefill", "graph", "--prompts", "1100"]
    wide[wide.index("--config") + 1] = str(_default(tmp_path))
    assert script("whole_model").main(wide) == 0
    for row in json.loads((tmp_path / "out.json").read_text())["rows"]:
        if row["part"] == "graph":
            assert row["original"]["same"] == row["dense"]["same"] == row["converted"]["same"] == 1.0


def _default(folder: Path) -> Path:
    """HSA's default sizes, which the kernels take."""
    path = folder / "default.json"
    path.write_text(json.dumps(config_to_dict(HSAConfig())))
    return path
