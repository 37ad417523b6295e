"""How long the kernels of a converted site's attention take on a GPU, each by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

RUNS = 10
"""Runs over which times are averaged."""
SELECTING = frozenset(
    {
        *("halve_levels", "pool_levels", "pool_cells", "measure_spreads", "advance"),
        *("top_scores", "refine", "keep"),
        *("vote", "vote_by_roles", "vote_parts", "settle"),
    }
)
"""Triton kernels that pool keys and select leaves, by name; attention is what the others do."""


def kernel_times(run: Callable[[], Any]) -> dict[str, float]:
    """Returns the microseconds that each kernel takes in one of several runs, the longest first."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(RUNS):
            run()
        torch.cuda.synchronize()
    times: defaultdict[str, float] = defaultdict(float)
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA":
            times[event.name] += event.device_time / RUNS
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def selection_share(times: Mapping[str, float]) -> float | None:
    """Returns which part of the kernels' time pooling and selection take; None where none of them chooses leaves."""
    if "settle" not in times:
        return None
    return sum(time for name, time in times.items() if name in SELECTING) / sum(times.values())
