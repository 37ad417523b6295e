"""Arguments and options that several commands share, and how their text is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from retrofit.errors import ConfigError

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
    str, typer.Option(help="Which sites, as a pattern over their paths: 'model.layers.1?.self_attn'.")
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
        values[name] = tuple(map(_value, value.split(","))) if "," in value else _value(value)
    return values


def _value(text: str) -> Any:
    word = text.strip()
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(word, word))
    except json.JSONDecodeError:
        return word
