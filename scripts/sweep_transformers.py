"""Converts a tiny model of every architecture of transformers and says what became of each.

    python scripts/sweep_transformers.py --family causal-lm vision --output benchmarks/results --jobs 2 [--names NAME …]

An architecture is built offline from its default configuration with reduced sizes, in a process of its own with a time
limit. The results of a family are in OUTPUT/sweep-FAMILY.json, which grows with each architecture; with ``--resume``
those that it has are not run again. ``scripts/sweep_table.py`` makes pages of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import transformers
from sweep_check import check
from sweep_families import FAMILIES, architectures

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Task:
    """An architecture to check."""

    family: str
    name: str
    config_class: type
    model_class: type


@dataclass(frozen=True)
class _Job:
    """A process that checks one, and when it has to be done."""

    task: Task
    process: Any
    pipe: Any
    until: float


class Results:
    """The rows of each family, written with every new one. Those of another commit than the file's say which."""

    def __init__(self, folder: Path, families: list[str], commit: str | None) -> None:
        self.folder = folder
        self.commit = commit
        self.rows: dict[str, dict[str, dict[str, Any]]] = {family: self._read(family) for family in families}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, task: Task, row: dict[str, Any]) -> None:
        """Puts a row in the place of the one that its architecture had."""
        self.rows[task.family][task.name] = row
        rows = [row for _, row in sorted(self.rows[task.family].items())]
        result = {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            "commit": self.commit,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "summary": dict(Counter(row["verdict"] for row in rows).most_common()),
            "rows": rows,
        }
        path = self._path(task.family)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)

    def _path(self, family: str) -> Path:
        return self.folder / f"sweep-{family}.json"

    def _read(self, family: str) -> dict[str, dict[str, Any]]:
        path = self._path(family)
        if not path.exists():
            return {}
        result = json.loads(path.read_text())
        of = {} if result["commit"] == self.commit else {key: result[key] for key in ("commit", "torch")}
        return {row["architecture"]: {**of, **row} for row in result["rows"]}


def run(tasks: list[Task], jobs: int, limit: float, deadline: float) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Yields the row of each task as it is known, with ``jobs`` processes at a time; none after ``deadline``."""
    waiting, running = list(reversed(tasks)), list[_Job]()
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < deadline:
            running.append(_started(waiting.pop(), limit))
        if time.monotonic() >= deadline:
            for job in running:
                _stop(job)
            return
        until = min([deadline, *(job.until for job in running)])
        connection.wait([job.pipe for job in running], max(0.0, until - time.monotonic()))
        for job in list(running):
            if job.pipe.poll() or time.monotonic() >= job.until:
                running.remove(job)
                yield job.task, _row(job, limit)


def _started(task: Task, limit: float) -> _Job:
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_work, args=(task, sender), daemon=True)
    process.start()
    sender.close()
    return _Job(task, process, receiver, time.monotonic() + limit)


def _work(task: Task, pipe: Any) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        start = time.perf_counter()
        row = check(task.name, task.config_class, task.model_class)
    pipe.send({**row, "seconds": round(time.perf_counter() - start, 1)})


def _row(job: _Job, limit: float) -> dict[str, Any]:
    """What the process says; if nothing, why."""
    row = {"architecture": job.task.name, "class": job.task.model_class.__name__}
    try:
        if job.pipe.poll():
            return job.pipe.recv()
        return {**row, "verdict": "timed out", "error": f"not done after {limit:.0f} s"}
    except EOFError:
        job.process.join()
        code = job.process.exitcode
        return {**row, "verdict": "crashed", "crash": f"the process ended with exit status {code}"}
    finally:
        _stop(job)


def _stop(job: _Job) -> None:
    job.process.kill()
    job.process.join()
    job.pipe.close()


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--names", nargs="+", default=[], help="architectures to renew; all if none is named")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="leave out what the results have already")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one architecture")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--commit", default=_commit(), help="what the results are of")
    return parser.parse_args()


def main() -> None:
    """Runs the sweep."""
    given = _arguments()
    deadline = time.monotonic() + given.seconds
    results = Results(given.output, given.family, given.commit)
    tasks = [
        Task(family, *found)
        for family in given.family
        for found in architectures(family, given.names)
        if not (given.resume and found[0] in results.rows[family])
    ]
    totals: Counter[str] = Counter()
    for task, row in run(tasks, given.jobs, given.limit, deadline):
        trace = row.pop("trace", "")
        results.add(task, row)
        totals[row["verdict"]] += 1
        why = row.get("crash") or row.get("error") or row.get("refused") or ""
        print(
            task.family, task.name, row["verdict"], row.get("seconds", ""), why, file=sys.stderr, flush=True
        )
        if trace:
            print(trace, file=sys.stderr, flush=True)
    print(f"{totals.total()} of {len(tasks)}: {dict(totals)}")


if __name__ == "__main__":
    main()
