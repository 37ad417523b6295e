"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # exits with 1 if a table is not what the results say, and names it

A table stands behind a comment that names it, <!-- table: NAME -->, where NAME is a key of TABLES. Tables without such a
comment are left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)((?:\|.*\n)*)")
BACKENDS = {"flash": "FlashAttention", "cudnn": "cuDNN", "efficient": "memory-efficient"}
TEXTS = {
    "python": "Python's reference manual",
    "play": "Hamlet",
    "handbook": "Debian's handbook",
    "postgres": "PostgreSQL's manual",
}

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    wrong = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if unknown := {name for _, name, _ in TABLE.findall(before)} - TABLES.keys():
            parser.error(
                f"{page}: no table is called {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}"
            )
        after = TABLE.sub(lambda found: found[1] + TABLES[found[2]](), before)
        if options.check:
            old, new = (TABLE.findall(text) for text in (before, after))
            wrong += [f"{page.relative_to(ROOT)}: {x[1]}" for x, y in zip(old, new, strict=True) if x != y]
        else:
            page.write_text(after, encoding="utf-8")
    for name in wrong:
        print(f"{name} is not what the results say; run python benchmarks/tables.py", file=sys.stderr)
    return bool(wrong)


def result(name: str) -> Any:
    """What was measured under this name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(rows: Sequence[Row], *columns: Column) -> str:
    """A row of a table for each of ``rows``."""
    lines = [[heading for heading, _ in columns], *([show(row) for _, show in columns] for row in rows)]
    head, *body = ("| " + " | ".join(line) + " |\n" for line in lines)
    return "".join([head, "|" + "---|" * len(columns) + "\n", *body])


def number(key: str, digits: int = 0) -> Callable[[Row], str]:
    """Shows what stands under ``key``; nothing where there is nothing."""
    return lambda row: "" if row[key] is None else f"{row[key]:,.{digits}f}"


def times(slow: str, fast: str) -> Callable[[Row], str]:
    """Shows how many times as long one takes as another."""
    return lambda row: f"{row[slow] / row[fast]:.2f}"


def timings(name: str, inputs: str = "recorded") -> list[Row]:
    """The times of a result of ``retrofit bench``, those of both passes by names that begin with ``both_``."""
    return [
        {
            **row,
            **{f"rival_{rival}": ms for rival, ms in row["rivals_ms"].items()},
            **{f"both_{way}": ms for way, ms in (row["backward"] or {}).items()},
        }
        for row in result(name)["timings"]
        if row["inputs"] == inputs
    ]


TOKENS, KEYS = ("tokens", number("length")), ("keys per query", number("keys"))
DENSE = "dense ms", number("dense_ms", 2)
ORIGINAL = "original ms", number("dense_ms", 1)
IN_A_GRAPH = (
    ("in a CUDA graph, ms", number("target_graph_ms", 2)),
    ("speed-up", times("dense_ms", "target_graph_ms")),
)


def of(who: str, digits: int = 2) -> tuple[Column, Column]:
    """Columns of the converted attention's time."""
    return (f"{who} ms", number("target_ms", digits)), ("speed-up", times("dense_ms", "target_ms"))


def both(who: str, dense: str = "dense ms") -> tuple[Column, ...]:
    """Columns of the time of both passes."""
    return (
        (dense, number("both_dense_ms", 1)),
        (f"{who} ms", number("both_target_ms", 1)),
        ("speed-up", times("both_dense_ms", "both_target_ms")),
    )


def quality() -> str:
    """Perplexity of conversions that nobody trained."""
    return table(
        result("quality")["rows"],
        ("configuration", lambda row: row["configuration"]),
        ("text", lambda row: row["text"]),
        ("dense", number("dense", 3)),
        ("converted", number("perplexity", 3)),
        ("ratio", number("ratio", 4)),
        KEYS,
    )


def quality_in_short() -> str:
    """The same of the targets' defaults, by text."""
    found = {(row["configuration"], row["text"]): row for row in result("quality")["rows"]}
    columns: list[Column] = [("text", lambda row: row["text"])]
    rows: dict[str, dict[str, Any]] = {text: {"text": words} for text, words in TEXTS.items()}
    for target in ("HSA", "MAHA"):
        ratio, keys = f"{target} ratio", f"{target} keys"
        for text, row in rows.items():
            measured = found[f"{target}, default", text]
            row[ratio], row[keys] = measured["ratio"], measured["keys"]
        columns += [(target, number(ratio, 3)), ("keys per query", number(keys))]
    return table(list(rows.values()), *columns)


