"""Which sites of a model are meant: by pattern, number, range and kind.

where="model.layers.1?.*"    where=3, where=range(4, 20), where="4:20,-1"    kind="self"    skip="0,-1"
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from retrofit.capture.analyse import Found
from retrofit.capture.site_plan import SitePlan
from retrofit.errors import ConfigError

Selector = str | int | range | slice
Selection = Selector | Sequence[Selector]
KINDS = ("self", "cross", "encoder", "decoder")
_NUMBERS = re.compile(r"\s*(-?\d+|-?\d*:-?\d*(:-?\d+)?)\s*(,\s*(-?\d+|-?\d*:-?\d*(:-?\d+)?)\s*)*")


def attention_paths(found: Sequence[Found]) -> list[str]:
    """The paths of what is attention, by number."""
    return [item.path for item in found if item.plan.kind != "other"]


def matching(selection: Selection, found: Sequence[Found], name: str) -> set[str]:
    """Returns the paths that ``selection`` means.

    Args:
        selection: Patterns over paths, numbers of sites as ``inspect`` counts them, or ranges of numbers;
            in text numbers are written ``0,4:20,-1``. A path that is itself a number comes first.
        found: The modules that own attention.
        name: Of the argument, for messages.

    Raises:
        ConfigError: If a part of it means no site.
    """
    parts: Sequence[Any] = selection if isinstance(selection, (list, tuple)) else [selection]
    chosen: set[str] = set()
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (str, int, range, slice)):
            raise ConfigError(f"{name} must be a pattern, a number or a range, got {part!r}")
        chosen |= _of_part(part, found, name)
    return chosen


def _of_part(part: Selector, found: Sequence[Found], name: str) -> set[str]:
    paths = attention_paths(found)
    every = [item.path for item in found]
    if isinstance(part, str):
        matched = {path for path in every if fnmatch.fnmatchcase(path, part)}
        if matched:
            return matched
        if not _NUMBERS.fullmatch(part):
            near = get_close_matches(part, every, n=3, cutoff=0.3) or every[:3]
            raise ConfigError(
                f"{name}={part!r} matches no attention module; the nearest are {', '.join(near)}"
            )
        numbers = [_number(text) for text in part.split(",")]
        return set().union(*(_numbered(number, paths, name) for number in numbers))
    return _numbered(part, paths, name)


def _number(text: str) -> int | slice:
    ends = [int(end) if end.strip() else None for end in text.split(":")]
    first = ends[0]
    return first if len(ends) == 1 and first is not None else slice(*ends)


def _numbered(number: int | range | slice, paths: Sequence[str], name: str) -> set[str]:
    try:
        if isinstance(number, slice):
            meant = set(paths[number])
        else:
            meant = {paths[place] for place in ([number] if isinstance(number, int) else number)}
    except IndexError:
        meant = set()
    if not meant:
        shown = (
            ":".join("" if end is None else str(end) for end in (number.start, number.stop))
            if isinstance(number, slice)
            else str(number)
        )
        raise ConfigError(
            f"{name}={shown} is no attention module; there are {len(paths)}, from 0 to {len(paths) - 1}"
        )
    return meant


def of_kind(kind: str | Sequence[str], found: Sequence[Found]) -> set[str]:
    """Returns the paths of the kinds named.

    Raises:
        ConfigError: If a kind is unknown, or there is none of it.
    """
    chosen: set[str] = set()
    for name in (kind,) if isinstance(kind, str) else tuple(kind):
        if name not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, got {name!r}")
        meant = {item.path for item in found if name in (item.plan.kind, side(item))}
        if not meant:
            there = sorted({word for item in found for word in (item.plan.kind, side(item)) if word in KINDS})
            raise ConfigError(
                f"kind={name!r} matches no attention module; there are {', '.join(there) or 'none of a known kind'}"
            )
        chosen |= meant
    return chosen


def side(item: Found) -> str | None:
    """``encoder`` or ``decoder``: what sees no later tokens decodes; else the path tells, if it can."""
    if item.plan.kind == "cross":
        return "decoder"
    if isinstance(item.plan, SitePlan):
        return "decoder" if item.plan.mask.causal else "encoder"
    named = [part for part in item.path.split(".") if "encoder" in part or "decoder" in part]
    return None if not named else "decoder" if "decoder" in named[-1] else "encoder"


def first_match(values: Mapping[str, Any], path: str) -> Any:
    """The value of the first pattern that matches ``path``; None if none does."""
    return next((value for pattern, value in values.items() if fnmatch.fnmatchcase(path, pattern)), None)
