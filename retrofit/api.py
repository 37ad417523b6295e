"""Inspect, convert and revert a model in place.

inspect(model)                →  InspectReport: what attention there is and whether it can be converted
convert(model, HSAConfig())   →  ConvertReport: all of it converted and verified, or nothing touched
revert(model)                 →  RevertReport: the same modules put back
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.admit import admit
from retrofit.capture.analyse import Found, Progress, analyse
from retrofit.capture.probes import ExampleInputs, is_transformers
from retrofit.capture.site_plan import Refused, SitePlan
from retrofit.configs import DenseConfig, HSAConfig, TargetConfig
from retrofit.errors import CaptureError, ModelLoadError, NoAttentionFound, VerificationError
from retrofit.exchange import dense as dense
from retrofit.exchange import originals, outlined, put_back, put_in
from retrofit.exchange import sites as sites
from retrofit.outlined import with_parts
from retrofit.reports import ConvertReport, InspectReport, RevertReport, SiteInfo
from retrofit.selection import Selection, attention_paths, first_match, matching, of_kind, side
from retrofit.site import RetrofittedAttention, build_target

ONLY_DENSE_BIASED = (
    "a position bias is added to its scores, which DenseConfig() alone carries; it keeps its own attention"
)
KEPT_DENSE = "kept dense by skip"
ONLY_DENSE = "cross-attention takes DenseConfig() alone and keeps its own attention"
ONLY_DENSE_POOLED = (
    "attention whose queries and keys are not the same tokens (one is pooled from the other, or learned) takes "
    "DenseConfig() alone and keeps its own attention"
)


def inspect(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, progress: Progress | None = None
) -> InspectReport:
    """Says what attention ``model`` has and which of it can be converted. Changes nothing.

    Args:
        model: Any module; a converted one is looked at in its original form.
        example_inputs: A tuple or a dict, as for ``torch.export``; made up for a transformers text model.
        progress: Called as ``progress(path, done, total)``.

    Raises:
        CaptureError: If an example is needed, or the model cannot be called with it.
    """
    converted = sites(model)
    targets = {path: site.retrofit.config.target for path, site in converted}
    with originals(model):
        analysis = analyse(model, example_inputs, progress)
        found = with_parts(model, analysis, outlined([site for _, site in converted]), progress).found
    numbers = attention_paths(found)
    infos = tuple(_info(item, targets.get(item.path), numbers) for item in found)
    return InspectReport(infos, observed=len(found))


def convert(
    model: nn.Module,
    config: TargetConfig | Mapping[str, TargetConfig],
    example_inputs: ExampleInputs | None = None,
    where: Selection = "*",
    *,
    kind: str | Sequence[str] | None = None,
    skip: Selection = (),
    progress: Progress | None = None,
    implementation: str = "auto",
) -> ConvertReport:
    """Rewrites the attention of ``model`` in place: what is verified and no more, or nothing if an error is raised.

    Args:
        model: Any module. Converted sites start again from their original.
        config: The target, or one for each glob over site paths; the first that matches counts.
        example_inputs: A tuple or a dict, as for ``torch.export``; made up for a transformers text model.
        where: Globs over site paths, numbers of sites as ``inspect`` counts them, or ranges: ``"*.1?.*"``, ``3``,
            ``range(4, 20)``, ``"4:20,-1"``. The others stay as they are, converted or not.
        kind: ``self``, ``cross``, ``encoder`` or ``decoder``, or several; the others stay as they are.
        skip: Sites to keep dense, written like ``where``.
        progress: Called as ``progress(path, done, total)``.
        implementation: Which implementation of the target's op runs.

    Raises:
        NoAttentionFound: If no site can be converted; lists what was looked at and why it was refused.
        ConfigError: If ``where``, ``kind``, ``skip`` or a glob matches no site.
        VerificationError: If no rewritten site reproduces the original; says what each did.
        CaptureError: If an example is needed, or the model cannot be called with it, or a site that is to stay is part
            of a module that does something else with it than with the last one.
    """
    return _convert(model, config, example_inputs, (where, kind, skip), progress, implementation, {})


def convert_again(
    model: nn.Module,
    config: Mapping[str, TargetConfig],
    example_inputs: ExampleInputs | None,
    proofs: Mapping[str, str],
) -> ConvertReport:
    """Converts a model that was converted before, as when it is loaded.

    Args:
        model: Its original form.
        config: The target of each site, by path.
        example_inputs: As for :func:`convert`.
        proofs: Of the sites' earlier verification (see ``retrofit.verify.proof``), by path; sites that are still
            what was verified are not verified again.

    Raises:
        ModelLoadError: If a site cannot be converted any more, besides what :func:`convert` raises.
    """
    report = _convert(model, config, example_inputs, ("*", None, ()), None, "auto", proofs)
    lost = {path: reason for path, reason in report.skipped.items() if path in config}
    if lost:
        raise ModelLoadError(
            f"a site that was converted when the model was saved cannot be now: {_reasons(lost)}"
        )
    return report


def _convert(
    model: nn.Module,
    config: TargetConfig | Mapping[str, TargetConfig],
    example_inputs: ExampleInputs | None,
    asked: tuple[Selection, str | Sequence[str] | None, Selection],
    progress: Progress | None,
    implementation: str,
    proofs: Mapping[str, str],
) -> ConvertReport:
    choose = _chooser(config)
    before = sites(model)
    try:
        put_back(model)
        analysis = analyse(model, example_inputs, progress)
        analysis = with_parts(model, analysis, outlined([site for _, site in before]), progress)
        found = analysis.found
        if not any(isinstance(item.plan, SitePlan) for item in found):
            raise NoAttentionFound(_none_found(model, found))
        left_out = _left_out(found, config, asked)
        earlier = dict(before)
        chosen: list[tuple[Found, SitePlan, TargetConfig]] = []
        skipped: dict[str, str] = {}
        kept: list[RetrofittedAttention] = []
        for item in found:
            target = choose(item.path)
            if item.path in left_out or target is None:
                skipped[item.path] = left_out.get(item.path, "no glob of config matches")
                if item.path in earlier and skipped[item.path] != KEPT_DENSE:
                    if earlier[item.path].original is not item.module:
                        raise CaptureError(
                            f"{item.path} cannot stay as it is, as the module around it does something else with "
                            "this example than with the one before; convert it as well, or revert first"
                        )
                    kept.append(earlier[item.path])
                    skipped[item.path] += f"; stays {earlier[item.path].retrofit.config.target}"
            elif isinstance(item.plan, Refused):
                skipped[item.path] = item.plan.reason
            elif item.plan.kind == "cross" and not isinstance(target, DenseConfig):
                skipped[item.path] = ONLY_DENSE_POOLED if item.plan.pooled else ONLY_DENSE
            elif item.plan.mask.biased and not isinstance(target, DenseConfig):
                skipped[item.path] = ONLY_DENSE_BIASED
            else:
                chosen.append((item, item.plan, _worth(item.plan, target)))
        if not chosen:
            raise NoAttentionFound(
                f"no site that was asked for can be converted: {_reasons(skipped)}; "
                f"choose other sites with where=…"
            )
        built = [
            (
                item,
                RetrofittedAttention(
                    item.module, item.path, plan, build_target(plan, DenseConfig(), _like(item))
                ),
            )
            for item, plan, _ in chosen
        ]
        fingerprint = next((site.fingerprint for _, site in before), ()) or _fingerprint(model)
        admission = admit(model, analysis, built, kept, proofs, progress)
        if not admission.admitted:
            raise VerificationError(f"no site reproduces the original: {_reasons(admission.refused)}")
        skipped |= admission.refused
        targets = {item.path: (plan, target) for item, plan, target in chosen}
        for item, site in admission.admitted:
            plan, target = targets[item.path]
            site.retrofit = build_target(plan, target, _like(item), implementation=implementation)
            site.retrofit.train(site.training)
            site.fingerprint = fingerprint
        _record(model, example_inputs)
    except BaseException:
        put_back(model)
        for _, site in before:
            site.restored()
        put_in(model, [site for _, site in before])
        raise
    numbers = attention_paths(found)
    converted = tuple(_info(item, targets[item.path][1].target, numbers) for item, _ in admission.admitted)
    left = tuple(
        replace(_info(item, None, numbers), convertible=False, reason=skipped[item.path])
        for item in found
        if item.path in skipped
    )
    return ConvertReport(converted, skipped, left, admission.verification)


def revert(model: nn.Module) -> RevertReport:
    """Puts the original attention modules back, with the model's own attention setting.

    Their weights are the model's: if those were trained since the conversion, the report says so and a
    warning is given.
    """
    found = sites(model)
    fingerprint = next((site.fingerprint for _, site in found if site.fingerprint), None)
    put_back(model)
    _record(model)
    changed = fingerprint is not None and fingerprint != _fingerprint(model)
    if changed:
        warnings.warn(
            "the original attention is back, but weights of the model have changed since the conversion; load "
            "the original checkpoint to get the original model",
            stacklevel=2,
        )
    return RevertReport(tuple(path for path, _ in found), changed)


def _like(item: Found) -> Tensor:
    """A tensor of the site's device and dtype."""
    call = item.calls[0].call
    tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))


