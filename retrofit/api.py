"""Inspect, convert and revert a model in place.

inspect(model)                →  InspectReport: what attention there is and whether it can be converted
convert(model, HSAConfig())   →  ConvertReport: all of it converted and verified, or nothing touched
revert(model)                 →  RevertReport: the same modules put back
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from retrofit import masks
from retrofit.capture.call import is_cache
from retrofit.capture.plan import Planner, ProbedCall, Refused, SitePlan
from retrofit.capture.probes import ExampleInputs, Probe, is_transformers, make_probes
from retrofit.capture.record import OwnerCall, record
from retrofit.configs import DenseConfig, TargetConfig
from retrofit.errors import CaptureError, ConfigError, NoAttentionFound, VerificationError
from retrofit.site import RetrofittedAttention, build_target

TOLERANCE = 1e-5
Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""


@dataclass(frozen=True)
class SiteInfo:
    """One attention-owning module.

    Attributes:
        path: Where it is in the model.
        cls: Its class's name.
        kind: ``self``, ``cross`` or ``unknown``.
        spelling: Which rule recognised its attention.
        mask: Its mask's class: ``none``, ``causal``, ``key padding``, ``causal+padding``, ….
        convertible: Whether it can be converted.
        reason: Why not.
        target: The target it has, if it is converted.
    """

    path: str
    cls: str
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    mask: str | None = None
    spelling: str | None = None
    kind: str = "unknown"
    convertible: bool = False
    reason: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class InspectReport:
    """What attention a model has.

    Attributes:
        sites: One entry for each module that owns attention.
        observed: Number of modules in which a softmax or SDPA call was seen, counted independently.
    """

    sites: tuple[SiteInfo, ...]
    observed: int


@dataclass(frozen=True)
class Verification:
    """How far the dense round trip is from the original, relative to the largest value.

    Attributes:
        sites: Largest relative error of each site over its recorded calls.
        prefill: Of the whole model's output.
        decode: Of the logits of cached steps; None for a model without a cache.
    """

    sites: Mapping[str, float]
    prefill: float | None
    decode: float | None


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        converted: The converted sites.
        skipped: The other modules with attention, and why each was left, by path.
        verification: The errors measured before the targets went in.
    """

    converted: tuple[SiteInfo, ...]
    skipped: Mapping[str, str]
    verification: Verification


@dataclass(frozen=True)
class RevertReport:
    """What ``revert`` did.

    Attributes:
        reverted: Paths of the sites whose original attention is back.
        weights_changed: Whether base weights are not those of before the conversion.
    """

    reverted: tuple[str, ...]
    weights_changed: bool


@dataclass
class _Found:
    """The analysis of one module."""

    path: str
    module: nn.Module
    plan: SitePlan | Refused
    calls: list[ProbedCall] = field(default_factory=list)


