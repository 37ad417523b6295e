"""Says why torch.export did not take a module: what it met, and the line of the model's code.

GuardOnDataDependentSymNode: Could not guard on …   →   it does one thing or another by the values of a tensor …
"""

from __future__ import annotations

import traceback
from pathlib import PurePath

from torch import nn

_NOT_THE_MODEL = ("/torch/", "/retrofit/capture/")


def failure(module: nn.Module, error: Exception) -> str:
    """The reason why ``module`` was not exported, which ended in ``error``."""
    name, line = type(module).__name__, _line(error)
    where = f" (at {line})" if line else ""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if "data-dependent" in first:
        return (
            f"{name} does one thing or another by the values of a tensor, which no graph can: {first}{where}"
        )
    return f"torch.export of {name} failed: {first}{where}"


def _line(error: BaseException | None) -> str | None:
    """``attention.py:123``: the innermost line of the model's own code in which ``error`` arose."""
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if not any(part in frame.filename for part in _NOT_THE_MODEL):
                return (
                    None
                    if "/retrofit/" in frame.filename
                    else f"{PurePath(frame.filename).name}:{frame.lineno}"
                )
        error = error.__cause__ or error.__context__
    return None
