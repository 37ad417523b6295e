"""Converts a tiny model of one architecture and says what became of it.

    llama, LlamaConfig, LlamaForCausalLM  →  {"sites": 2, "convertible": 2, "hsa_sites": 2, "verdict": "converted", …}

Attention found by retrofit is held against the calls to softmax and SDPA that a dispatch mode counts in a forward of
the model. Then comes the conversion to ``DenseConfig`` with its proofs, which the verdict is about; the conversion to
HSA in its dense limit, of the sites that HSA takes; the outputs and ``generate()`` of both, greedy and left-padded; and
the way back.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from typing import Any

import torch
from tiny_examples import ROWS, example
from tiny_models import built
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import retrofit
from retrofit.errors import NoAttentionFound, RetrofitError, VerificationError
from retrofit.reports import ConvertReport, InspectReport

DENSE_LIMIT = retrofit.HSAConfig(
    window=8, sink=8, budget=4096, block=8, node=4, fanout=2, nodes_per_span=4, query_block=8
)
"""HSA whose budget holds every token of an example: it has to give what dense attention gives."""

TOLERANCE = 1e-4
"""Largest change of a model's output that counts as rounding, relative to its norm."""

REFUSALS = (NoAttentionFound, VerificationError)

_Prompt = dict[str, torch.Tensor]
_Continued = tuple[_Prompt, torch.Tensor]


class _Count(TorchDispatchMode):
    """Counts softmax and SDPA calls by the innermost module that makes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.stack: list[str] = [""]
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: self.stack.append(path))
            module.register_forward_hook(self._leave)

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if ("softmax" in name and "log" not in name) or "scaled_dot_product" in name:
            self.seen[self.stack[-1]] += 1
        return func(*args, **(kwargs or {}))


def check(name: str, config_class: type, model_class: type) -> dict[str, Any]:
    """Returns the row of one architecture."""
    row: dict[str, Any] = {"architecture": name, "class": model_class.__name__}
    try:
        model = built(name, config_class, model_class)
    except Exception as error:
        return {**row, "verdict": "not built", "error": line(error)}
    try:
        inputs = example(model)
        counted = counted_calls(built(name, config_class, model_class), (), inputs)
        with torch.no_grad():
            before = _first(model, inputs)
    except Exception as error:
        return {**row, "verdict": "not run", "error": line(error)}
    given = None if _is_text(model, inputs) else inputs
    try:
        row.update(_converted(model, inputs, given, before, counted))
    except RetrofitError as error:
        row["error"] = line(error)
    except Exception as error:
        row.update(crash=line(error), trace=traceback.format_exc()[-1500:])
    return {**row, "verdict": verdict(row)}


def _is_text(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether retrofit makes up an example of its own, which is padded on both sides."""
    text = model.config.get_text_config(decoder=True)
    rows = all(value.dim() == 2 and len(value) == ROWS for value in inputs.values())  # no codebooks
    named = set(inputs) <= {"input_ids", "decoder_input_ids"}
    return rows and named and isinstance(getattr(text, "vocab_size", None), int)


def verdict(row: dict[str, Any]) -> str:
    """One word for what became of an architecture."""
    if "crash" in row:
        return "crashed"
    if row.get("missed"):
        return "missed"
    if "error" in row:
        return "failed"
    if row["sites"] == 0:
        return "no attention"
    if not row["convertible"]:
        return "refused"
    return "converted" if row["convertible"] == row["sites"] else "in part"


def _converted(
    model: Any,
    inputs: dict[str, Any],
    given: dict[str, Any] | None,
    before: torch.Tensor,
    counted: Counter[str],
) -> dict[str, Any]:
    """Converts ``model``, holds it against its original and puts the original back."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    continued = _continued(model, _prompts(model, inputs))
    try:
        report = retrofit.convert(model, retrofit.DenseConfig(), given)
    except REFUSALS as error:
        return _refused(retrofit.inspect(model, given), counted, error)
    row = found((*report.converted, *report.left), counted, report.skipped)
    row["coverage"] = report.coverage
    row["site_error"] = max(report.verification.sites.values())
    row["decode_error"] = report.verification.decode
    row["prefill_error"], same = _compared(model, inputs, before, continued)
    row |= {f"generate_{kind}": value for kind, value in same.items()}
    retrofit.revert(model)
    row["hsa_sites"], row["hsa_refused"] = in_hsa(model, given, report)
    if row["hsa_sites"]:
        row["hsa_error"], same = _compared(model, inputs, before, continued)
        row |= {f"generate_{kind}_hsa": value for kind, value in same.items()}
        retrofit.revert(model)
    with torch.no_grad():
        kept = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        row["reverted"] = kept and bool(torch.equal(_first(model, inputs), before))
    if wrong := _wrong(row):
        row["error"] = wrong
    return row


def in_hsa(model: Any, given: Any, dense: ConvertReport) -> tuple[int, dict[str, int]]:
    """Converts ``model`` to HSA in its dense limit.

    Returns:
        How many sites it took, and why it left others that ``DenseConfig`` took, with their number.
    """
    try:
        report = retrofit.convert(model, DENSE_LIMIT, given)
    except NoAttentionFound as error:
        return 0, {line(error): len(dense.converted)}
    left = (reason for path, reason in report.skipped.items() if path not in dense.skipped)
    return len(report.converted), dict(Counter(left))


def _compared(
    model: Any, inputs: dict[str, Any], before: torch.Tensor, continued: dict[str, _Continued]
) -> tuple[float, dict[str, bool]]:
    """How far the first result is from the original's, and whether each prompt is continued as by the original."""
    with torch.no_grad():
        error = _difference(_first(model, inputs), before)
        same = {
            kind: bool(torch.equal(_generated(model, prompt), tokens))
            for kind, (prompt, tokens) in continued.items()
        }
    return error, same


