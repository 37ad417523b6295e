"""Everything a site needs to run, found out from recorded calls of the module it replaces.

calls of a module on the probes  →  one graph per spelling of the call  →  canonical attention, mask class
                                 →  SitePlan, or the reason why the module is refused
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.fx import Node

from retrofit.capture.assemble import assembled, assembled_keys
from retrofit.capture.attend import Attend
from retrofit.capture.call import CACHE_NAMES, LeafPath, Signature, spelled
from retrofit.capture.call_plan import parts_of_call
from retrofit.capture.cross import cross_mask
from retrofit.capture.export import Captured, capture
from retrofit.capture.guards import Guard, guards_of, guards_of_one
from retrofit.capture.identity import identity
from retrofit.capture.ignored import GOES_AROUND, ignored_arguments
from retrofit.capture.mask_argument import MaskArgument, is_mask_of, mask_argument
from retrofit.capture.observe import (
    Normalized,
    ProbedCall,
    holds_mask,
    is_pooled,
    kind_of,
    learned_mask,
    longer_samples,
    mask_paths_of,
    sample_of,
    selection,
    too_short,
)
from retrofit.capture.position_bias import (
    StepBias,
    bias_reason,
    dependence,
    hides_by,
    hiding,
    is_biased,
    is_mask,
    step_bias,
)
from retrofit.capture.record import OwnerCall
from retrofit.capture.site_plan import Refused, SitePlan
from retrofit.capture.slots import Slot, slot_of
from retrofit.capture.training import Training, training_of
from retrofit.errors import CaptureError
from retrofit.passes.attention.arguments import arguments, shape
from retrofit.passes.attention.axes import size_of
from retrofit.passes.attention.bias import ROUNDED
from retrofit.passes.attention.masks import MaskClass, MaskSample, classify, real_tokens
from retrofit.passes.attention.merged import differences
from retrofit.passes.attention.rewrite import attentions, normalize
from retrofit.passes.attention.rule import STAGES, source_line
from retrofit.passes.attention.weights import same_computation

MASK_NAME = "attention_mask"
_SHARED = "it attends to keys in the cache that another module has put there"


class Planner:
    """Makes plans; identical modules share one captured graph.

    Args:
        managed: Whether masks come through transformers' mask interface, so that a site gets the padding
            itself and the mask's own computation can go.
        far: Masks far beyond the example, of modules that are handed masks which sizes alone make.
    """

    def __init__(self, *, managed: bool, far: Mapping[nn.Module, Sequence[MaskSample]]) -> None:
        self.managed = managed
        self._far = far
        self.captures = 0
        self._graphs: dict[Any, Normalized] = {}
        self._training: dict[int, Training] = {}
        self._ignored: dict[int, frozenset[str]] = {}
        self._guards: dict[int, tuple[Guard, ...]] = {}
        self._longest: dict[int, Sequence[MaskSample] | CaptureError] = {}

    def plan(
        self, module: nn.Module, calls: Sequence[ProbedCall], every: Sequence[OwnerCall]
    ) -> tuple[SitePlan | Refused, list[ProbedCall]]:
        """Returns the plan for ``module``, or why there is none, and the calls with their real tokens.

        Args:
            module: The module.
            calls: Its first call on each probe.
            every: All its calls.
        """
        samples: list[MaskSample] = []
        plan = self._plan(module, calls, every, samples)
        if isinstance(plan, Refused) or plan.kind == "cross":
            return plan, list(calls)
        return plan, [
            ProbedCall(probed.call, real_tokens(sample))
            for probed, sample in zip(calls, samples, strict=True)
        ]

    def _plan(
        self,
        module: nn.Module,
        calls: Sequence[ProbedCall],
        every: Sequence[OwnerCall],
        samples: list[MaskSample],
    ) -> SitePlan | Refused:
        signature = Signature.of(module)
        mask_paths: set[LeafPath] = set()
        primary: Normalized | None = None
        kinds: set[str] = set()
        for probed in calls:
            try:
                normalized = self._normalized(module, probed.call, signature)
            except CaptureError as error:  # its mask does not fit to keys that are not its own
                others = calls[0].call.continued or any(call.shared for call in every)
                return Refused(_SHARED if others else str(error))
            if normalized.attention is None:
                nearest = normalized.nearest
                return Refused(
                    normalized.reason,
                    normalized.kind,
                    nearest.source if nearest else None,
                    f"{nearest.rule}, all but {nearest.stage}" if nearest else None,
                    several=bool(normalized.several) and not self.managed,
                )
            primary = primary or normalized
            kinds.add(kind_of(normalized.attention))
            if (short := too_short(normalized.attention)) is not None:
                return _refused(normalized.attention, short, "the layout")
            if arguments(normalized.attention)["dropout_p"]:
                reason = "it drops out attention weights in evaluation as well, not in training alone"
                return _refused(normalized.attention, reason, "the dropout")
            chosen_by = selection(normalized.attention)
            if chosen_by is not None and kinds == {"self"}:
                reason = f"the mask shows the keys that {chosen_by} selects, not all that are real"
                return _refused(normalized.attention, reason, "the mask")
            try:
                samples.append(sample_of(module, normalized, probed, signature))
            except CaptureError as error:
                return _refused(normalized.attention, str(error), "the mask")
            mask_paths |= mask_paths_of(normalized)
        assert primary is not None
        assert primary.attention is not None
        (kind,) = kinds if len(kinds) == 1 else ("cross",)
        if kind == "self" and any(call.shared for call in every):
            return _refused(primary.attention, _SHARED, "the place in the cache")
        mask = self._mask(module, primary, samples, calls, every, mask_paths, kind)
        if isinstance(mask, str):
            return _refused(primary.attention, mask, "the mask", kind)
        if mask.biased:
            samples[:] = map(hiding, samples)
        if (mask.slopes or mask.biased) and self.managed:
            mask_paths = {path for path in mask_paths if hides_by(path, calls, signature)}
        if self.managed and len(mask_paths) > 1:
            names = ", ".join(sorted(str(path[0]) for path in mask_paths))
            reason = f"the mask is made from several inputs: {names}"
            return _refused(primary.attention, reason, "the mask", kind)
        if kind == "cross" and not mask.biased and self.managed:
            mask_paths = {path for path in mask_paths if is_mask_of(path, calls, samples, signature)}
        if (own := self._now_and_then(module, primary, calls, signature, mask_paths)) is not None:
            reason = f"it computes with {spelled(own)}, which it is given in some calls alone"
            return _refused(primary.attention, reason, "the inputs", kind)
        slot = slot_of(module, signature, every)
        if isinstance(slot, str):
            return _refused(primary.attention, slot, "the place in the cache", kind)
        training = self._in_training(module, calls[0].call, primary)
        if id(primary) not in self._ignored:
            self._ignored[id(primary)] = ignored_arguments(module, calls[0].call, primary, normalized_of)
            # Steps of single tokens are compared in the whole model where there is a cache.
            self._guards[id(primary)] = (
                *guards_of(primary.captured),
                *guards_of_one(module, primary, calls[0].call, rows_alone=self.managed),
            )
        hides = self._hides(primary, calls, signature)
        step = step_bias(module, primary, calls[0], hides) if mask.biased and kind == "self" else None
        return _plan(
            primary,
            kind,
            mask,
            signature,
            calls[0].call,
            mask_paths,
            slot,
            training,
            (hides, step),
            self._ignored[id(primary)],
            self._guards[id(primary)],
            partial(mask_argument, calls=calls, samples=samples, signature=signature, of_site=mask),
            managed=self.managed,
        )

    def _mask(
        self,
        module: nn.Module,
        primary: Normalized,
        samples: Sequence[MaskSample],
        calls: Sequence[ProbedCall],
        every: Sequence[OwnerCall],
        mask_paths: set[LeafPath],
        kind: str,
    ) -> MaskClass | str:
        """The class of the mask, or why there is none that can be carried over."""
        attention = primary.attention
        assert attention is not None
        biased = is_biased(module, attention, samples, mask_paths)
        if kind == "cross" and not (biased and self.managed):
            return cross_mask(attention, samples, every, biased=False)
        try:
            longer = [*self._longer(module, primary, calls[0].call), *self._far.get(module, ())]
        except CaptureError as error:
            return str(error)
        if not biased:
            return classify([*samples, *longer])
        if (reason := dependence(primary)) is not None:
            return reason
        if kind == "self" and self._by_distance(module, attention, mask_paths):
            found = classify([*samples, *longer])
            if not isinstance(found, str) or found.startswith(ROUNDED):
                return found
        hides = self._hides(primary, calls, Signature.of(module))
        if (reason := bias_reason(module, primary, calls, samples, hides)) is not None:
            return reason
        hidden = list(map(hiding, samples))
        if kind == "cross":
            return cross_mask(attention, hidden, every, biased=True)
        found = classify([*hidden, *map(hiding, longer)])
        return found if isinstance(found, str) else replace(found, biased=True)

    def _longer(self, module: nn.Module, primary: Normalized, call: OwnerCall) -> Sequence[MaskSample]:
        """The mask far beyond the example; identical modules that hold nothing for it share it."""
        assert primary.attention is not None
        if holds_mask(primary.attention, primary.captured.constants):
            return longer_samples(module, primary, call, Signature.of(module))
        key = id(primary)
        if key not in self._longest:
            try:
                self._longest[key] = longer_samples(module, primary, call, Signature.of(module))
            except CaptureError as error:
                self._longest[key] = error
        found = self._longest[key]
        if isinstance(found, CaptureError):
            raise found
        return found

    @staticmethod
    def _by_distance(module: nn.Module, attention: Node, mask_paths: set[LeafPath]) -> bool:
        """Whether a bias in proportion to the distance can be had in queries and keys."""
        given = arguments(attention)
        learned = learned_mask(module, attention) is not None and all(map(is_mask, mask_paths))
        # A constant in a row of scores is not the same as none beside a softcap or sinks.
        return not learned and not given["softcap"] and given["sinks"] is None

    def _now_and_then(
        self,
        module: nn.Module,
        primary: Normalized,
        calls: Sequence[ProbedCall],
        signature: Signature,
        mask_paths: Set[LeafPath],
    ) -> LeafPath | None:
        """An input that the first call is without and that another one's graph reads; masks are read around it."""
        own = set(primary.captured.inputs.values())
        for probed in calls[1:]:
            normalized = self._normalized(module, probed.call, signature)
            for name, path in normalized.captured.inputs.items():
                node = next(item for item in normalized.captured.graph.nodes if item.name == name)
                if path not in own | mask_paths and path != (MASK_NAME,) and node.users:
                    return path
        return None

    def _hides(self, normalized: Normalized, calls: Sequence[ProbedCall], signature: Signature) -> str | None:
        """The placeholder of the mask that goes around the graph."""
        paths = mask_paths_of(normalized) if self.managed else set()
        hiding = {path for path in paths if hides_by(path, calls, signature)}
        return next((name for name, path in normalized.captured.inputs.items() if path in hiding), None)

    def _in_training(self, module: nn.Module, call: OwnerCall, evaluated: Normalized) -> Training:
        key = id(evaluated)
        if key not in self._training:
            self._training[key] = training_of(module, call, evaluated, normalized_of)
        return self._training[key]

    def _normalized(self, module: nn.Module, call: OwnerCall, signature: Signature) -> Normalized:
        key = identity(module, call, signature)
        if key not in self._graphs:
            self.captures += 1
            captured = capture(module, call)
            if isinstance(module, Attend):  # whose lines are retrofit's own
                for node in captured.graph.nodes:
                    node.meta["stack_trace"] = module.trace
            self._graphs[key] = normalized_of(captured)
        return self._graphs[key]


