"""The command line: one small file per command, each of which calls the function of the same name."""

from retrofit.cli.main import app, main

__all__ = ["app", "main"]