def _wrong(row: dict[str, Any]) -> str | None:
    """What a conversion changed beyond rounding."""
    differ = [key for key, value in row.items() if key.startswith("generate_") and value is False]
    if differ:
        return f"generate() differs: {', '.join(differ)}"
    for key in ("prefill_error", "hsa_error"):
        if not row.get(key, 0.0) <= TOLERANCE:
            return f"{key} is {row[key]:.1e}"
    return None if row["reverted"] else "revert() is not bit-exact"


def _refused(report: InspectReport, counted: Counter[str], error: Exception) -> dict[str, Any]:
    """The row of a model of which nothing was converted."""
    because = {site.path: line(error) for site in report.sites if site.convertible}
    row = found(report.sites, counted, {site.path: site.reason or "" for site in report.sites} | because)
    return {**row, "convertible": 0, "coverage": 0.0}


def found(sites: Any, counted: Counter[str], reasons: Any) -> dict[str, Any]:
    """What there is, against what was counted."""
    paths = {site.path for site in sites}
    attention = [site for site in sites if site.kind != "other"]
    left = [reasons[site.path] for site in attention if site.path in reasons]
    return {
        "counted": len(counted),
        "missed": sorted(path for path in counted if not _covered(path, paths)),
        "sites": len(attention),
        "other_softmax": len(paths) - len(attention),
        "convertible": sum(site.convertible for site in attention),
        "refused": dict(Counter(left)),
    }


def _first(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The first result of ``model``: of a text model its logits."""
    torch.manual_seed(0)
    output = model(**inputs)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if isinstance(getattr(output, name, None), torch.Tensor):
            return getattr(output, name).clone()
    floats = (
        leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    )
    return next(floats).clone()


def _difference(after: torch.Tensor, before: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm().clamp(min=1e-30))


def _prompts(model: Any, inputs: dict[str, Any]) -> dict[str, _Prompt]:
    """What to generate from: the example, and the same with padding before its second row."""
    if "input_ids" not in inputs or not getattr(model, "can_generate", lambda: False)():
        return {}
    made = ("input_ids", "decoder_input_ids", "decoder_attention_mask")
    rest = {key: value for key, value in inputs.items() if key not in made}
    ids = inputs["input_ids"]
    keep = torch.ones_like(ids)
    keep[1, :5] = 0
    padded = {"input_ids": ids * keep, "attention_mask": keep}
    return {"greedy": {"input_ids": ids, **rest}, **({} if rest else {"padded": padded})}


def _continued(model: Any, prompts: dict[str, _Prompt]) -> dict[str, _Continued]:
    """The prompts from which the original can generate, with the tokens that it gives."""
    found = {}
    for kind, prompt in prompts.items():
        with contextlib.suppress(Exception):
            found[kind] = prompt, _generated(model, prompt)
    return found


def _generated(model: Any, prompt: _Prompt) -> torch.Tensor:
    torch.manual_seed(0)
    result = model.generate(
        **prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, pad_token_id=0
    )
    return getattr(result, "sequences", result)


def counted_calls(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Counter[str]:
    """Paths with softmax or SDPA calls, seen by a second model of the same configuration."""
    count = _Count(model)
    with torch.no_grad(), count:
        model(*args, **kwargs)
    return count.seen


def _covered(path: str, found: set[str]) -> bool:
    """Whether a path with a softmax is a site, or inside one, as ``nn.Softmax`` is."""
    return any(path == site or path.startswith(f"{site}.") for site in found)


def line(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    return f"{type(error).__name__}: " + (str(error).strip().splitlines() or [""])[0][:600]
