"""``retrofit distill``: recovers the accuracy of a converted model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from retrofit.cli.options import Converted, Data, Device, Dtype, Output, assignments, known
from retrofit.cli.output import Shown, command


@command
def distill(
    model: Converted,
    output: Output,
    data: Data = "pydoc_data.topics",
    stage: Annotated[
        str | None,
        typer.Option(
            help="1 (the targets' own parameters), 2 (attention outputs and logits) or both; what there is to "
            "train, by default.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of a stage; 300 by default.", show_default=False)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; 2,048 by default.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set any other option of DistillConfig, as in --set trainable=all; may be repeated.",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints and losses; OUTPUT.checkpoints by default.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run whose checkpoints are there.")
    ] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> Shown:
    """Train MODEL to do what its own weights do with dense attention, and save it in OUTPUT."""
    from retrofit.data import check
    from retrofit.distill import DistillConfig
    from retrofit.distill import distill as train
    from retrofit.distill.files import check_run
    from retrofit.loading import load_model
    from retrofit.saving import check_folder, save_pretrained

    named = {"stage": stage, "steps": steps, "length": length}
    options: dict[str, Any] = {**assignments(set_), **{k: v for k, v in named.items() if v is not None}}
    config = DistillConfig(**known("--set", options, [field.name for field in fields(DistillConfig)]))
    run = checkpoints if checkpoints is not None else output.with_name(f"{output.name}.checkpoints")
    check_folder(output)
    check_run(run, resume=resume)
    check(data)
    loaded = load_model(model, dtype=dtype, device=device)
    done = train(loaded.model, data, config, tokenizer=loaded.tokenizer, output=run, resume=resume)
    save_pretrained(loaded.model, output, tokenizer=loaded.tokenizer)
    document = {"model": model, "output": output, "checkpoints": run, **done.to_dict()}
    return Shown(document, _screen(done, output, run), f"retrofit eval {output}")


def _screen(done: Any, output: Path, run: Path) -> list[str]:
    lines = [
        f"stage {stage.stage}: {stage.steps} steps, {stage.trained:,} parameters trained, "
        f"loss {stage.first_loss:.4g} → {stage.last_loss:.4g}"
        for stage in done.stages
    ]
    return [
        *lines,
        f"{done.tokens:,} tokens of {done.sequences:,} sequences in {done.seconds:,.0f} s",
        f"saved in {output}; checkpoints and losses in {run}",
    ]