def normalized_of(captured: Captured) -> Normalized:
    """Finds the one attention of a captured module."""
    refusals = normalize(captured.graph).refusals
    found = attentions(captured.graph)
    if captured.unfit is not None and (found or not refusals):
        return Normalized(captured, None, captured.unfit)
    if refusals and not (found and not any(refusal.attention for refusal in refusals)):
        kind = "unknown" if found or any(refusal.attention for refusal in refusals) else "other"
        nearest = max(refusals, key=lambda refusal: (refusal.attention, STAGES.index(refusal.stage)))
        reason = "; ".join(dict.fromkeys(str(refusal) for refusal in refusals))
        return Normalized(captured, None, reason, kind, nearest)
    if not found:
        return Normalized(captured, None, "attention ran in it, in a form that no rule reads")
    if (chunks := _chunks(found)) is not None:
        return Normalized(captured, None, chunks)
    if len(found) != 1:
        names = f" (at {'; at '.join(map(_where, found))})"
        differing = f", which differ in {' and '.join(differences(*found[:2]))}"
        reason = f"{len(found)} attentions in one module{differing}{names}"
        return Normalized(captured, None, reason, several=tuple(found))
    return Normalized(captured, found[0], "")


def _chunks(found: Sequence[Node]) -> str | None:
    """What is to say where several attentions are those of parts of the queries to the same keys; None elsewhere."""
    keys = [node.args[1:3] for node in found]
    if len(found) < 2 or not all(same_computation(keys[0], other) for other in keys[1:]):
        return None
    queries = [size_of((shape(node.args[0]) or ())[2]) for node in found]
    if sum(queries) != size_of((shape(found[0].args[1]) or ())[2]):
        return None
    return (
        f"its queries attend in {len(found)} chunks, each in a call of its own (at {_where(found[0])}), which are as "
        "many as the example makes them; have it attend with all queries at once"
    )