def _fingerprint(model: nn.Module) -> tuple[tuple[str, float], ...]:
    """Sums of the base weights, by name."""
    own = [f"{path}.retrofit." for path, _ in sites(model)]
    with torch.no_grad():
        return tuple(
            (name, float(parameter.sum(dtype=torch.float64)))
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not any(name.startswith(prefix) for prefix in own)
        )


def _record(model: nn.Module, example_inputs: ExampleInputs | None = None) -> None:
    if is_transformers(model):
        from retrofit.record import record

        record(model, example_inputs)


def _info(item: Found, target: str | None, numbers: Sequence[str]) -> SiteInfo:
    plan = item.plan
    common: dict[str, Any] = {
        "path": item.path,
        "cls": type(item.module).__name__,
        "number": numbers.index(item.path) if item.path in numbers else None,
        "kind": plan.kind,
        "side": side(item) if plan.kind != "other" else None,
        "flops": item.flops,
        **{name: getattr(plan, name) for name in ("heads", "kv_heads", "head_dim", "spelling")},
    }
    if isinstance(plan, Refused):
        return SiteInfo(**common, reason=plan.reason, source=plan.source, near_miss=plan.near_miss)
    return SiteInfo(**common, mask=str(plan.mask), convertible=True, target=target)


def _worth(plan: SitePlan, target: TargetConfig) -> TargetConfig:
    """Leaves a layer dense whose sliding window lies within what the target would attend to anyway."""
    window = plan.mask.sliding_window
    if isinstance(target, HSAConfig) and 0 < window <= target.sink + target.window + target.budget:
        return DenseConfig()
    return target


