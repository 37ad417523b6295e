"""``retrofit report``: all about a converted model on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retrofit.cli.options import Converted, Data, Device, Dtype, read_json
from retrofit.cli.output import Shown, command
from retrofit.errors import DataError, OutputError


@command
def report(
    model: Converted,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What retrofit eval --json printed; measured anew by default.", show_default=False),
    ] = None,
    benchmark: Annotated[
        Path | None,
        typer.Option(help="What retrofit bench --json printed; left out by default.", show_default=False),
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity where no evaluation is given.")] = True,
    data: Data = "pydoc_data.topics",
    length: Annotated[
        int | None, typer.Option(help="Tokens of the sequence that is measured on.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write the page here: .html with pictures, .json, or text.",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> Shown:
    """Say what MODEL was converted to, and what that costs and saves."""
    measured = None if evaluation is None else _printed(evaluation, "eval", ("bins", "sites", "all"))
    timed = None if benchmark is None else _printed(benchmark, "bench", ("site", "timings", "environment"))
    if output is not None and not output.parent.is_dir():
        raise OutputError(f"{output.parent} is no folder; make it, or give another --output")

    from retrofit.api import sites
    from retrofit.data import check
    from retrofit.evaluate import evaluate as measure
    from retrofit.loading import load_model
    from retrofit.report import report as gather

    if measured is None and evaluate:
        check(data)
    loaded = load_model(model, dtype=dtype, device=device)
    if measured is None and evaluate and sites(loaded.model):
        measured = measure(loaded.model, data, tokenizer=loaded.tokenizer, length=length, sequences=1)
    found = gather(loaded.model, evaluation=measured, benchmark=timed)
    screen = [str(found)]
    if output is not None:
        screen.append(f"written to {found.save(output)}")
    return Shown(found.to_dict(), screen, f"retrofit export {model} OUTPUT")


def _printed(path: Path, command: str, needed: tuple[str, ...]) -> Any:
    """What ``retrofit COMMAND --json`` printed into a file."""
    document = read_json(path)
    if missing := [name for name in needed if name not in document]:
        raise DataError(
            f"{path} is not what retrofit {command} --json printed: it has no {', '.join(missing)}"
        )
    return document
