"""Arguments and options that several commands share, and how their text is read."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from retrofit.errors import ConfigError, DataError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id, a folder, a .gguf file, or package:NAME for a model inside an installed package.",
        show_default=False,
    ),
]
Converted = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder that retrofit convert wrote.", show_default=False),
]
Output = Annotated[
    Path,
    typer.Argument(
        metavar="OUTPUT", help="The folder to write; must not hold anything else.", show_default=False
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Of the weights: float32, bfloat16, float16 or auto, the stored one.")
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, …")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        "--text",
        help="A text, JSONL or parquet file, datasets:ID, or pydoc_data.topics: the manual that Python ships.",
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model ships.")]
Where = Annotated[
    str,
    typer.Option(
        help="Which sites: a pattern over their paths, 'model.layers.1?.self_attn', or their numbers, 0,4:20,-1."
    ),
]
Kind = Annotated[
    list[str] | None,
    typer.Option(
        help="Only sites of a kind: self, cross, encoder or decoder; may be repeated.", show_default=False
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Sites to keep dense, written like --where; may be repeated.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Set an option of the target, as in --set budget=256; may be repeated.",
        show_default=False,
    ),
]


def assignments(texts: list[str] | None) -> dict[str, Any]:
    """Returns ``["budget=256", "widths=64,32"]`` as ``{"budget": 256, "widths": (64, 32)}``.

    Values are read as JSON where they are JSON, as tuples where they hold commas, and as words otherwise.

    Raises:
        ConfigError: If a text has no ``=``, or names an option twice.
    """
    values: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ConfigError(f"--set expects NAME=VALUE as in --set budget=256, got {text!r}")
        if name in values:
            raise ConfigError(f"--set {name} is given twice; leave one out")
        read = _value(value)
        if isinstance(read, str) and "," in read:
            read = tuple(map(_value, read.split(",")))
        values[name] = tuple(read) if isinstance(read, list) else read
    return values


def known(option: str, values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Returns ``values``, if all its keys are among ``names``.

    Raises:
        ConfigError: If one is not, with the nearest names.
    """
    for name in values:
        if name not in names:
            near = get_close_matches(name, names, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{option} must name one of {', '.join(names)}, got {name}{hint}")
    return values


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Returns ``"4096,8192"`` as ``(4096, 8192)``.

    Raises:
        ConfigError: If a part is no whole number of at least 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(
            f"{option} expects whole numbers with commas between, as in 4096,8192, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        DataError: If the file cannot be read or holds anything else.
    """
    from retrofit.data import read_text

    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg} in line {error.lineno}; correct it") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(record).__name__}; correct it")
    return record


def _value(text: str) -> Any:
    word = text.strip()
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(word, word))
    except json.JSONDecodeError:
        return word
