"""How the time of a converted site grows with the length: the exponent of a power law through several lengths.

times by length  ──least squares over logarithms──▶  time ~ length^exponent
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log

from retrofit.attention_call import unpadded
from retrofit.bench.inputs import Inputs
from retrofit.bench.measure import executed_keys, medians
from retrofit.bench.rivals import Run
from retrofit.errors import BenchmarkError
from retrofit.targets.base import TargetAttention


@dataclass(frozen=True)
class Scaling:
    """How the forward time of a site grows.

    Attributes:
        target_ms: Median of the converted attention, pooling and selection included, by length.
        keys: Keys executed per query and kv head, mean over all positions, by length.
        exponent: Slope of the logarithm of the time over that of the length.
    """

    target_ms: Mapping[int, float]
    keys: Mapping[int, float]
    exponent: float


def time_scaling(target: TargetAttention, inputs: Inputs, lengths: Sequence[int], repeats: int) -> Scaling:
    """Times ``target`` alone on the first tokens of ``inputs``; dense attention would take too long to wait for.

    Args:
        target: The converted attention.
        inputs: Of at least the longest length.
        lengths: In tokens; at least two.
        repeats: Timed runs of a length, at least; the median counts.
    """
    found: dict[int, float] = {}
    keys: dict[int, float] = {}
    for length in sorted(set(lengths)):
        first = inputs.first(length)
        run = Run(partial(target, call=unpadded(first.q)), (first.q, first.k, first.v))
        with executed_keys(target) as counted:
            run.forward()
        keys[length] = counted[0].mean().item()
        found[length] = medians({"target": run.forward}, repeats, first.q.device)["target"]
    return Scaling(found, keys, exponent(found))


def exponent(times_ms: Mapping[int, float]) -> float:
    """The least-squares slope of log time over log length.

    Raises:
        BenchmarkError: If there are fewer than two lengths.
    """
    if len(times_ms) < 2:
        raise BenchmarkError(f"an exponent needs at least two lengths, got {len(times_ms)}")
    points = [(log(length), log(time)) for length, time in times_ms.items()]
    middle, level = (sum(values) / len(points) for values in zip(*points, strict=True))
    rise = sum((x - middle) * (y - level) for x, y in points)
    return rise / sum((x - middle) ** 2 for x, _ in points)
