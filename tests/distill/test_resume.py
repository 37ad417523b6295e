"""A killed run goes on as if nothing had happened."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.errors import OutputError

SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("killed_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def uninterrupted(script: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    model = script.build()
    return model, script.run(model, folder), folder


def kill_at(folder: Path, stage: int, step: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.split() == [str(stage), str(step)]:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(("stage", "step"), [(1, 4), (2, 3)])
def test_resuming_after_a_kill_gives_the_same_losses(
    script: Any, uninterrupted: tuple[Any, Any, Path], tmp_path: Path, stage: int, step: int
) -> None:
    folder = tmp_path / "run"
    kill_at(folder, stage, step)
    model = script.build()
    report = script.run(model, folder, resume=True)

    expected_model, expected, expected_folder = uninterrupted
    assert report.resumed_from is not None
    assert 0 < report.resumed_from < len(expected.losses)
    assert report.losses == expected.losses
    assert report.stages == expected.stages
    assert (folder / "losses.jsonl").read_text() == (expected_folder / "losses.jsonl").read_text()
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_resuming_a_finished_run_gives_its_model(
    script: Any, uninterrupted: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    expected_model, expected, folder = uninterrupted
    model = script.build()
    report = script.run(model, folder, resume=True)
    assert report.resumed_from == len(expected.losses)
    assert report.losses == expected.losses
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_folder_is_not_taken_from_another_run(
    script: Any, uninterrupted: tuple[Any, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, folder = uninterrupted
    before = sorted((entry.name, entry.read_bytes()) for entry in folder.iterdir())
    with pytest.raises(OutputError, match="holds an earlier run; go on with it"):
        script.run(model, folder)
    monkeypatch.setattr(script, "CONFIG", script.DistillConfig(length=128, seed=4))
    with pytest.raises(OutputError, match=r"has config\.\w+=.*resume with the same"):
        script.run(model, folder, resume=True)
    assert sorted((entry.name, entry.read_bytes()) for entry in folder.iterdir()) == before

    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(OutputError, match="not empty and holds no distillation, but photo"):
        script.run(model, tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        script.run(model, tmp_path / "photo.jpg")


def test_the_folder_says_what_was_run(uninterrupted: tuple[Any, Any, Path]) -> None:
    _, report, folder = uninterrupted
    record = json.loads((folder / "distill.json").read_text())
    assert record["version"] == 1
    assert record["sites"]["model.layers.0.self_attn"]["pooling"] == "learned"
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert tuple(lines) == report.losses
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "checkpoint.pt",
        "distill.json",
        "losses.jsonl",
    ]
