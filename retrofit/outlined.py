"""Modules that have several attentions, run so that each of these is a site.

block(forward: sdpa … sdpa)   →   block(attention_0=Attend, attention_1=Attend)   →   two sites in it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retrofit.awaken import awakened, says_nothing
from retrofit.capture.analyse import Analysis, Found, Progress, analyse_again, evaluating, reason_in
from retrofit.capture.kept import restored
from retrofit.capture.outline import Outline, Outliner
from retrofit.capture.site_plan import CallPlan, Refused
from retrofit.errors import CaptureError
from retrofit.exchange import Outlined, exchange_all, exchange_back
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
    outliner = Outliner()
    outlines: dict[str, Outline] = {}
    outlined: dict[str, Outlined] = {}
    refused: dict[str, str] = {}
    for item in analysis.found:
        if not isinstance(item.plan, Refused) or not item.plan.several:
            continue
        try:
            with restored(item.module.modules()):
                outlines[item.path] = _outline(item, outliner)
                outlined[item.path] = _made(item, outlines[item.path], earlier.get(item.path))
        except Exception as error:  # one module that cannot be parted must not keep the others
            refused[item.path] = reason_in(error)
    far = {f"{path}.{name}": outlines[path].far[name] for path in outlined for name in outlines[path].attends}
    parts: list[Found] = []
    if outlined:
        try:
            with _in_place(model, outlined.values()):
                parts = list(analyse_again(model, analysis.probes, far, progress))
        except CaptureError as error:
            refused |= dict.fromkeys(outlined, str(error))
    found: list[Found] = []
    for item in analysis.found:
        own = [part for part in parts if item.path in outlined and part.path.rpartition(".")[0] == item.path]
        found += own or [_refused(item, refused.get(item.path))]
    return replace(analysis, found=found)


def _outline(item: Found, outliner: Outliner) -> Outline:
    kept = frozenset().union(*(call.kept for call in item.every))
    if kept:
        raise CaptureError(f"a call changes {', '.join(sorted(kept))} of it")
    return outliner.outline(item.module, item.every[0])


def _made(item: Found, outline: Outline, before: Outlined | None) -> Outlined:
    """What stands for the module, if it gives the same in all its calls.

    Raises:
        CaptureError: If it does not.
    """
    if before is not None and before.original is item.module and _same(before.plan, outline.plan):
        return before
    made = Outlined(item.module, item.path, outline)
    for call in item.every:
        with torch.no_grad(), evaluating(made):
            _compare(made(*call.args, **call.kwargs), call.output)
            if not says_nothing(item.module, first_tensor(call.output)):
                continue
            with awakened(item.module) as asleep, evaluating(item.module):
                if asleep:
                    _compare(made(*call.args, **call.kwargs), item.module(*call.args, **call.kwargs))
    return made


def _compare(output: object, original: object) -> None:
    got, expected = (
        [leaf for leaf in pytree.tree_leaves(of) if isinstance(leaf, Tensor)] for of in (output, original)
    )
    for a, b in zip(got, expected, strict=True):
        tolerance = max(SITE_TOLERANCE, 2 * torch.finfo(b.dtype).eps) if b.is_floating_point() else 0.0
        error = relative_error(a, b, None) if a.shape == b.shape else float("inf")
        if not error <= tolerance:
            raise CaptureError(f"run without them, it differs by {error:.1e} relative")


def _same(a: CallPlan, b: CallPlan) -> bool:
    return (
        replace(a, constants=()) == replace(b, constants=())
        and [name for name, _ in a.constants] == [name for name, _ in b.constants]
        and all(torch.equal(x, y) for (_, x), (_, y) in zip(a.constants, b.constants, strict=True))
    )


def _refused(item: Found, reason: str | None) -> Found:
    if reason is None or not isinstance(item.plan, Refused):
        return item
    why = f"{item.plan.reason}; they cannot be sites of their own: {reason}"
    return replace(item, plan=replace(item.plan, reason=why))


@contextmanager
def _in_place(model: nn.Module, outlined: Iterable[Outlined]) -> Iterator[None]:
    exchange_all(model, list(outlined))
    try:
        yield
    finally:
        exchange_back(model)
