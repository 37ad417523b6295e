"""Writes a folder whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from retrofit.errors import OutputError, RetrofitError

EXPORT_RECORD = "export.json"
"""The file that marks a folder as an ONNX export; such a folder also has the ``config.json`` of its model."""


def is_export(path: Path) -> bool:
    """Whether an export wrote ``path``."""
    return (path / EXPORT_RECORD).is_file()


@contextmanager
def new_folder(path: str | Path, is_ours: Callable[[Path], bool], kind: str) -> Iterator[Path]:
    """Gives a folder to fill that takes its place only when it is complete.

    Args:
        path: It must not exist, be empty, or be ours: then it is replaced.
        is_ours: Whether a folder was written by an earlier run.
        kind: What such a run writes, in words.

    Raises:
        OutputError: If ``path`` is a file or holds something else, or writing fails.
    """
    path = Path(path).expanduser()
    check_folder(path, is_ours, kind)
    filling: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        filling = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        filling.chmod(0o777 & ~_umask())
        yield filling
        _replace(path, filling)
    except RetrofitError:
        raise
    except Exception as error:  # safetensors reports a full disk by an error of its own
        if isinstance(error, OSError) or "os error" in str(error).lower() or "No space" in str(error):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OutputError(f"cannot write {path}: {reason}; nothing was written") from error
        raise
    finally:
        if filling is not None and filling.exists():
            shutil.rmtree(filling, ignore_errors=True)


def check_folder(path: Path, is_ours: Callable[[Path], bool], kind: str) -> None:
    """Checks that a folder may be written, before anything is done for it; arguments as in ``new_folder``.

    Raises:
        OutputError: If ``path`` is a file, or a folder with something else in it.
    """
    if path.is_dir():
        if any(path.iterdir()) and not is_ours(path):
            raise OutputError(
                f"{path} is not empty and holds no {kind}{_instead(path)}; give another folder, or empty it first"
            )
    elif path.exists():
        raise OutputError(f"{path} is a file; give a folder")


def _instead(path: Path) -> str:
    if is_export(path):
        return ", but an ONNX export"
    return ", but a model" if (path / "config.json").is_file() else ""


def _replace(path: Path, filling: Path) -> None:
    """Puts ``filling`` in the place of ``path``; what was there goes only then."""
    if not path.exists():
        filling.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / path.name)
    try:
        filling.rename(path)
    except OSError:
        (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