def sites(model: nn.Module) -> list[tuple[str, RetrofittedAttention]]:
    """Returns the converted sites of ``model`` by path."""
    return [
        (path, module) for path, module in model.named_modules() if isinstance(module, RetrofittedAttention)
    ]


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Runs every converted site with dense attention: the original model, as a teacher."""
    found = [site for _, site in sites(model)]
    before = [site.dense_mode for site in found]
    for site in found:
        site.dense_mode = True
    try:
        yield
    finally:
        for site, mode in zip(found, before, strict=True):
            site.dense_mode = mode


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
    targets = {path: site.retrofit.config.target for path, site in sites(model)}
    with _originals(model):
        probes, found = _analyse(model, example_inputs, progress)
    del probes
    infos = tuple(_info(item, targets.get(item.path)) for item in found)
    return InspectReport(infos, observed=len(found))


def convert(
    model: nn.Module,
    config: TargetConfig | Mapping[str, TargetConfig],
    example_inputs: ExampleInputs | None = None,
    where: str | list[str] | tuple[str, ...] = "*",
    *,
    progress: Progress | None = None,
    implementation: str = "auto",
) -> ConvertReport:
    """Rewrites the attention of ``model`` in place; all of it verified, or nothing changed.

    Args:
        model: Any module. Converted sites start again from their original.
        config: The target, or one for each glob over site paths; the first that matches counts.
        example_inputs: A tuple or a dict, as for ``torch.export``; made up for a transformers text model.
        where: Glob or globs over site paths; the others stay as they are.
        progress: Called as ``progress(path, done, total)``.
        implementation: Which implementation of the target's op runs.

    Raises:
        NoAttentionFound: If no site can be converted; lists what was looked at and why it was refused.
        ConfigError: If ``where`` or a glob matches no site.
        VerificationError: If a rewritten site or the whole model differs from the original.
        CaptureError: If an example is needed, or the model cannot be called with it.
    """
    choose = _chooser(config)
    globs = (where,) if isinstance(where, str) else tuple(where)
    before = sites(model)
    changed = False
    try:
        _put_back(model)
        probes, found = _analyse(model, example_inputs, progress)
        if not any(isinstance(item.plan, SitePlan) for item in found):
            raise NoAttentionFound(_none_found(model, found))
        _check_globs(globs, found, "where")
        if isinstance(config, Mapping):
            _check_globs(tuple(config), found, "config")
        chosen: list[tuple[_Found, SitePlan, TargetConfig]] = []
        skipped: dict[str, str] = {}
        for item in found:
            target = choose(item.path)
            if not any(fnmatch.fnmatchcase(item.path, glob) for glob in globs) or target is None:
                skipped[item.path] = (
                    "left out by where" if target is not None else "no glob of config matches"
                )
            elif isinstance(item.plan, Refused):
                skipped[item.path] = item.plan.reason
            else:
                chosen.append((item, item.plan, target))
        if not chosen:
            raise NoAttentionFound(
                f"no site that was asked for can be converted: {_reasons(skipped)}; "
                f"choose other sites with where=…"
            )
        built = [
            RetrofittedAttention(item.module, item.path, plan, build_target(plan, DenseConfig(), _like(item)))
            for item, plan, _ in chosen
        ]
        errors: dict[str, float] = {}
        for done, ((item, _, _), site) in enumerate(zip(chosen, built, strict=True)):
            errors[item.path] = _verify_site(item, site)
            if progress is not None:
                progress(f"verify {item.path}", done + 1, len(chosen))
        reference = _model_outputs(model, probes)
        fingerprint = _fingerprint(model)
        changed = True
        for site in built:
            _exchange(model, site.original, site)
        masks.enable(model)
        prefill, decode = _compare(reference, _model_outputs(model, probes), probes)
        for (item, plan, target), site in zip(chosen, built, strict=True):
            site.retrofit = build_target(plan, target, _like(item), implementation=implementation)
            site.retrofit.train(site.training)
            site.fingerprint = fingerprint
        _record(model)
    except BaseException:
        if changed:
            _put_back(model)
        for _, site in before:
            site.restored()
            _exchange(model, site.original, site)
        if before:
            masks.enable(model)
        raise
    converted = tuple(_info(item, target.target) for item, _, target in chosen)
    return ConvertReport(converted, skipped, Verification(errors, prefill, decode))


def revert(model: nn.Module) -> RevertReport:
    """Puts the original attention modules back, with the model's own attention setting.

    Their weights are the model's: if those were trained since the conversion, the report says so and a
    warning is given.
    """
    found = sites(model)
    fingerprint = next((site.fingerprint for _, site in found if site.fingerprint), None)
    _put_back(model)
    _record(model)
    changed = fingerprint is not None and fingerprint != _fingerprint(model)
    if changed:
        warnings.warn(
            "the original attention is back, but weights of the model have changed since the conversion; load "
            "the original checkpoint to get the original model",
            stacklevel=2,
        )
    return RevertReport(tuple(path for path, _ in found), changed)


def _analyse(
    model: nn.Module, example_inputs: ExampleInputs | None, progress: Progress | None
) -> tuple[list[Probe], list[_Found]]:
    probes = make_probes(model, example_inputs)
    calls: dict[str, list[ProbedCall]] = {}
    with _evaluating(model):
        for probe in probes:
            for path, owner_calls in _recorded(model, probe).items():
                calls.setdefault(path, []).extend(
                    ProbedCall(call, _keep(probe, call)) for call in owner_calls[:1]
                )
    planner = Planner(managed=is_transformers(model))
    found = []
    for done, (path, of_path) in enumerate(calls.items()):
        module = model.get_submodule(path)
        inner = next(
            (other for other in calls if other != path and other.startswith(f"{path}." if path else "")), None
        )
        plan: SitePlan | Refused
        if inner is not None:
            plan = Refused(f"it has a softmax of its own around the attention of {inner}")
        elif not path:
            plan = Refused("the attention is the whole model; wrap it in a module that holds it")
        else:
            plan = planner.plan(module, of_path)
        found.append(_Found(path, module, plan, of_path))
        if progress is not None:
            progress(f"capture {path}", done + 1, len(calls))
    return probes, found


def _recorded(model: nn.Module, probe: Probe) -> dict[str, list[OwnerCall]]:
    try:
        return record(model, probe.args, probe.kwargs).owners
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CaptureError(
            f"{type(model).__name__} cannot be called with the example ({probe.name}): {first}; pass example_inputs "
            "that its forward takes"
        ) from error


def _keep(probe: Probe, call: OwnerCall) -> Tensor | None:
    """The probe's padding, if the call is about the same tokens."""
    if probe.keep is None:
        return None
    first = next(
        (
            value
            for value in (*call.args, *call.kwargs.values())
            if isinstance(value, Tensor) and value.dim() > 2
        ),
        None,
    )
    if first is None or first.shape[0] != probe.keep.shape[0]:
        return None
    length = first.shape[2] if first.dim() == 4 else first.shape[1]
    return probe.keep.cpu() if length == probe.keep.shape[1] else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _originals(model: nn.Module) -> Iterator[None]:
    """Has the original attention in place for a while."""
    before = sites(model)
    if before:
        _put_back(model)
    try:
        yield
    finally:
        for _, site in before:
            _exchange(model, site.original, site)
        if before:
            masks.enable(model)


