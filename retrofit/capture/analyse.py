"""Finds the attention of a whole model: probes it, and plans each module that owns attention.

model  →  recorded calls on every probe  →  one Found per owner, convertible or refused with the reason
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.capture.kept import restored
from retrofit.capture.observe import ProbedCall
from retrofit.capture.plan import Planner
from retrofit.capture.probes import ExampleInputs, Probe, is_transformers, make_probes, same_draws
from retrofit.capture.record import OwnerCall, Recording, record
from retrofit.capture.reserved import taken
from retrofit.capture.site_plan import Refused, SitePlan
from retrofit.capture.used import refuse_used
from retrofit.errors import CaptureError, RetrofitError
from retrofit.passes.attention.masks import MaskSample

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""


@dataclass(frozen=True)
class Found:
    """One module that owns attention, with its calls on the probes.

    Attributes:
        calls: Its first call on each probe.
        every: All its calls.
        flops: Operations of its attention in all its calls on the first probe it was called on.
    """

    path: str
    module: nn.Module
    plan: SitePlan | Refused
    calls: Sequence[ProbedCall]
    every: Sequence[OwnerCall]
    flops: int


@dataclass(frozen=True)
class Analysis:
    """What the probes showed.

    Attributes:
        probes: The calls of the model.
        outputs: What the model returned on each.
        found: The modules that own attention, in order of their first call.
    """

    probes: Sequence[Probe]
    outputs: Sequence[Any]
    found: Sequence[Found]


def analyse(
    model: nn.Module, example_inputs: ExampleInputs | None, progress: Progress | None = None
) -> Analysis:
    """Probes ``model``, which has its original attention, and plans what can be converted."""
    with restored(model.modules()):
        return _analyse(model, make_probes(model, example_inputs), None, progress)


def analyse_again(
    model: nn.Module,
    probes: Sequence[Probe],
    far: Mapping[str, Sequence[MaskSample]],
    progress: Progress | None,
) -> Sequence[Found]:
    """Plans some modules alone, on the same probes.

    Args:
        model: The model.
        probes: The calls of it.
        far: Paths of the modules, with their masks far beyond the example, where those are made outside of them.
        progress: Called as ``progress(path, done, total)``.
    """
    with restored(model.modules()):
        return _analyse(model, probes, far, progress).found


def _analyse(
    model: nn.Module,
    probes: Sequence[Probe],
    only: Mapping[str, Sequence[MaskSample]] | None,
    progress: Progress | None,
) -> Analysis:
    calls: dict[str, list[ProbedCall]] = {}
    every: dict[str, list[OwnerCall]] = {}
    flops: dict[str, int] = {}
    exchanged: dict[str, tuple[str, str]] = {}
    outputs = []
    with evaluating(model):
        for probe in probes:
            recording = _recorded(model, probe)
            exchanged |= recording.exchanged
            outputs.append(recording.output)
            for path, of_path in recording.owners.items():
                if only is not None and path not in only:
                    continue
                first = of_path[0]
                flops.setdefault(path, sum(call.flops for call in of_path))
                every.setdefault(path, []).extend(of_path)
                calls.setdefault(path, []).append(ProbedCall(first, _keep(probe, first)))
    for path in exchanged:
        if path in calls:
            # In the call that brought the new module, what it did was seen as done by the one around it.
            calls.pop(path.rpartition(".")[0], None)
    far = {model.get_submodule(path): samples for path, samples in (only or {}).items()}
    planner = Planner(managed=is_transformers(model), far=far)
    planned: dict[str, Found] = {}
    # Inner modules first: a router's softmax inside does not make its parent anything but attention.
    for done, (path, of_owner) in enumerate(sorted(calls.items(), key=lambda item: -item[0].count("."))):
        module = model.get_submodule(path)
        inner = [
            p
            for p, item in planned.items()
            if p.startswith(f"{path}." if path else "") and getattr(item.plan, "kind", "") != "other"
        ]
        inlined = next((p for p in inner if not _is_opaque(path, p, of_owner[0].call)), None)
        plan: SitePlan | Refused
        with_keep: Sequence[ProbedCall] = of_owner
        if path in exchanged or any(top.startswith(f"{path}.") for top in exchanged):
            plan = Refused(_replaced(path, exchanged))
        elif inner and not flops[path]:
            plan = Refused(f"a softmax besides the attention of {inner[0]}, between no two products", "other")
        elif inlined is not None:
            plan = Refused(f"it has a softmax of its own around the attention of {inlined}")
        elif isinstance(module, torch.jit.ScriptModule):
            plan = Refused("it is a ScriptModule; put the module that this was made from in its place")
        elif (name := taken(module)) is not None:
            plan = Refused(name)
        elif not path:
            plan = Refused("the attention is the whole model; wrap it in a module that holds it")
        else:
            try:
                plan, with_keep = planner.plan(module, of_owner, every[path])
            except Exception as error:  # one module that cannot be understood must not keep the others
                plan = Refused(reason_in(error))
        planned[path] = Found(path, module, plan, with_keep, every[path], flops[path])
        if progress is not None:
            progress(f"capture {path}", done + 1, len(calls))
    kept = {path: frozenset().union(*(call.kept for call in of_owner)) for path, of_owner in every.items()}
    with evaluating(model):
        refuse_used(model, planned, kept, probes[0], outputs[0])
    return Analysis(probes, outputs, [planned[path] for path in calls])


def _is_opaque(path: str, inner: str, call: OwnerCall) -> bool:
    """Whether the graph of the module at ``path`` has a call of a child in the place of what is at ``inner``."""
    below = inner[len(path) + 1 :] if path else inner
    return any(
        child.outputs and (below == child.path or below.startswith(f"{child.path}."))
        for child in call.children
    )


def _replaced(path: str, exchanged: Mapping[str, tuple[str, str]]) -> str:
    top = path if path in exchanged else next(top for top in exchanged if top.startswith(f"{path}."))
    before, after = exchanged[top]
    return (
        f"called with the example, the model puts {after} in the place of {before} at {top}; "
        "configure the model to have the one that is to be converted from the start"
    )


def reason_in(error: Exception) -> str:
    """The reason in an error; one that is not retrofit's own names its type."""
    first = (str(error).strip().splitlines() or [""])[0]
    return (
        first if isinstance(error, RetrofitError) else f"it cannot be read: {type(error).__name__}: {first}"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Has ``model`` in evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _recorded(model: nn.Module, probe: Probe) -> Recording:
    try:
        with same_draws():
            return record(model, probe.args, probe.kwargs)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CaptureError(
            f"{type(model).__name__} cannot be called with the example ({probe.name}): {first}; pass "
            "example_inputs that its forward takes"
        ) from error


def _keep(probe: Probe, call: OwnerCall) -> Tensor | None:
    """The probe's padding, if the call is about the same tokens."""
    if probe.keep is None:
        return None
    values = (*call.args, *call.kwargs.values())
    first = next((value for value in values if isinstance(value, Tensor) and value.dim() > 2), None)
    if first is None or first.shape[0] != probe.keep.shape[0]:
        return None
    length = first.shape[2] if first.dim() == 4 else first.shape[1]
    return probe.keep.cpu() if length == probe.keep.shape[1] else None
