"""The dense round trip: a rewritten site, and the whole model, against the original.

Each site on its own recorded calls, relative error at most 1e-5; then the model's outputs on every probe and
the logits of cached steps. Only real tokens count: rows that are padding mean nothing.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retrofit.awaken import awakened, is_zero, says_nothing
from retrofit.capture.analyse import Found, evaluating
from retrofit.capture.call import is_cache, rebuild
from retrofit.capture.kept import restored
from retrofit.capture.observe import ProbedCall
from retrofit.capture.probes import Probe, same_draws
from retrofit.errors import VerificationError
from retrofit.site import RetrofittedAttention

SITE_TOLERANCE = 1e-5
MODEL_TOLERANCE = 1e-4
STEPS = (4, 1, 1)  # tokens of each call after the prompt's


def verify_site(found: Found, site: RetrofittedAttention) -> float:
    """Runs the dense ``site`` on every recorded call; returns the largest relative error.

    Where the module gives zero on the example, or has weights that are zero throughout, it is compared once more with
    random numbers in their place.

    Raises:
        VerificationError: If it is above the tolerance of the dtype, or the module gives zero all the same.
    """
    worst = 0.0
    for probed in found.calls:
        expected = probed.call.output
        worst = max(worst, _verified(found, site, probed, expected))
        if not says_nothing(found.module, first_tensor(expected)):
            continue
        with awakened(found.module) as asleep:
            expected = _of_original(found, site, probed) if asleep else expected
            if is_zero(first_tensor(expected)):
                raise VerificationError(
                    f"{found.path} gives zero on the example, also with random numbers in the place of parameters "
                    "that are zero, so that it cannot be compared; convert with an example on which it gives something"
                )
            if asleep:
                worst = max(worst, _verified(found, site, probed, expected))
    return worst


def _verified(found: Found, site: RetrofittedAttention, probed: ProbedCall, expected: Any) -> float:
    """The error of ``site`` on one call.

    Raises:
        VerificationError: If it is too large.
    """
    first = first_tensor(expected)
    tolerance = max(SITE_TOLERANCE, 2 * torch.finfo(first.dtype).eps)
    with torch.no_grad(), evaluating(site):
        error = _difference(site(**_as_converted(site, probed)), expected, probed.keep)
    if error <= tolerance and tolerance > SITE_TOLERANCE and _can_be_float32(site):
        error, tolerance = _error_in_float32(found, site, probed), SITE_TOLERANCE
    if not error <= tolerance:
        raise VerificationError(
            f"{found.path} differs from the original by {error:.1e} relative after rewriting, at most "
            f"{tolerance:.0e} is allowed"
        )
    return error


def _of_original(found: Found, site: RetrofittedAttention, probed: ProbedCall) -> Any:
    """What the original module gives now for a recorded call."""
    with torch.no_grad(), evaluating(found.module), restored(found.module.modules()):
        return found.module(**_arguments(site, probed))


def _difference(got: Any, expected: Any, keep: Tensor | None) -> float:
    """The largest relative error among the tensors that both outputs have."""
    error = relative_error(first_tensor(got), first_tensor(expected), keep)
    ours, theirs = tensors_of(got), tensors_of(expected)
    for path in ours.keys() & theirs.keys():
        error = max(error, _beside(ours[path], theirs[path], keep))
    return error


def _beside(got: Tensor, expected: Tensor, keep: Tensor | None) -> float:
    """The relative error of one tensor among others; of one that has no rows to leave out where padding is, none."""
    if got.shape != expected.shape:
        return float("inf")
    padded = keep is not None and not bool(keep.all())
    if padded and keep is not None and not _has_rows(got, keep):
        return 0.0
    return relative_error(got, expected, keep)


def _has_rows(output: Tensor, keep: Tensor) -> bool:
    return output.dim() > 2 and any(
        tuple(output.shape[dim] for dim in dims) == tuple(keep.shape) for dims in ((0, 1), (0, 2), (1, 0))
    )


def proof(site: RetrofittedAttention) -> str:
    """A digest of all that the round trip of ``site`` depends on.

    A site of the same graph, shapes, dtype, device and versions as one that was verified needs no verification.
    """
    plan = site.plan
    like = next(site.original.parameters(), torch.zeros(()))
    parts = [
        *(f"{name} {_version(name)}" for name in ("torch", "transformers", "retrofit-attention")),
        f"{like.dtype} {like.device.type} {type(site.original).__qualname__}",
        plan.source,
        f"{plan.kind} {plan.keys} {plan.key_inputs}",
        *(f"{path} {value!r}" for path, value in plan.known if isinstance(value, (bool, int, float, str))),
        repr((plan.inputs, plan.mask, plan.mask_argument, plan.keep_mask, plan.scale, plan.dropout)),
        repr((plan.softcap, plan.step, plan.guards)),
        repr((plan.heads, plan.kv_heads, plan.head_dim, plan.value_dim)),
        *(f"{name} {value.tolist()}" for name, value in plan.constants),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def own_version() -> str:
    """The version of retrofit; ``unknown`` where it runs without being installed."""
    return _version("retrofit-attention")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _can_be_float32(site: RetrofittedAttention) -> bool:
    """Whether nothing in the graph or the weights ties the site to its lower precision."""
    casts = ("torch.bfloat16", "torch.float16")
    return all(p.is_floating_point() for p in site.parameters()) and not any(
        cast in site.plan.source for cast in casts
    )


def _error_in_float32(found: Found, site: RetrofittedAttention, probed: ProbedCall) -> float:
    """The error of float32 copies of module and site on the same call."""
    original = copy.deepcopy(found.module).float()
    target = copy.deepcopy(site.retrofit).float()
    twin = RetrofittedAttention(original, site.path, site.plan, target)
    with torch.no_grad(), evaluating(original), evaluating(twin):
        expected = original(**_float32(_arguments(site, probed)))
        got = twin(**_float32(_as_converted(site, probed)))
    return _difference(got, expected, probed.keep)


def _float32(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with every floating tensor in float32."""
    made: dict[int, Tensor] = {}  # arguments that are one tensor stay one

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return made.setdefault(id(leaf), leaf.float())
        return leaf

    changed: dict[str, Any] = pytree.tree_map(change, dict(values))
    return changed


