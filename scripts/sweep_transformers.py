"""Converts a tiny model of every architecture of transformers and says what became of each.

    python scripts/sweep_transformers.py --family causal-lm --output benchmarks/results/sweep-causal-lm.json [NAME …]

An architecture is built offline from its default configuration with reduced sizes, in a process of its own
with a time limit. Attention found by ``inspect`` is held against the calls to softmax and SDPA that a dispatch
mode counts in a forward of the model; then comes the conversion to ``DenseConfig`` with its proofs, ``generate()``
and the way back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tiny_models import built, example
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import retrofit
from retrofit.errors import RetrofitError

LIMIT = 150  # seconds for one architecture


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


def sweep(name: str, config_class: type, model_class: type) -> dict[str, Any]:
    """Builds, inspects, converts, generates with and reverts one architecture."""
    row: dict[str, Any] = {"architecture": name, "class": model_class.__name__}
    try:
        model = built(name, config_class, model_class)
    except Exception as error:
        return {**row, "verdict": "not built", "error": _line(error)}
    inputs = example(model)
    # A text model gets retrofit's own example, which is padded on both sides.
    given = None if set(inputs) <= {"input_ids", "decoder_input_ids"} else inputs
    try:
        counted = _counted(built(name, config_class, model_class), inputs)
    except Exception as error:
        return {**row, "verdict": "not run", "error": _line(error)}
    start = time.perf_counter()
    try:
        report = retrofit.inspect(model, given)
        found = {site.path: site for site in report.sites}
        row["counted"] = len(counted)
        row["missed"] = sorted(path for path in counted if not _covered(path, found))
        attention = [site for site in report.sites if site.kind != "other"]
        row["sites"] = len(attention)
        row["other_softmax"] = len(found) - len(attention)
        refused = Counter(f"{site.reason}" for site in attention if not site.convertible)
        row["refused"] = dict(refused)
        row["convertible"] = sum(site.convertible for site in report.sites)
        row["coverage"] = report.coverage
        row["seconds"] = round(time.perf_counter() - start, 1)
        if row["convertible"]:
            row.update(_round_trip(model, inputs, given))
    except RetrofitError as error:
        row["error"] = f"{type(error).__name__}: {_line(error)}"
    except Exception as error:
        return {**row, "verdict": "crashed", "error": _line(error), "trace": traceback.format_exc()[-1500:]}
    row["verdict"] = verdict(row)
    return row


def verdict(row: dict[str, Any]) -> str:
    """One word for what became of an architecture."""
    if row.get("missed"):
        return "missed"
    if row.get("sites") == 0:
        return "no attention"
    if "error" in row:
        return "failed"
    if not row["convertible"]:
        return "refused"
    return "converted" if row["convertible"] == row["sites"] else "in part"


def _round_trip(model: Any, inputs: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    text = given is None
    with torch.no_grad():
        before = _first(model, inputs)
        can = text and getattr(model, "can_generate", lambda: False)()
        tokens = _generated(model, inputs["input_ids"]) if can else None
        report = retrofit.convert(model, retrofit.DenseConfig(), given)
        after = _first(model, inputs)
        row = {
            "prefill_error": float(((after - before).norm() / before.norm()).item()),
            "site_error": max(report.verification.sites.values()),
            "decode_error": report.verification.decode,
        }
        # What inspect took for convertible and the proof did not: its mask was classified.
        unfit = [site for site in report.left if site.mask is not None]
        if unfit:
            row["convertible"] = len(report.converted)
            row["refused"] = dict(
                Counter(report.skipped[site.path] for site in report.left if site.kind != "other")
            )
        if tokens is not None:
            row["generate_equal"] = bool(torch.equal(tokens, _generated(model, inputs["input_ids"])))
        retrofit.revert(model)
        same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        row["reverted"] = same and bool(torch.equal(_first(model, inputs), before))
    if not row["reverted"] or row.get("generate_equal") is False:
        row["error"] = "generate() differs" if row["reverted"] else "revert() is not bit-exact"
    return row


def _first(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The first result of ``model``: of a text model its logits."""
    output = model(**inputs)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name).clone()
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)).clone()


