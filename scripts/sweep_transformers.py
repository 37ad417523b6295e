"""Converts a tiny model of every architecture of transformers and says what became of each.

    python scripts/sweep_transformers.py --output benchmarks/results/sweep-causal-lm.json [NAME …]

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
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import retrofit
from retrofit.errors import RetrofitError

LIMIT = 150  # seconds for one architecture
SIZES = {
    "hidden_size": 64,
    "embed_dim": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "emb_dim": 64,
    "intermediate_size": 96,
    "n_inner": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "d_inner": 96,
    "dim_ff": 96,
    "dff": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "moe_intermediate_size": 48,
    "shared_intermediate_size": 96,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "head_dim": 16,
    "attention_head_dim": 16,
    "dim_head": 16,
    "d_kv": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "rotary_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 512,
    "char_vocab_size": 512,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "sliding_window": 24,
    "attention_window": 24,
    "local_attention": 24,
    "window_size": 24,
    "attention_chunk_size": 24,
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_headdim": 32,
    "n_mamba_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "chunk_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512,
}


def tiny_config(cls: type, overrides: dict[str, Any] | None = None) -> Any:
    """Returns a configuration of ``cls`` with every size reduced that its default one has."""
    default = cls()
    given = {name: value for name in _settable(cls, default) if (value := _read(default, name)) is not None}
    kwargs: dict[str, Any] = {name: size for name, size in SIZES.items() if isinstance(given.get(name), int)}
    if "qk_rope_head_dim" in kwargs:
        kwargs.pop("head_dim", None)
        if "head_dim" in given:
            kwargs["head_dim"] = kwargs["qk_rope_head_dim"]
        if "num_key_value_heads" in given:
            kwargs["num_key_value_heads"] = 4
    for name in ("num_key_value_heads", "n_head_kv", "num_kv_heads", "swa_num_key_value_heads"):
        value = given.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and name not in kwargs:
            heads = given.get("num_attention_heads", value)
            kwargs[name] = 1 if value == 1 else 4 if value == heads else 2
    if given.get("is_decoder") is False and not given.get("is_encoder_decoder"):
        kwargs["is_decoder"] = True
    kinds = given.get("layer_types")
    if isinstance(kinds, (list, tuple)) and kinds:
        kinds = list(dict.fromkeys(kinds))
        kinds += kinds[-1:] * (len(kinds) == 1)
        kwargs["layer_types"] = kinds
        kwargs["num_hidden_layers"] = len(kinds)
    for name, value in given.items():
        if name.endswith("token_id") and isinstance(value, int) and value >= SIZES["vocab_size"]:
            kwargs[name] = 7
    for name in getattr(cls, "sub_configs", {}):
        sub = given.get(name)
        if hasattr(sub, "to_dict"):
            kwargs[name] = tiny_config(type(sub)).to_dict()
    kwargs.update(overrides or {})
    return cls(**{name: value for name, value in kwargs.items() if value is not ...})


def _settable(cls: type, default: Any) -> list[str]:
    """Names that a configuration may be given."""
    names = {*vars(default), *getattr(cls, "attribute_map", {}), *getattr(cls, "__dataclass_fields__", {})}
    names |= {name for name in SIZES if _read(default, name) is not None}
    mapped = getattr(cls, "attribute_map", {})
    return sorted(
        name
        for name in names
        for kept in [getattr(cls, mapped.get(name, name), None)]
        if not (isinstance(kept, property) and kept.fset is None)
    )


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name)
    except Exception:  # per-layer attributes have no one value
        return None


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
        config = tiny_config(config_class, OVERRIDES.get(name))
        if not isinstance(config, model_class.config_class or object):
            config = config.get_text_config(decoder=True)
        torch.manual_seed(0)
        model = model_class(config).eval()
    except Exception as error:
        return {**row, "verdict": "not built", "error": _line(error)}
    ids = torch.randint(10, 500, (2, 21))
    try:
        counted = _counted(model_class, config, ids)
    except Exception as error:
        return {**row, "verdict": "not run", "error": _line(error)}
    start = time.perf_counter()
    try:
        report = retrofit.inspect(model)
        found = {site.path: site for site in report.sites}
        row["counted"] = len(counted)
        row["missed"] = sorted(path for path in counted if not _covered(path, found))
        attention = [site for site in report.sites if site.kind != "other"]
        row["sites"] = len(attention)
        row["other_softmax"] = len(found) - len(attention)
        refused = Counter(f"{site.reason}" for site in attention if not site.convertible)
        row["refused"] = dict(refused)
        row["convertible"] = sum(site.convertible for site in report.sites)
        row["seconds"] = round(time.perf_counter() - start, 1)
        if row["convertible"]:
            row.update(_round_trip(model, ids))
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


def _round_trip(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = _logits(model, ids)
        can = getattr(model, "can_generate", lambda: False)()
        tokens = _generated(model, ids) if can else None
        report = retrofit.convert(model, retrofit.DenseConfig())
        after = _logits(model, ids)
        row = {
            "prefill_error": float(((after - before).norm() / before.norm()).item()),
            "site_error": max(report.verification.sites.values()),
            "decode_error": report.verification.decode,
        }
        if tokens is not None:
            row["generate_equal"] = bool(torch.equal(tokens, _generated(model, ids)))
        retrofit.revert(model)
        same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        row["reverted"] = same and bool(torch.equal(_logits(model, ids), before))
    if not row["reverted"] or row.get("generate_equal") is False:
        row["error"] = "generate() differs" if row["reverted"] else "revert() is not bit-exact"
    return row


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    extra = {"decoder_input_ids": ids[:, :9]} if model.config.is_encoder_decoder else {}
    output = model(input_ids=ids, **extra)
    first = output.logits if hasattr(output, "logits") else output[0]
    return first.clone()


def _generated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1, pad_token_id=0)


def _counted(model_class: Any, config: Any, ids: torch.Tensor) -> Counter[str]:
    """Paths with softmax or SDPA calls, seen by a second model of the same configuration."""
    model = model_class(config).eval()
    count = _Count(model)
    with torch.no_grad(), count:
        _logits(model, ids)
    return count.seen


def _covered(path: str, found: dict[str, Any]) -> bool:
    """Whether a path with a softmax is a site, or inside one, as ``nn.Softmax`` is."""
    return any(path == site or path.startswith(f"{site}.") for site in found)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + (str(error).strip().splitlines() or [""])[0][:300]


OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # the other one is for texts of 700 tokens and more
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 16},
    "moshi": {
        "sliding_window": 256
    },  # as in the real one, no shorter than the positions: its mask has no window
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "attention"]},
    "prophetnet": {"num_hidden_layers": ...},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlnet": {"max_position_embeddings": ...},
    "xmod": {"default_language": "en_XX"},
}
"""What the sizes alone do not settle; ``...`` leaves an argument out."""


def _work(name: str, config_class: type, model_class: type, pipe: Any) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    pipe.send(sweep(name, config_class, model_class))


def architectures(names: list[str]) -> list[tuple[str, type, type]]:
    """The architectures of the causal-LM mapping with their classes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    found = []
    for name, config_class in CONFIG_MAPPING.items():
        if config_class in MODEL_FOR_CAUSAL_LM_MAPPING and (not names or name in names):
            cls = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
            found.append((name, config_class, cls[0] if isinstance(cls, tuple) else cls))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: the totals, then one line for each architecture."""
    import transformers

    totals = Counter(row["verdict"] for row in rows)
    built = sum(count for verdict, count in totals.items() if verdict not in NOT_SWEPT)
    lines = [
        "# Causal language models of transformers",
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
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    rows = json.loads(given.output.read_text()) if given.names and given.output.exists() else []
    for name, config_class, model_class in architectures(given.names):
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
        given.output.with_suffix(".md").write_text(table(rows))
    print(Counter(row["verdict"] for row in rows))


if __name__ == "__main__":
    main()