def _arguments(site: RetrofittedAttention, probed: ProbedCall) -> dict[str, Any]:
    """The arguments of the recorded call, without a cache."""
    bound = site.plan.signature.bind(probed.call.args, probed.call.kwargs)
    return {name: None if is_cache(value) else value for name, value in bound.items()}


def _as_converted(site: RetrofittedAttention, probed: ProbedCall) -> dict[str, Any]:
    """The recorded call as a converted model makes it: padding in the place of the mask, no cache."""
    plan, values = site.plan, _arguments(site, probed)
    if plan.mask_argument is not None and probed.keep is not None and plan.kind == "self":
        device = next(value.device for value in values.values() if isinstance(value, Tensor))
        keep = probed.keep.to(device)
        path = plan.mask_argument.path
        given = None if bool(keep.all()) else ~keep if plan.mask_argument.inverted else keep
        values = rebuild({str(path[0]): None, **values}, {path: given})
    return values


class ModelCheck:
    """Holds what the original model gives, to compare the rewritten one with.

    Args:
        model: The model with its original attention.
        probes: The calls it was analysed with.
        outputs: What it returned on each.
        keep: The real tokens of each probe, where they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[Probe],
        outputs: Sequence[Any],
        keep: Sequence[Tensor | None],
    ) -> None:
        self.probes = probes
        self.outputs = [first_tensor(output) for output in outputs]
        self.besides = [tensors_of(output) for output in outputs]
        self.keep = keep
        names = [probe.name for probe in probes]
        self.steps_of = "padded left" if "padded left" in names else names[0]
        try:
            self.steps = cached_steps(model, probes, self.steps_of)
        except Exception:  # a model that cannot be called in steps has no steps to compare
            self.steps = []

    def reconsider(self, model: nn.Module) -> tuple[bool, str | None]:
        """Asks whether the original contradicts itself where its cached steps were compared.

        If it does so with padding alone, steps without padding are compared from now on.

        Args:
            model: With its original attention.

        Returns:
            Whether another comparison may come out differently, and what there is to say about the original.
        """
        padded = self._contradiction(self.steps_of, self.steps)
        if padded is None:
            return False, None
        plain = cached_steps(model, self.probes, "plain")
        contradiction = self._contradiction("plain", plain)
        if contradiction is not None:
            return False, contradiction
        self.steps_of, self.steps = "plain", plain
        return True, f"{padded} where a row is padded, so steps without padding were compared"

    def _contradiction(self, name: str, steps: Sequence[Tensor]) -> str | None:
        """How far the original's cached steps are from what it gives at once."""
        if not steps:
            return None
        number = next(number for number, probe in enumerate(self.probes) if probe.name == name)
        at_once = self.outputs[number]
        at_once = at_once * for_rows(real_rows(self.probes[number]), len(at_once))
        error = relative_error(torch.cat(list(steps), dim=1), at_once, None)
        if error <= max(MODEL_TOLERANCE, 32 * torch.finfo(at_once.dtype).eps):
            return None
        return f"the original's own cached steps differ by {error:.1e} relative from what it gives at once"

    def reads_padding(self, model: nn.Module, sites: Sequence[Found]) -> str | None:
        """The first probe in which the original's output depends on what ``sites`` give at padding; None if none does.

        Args:
            model: With its original attention.
            sites: Modules in it.
        """
        for number, (probe, expected) in enumerate(zip(self.probes, self.outputs, strict=True)):
            handles = [
                item.module.register_forward_hook(_Blank(item.calls[number].keep, probe.keep))
                for item in sites
                if len(item.calls) == len(self.probes)
            ]
            try:
                with torch.no_grad(), evaluating(model):
                    got = first_tensor(_called(model, probe))
            finally:
                for handle in handles:
                    handle.remove()
            if relative_error(got, expected, self.keep[number]) > MODEL_TOLERANCE:
                return probe.name
        return None

    def compare(self, model: nn.Module) -> tuple[float, float | None]:
        """Returns the relative errors of the outputs and of cached steps; None for a model that takes no steps.

        Raises:
            VerificationError: If one is above the tolerance of the dtype.
        """
        errors = []
        with torch.no_grad(), evaluating(model):
            for number, probe in enumerate(self.probes):
                output = _called(model, probe)
                error = relative_error(first_tensor(output), self.outputs[number], self.keep[number])
                errors.append(max(error, self._besides(number, tensors_of(output))))
                del output  # logits are large: never those of two probes at a time
        prefill = max(errors)
        worst = self.probes[errors.index(prefill)].name
        steps = cached_steps(model, self.probes, self.steps_of) if self.steps else []
        decode = max(
            (relative_error(a, b, None) for a, b in zip(steps, self.steps, strict=True)), default=None
        )
        tolerance = max(MODEL_TOLERANCE, 32 * torch.finfo(self.outputs[0].dtype).eps)
        for name, of, difference in (
            ("output", worst, prefill),
            ("cached decode", self.steps_of, decode),
        ):
            if difference is not None and not difference <= tolerance:
                raise VerificationError(
                    f"the whole model's {name} differs from the original by {difference:.1e} relative ({of}) "
                    f"after rewriting, at most {tolerance:.0e} is allowed"
                )
        return prefill, decode

    def _besides(self, number: int, got: Mapping[str, Tensor]) -> float:
        """The largest error among all tensors of an output; none where a probe has padding, which these may be of."""
        known = (self.probes[number].keep, self.keep[number])
        if any(keep is not None and not bool(keep.all()) for keep in known):
            return 0.0
        expected = self.besides[number]
        paths = [path for path in got if path in expected and expected[path].is_floating_point()]
        return max((_beside(got[path], expected[path], None) for path in paths), default=0.0)