def _refused(attention: Node, reason: str, stage: str, kind: str = "self") -> Refused:
    """The refusal of an attention that a rule recognised, for something that came after."""
    spelling = str(attention.meta.get("spelling"))
    q, k = (shape(node) for node in attention.args[:2])
    assert q is not None
    assert k is not None
    return Refused(
        f"{reason} (at {_where(attention)})",
        kind,
        source_line(attention),
        f"{spelling}, all but {stage}",
        spelling,
        heads=q[1],
        kv_heads=k[1],
        head_dim=q[3],
    )


def _where(attention: Node) -> str:
    line = source_line(attention)
    return f"node {attention.name}, {line}" if line else f"node {attention.name}"


def _plan(
    normalized: Normalized,
    kind: str,
    mask: MaskClass,
    signature: Signature,
    call: OwnerCall,
    mask_paths: set[LeafPath],
    slot: Slot,
    training: Training,
    bias: tuple[str | None, StepBias | None],
    ignored: frozenset[str],
    guards: tuple[Guard, ...],
    read: Callable[[LeafPath], MaskArgument],
    *,
    managed: bool,
) -> SitePlan:
    captured, attention = normalized.captured, normalized.attention
    assert attention is not None
    q, k, v = (shape(node) for node in attention.args[:3])
    assert q is not None
    assert k is not None
    assert v is not None
    keep_mask = attention.args[3] is not None and not managed and bool(mask_paths_of(normalized))
    if kind == "cross":
        keep_mask = attention.args[3] is not None and not (managed and mask_paths)
        keep_mask = keep_mask and not mask.biased
    hides, step = bias
    write = partial(assembled, keep_mask=keep_mask, mask=mask, kind=kind, hides=hides)
    source = write(normalized)
    keys = assembled_keys(normalized) if kind == "cross" else None
    trained = write(training.normalized) if training.normalized is not None else None
    if trained is not None and trained.inputs != source.inputs:
        training = Training(reason="in training it takes other inputs")
    argument = next(iter(mask_paths), None) if managed else None
    taken = {captured.inputs[name] for name in source.inputs}
    beside = argument
    if managed and argument is None and MASK_NAME in signature.names and (MASK_NAME,) not in taken:
        beside = (MASK_NAME,)  # a converted model may hand padding over
        given = signature.bind(call.args, call.kwargs).get(MASK_NAME)
        argument = beside if given is None else None  # one that nobody reads says nothing
    around = (*CACHE_NAMES, *GOES_AROUND, *ignored, slot.argument)
    return SitePlan(
        **parts_of_call(
            captured, source, signature, call, around, closed=not managed, guards=guards, mask=beside
        ),
        training=None if training.reason or trained is None else trained.code,
        untrainable=training.reason,
        keys=None if keys is None else keys.code,
        key_inputs=() if keys is None else tuple(captured.inputs[name] for name in keys.inputs),
        mask_argument=None if argument is None else read(argument),
        keep_mask=keep_mask,
        mask=mask,
        spelling=str(attention.meta.get("spelling")),
        kind=kind,
        pooled=kind == "cross" and is_pooled(attention),
        heads=q[1],
        kv_heads=k[1],
        head_dim=q[3],
        value_dim=v[3],
        scale=float(attention.args[5]),  # type: ignore[arg-type]
        dropout=training.dropout,
        softcap=float(attention.args[7]),  # type: ignore[arg-type]
        sinks=attention.args[8] is not None,
        slot=slot,
        step=step,
        unkept=frozenset(),
    )
