"""Writes the results of the sweep as Markdown: a page for each family, and one that sums them up.

python scripts/sweep_table.py benchmarks/results
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from sweep_families import FAMILIES

NOT_SWEPT = ("not built", "not run", "no attention", "timed out")
"""Verdicts that say nothing about the attention."""

MADE_BY = (
    "Tiny random models, float32, CPU. Made by `scripts/sweep_transformers.py` and `scripts/sweep_table.py`; the raw\n"
    "results are in the JSON file beside this one."
)

COLUMNS = (
    "*converted* counts the sites that `DenseConfig` takes with proof, *HSA* those that HSA takes too (in older rows,\n"
    "which leave it open, HSA takes all that were converted)."
)


def page(family: str, result: dict[str, Any]) -> str:
    """Returns the rows of one family: the totals, then one line for each architecture."""
    rows = result["rows"]
    lines = [
        f"# {FAMILIES[family][0]} of transformers",
        "",
        f"{_versions(result)} {MADE_BY}",
        "",
        _totals(rows),
        "",
        COLUMNS,
        "",
        "| architecture | sites | converted | HSA | verdict | why not |",
        "| --- " * 6 + "|",
    ]
    for row in rows:
        cells = [row["architecture"], *(row.get(key, "") for key in ("sites", "convertible", "hsa_sites"))]
        cells += [row["verdict"], why_not(row)]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def why_not(row: dict[str, Any]) -> str:
    """Returns what went wrong, or the reasons of the sites that were left."""
    left = [*row.get("refused", {}), *(f"HSA: {reason}" for reason in row.get("hsa_refused", {}))]
    return row.get("crash") or row.get("error") or "; ".join(left)


def summary(results: dict[str, dict[str, Any]]) -> str:
    """Returns one line for each family."""
    kinds = ("converted", "in part", "refused", "failed", "crashed", "missed")
    lines = [
        "# Architectures of transformers",
        "",
        MADE_BY.replace("file beside this one", "files beside this one"),
        "",
        "| family | architectures | with attention that ran | " + " | ".join(kinds) + " |",
        "| --- " * (len(kinds) + 3) + "|",
    ]
    for family, result in results.items():
        totals = Counter(row["verdict"] for row in result["rows"])
        cells = [f"[{FAMILIES[family][0]}](sweep-{family}.md)", len(result["rows"]), swept(result["rows"])]
        lines.append("| " + " | ".join(map(str, [*cells, *(totals[kind] for kind in kinds)])) + " |")
    return "\n".join(lines) + "\n"


def swept(rows: list[dict[str, Any]]) -> int:
    """Returns how many architectures have attention that could be built and run."""
    return sum(row["verdict"] not in NOT_SWEPT for row in rows)


def ran(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the architectures that could be built and run, with attention or without."""
    return [row for row in rows if row["verdict"] not in ("not built", "not run", "timed out")]


def settled(row: dict[str, Any]) -> bool:
    """Whether every attention of an architecture is converted or has a reason why it is not."""
    if row["verdict"] == "no attention":
        return True
    if row["verdict"] not in ("converted", "in part", "refused"):
        return False
    left = row["sites"] - row["convertible"]
    return sum(row["refused"].values()) == left and all(map(specific, row["refused"]))


def specific(reason: str) -> bool:
    """Whether a reason says what it is about the attention, not only that a comparison failed."""
    return bool(reason) and not any(
        vague in reason for vague in ("the whole model's", "the whole model fails")
    )


def _totals(rows: list[dict[str, Any]]) -> str:
    totals = Counter(row["verdict"] for row in rows).most_common()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in totals)
    return f"{len(rows)} architectures, {swept(rows)} with attention that could be built and run offline: {counts}."


def _versions(result: dict[str, Any]) -> str:
    made = f"transformers {result['transformers']}, torch {result['torch']}, retrofit at {result['commit']}, "
    others = Counter((row["commit"], row["torch"]) for row in result["rows"] if "commit" in row)
    later = "".join(
        f" {count} of the rows are of {commit} with torch {torch}."
        for (commit, torch), count in others.items()
    )
    return f"{made}{result['date']}.{later}"


def main() -> None:
    """Writes the pages beside the JSON files of a folder."""
    folder = Path(sys.argv[1])
    results = {}
    for family in FAMILIES:
        path = folder / f"sweep-{family}.json"
        if path.exists():
            results[family] = json.loads(path.read_text())
            path.with_suffix(".md").write_text(page(family, results[family]))
    (folder / "sweep.md").write_text(summary(results))


if __name__ == "__main__":
    main()