class _Blank:
    """A forward hook that sets to zero what a module gives at padding.

    Args:
        keep: bool [B, N], the real tokens of its first call; None if all are.
        of_probe: Those of the model's call, which another of its calls may be about.
    """

    def __init__(self, keep: Tensor | None, of_probe: Tensor | None) -> None:
        self.known = [known for known in (keep, of_probe) if known is not None]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        place = next(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        keep = next((known for known in self.known if leaves[place].shape[:2] == known.shape), None)
        if keep is not None:
            leaves[place] = leaves[place] * keep.to(leaves[place].device)[..., None]
        return pytree.tree_unflatten(leaves, spec)


def _called(model: nn.Module, probe: Probe) -> Any:
    with same_draws():
        return model(*probe.args, **probe.kwargs)


def cached_steps(model: nn.Module, probes: Sequence[Probe], name: str) -> list[Tensor]:
    """Logits of a prompt and some cached steps, on the probe called ``name``; empty without a cache."""
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    probe = next((probe for probe in probes if probe.name == name), None)
    if probe is None or not callable(can_generate) or not can_generate():
        return []
    decoding = "decoder_input_ids" if getattr(config, "is_encoder_decoder", False) else "input_ids"
    if decoding not in probe.kwargs:
        return []
    if decoding == "input_ids" and probe.keep is None:
        return []  # what else is in the example may belong to the prompt alone
    ids, real = probe.kwargs[decoding], real_rows(probe)
    left_out = {decoding, "position_ids", "past_key_values", "labels"}
    if decoding == "input_ids":
        left_out.add("attention_mask")
    rest = {key: value for key, value in probe.kwargs.items() if key not in left_out}
    logits: list[Tensor] = []
    cache, position = None, 0
    with torch.no_grad(), evaluating(model):
        for tokens in (ids.shape[1] - sum(STEPS), *STEPS):
            stop = position + tokens
            if decoding == "input_ids":
                rest["attention_mask"] = real[:, :stop, 0]
            output = model(
                **{**rest, decoding: ids[:, position:stop], "past_key_values": cache, "use_cache": True}
            )
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                return []
            found = first_tensor(output.logits)
            logits.append(found * for_rows(real, len(found))[:, position:stop])
            position = stop
    return logits


def real_rows(probe: Probe) -> Tensor:
    """1 at the real tokens that a text probe decodes, 0 at padding: [B, N, 1]."""
    prefix = "decoder_" if "decoder_input_ids" in probe.kwargs else ""
    ids = probe.kwargs[f"{prefix}input_ids"]
    mask: Tensor = probe.kwargs.get(f"{prefix}attention_mask", ids.new_ones(ids.shape[:2]))
    return mask[..., None]


def for_rows(keep: Tensor, rows: int) -> Tensor:
    """``keep`` [B, …] for an output with several rows in turn for each sequence, as one for each codebook."""
    return keep.repeat_interleave(rows // len(keep), dim=0) if rows % len(keep) == 0 else keep


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a module's output; of a model's, its logits or hidden states."""
    if isinstance(output, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(output.get(name), Tensor):
                tensor: Tensor = output[name]
                return tensor
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def tensors_of(output: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors of an output by their place in it."""
    if isinstance(output, Tensor):
        return {path: output}
    items: Any = output.items() if isinstance(output, Mapping) else ()
    if isinstance(output, (tuple, list)):
        items = enumerate(output)
    found: dict[str, Tensor] = {}
    for name, item in items:
        found |= tensors_of(item, f"{path}.{name}")
    return found


def relative_error(got: Tensor, expected: Tensor, keep: Tensor | None) -> float:
    """‖got − expected‖ / ‖expected‖ over the real tokens; infinite if either is not finite there."""
    got, expected = got.detach(), expected.detach()
    if keep is not None and got.dim() == 3 and got.shape[:2] == (keep.shape[1], keep.shape[0]):
        got, expected = got.transpose(0, 1), expected.transpose(0, 1)  # length first
    real = torch.ones((), dtype=torch.bool, device=got.device)
    if keep is not None and got.dim() >= 3 and got.shape[0] == keep.shape[0]:
        dim = 1 if got.shape[1] == keep.shape[1] else 2
        if got.shape[dim] == keep.shape[1]:
            shape = [1] * got.dim()
            shape[0], shape[dim] = keep.shape
            real = keep.to(got.device).view(shape)
    difference = size = 0.0
    for a, b, known in zip(*map(_pieces, (got, expected, real.expand(got.shape))), strict=True):
        a, b = (torch.where(known, x.double(), 0) for x in (a, b))
        difference += float((a - b).square().sum())
        size += float(b.square().sum())
    error = math.sqrt(difference) / max(math.sqrt(size), 1e-30)
    return error if math.isfinite(error) else float("inf")


def _pieces(x: Tensor) -> list[Tensor]:
    """``x`` in pieces, of which there are never many in memory twice: logits are large."""
    if x.dim() < 2:
        return [x]
    return [piece for row in x.split(1) for piece in row.split(16, 1)]
