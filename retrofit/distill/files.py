"""What a distillation keeps in its folder, so that a killed run goes on as if nothing had happened.

distill.json      settings, data and sites: a resumed run must match them
losses.jsonl      one line a step
checkpoint.pt     trained parameters, optimiser, stage, step; replaced whole by a rename
teacher/          stored logits
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from retrofit.errors import OutputError

VERSION = 1


RECORD = "distill.json"
"""The file that marks a folder as that of a run."""


def check_run(path: Path, *, resume: bool) -> None:
    """Checks that a folder holds no earlier run, unless that is to go on.

    Raises:
        OutputError: If it does.
    """
    if (path / RECORD).is_file() and not resume:
        raise OutputError(
            f"{path} holds an earlier run; go on with it (--resume, resume=True), or give another folder"
        )


class RunFolder:
    """The folder of one run.

    Raises:
        OutputError: If the folder is not empty and not ours, holds a run and ``resume`` is off, or holds a run
            with other settings.
    """

    def __init__(self, path: str | Path, record: dict[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self.log = self.path / "losses.jsonl"
        self.teacher = self.path / "teacher"
        self._checkpoint = self.path / "checkpoint.pt"
        self._record = self.path / RECORD
        record = json.loads(json.dumps({"version": VERSION, **record}))
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file, expected a folder; choose another output")
        held = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        ours = (self._record, self._checkpoint)
        check_run(self.path, resume=resume)
        if self._record.is_file():
            self._compare(record)
            for unfinished in (entry for file in ours for entry in self.path.glob(f".{file.name}.*")):
                unfinished.unlink()
        elif other := [name for name in held if not name.startswith(f".{self._record.name}.")]:
            raise OutputError(
                f"{self.path} is not empty and holds no distillation, but {other[0]}; choose another output"
            )
        else:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{self.path} cannot be made: {error.strerror}; choose another output"
                ) from error
            replace(self._record, json.dumps(record, indent=2).encode())

    def _compare(self, record: dict[str, Any]) -> None:
        try:
            earlier = json.loads(self._record.read_text())
        except (OSError, ValueError) as error:
            raise OutputError(f"{self._record} cannot be read: {error}; choose another output") from error
        for part in record:
            ours, theirs = record[part], earlier.get(part)
            if ours == theirs:
                continue
            if isinstance(ours, dict) and isinstance(theirs, dict):
                name = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
                part, ours, theirs = f"{part}.{name}", ours.get(name), theirs.get(name)
            raise OutputError(
                f"the run in {self.path} has {part}={theirs}, got {ours}; resume with the same or choose another "
                "output"
            )

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint; ``state`` holds tensors, numbers, strings, lists and dictionaries."""
        if self.log.exists():
            with self.log.open("rb") as log:
                os.fsync(log.fileno())
        buffer = io.BytesIO()
        torch.save({**state, "log_bytes": self.log.stat().st_size if self.log.exists() else 0}, buffer)
        replace(self._checkpoint, buffer.getvalue())

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """The checkpoint and the losses up to it; later losses are cut off. None before the first one."""
        if not self._checkpoint.is_file():
            self.log.unlink(missing_ok=True)
            return None
        state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        size = state["log_bytes"]
        raw = self.log.read_bytes()[:size] if self.log.exists() else b""
        if len(raw) != size:
            raise OutputError(f"{self.log} is shorter than at the checkpoint; choose another output")
        if size or self.log.exists():
            os.truncate(self.log, size)
        return state, [json.loads(line) for line in raw.splitlines()]

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line to the losses."""
        try:
            with self.log.open("a") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.log} cannot be written: {error.strerror}; free space and resume"
            ) from error


def replace(path: Path, content: bytes) -> None:
    """Writes ``content`` beside ``path``, then renames it: a reader sees the old file or the new one, whole.

    Raises:
        OutputError: If it cannot be written; ``path`` is then as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror}; free space or choose another output"
        ) from error