def distillation() -> str:
    """Perplexity before and after a few minutes of training."""
    found = result("distillation")
    rows = [
        {"what": "dense", "perplexity": found["dense"], "ratio": 1.0, "keys": found["dense_keys"]},
        *(
            {"what": what, "perplexity": found[name], "ratio": found["ratios"][name], "keys": found["keys"]}
            for name, what in (
                ("converted", "converted"),
                ("distilled", f"distilled, {found['cpu_minutes']:.1f} CPU minutes"),
            )
        ),
    ]
    return table(
        rows,
        ("", lambda row: row["what"]),
        ("perplexity", number("perplexity", 3)),
        ("times dense", number("ratio", 4)),
        KEYS,
    )


def on_a_cpu() -> str:
    """Times on a CPU."""
    return table(
        timings("speed-cpu"),
        TOKENS,
        ("dense ms", number("dense_ms")),
        *of("HSA", 0),
        ("HSA ms, dense_until=0", number("target_from_0_ms")),
    )


def kernels() -> str:
    """Time of each kernel of the forward pass that takes 5 µs of it somewhere, and what selection and pooling take."""
    rows = timings("speed-h200-hsa-32x8x128-forward")
    names = dict.fromkeys(name for row in rows for name, us in row["kernels_us"].items() if us >= 5)
    return table(
        [{**names, **row, **row["kernels_us"]} for row in rows],
        TOKENS,
        *((name, number(name)) for name in names),
        ("selection and pooling", lambda row: f"{row['selection_share']:.1%}"),
    )


def scaling() -> str:
    """Times of one text after another that is twice as long."""
    found = result("speed-h200-hsa-scaling")["scaling"]["target_ms"]
    lengths: list[Column] = [(f"{int(n):,}", number(n, 2)) for n in found]
    return table([found], ("tokens", lambda row: "HSA ms"), *lengths)


def decoding() -> str:
    """Times of one token."""
    return table(
        result("speed-h200-hsa-decode")["decoding"],
        ("tokens before", number("length")),
        ("dense µs", number("dense_us", 1)),
        ("HSA µs", number("target_us", 1)),
        ("speed-up", number("speedup", 2)),
        ("first token of a block, µs", number("first_us", 1)),
        KEYS,
    )


def rivals(names: Sequence[str], *columns: Column) -> str:
    """Times beside those of a rival."""
    return table([row for name in names for row in timings(name)], TOKENS, *columns, KEYS)


def whole_model(part: str) -> list[Row]:
    """Times of a whole model, by the names that those of a layer have."""
    return [
        {**row, **row["converted"], "dense_ms": row["original"]["ms"], "target_ms": row["converted"]["ms"]}
        for row in result(f"whole-model-{part}")["rows"]
    ]


def prefill() -> str:
    """Times of a whole model that reads a prompt."""
    return table(whole_model("prefill"), TOKENS, ORIGINAL, *of("converted", 1), KEYS)


def generate() -> str:
    """Times of a whole model's tokens."""
    rows = sorted(whole_model("generate"), key=lambda row: row["length"])
    return table(rows, ("prompt", number("length")), ("rows", number("batch")), ORIGINAL, *of("converted", 1))


def training_step(length: int) -> str:
    """Time and memory of a training step of one row of so many tokens."""
    (found,) = (row for row in result("training-step-smollm2")["rows"] if row["length"] == length)
    ways = {
        "eager": "eager: softmax(q kᵀ) v",
        **BACKENDS,
        "hsa": f"HSA, {found['hsa']['keys']:,.0f} keys a query",
    }
    rows = [
        {"attention": words, **found[way]} for way, words in ways.items() if "ms" in (found.get(way) or {})
    ]
    return table(
        rows,
        ("attention", lambda row: row["attention"]),
        ("ms", number("ms", 1)),
        ("peak memory", lambda row: f"{row['bytes'] / 1e6:,.0f} MB"),
    )


def exported_logits() -> str:
    """How far the logits of an exported model are from PyTorch's."""
    return table(
        result("export")["HSA"]["logits"],
        TOKENS,
        ("batch", number("batch")),
        ("largest difference of a logit", lambda row: f"{row['worst']:.1e}"),
    )


