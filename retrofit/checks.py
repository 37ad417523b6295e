"""Checks of a configuration's values, with errors that name the option, what it must be, and what it is."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from retrofit.errors import ConfigError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", NoneType: "None"}


def check_types(config: Any) -> None:
    """Checks every field of a dataclass against its annotation; whole numbers pass for numbers.

    Raises:
        ConfigError: If a value is of another type.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ConfigError(f"{field.name} must be {_words(hint)}, got {value!r}")


def at_least(config: Any, name: str, least: int) -> None:
    """Checks that a number is not below ``least``."""
    value = getattr(config, name)
    if value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def multiple(config: Any, name: str, of: str) -> None:
    """Checks that one option is a multiple of another."""
    if getattr(config, name) % getattr(config, of):
        raise ConfigError(
            f"{name} must be a multiple of {of}={getattr(config, of)}, got {getattr(config, name)}"
        )


def one_of(config: Any, name: str, known: tuple[str, ...]) -> None:
    """Checks that an option is one of the known words."""
    value = getattr(config, name)
    if value not in known:
        raise ConfigError(
            f"{name} must be one of {', '.join(known)}{nearest(str(value), known)}, got {value!r}"
        )


def nearest(name: str, known: Any) -> str:
    """Returns `` (did you mean …?)`` with the names most like ``name``, or nothing."""
    matches = get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) is UnionType:
        return " or ".join(map(_words, get_args(hint)))
    if get_origin(hint) is tuple:
        return "whole numbers with commas between"
    return _WORDS[hint]
