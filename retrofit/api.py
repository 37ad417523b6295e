"""Inspect, convert and revert a model in place.

inspect(model)                →  InspectReport: what attention there is and whether it can be converted
convert(model, HSAConfig())   →  ConvertReport: all of it converted and verified, or nothing touched
revert(model)                 →  RevertReport: the same modules put back
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from retrofit import masks, outputs
from retrofit.capture.analyse import Analysis, Found, Progress, analyse
from retrofit.capture.plan import Refused, SitePlan
from retrofit.capture.probes import ExampleInputs, is_transformers
from retrofit.configs import DenseConfig, HSAConfig, TargetConfig
from retrofit.errors import ConfigError, NoAttentionFound
from retrofit.reports import ConvertReport, InspectReport, RevertReport, SiteInfo, Verification
from retrofit.site import RetrofittedAttention, build_target
from retrofit.verify import ModelCheck, first_tensor, proof, verify_site


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
        found = analyse(model, example_inputs, progress).found
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
        where: Glob or globs over site paths; the others stay as they are, converted or not.
        progress: Called as ``progress(path, done, total)``.
        implementation: Which implementation of the target's op runs.

    Raises:
        NoAttentionFound: If no site can be converted; lists what was looked at and why it was refused.
        ConfigError: If ``where`` or a glob matches no site.
        VerificationError: If a rewritten site or the whole model differs from the original.
        CaptureError: If an example is needed, or the model cannot be called with it.
    """
    return _convert(model, config, example_inputs, where, progress, implementation, {})


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
    """
    return _convert(model, config, example_inputs, "*", None, "auto", proofs)


def _convert(
    model: nn.Module,
    config: TargetConfig | Mapping[str, TargetConfig],
    example_inputs: ExampleInputs | None,
    where: str | Sequence[str],
    progress: Progress | None,
    implementation: str,
    proofs: Mapping[str, str],
) -> ConvertReport:
    choose = _chooser(config)
    globs = (where,) if isinstance(where, str) else tuple(where)
    before = sites(model)
    changed = False
    try:
        _put_back(model)
        analysis = analyse(model, example_inputs, progress)
        found = analysis.found
        if not any(isinstance(item.plan, SitePlan) for item in found):
            raise NoAttentionFound(_none_found(model, found))
        _check_globs(globs, found, "where")
        if isinstance(config, Mapping):
            _check_globs(tuple(config), found, "config")
        earlier = dict(before)
        chosen: list[tuple[Found, SitePlan, TargetConfig]] = []
        skipped: dict[str, str] = {}
        for item in found:
            target = choose(item.path)
            if not any(fnmatch.fnmatchcase(item.path, glob) for glob in globs) or target is None:
                skipped[item.path] = (
                    "left out by where" if target is not None else "no glob of config matches"
                )
                if item.path in earlier:
                    skipped[item.path] += f"; stays {earlier[item.path].retrofit.config.target}"
            elif isinstance(item.plan, Refused):
                skipped[item.path] = item.plan.reason
            else:
                chosen.append((item, item.plan, _worth(item.plan, target)))
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
            if proofs.get(item.path) == proof(site):
                continue
            errors[item.path] = verify_site(item, site)
            if progress is not None:
                progress(f"verify {item.path}", done + 1, len(chosen))
        check = None
        if errors:
            keep = _real_tokens(analysis, [item for item, _, _ in chosen])
            check = ModelCheck(model, analysis.probes, analysis.outputs, keep)
        fingerprint = next((site.fingerprint for _, site in before), ()) or _fingerprint(model)
        changed = True
        renewed = {site.path for site in built}
        for site in (*built, *(site for path, site in before if path not in renewed)):
            _exchange(model, site.original, site)
        _enable(model)
        prefill, decode = None, None
        if check is not None:
            with dense(model):
                prefill, decode = check.compare(model)
        for (item, plan, target), site in zip(chosen, built, strict=True):
            site.retrofit = build_target(plan, target, _like(item), implementation=implementation)
            site.retrofit.train(site.training)
            site.fingerprint = fingerprint
        _record(model, example_inputs)
    except BaseException:
        if changed:
            _put_back(model)
        for _, site in before:
            site.restored()
            _exchange(model, site.original, site)
        if before:
            _enable(model)
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
            _enable(model)


def _put_back(model: nn.Module) -> None:
    found = sites(model)
    if not found:
        return
    masks.restore(model)
    if is_transformers(model):
        outputs.release(model)
    for _, site in found:
        _exchange(model, site, site.restored())


def _enable(model: nn.Module) -> None:
    """Has what surrounds the converted sites deal with them."""
    masks.enable(model)
    if is_transformers(model):
        outputs.guard(model)


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        if module is new:
            continue
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _real_tokens(analysis: Analysis, chosen: Sequence[Found]) -> list[Tensor | None]:
    """The real tokens of each probe's output: those of the probe, or of the sites that see as many tokens."""
    found = []
    for number, (probe, output) in enumerate(zip(analysis.probes, analysis.outputs, strict=True)):
        shape = first_tensor(output).shape
        calls = [item.calls[number].keep for item in chosen if len(item.calls) == len(analysis.probes)]
        fitting = [keep for keep in (probe.keep, *calls) if keep is not None and keep.shape == shape[:2]]
        found.append(fitting[0] if fitting else None)
    return found


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


def _info(item: Found, target: str | None) -> SiteInfo:
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
    return lambda path: next(
        (value for glob, value in config.items() if fnmatch.fnmatchcase(path, glob)), None
    )


def _check_globs(globs: tuple[str, ...], found: Sequence[Found], name: str) -> None:
    paths = [item.path for item in found]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(path, glob) for path in paths):
            near = get_close_matches(glob, paths, n=3, cutoff=0.3) or paths[:3]
            raise ConfigError(
                f"{name}={glob!r} matches no attention module; the nearest are {', '.join(near)}"
            )


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