def _chooser(
    config: TargetConfig | Mapping[str, TargetConfig],
) -> Callable[[str], TargetConfig | None]:
    from retrofit.targets import target_class

    for value in config.values() if isinstance(config, Mapping) else (config,):
        target_class(value)
    if not isinstance(config, Mapping):
        return lambda path: config
    return lambda path: first_match(config, path)


def _left_out(
    found: Sequence[Found],
    config: TargetConfig | Mapping[str, TargetConfig],
    asked: tuple[Selection, str | Sequence[str] | None, Selection],
) -> dict[str, str]:
    """Why sites are not asked for, by path."""
    where, kind, skip = asked
    if isinstance(config, Mapping):
        matching(tuple(config), found, "config")
    wanted = matching(where, found, "where")
    of_kinds = of_kind(kind, found) if kind is not None else wanted
    reasons = {item.path: "left out by where" for item in found if item.path not in wanted}
    reasons |= {item.path: "left out by kind" for item in found if item.path in wanted - of_kinds}
    reasons |= dict.fromkeys(matching(skip, found, "skip"), KEPT_DENSE)
    return reasons


def _none_found(model: nn.Module, found: Sequence[Found]) -> str:
    name = type(model).__name__
    if not found:
        return (
            f"{name} has no attention: no softmax or scaled_dot_product_attention was called in any of its modules; "
            "check that the example runs the part that attends"
        )
    reasons = {item.path: item.plan.reason for item in found if isinstance(item.plan, Refused)}
    return f"no attention of {name} can be converted: {_reasons(reasons)}"


def _reasons(reasons: Mapping[str, str]) -> str:
    """Names the paths by reason, so that thirty layers with one reason take one line."""
    grouped: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        grouped.setdefault(reason, []).append(path or "the model itself")
    return "; ".join(
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in grouped.items()
    )
