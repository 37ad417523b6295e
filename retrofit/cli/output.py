"""What a command prints and how it fails.

@command
def inspect(model: Model) -> Shown: …     →   a table, or one JSON document with --json;
                                              "error: …" on stderr and exit code 1 for a RetrofitError
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console, RenderableType

from retrofit import progress
from retrofit.errors import RetrofitError

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error, and every warning.")]


WIDTH = 120
"""Columns where the output goes to a file or a pipe, which has no width of its own."""


@dataclass(frozen=True)
class Shown:
    """The outcome of a command.

    Attributes:
        document: What ``--json`` prints; dataclasses, paths and dtypes are turned into plain JSON.
        screen: What a person sees instead.
        next: The command to try next.
    """

    document: Any
    screen: Iterable[RenderableType]
    next: str


def command(function: Callable[..., Shown]) -> Callable[..., None]:
    """Gives ``function`` the options ``--json`` and ``--debug``, prints its outcome and reports its errors."""

    @functools.wraps(function)
    def run(*, json: bool, debug: bool, **arguments: Any) -> None:
        try:
            with warnings.catch_warnings():
                if not debug:
                    _quieten()
                # Libraries print on stdout; with --json that would break the document.
                with redirect_stdout(sys.stderr), progress.shown():
                    outcome = function(**arguments)
            _show(outcome, as_json=json)
        except typer.Exit:
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from None

    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True) | {"json": Json, "debug": Debug, "return": None}
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
    ]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hints[name])
        for name in ("json", "debug")
    ]
    # typer reads both, and must not find the wrapped function's own.
    vars(run)["__signature__"] = inspect.Signature([*own, *common])
    run.__annotations__ = hints
    del vars(run)["__wrapped__"]
    return run


def one_line(error: BaseException) -> str:
    """Returns the message of ``error`` on one line; an unexpected one names its type and the way to its trace."""
    message = " ".join(str(error).split())
    if isinstance(error, RetrofitError):
        return message
    return f"unexpected {type(error).__name__}: {message}; run the command again with --debug for the trace"


def plain(value: Any) -> Any:
    """Returns ``value`` in the types that JSON has; what is not finite becomes null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def _show(outcome: Shown, *, as_json: bool) -> None:
    if as_json:
        document = plain(outcome.document)
        if isinstance(document, dict):
            document = {**document, "next": outcome.next}
        print(json.dumps(document, indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for part in outcome.screen:
        if isinstance(part, str):
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)
    console.print(f"next: {outcome.next}", style="dim", markup=False, soft_wrap=True)


def _quieten() -> None:
    """Leaves only the warnings and log lines that tell a user something to act upon."""
    import logging

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torch", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
