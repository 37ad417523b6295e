"""Verifies rewritten sites and says which of them may stay.

sites, dense  →  each on its own recorded calls  →  all of them in the whole model  →  the errors measured
                 a site that differs is refused     if that differs, each kind of site alone: kinds that differ
                                                    are refused with what they did, the rest is tried again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from retrofit.capture.analyse import Analysis, Found, Progress
from retrofit.capture.export import is_record
from retrofit.errors import RetrofitError, VerificationError
from retrofit.exchange import dense, put_back, put_in
from retrofit.reports import Verification
from retrofit.site import RetrofittedAttention
from retrofit.verify import ModelCheck, first_tensor, for_rows, proof, verify_site

Candidate = tuple[Found, RetrofittedAttention]


@dataclass(frozen=True)
class Admission:
    """Which sites reproduce the original.

    Attributes:
        admitted: Those that do, now in the model with dense attention.
        refused: Why the others do not, by path.
    """

    admitted: Sequence[Candidate]
    refused: Mapping[str, str]
    verification: Verification


def admit(
    model: nn.Module,
    analysis: Analysis,
    candidates: Sequence[Candidate],
    kept: Sequence[RetrofittedAttention],
    proofs: Mapping[str, str],
    progress: Progress | None,
) -> Admission:
    """Puts what reproduces the original into ``model``, which has its original attention.

    Args:
        model: The model.
        analysis: The calls it was analysed with.
        candidates: What was found, and the dense sites for it.
        kept: Sites that were converted before and go back as they are.
        proofs: Of earlier verifications, by path; sites that are still what was verified are not verified again.
        progress: Called as ``progress(path, done, total)``.
    """
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    admitted: list[Candidate] = []
    for done, (item, site) in enumerate(candidates):
        if proofs.get(item.path) != proof(site):
            try:
                errors[item.path] = verify_site(item, site)
            except Exception as error:
                refused[item.path] = _reason(error, "rewritten, it fails on the call that was recorded")
                continue
            if progress is not None:
                progress(f"verify {item.path}", done + 1, len(candidates))
        admitted.append((item, site))
    if not errors:
        put_in(model, [*(site for _, site in admitted), *kept])
        return Admission(admitted, refused, Verification(errors, None, None))
    check = ModelCheck(model, analysis.probes, analysis.outputs, _real_tokens(analysis, admitted))
    found: tuple[float | None, float | None] = (None, None)
    try:
        found = _compared(model, check, admitted, kept)
    except Exception as first:
        unfit = _unfit(model, check, admitted, first)
        refused |= unfit
        admitted = [(item, site) for item, site in admitted if item.path not in unfit]
        if admitted:
            found = _compared(model, check, admitted, kept)
    errors = {path: error for path, error in errors.items() if path not in refused}
    return Admission(admitted, refused, Verification(errors, *found))


def _compared(
    model: nn.Module,
    check: ModelCheck,
    candidates: Sequence[Candidate],
    kept: Sequence[RetrofittedAttention] = (),
) -> tuple[float, float | None]:
    """The errors of the whole model with the candidates in it; if it differs they are out of it again."""
    put_in(model, [*(site for _, site in candidates), *kept])
    try:
        with dense(model):
            return check.compare(model)
    except BaseException:
        put_back(model)
        raise


def _unfit(
    model: nn.Module, check: ModelCheck, candidates: Sequence[Candidate], first: Exception
) -> dict[str, str]:
    """Which kinds of site change the model, and what they do to it; none if another comparison finds nothing."""
    again, doubt = check.reconsider(model)
    if again:
        try:
            _compared(model, check, candidates)
        except Exception as second:
            first = second
        else:
            put_back(model)
            return {}
    kinds: dict[object, list[Candidate]] = {}
    for item, site in candidates:
        kinds.setdefault((type(item.module), site.plan.source, site.plan.mask), []).append((item, site))
    reasons: dict[object, str] = {}
    for kind, of_kind in kinds.items():
        try:
            if len(kinds) == 1:
                raise first
            _compared(model, check, of_kind)
            put_back(model)
        except Exception as error:
            reason = _reason(error, "with it rewritten, the whole model fails")
            probe = check.reads_padding(model, [item for item, _ in of_kind])
            if probe is not None and isinstance(error, VerificationError):
                reason = (
                    f"the model reads what its attention gives at padding ({probe}), as by pooling such a row; "
                    "a converted site gives nothing there"
                )
            reasons[kind] = reason + (f"; {doubt}" if doubt else "") + _emptied(of_kind[0][1])
    if not reasons:
        raise first
    unfit = _to_blame(model, check, kinds, list(reasons)) if len(reasons) > 1 else list(reasons)
    return {item.path: reasons[kind] for kind in unfit for item, _ in kinds[kind]}


def _emptied(site: RetrofittedAttention) -> str:
    """What ``site`` returns without the tensors that the original has there."""
    records = [type(leaf).__name__ for leaf in pytree.tree_leaves(site.plan.output) if is_record(leaf)]
    return f"; tensors in the {records[0]} that it returns become None" if records else ""


def _to_blame(
    model: nn.Module,
    check: ModelCheck,
    kinds: Mapping[object, Sequence[Candidate]],
    failing: Sequence[object],
) -> Sequence[object]:
    """Which of the kinds that fail alone have to go: one, if the others do without it, else all."""
    for kind in failing:
        rest = [candidate for other, of_kind in kinds.items() if other != kind for candidate in of_kind]
        try:
            _compared(model, check, rest)
        except Exception:
            continue
        put_back(model)
        return [kind]
    return failing


def _reason(error: Exception, what: str) -> str:
    if isinstance(error, RetrofitError):
        return f"{error}"
    return f"{what}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _real_tokens(analysis: Analysis, candidates: Sequence[Candidate]) -> list[Tensor | None]:
    """The real tokens of each probe's output: those of the probe, or of the sites that see as many tokens."""
    found = []
    for number, (probe, output) in enumerate(zip(analysis.probes, analysis.outputs, strict=True)):
        shape = first_tensor(output).shape
        calls = [item.calls[number].keep for item, _ in candidates if len(item.calls) == len(analysis.probes)]
        given = [keep for keep in (probe.keep, *calls) if keep is not None and shape]  # a loss has no rows
        known = [for_rows(keep, shape[0]) for keep in given]
        fitting = [keep for keep in known if keep.shape == shape[:2]]
        found.append(fitting[0] if fitting else None)
    return found
