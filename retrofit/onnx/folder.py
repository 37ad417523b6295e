"""Writes a folder whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrofit.errors import OutputError


@contextmanager
def new_folder(path: Path, *, record: str) -> Iterator[Path]:
    """Gives a folder to write to, which takes the place of ``path`` when the block ends without an error.

    Args:
        path: It must not exist, be empty, or hold the file ``record`` of an earlier run, which is replaced.
        record: Name of the file by which a folder shows that it is ours.

    Raises:
        OutputError: If ``path`` holds something else, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / record).is_file())):
        raise OutputError(
            f"{path} is not empty and holds no earlier export; choose another folder or empty this one"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another folder") from error
    try:
        work.chmod(0o755)
        yield work
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            path.rename(old / path.name)
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; nothing was written"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
