"""Bad input ends in one line with a remedy, a non-zero exit code and nothing half-written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def _fails(result: Any, *words: str, code: int = 1) -> None:
    """Asserts an exit with ``code`` whose one line on stderr has all ``words``, and nothing on stdout."""
    assert result.exit_code == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "unexpected" not in lines[0], lines[0]
    for word in words:
        assert word in lines[0], lines[0]
    assert result.stdout == ""


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_unknown_model_id(retrofit: Run, tmp_path: Path) -> None:
    _fails(
        retrofit("convert", "nobody/no-such-model", tmp_path / "out"), "unknown model 'nobody/no-such-model'"
    )
    assert not (tmp_path / "out").exists()


def test_unknown_folder(retrofit: Run, tmp_path: Path) -> None:
    _fails(retrofit("inspect", tmp_path / "nowhere"), "folder not found", "nowhere")


def test_unknown_package(retrofit: Run) -> None:
    _fails(retrofit("inspect", "package:no_such_package"), "pip install no_such_package")


def test_folder_without_weights(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    _fails(retrofit("convert", folder, tmp_path / "out"), "has no weights", "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_corrupt_safetensors(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    _fails(retrofit("convert", folder, tmp_path / "out"), "not a whole safetensors file", "again")
    assert not (tmp_path / "out").exists()


def test_model_without_attention(retrofit: Run, tmp_path: Path) -> None:
    from transformers import MobileNetV2Config, MobileNetV2Model

    folder = tmp_path / "model"
    MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, image_size=32)).save_pretrained(folder)
    _fails(retrofit("convert", folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unknown_target(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    result = retrofit("convert", tiny_folder, tmp_path / "out", "--target", "hasa")
    _fails(result, "unknown target 'hasa'", "did you mean hsa")
    assert not (tmp_path / "out").exists()


def test_unknown_option_of_the_target(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    result = retrofit("convert", tiny_folder, tmp_path / "out", "--set", "bugdet=256")
    _fails(result, "no option 'bugdet'", "did you mean budget")


def test_where_that_matches_nothing(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    result = retrofit("convert", tiny_folder, tmp_path / "out", "--where", "model.blocks.*")
    _fails(result, "model.blocks.*", "model.layers.0.self_attn")
    assert not (tmp_path / "out").exists()


def test_configuration_file_that_is_not_json(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("target: hsa\n")
    _fails(retrofit("convert", tiny_folder, tmp_path / "out", "--config", config), "is not JSON")


def test_output_that_is_not_ours(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    _fails(retrofit("convert", tiny_folder, out), str(out))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    _fails(retrofit("export", tiny_folder, out), str(out))
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_output_that_is_a_file(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("notes")
    _fails(retrofit("convert", tiny_folder, out), str(out))
    assert out.read_text() == "notes"


def test_sequence_longer_than_the_positions(retrofit: Run, tiny_folder: Path) -> None:
    _fails(retrofit("eval", tiny_folder, "--length", "100000"), "512 positions", "100000")


def test_dtype_that_no_op_takes(retrofit: Run, tiny_folder: Path, tmp_path: Path) -> None:
    result = retrofit("convert", tiny_folder, tmp_path / "out", "--dtype", "int8")
    _fails(result, "dtype", "float32", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "distill"])
def test_text_that_is_empty(retrofit: Run, converted_folder: Path, tmp_path: Path, command: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" \n")
    output = [] if command == "eval" else [tmp_path / "out", "--length", 128]
    _fails(retrofit(command, converted_folder, *output, "--data", text), "text.txt is empty")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "distill"])
def test_text_that_is_not_utf8(retrofit: Run, converted_folder: Path, tmp_path: Path, command: str) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("déjà vu, again and again".encode("latin-1"))
    output = [] if command == "eval" else [tmp_path / "out", "--length", 128]
    result = retrofit(command, converted_folder, *output, "--data", text)
    _fails(result, "is not UTF-8", "offset 1", "iconv")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["bench", "distill", "eval", "report"])
def test_the_text_is_looked_at_before_the_model(retrofit: Run, tmp_path: Path, command: str) -> None:
    output = [tmp_path / "out"] if command == "distill" else []
    result = retrofit(command, tmp_path / "nowhere", *output, "--data", tmp_path / "none.txt")
    _fails(result, "none.txt does not exist")


def test_distillation_of_a_model_that_is_not_converted(
    retrofit: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    _fails(retrofit("distill", tiny_folder, tmp_path / "out"), "convert")
    assert not (tmp_path / "out").exists()


# Files of at most 100 kB: the weights do not fit, as on a full disk. The signal would end the process at once.
_SMALL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from retrofit.cli import main
sys.argv = ["retrofit", *sys.argv[1:]]
main()
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_disk_full_while_saving(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", _SMALL_DISK, "convert", str(tiny_folder), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    assert "unexpected" not in last
    assert str(out) in last
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retrofit", "inspect", str(tmp_path / "nowhere"), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: folder not found: {tmp_path / 'nowhere'}\n"


def test_usage_errors_exit_2(retrofit: Run) -> None:
    assert retrofit("convert").exit_code == 2
    assert retrofit("convret", "x").exit_code == 2
    assert retrofit("eval", "x", "--length", "long").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("inspect", ""), "a model must be a Hub id"),
        (("inspect", "package:"), "a model must be a Hub id"),
        (("inspect", "{model}", "--device", "banana"), "device 'banana' cannot be used"),
        (("eval", "{model}", "--length", 0), "length must be at least 2"),
        (("export", "{model}", "{model}"), "is not empty and holds no earlier export"),
        (("convert", "{model}", "{model}"), "is the model itself"),
        (
            ("report", "{model}", "--evaluation", "{model}/config.json"),
            "is not what retrofit eval --json printed",
        ),
        (("report", "{model}", "--output", "{model}/no/where.html"), "is no folder"),
        (("bench", "{model}", "--repeats", 0), "repeats must be at least 1"),
        (("bench", "{model}", "--shape", "8,2"), "heads, kv heads and dims"),
        (("bench", "{model}", "--graph"), "graph needs a model on CUDA"),
        (("bench", "{model}", "--kernels"), "kernels needs a model on CUDA"),
        (("bench", "{model}", "--scaling", "256"), "scaling needs at least two lengths"),
    ],
)
def test_arguments_that_cannot_work(
    retrofit: Run, converted_folder: Path, arguments: tuple[Any, ...], word: str
) -> None:
    given = [str(x).replace("{model}", str(converted_folder)) for x in arguments]
    _fails(retrofit(*given), word)


def test_a_second_run_of_a_distillation_is_stopped_before_any_work(
    retrofit: Run, converted_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "out.checkpoints"
    run.mkdir()
    (run / "distill.json").write_text("{}")
    _fails(retrofit("distill", converted_folder, tmp_path / "out"), "holds an earlier run", "--resume")


def test_trained_parameters_are_not_dropped_by_converting_again(
    retrofit: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    options = ("--target", "maha", "--set", "widths=64,8,8")
    assert retrofit("convert", tiny_folder, tmp_path / "once", *options).exit_code == 0
    _fails(
        retrofit("convert", tmp_path / "once", tmp_path / "twice", *options),
        "have parameters of their own that converting again would drop",
    )
    assert not (tmp_path / "twice").exists()
