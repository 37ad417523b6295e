"""Modules that have several attentions, run so that each of these is a site.

block(forward: sdpa … sdpa)   →   block(attention_0=Attend, attention_1=Attend)   →   two sites in it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from retrofit.capture.analyse import Analysis, Found, Progress, analyse_again, evaluating
from retrofit.capture.outline import outline
from retrofit.capture.site_plan import Refused
from retrofit.errors import CaptureError
from retrofit.exchange import Outlined, exchange
from retrofit.verify import SITE_TOLERANCE, first_tensor, relative_error


def with_parts(
    model: nn.Module, analysis: Analysis, earlier: Mapping[str, Outlined], progress: Progress | None
) -> Analysis:
    """Returns ``analysis`` with the attentions of modules that have several in the place of these.

    Args:
        model: The model, with its original attention.
        analysis: What was found in it.
        earlier: By path, what already stands for such a module in sites that may stay.
        progress: Called as ``progress(path, done, total)``.
    """
    outlined = {item.path: made for item in analysis.found if (made := _outlined(item, earlier)) is not None}
    if not outlined:
        return analysis
    paths = {f"{path}.{name}": path for path, made in outlined.items() for name in made.attends}
    with _in_place(model, outlined):
        parts = analyse_again(model, analysis.probes, set(paths), progress)
    found: list[Found] = []
    for item in analysis.found:
        own = [part for part in parts if paths[part.path] == item.path]
        found += own or [item]
    return replace(analysis, found=found)


def _outlined(item: Found, earlier: Mapping[str, Outlined]) -> Outlined | None:
    """What stands for a module with several attentions, if it gives the same as the module."""
    call = item.calls[0].call
    if not isinstance(item.plan, Refused) or not item.plan.several or call.kept:
        return None
    try:
        made = outline(item.module, call)
    except CaptureError:
        return None
    if made is None:
        return None
    before = earlier.get(item.path)
    if before is not None and before.original is item.module and before.plan.source == made.plan.source:
        return before
    result = Outlined(item.module, item.path, made)
    with torch.no_grad(), evaluating(result):
        got = first_tensor(result(*call.args, **call.kwargs))
    return result if relative_error(got, first_tensor(call.output), None) <= SITE_TOLERANCE else None


@contextmanager
def _in_place(model: nn.Module, outlined: Mapping[str, Outlined]) -> Iterator[None]:
    for made in outlined.values():
        exchange(model, made.original, made)
    try:
        yield
    finally:
        for made in outlined.values():
            exchange(model, made, made.restored())