def exports() -> str:
    """What an export takes, and what it makes."""
    found = result("export")
    rows = []
    for name in ("HSA", "unconverted"):
        memory = found[name]["memory_at_8192"]
        rows.append({"model": name, "export": found[name]["export_cpu_s"], **memory})
    return table(
        rows,
        ("model", lambda row: row["model"]),
        ("export, CPU s", number("export")),
        ("load, CPU s", number("load_cpu_s")),
        ("peak memory at 8,192 tokens", lambda row: f"{row['peak_mb']:,} MB"),
        ("forward at 8,192 tokens, CPU s", number("run_cpu_s")),
    )


def speed_in_short() -> str:
    """How many times as fast one layer is on a GPU, by length."""
    lengths = (4096, 16384, 32768, 65536, 131072)

    def ratios(*names: str, dense: str = "dense_ms", target: str = "target_ms") -> dict[int, float]:
        return {row["length"]: row[dense] / row[target] for name in names for row in timings(name)}

    rows = {
        "HSA, forward": ratios("speed-h200-hsa-32x8x128-forward", "speed-h200-hsa-128k"),
        "HSA, both passes": ratios("speed-h200-hsa-32x8x128", dense="both_dense_ms", target="both_target_ms"),
        # Behind a few tokens less than a power of two.
        "HSA, a decoded token of 8 rows": {
            1 << int(row["length"]).bit_length(): row["speedup"]
            for row in result("speed-h200-hsa-decode")["decoding"]
        },
        "MAHA with 7 scales, forward": ratios("speed-h200-maha-32x8x128-forward", "speed-h200-maha-128k"),
    }
    return table(
        [{"what": what, **{f"{n:,}": found.get(n) for n in lengths}} for what, found in rows.items()],
        ("tokens", lambda row: row["what"]),
        *((f"{n:,}", number(f"{n:,}", 2)) for n in lengths),
    )


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "quality-in-short": quality_in_short,
    "distillation": distillation,
    "speed-cpu": on_a_cpu,
    "hsa-32x8x128-forward": lambda: table(
        timings("speed-h200-hsa-32x8x128-forward"), TOKENS, DENSE, *of("HSA"), *IN_A_GRAPH, KEYS
    ),
    "hsa-kernels": kernels,
    "hsa-128k": lambda: table(timings("speed-h200-hsa-128k"), TOKENS, DENSE, *of("HSA"), KEYS),
    "hsa-scaling": scaling,
    "hsa-decode": decoding,
    "hsa-smollm2-forward": lambda: table(
        timings("speed-h200-hsa-smollm2-forward"), TOKENS, DENSE, *of("HSA"), *IN_A_GRAPH, KEYS
    ),
    "hsa-32x8x128": lambda: table(timings("speed-h200-hsa-32x8x128"), TOKENS, *both("HSA"), KEYS),
    "hsa-32x32x128": lambda: table(
        timings("speed-h200-hsa-32x32x128"),
        TOKENS,
        DENSE,
        *of("HSA"),
        *both("HSA", "both passes, dense ms"),
        KEYS,
    ),
    "hsa-flex": lambda: rivals(
        ["speed-h200-hsa-flex"],
        ("HSA ms", number("target_ms", 2)),
        ("FlexAttention ms", number("rival_flex", 2)),
        ("times as fast", times("rival_flex", "target_ms")),
    ),
    "hsa-nsa": lambda: rivals(
        ["speed-h200-hsa-nsa-32k", "speed-h200-hsa-nsa-64k"],
        ("HSA ms", number("target_ms", 1)),
        ("NSA ms", number("rival_nsa", 1)),
        ("times as fast", times("rival_nsa", "target_ms")),
        ("both passes, HSA ms", number("both_target_ms", 1)),
        ("NSA ms", number("both_nsa_ms", 1)),
        ("times as fast", times("both_nsa_ms", "both_target_ms")),
    ),
    "hsa-random": lambda: table(timings("speed-h200-hsa-random", "random"), TOKENS, DENSE, *of("HSA"), KEYS),
    "maha-32x8x128-forward": lambda: table(
        timings("speed-h200-maha-32x8x128-forward"), TOKENS, DENSE, *of("MAHA"), *IN_A_GRAPH, KEYS
    ),
    "maha-32x8x128": lambda: table(timings("speed-h200-maha-32x8x128"), TOKENS, *both("MAHA")),
    "speed-in-short": speed_in_short,
    "prefill": prefill,
    "generate": generate,
    "training-step": partial(training_step, 8192),
    "training-step-32k": partial(training_step, 32768),
    "exported-logits": exported_logits,
    "exports": exports,
}

if __name__ == "__main__":
    sys.exit(main())