def _put_back(model: nn.Module) -> None:
    found = sites(model)
    if not found:
        return
    masks.restore(model)
    for _, site in found:
        _exchange(model, site, site.restored())


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        if module is new:
            continue
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _like(item: _Found) -> Tensor:
    """A tensor of the site's device and dtype."""
    call = item.calls[0].call
    tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))


def _verify_site(item: _Found, site: RetrofittedAttention) -> float:
    """Runs the dense site on every recorded call; returns the largest relative error."""
    worst = 0.0
    for probed in item.calls:
        call = probed.call
        args, kwargs = _padding_instead(site, call, probed.keep)
        with torch.no_grad(), _evaluating(site):
            got = _first_tensor(site(*args, **kwargs))
        worst = max(worst, _relative(got, _first_tensor(call.output), probed.keep))
    like = _like(item)
    tolerance = max(TOLERANCE, 8 * torch.finfo(like.dtype).eps)
    if not worst <= tolerance:
        raise VerificationError(
            f"{item.path} differs from the original by {worst:.1e} relative after rewriting, at most "
            f"{tolerance:.0e} is allowed; leave it out with where=… and report it"
        )
    return worst


def _padding_instead(
    site: RetrofittedAttention, call: OwnerCall, keep: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The recorded call as a converted model makes it: padding for a mask, no cache."""
    plan = site.plan
    bound = plan.signature.bind(call.args, call.kwargs)
    values = {name: None if is_cache(value) else value for name, value in bound.items()}
    if plan.mask_argument is not None and keep is not None:
        whole = bool(keep.all())
        values[str(plan.mask_argument[0])] = None if whole else keep.to(_like_of(values).device)
    return (), values


def _like_of(values: Mapping[str, Any]) -> Tensor:
    return next(value for value in values.values() if isinstance(value, Tensor))


def _first_tensor(output: Any) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _relative(got: Tensor, expected: Tensor, keep: Tensor | None) -> float:
    """Largest difference over the real tokens, relative to the largest value."""
    difference = (got.double() - expected.double()).abs()
    size = expected.double().abs()
    if keep is not None and got.dim() >= 3:
        dim = 2 if got.dim() == 4 and got.shape[1] != keep.shape[1] else 1
        shape = [1] * got.dim()
        shape[0], shape[dim] = keep.shape
        real = keep.to(got.device).view(shape)
        difference, size = difference * real, size * real
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.max() / size.max().clamp(min=1e-30))


@dataclass(frozen=True)
class _Outputs:
    prefill: list[Tensor]
    steps: list[Tensor]


def _model_outputs(model: nn.Module, probes: list[Probe]) -> _Outputs:
    """The model's own outputs on the probes, and of cached steps where it has a cache."""
    with torch.no_grad(), _evaluating(model):
        prefill = [_first_tensor(model(*probe.args, **probe.kwargs)) for probe in probes]
        steps = []
        for probe in probes:
            if probe.name in ("plain", "padded left"):
                steps += _cached_steps(model, probe)
    return _Outputs(prefill, steps)


def _cached_steps(model: nn.Module, probe: Probe) -> list[Tensor]:
    config = getattr(model, "config", None)
    if not getattr(model, "_supports_cache_class", True) or not _is_decoder(model, config):
        return []
    ids = probe.kwargs["input_ids"]
    mask = probe.kwargs.get("attention_mask")
    first = ids.shape[1] - 6
    rest = {k: v for k, v in probe.kwargs.items() if k not in ("input_ids", "attention_mask")}
    logits, cache, position = [], None, 0
    for length in (first, 4, 1, 1):
        stop = position + length
        given = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, position:stop]
            given["position_ids"] = positions
        output = model(
            input_ids=ids[:, position:stop], past_key_values=cache, use_cache=True, **given, **rest
        )
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return []
        real = probe.keep[:, position:stop] if probe.keep is not None else None
        tensor = _first_tensor(output.logits if hasattr(output, "logits") else output)
        logits.append(tensor if real is None else tensor * real.to(tensor.device)[..., None])
        position = stop
    return logits