def _generated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1, pad_token_id=0)


def _counted(model: Any, inputs: dict[str, Any]) -> Counter[str]:
    """Paths with softmax or SDPA calls, seen by a second model of the same configuration."""
    count = _Count(model)
    with torch.no_grad(), count:
        model(**inputs)
    return count.seen


def _covered(path: str, found: dict[str, Any]) -> bool:
    """Whether a path with a softmax is a site, or inside one, as ``nn.Softmax`` is."""
    return any(path == site or path.startswith(f"{site}.") for site in found)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + (str(error).strip().splitlines() or [""])[0][:300]


def _work(name: str, config_class: type, model_class: type, pipe: Any) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    pipe.send(sweep(name, config_class, model_class))


FAMILIES = {
    "causal-lm": ("Causal language models", ("CAUSAL_LM",)),
    "encoder": ("Text encoders", ("MASKED_LM",)),
    "encoder-decoder": ("Encoder-decoders of text", ("SEQ_TO_SEQ_CAUSAL_LM",)),
    "vision": ("Vision models", ("IMAGE", "IMAGE_CLASSIFICATION")),
    "audio": ("Audio models", ("CTC", "AUDIO_CLASSIFICATION", "SPEECH_SEQ_2_SEQ")),
    "multimodal": ("Models of text and images", ("ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT")),
}
"""Titles, and the mappings of transformers whose architectures belong to a family; the first that has one counts."""


def architectures(names: list[str], family: str = "causal-lm") -> list[tuple[str, type, type]]:
    """The architectures of a family with their classes."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    mappings = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING") for name in FAMILIES[family][1]]
    found = []
    for name, config_class in CONFIG_MAPPING.items():
        mapping = next((mapping for mapping in mappings if config_class in mapping), None)
        if mapping is not None and (not names or name in names):
            cls = mapping[config_class]
            found.append((name, config_class, cls[0] if isinstance(cls, tuple) else cls))
    return found


def table(rows: list[dict[str, Any]], family: str = "causal-lm") -> str:
    """The rows as Markdown: the totals, then one line for each architecture."""
    import transformers

    totals = Counter(row["verdict"] for row in rows)
    built = sum(count for verdict, count in totals.items() if verdict not in NOT_SWEPT)
    lines = [
        f"# {FAMILIES[family][0]} of transformers",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}; tiny random models, float32, CPU. Made by",
        "`scripts/sweep_transformers.py`; the raw results, each with the commit that gave it, are in the JSON file",
        "beside this one.",
        "",
        f"{len(rows)} architectures, {built} with attention that could be built and run offline: "
        + ", ".join(f"{count} {verdict}" for verdict, count in totals.most_common())
        + ".",
        "",
        "| architecture | sites | convertible | verdict | why |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        why = row.get("error") or "; ".join(row.get("refused", {}))
        cells = [row["architecture"], row.get("sites", ""), row.get("convertible", ""), row["verdict"], why]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


NOT_SWEPT = ("not built", "not run", "no attention", "timed out or killed")
"""Verdicts that say nothing about the attention."""


def main() -> None:
    """Runs the sweep, one process after the other; the result file grows with each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures to renew in the file; all if none is named")
    parser.add_argument("--family", choices=FAMILIES, default="causal-lm")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    rows = json.loads(given.output.read_text()) if given.names and given.output.exists() else []
    for name, config_class, model_class in architectures(given.names, given.family):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, config_class, model_class, sender))
        process.start()
        sender.close()
        try:
            row = receiver.recv()
        except EOFError:
            row = {"architecture": name, "class": model_class.__name__, "verdict": "timed out or killed"}
        process.join()
        row["commit"] = commit
        rows = sorted(
            [other for other in rows if other["architecture"] != name] + [row],
            key=lambda row: str(row["architecture"]),
        )
        print(name, row["verdict"], row.get("error", row.get("refused", "")), file=sys.stderr, flush=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")
        given.output.with_suffix(".md").write_text(table(rows, given.family))
    print(Counter(row["verdict"] for row in rows))


if __name__ == "__main__":
    main()
