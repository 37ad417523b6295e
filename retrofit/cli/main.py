"""The command ``retrofit`` and its sub-commands."""

from __future__ import annotations

import os
import sys

import typer

from retrofit.cli.bench import bench
from retrofit.cli.convert import convert
from retrofit.cli.distill import distill
from retrofit.cli.evaluate import evaluate
from retrofit.cli.export import export
from retrofit.cli.inspect import inspect
from retrofit.cli.report import report

app = typer.Typer(
    name="retrofit",
    help="Rewrite a trained model's attention into hierarchical attention, recover its accuracy, export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for function, name in (
    (inspect, "inspect"),
    (convert, "convert"),
    (distill, "distill"),
    (evaluate, "eval"),
    (bench, "bench"),
    (export, "export"),
    (report, "report"),
):
    app.command(name)(function)


def main() -> None:
    """Runs the command line."""
    if not sys.stderr.isatty():
        # Before any library reads it: their bars would fill a log with one line a step.
        os.environ.setdefault("TQDM_DISABLE", "1")
    app(prog_name="retrofit")