def _is_decoder(model: nn.Module, config: Any) -> bool:
    can = getattr(model, "can_generate", None)
    generates = bool(can()) if callable(can) else False
    return generates and not getattr(config, "is_encoder_decoder", False)


def _compare(reference: _Outputs, got: _Outputs, probes: list[Probe]) -> tuple[float, float | None]:
    prefill = max(
        _relative(a, b, probe.keep if a.dim() >= 3 else None)
        for a, b, probe in zip(got.prefill, reference.prefill, probes, strict=True)
    )
    decode = max(
        (_relative(a, b, None) for a, b in zip(got.steps, reference.steps, strict=True)), default=None
    )
    dtype = got.prefill[0].dtype
    tolerance = max(1e-4, 32 * torch.finfo(dtype).eps)
    for name, error in (("prefill", prefill), ("cached decode", decode)):
        if error is not None and not error <= tolerance:
            raise VerificationError(
                f"the whole model's {name} differs from the original by {error:.1e} relative after rewriting, at "
                f"most {tolerance:.0e} is allowed; leave sites out with where=… to find the cause"
            )
    return prefill, decode


def _fingerprint(model: nn.Module) -> tuple[tuple[str, float], ...]:
    """Sums of the base weights, by name."""
    own = [f"{path}.retrofit." for path, _ in sites(model)]
    with torch.no_grad():
        return tuple(
            (name, float(parameter.sum(dtype=torch.float64)))
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and not any(name.startswith(prefix) for prefix in own)
        )


def _record(model: nn.Module) -> None:
    if is_transformers(model):
        from retrofit import saving

        saving.record(model)


def _info(item: _Found, target: str | None) -> SiteInfo:
    plan = item.plan
    name = type(item.module).__name__
    if isinstance(plan, Refused):
        return SiteInfo(item.path, name, kind=plan.kind, reason=plan.reason)
    return SiteInfo(
        item.path,
        name,
        heads=plan.heads,
        kv_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        mask=str(plan.mask),
        spelling=plan.spelling,
        kind=plan.kind,
        convertible=True,
        target=target,
    )


def _chooser(
    config: TargetConfig | Mapping[str, TargetConfig],
) -> Callable[[str], TargetConfig | None]:
    from retrofit.targets import target_class

    for value in config.values() if isinstance(config, Mapping) else (config,):
        target_class(value)
    if not isinstance(config, Mapping):
        return lambda path: config
    return lambda path: next(
        (value for glob, value in config.items() if fnmatch.fnmatchcase(path, glob)), None
    )


def _check_globs(globs: tuple[str, ...], found: list[_Found], name: str) -> None:
    paths = [item.path for item in found]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(path, glob) for path in paths):
            near = get_close_matches(glob, paths, n=3, cutoff=0.3) or paths[:3]
            raise ConfigError(
                f"{name}={glob!r} matches no attention module; the nearest are {', '.join(near)}"
            )


def _none_found(model: nn.Module, found: list[_Found]) -> str:
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
