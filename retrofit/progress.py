"""Progress bars for long work, shown only where somebody asked for them.

    for batch in track(batches, "distil", total=300): …      →  nothing, unless inside  with shown(): …

Library code marks its long loops with ``track``; the command line turns the bars on. They go to stderr, so that
stdout stays free for results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Item = TypeVar("Item")

_bars: ContextVar[Progress | None] = ContextVar("retrofit_progress", default=None)


@contextmanager
def shown(console: Console | None = None) -> Iterator[None]:
    """Shows the bars of every ``track`` inside the block on ``console``, by default on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        Remaining(),
    )
    bars = Progress(*columns, console=console or Console(stderr=True))
    token = _bars.set(bars)
    try:
        yield
    finally:
        _bars.reset(token)
        # Started by the first loop: without one nothing is printed, not even an empty line.
        if bars.live.is_started:
            bars.stop()


def track(items: Iterable[Item], description: str, *, total: int | None = None) -> Iterator[Item]:
    """Yields ``items``, and advances a bar named ``description`` where bars are shown.

    Args:
        items: What the loop goes over.
        description: A word or two that name the work.
        total: Number of items; None takes ``len(items)`` where there is one.
    """
    bars = _bars.get()
    if bars is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    bars.start()
    task = bars.add_task(description, total=total)
    for item in items:
        yield item
        bars.advance(task)


def count(what: str, done: int, total: int) -> None:
    """Sets a bar to ``done`` of ``total`` where bars are shown; for functions that take a ``progress`` callback.

    Args:
        what: The work and its object, as in ``verify model.layers.0``; the first word names the bar.
        done: Finished parts.
        total: Number of parts.
    """
    bars = _bars.get()
    if bars is None:
        return
    bars.start()
    name = what.split(" ", 1)[0]
    task = next((task.id for task in bars.tasks if task.description == name), None)
    bars.update(bars.add_task(name) if task is None else task, completed=done, total=total)


def tell(message: str) -> None:
    """Prints ``message`` above the bars where bars are shown."""
    bars = _bars.get()
    if bars is not None:
        bars.console.print(message, highlight=False)
