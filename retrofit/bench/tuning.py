"""Where the sites of a converted model begin to leave keys out, so that they are never slower than dense ones.

    the model's own q, k, v  →  times of dense attention and of HSA without a dense start, by length
                             →  the length at which HSA overtakes  →  dense_until of every site like it

It is kept with the model as a position: prefill, chunks and decoding still see the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from math import ceil, log
from typing import Any

from torch import nn

from retrofit.attention_call import unpadded
from retrofit.bench.inputs import Inputs, record
from retrofit.bench.measure import environment, medians
from retrofit.bench.rivals import Run, dense_runs
from retrofit.bench.run import attend, with_changes
from retrofit.configs import HSAConfig
from retrofit.data import DEFAULT_SOURCE, Source
from retrofit.errors import BenchmarkError
from retrofit.progress import track
from retrofit.targets.hsa import HSAAttention, geometry_of

SHORTEST = 1024
"""Tokens of the shortest sequence that is timed."""


@dataclass(frozen=True)
class Tuned:
    """What was measured for sites of one shape and configuration; times in milliseconds.

    Attributes:
        sites: Paths of the sites it holds for; the middle one was measured.
        dense_ms: Time of the fastest dense attention, by length.
        hsa_ms: Time of HSA without a dense start, by length.
        dense_until: Position before which queries of these sites now attend densely.
    """

    sites: tuple[str, ...]
    dense_ms: Mapping[int, float]
    hsa_ms: Mapping[int, float]
    dense_until: int


@dataclass(frozen=True)
class TuneReport:
    """What was measured and set, and where."""

    tuned: tuple[Tuned, ...]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def tune(
    model: nn.Module,
    *,
    tokenizer: Any,
    source: Source = DEFAULT_SOURCE,
    longest: int = 16384,
    repeats: int = 3,
) -> TuneReport:
    """Sets ``dense_until`` of the HSA sites of a converted model to where HSA overtakes dense attention here.

    Args:
        model: A converted model, on the device and in the dtype it is to run in.
        tokenizer: Its tokenizer.
        source: Text to run it on; anything ``retrofit.data.documents`` takes.
        longest: Tokens of the longest sequence that is timed; where HSA is slower there too, sites attend densely
            up to this position.
        repeats: Timed runs of a length, at least; the median counts.

    Returns:
        The times and the positions.

    Raises:
        BenchmarkError: If the model has no HSA site, ``longest`` is too short to time anything, or the text is too
            short.
    """
    from retrofit.api import sites
    from retrofit.record import record as keep_record

    if longest < 2 * SHORTEST:
        raise BenchmarkError(f"longest must be at least {2 * SHORTEST} tokens, got {longest}")
    alike: dict[tuple[Any, ...], list[str]] = {}
    found = dict(sites(model))
    for path, site in found.items():
        target = site.retrofit
        # Scores that are capped or have sinks are computed by other kernels, which no dense one can be compared to.
        if isinstance(target, HSAAttention) and target.causal and not (target.softcap or target.sinks):
            shape = (target.heads, target.kv_heads, target.head_dim, target.value_dim, target.sliding_window)
            alike.setdefault((target.config, *shape), []).append(path)
    if not alike:
        raise BenchmarkError("the model has no causal HSA site to tune; convert it with HSAConfig() first")
    tuned = []
    for paths in track(list(alike.values()), "tune"):
        middle = paths[len(paths) // 2]
        target = found[middle].retrofit
        assert isinstance(target, HSAAttention)
        inputs = record(model, middle, tokenizer, source, longest, target.scale)
        dense_ms, hsa_ms = _times(target, inputs, _lengths(longest), repeats)
        size = target.config.largest_query_block
        end = geometry_of(replace(target.config, dense_until=None), target.heads // target.kv_heads).dense_end
        until = ceil(max(end, overtaking(dense_ms, hsa_ms)) / size) * size
        for path in paths:
            target = found[path].retrofit
            assert isinstance(target.config, HSAConfig)
            found[path].retrofit = with_changes(target, config=replace(target.config, dense_until=until))
            found[path].retrofit.train(found[path].training)
        tuned.append(Tuned(tuple(paths), dense_ms, hsa_ms, until))
    keep_record(model)
    return TuneReport(tuple(tuned), environment(next(model.parameters()).device))


def overtaking(dense_ms: Mapping[int, float], hsa_ms: Mapping[int, float]) -> float:
    """The length at which HSA takes as long as dense attention, between two that were timed.

    Between them, the ratio of the times is taken for a power of the length.
    """
    lengths = sorted(dense_ms)
    ahead = {length: log(dense_ms[length] / hsa_ms[length]) for length in lengths}
    if ahead[lengths[-1]] < 0:
        return lengths[-1]
    # The last length at which HSA is slower counts: below it, a faster one was noise.
    for shorter, longer in reversed(list(pairwise(lengths))):
        if ahead[shorter] < 0:
            share = ahead[shorter] / (ahead[shorter] - ahead[longer])
            return shorter * (longer / shorter) ** share
    return 0


def _lengths(longest: int) -> list[int]:
    lengths = []
    length = longest
    while length >= SHORTEST:
        lengths.append(length)
        length //= 2
    return lengths[::-1]


def _times(
    target: HSAAttention, inputs: Inputs, lengths: Sequence[int], repeats: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Times of dense attention and of HSA with no more of a dense start than its sizes ask for, by length."""
    sparse = with_changes(target, config=replace(target.config, dense_until=0))
    dense_ms, hsa_ms = {}, {}
    for length in lengths:
        first = inputs.first(length)
        tensors = (first.q, first.k, first.v)
        runs = {
            "hsa": Run(partial(attend, sparse, unpadded(first.q)), tensors),
            **dense_runs(first, target.causal),
        }
        found = medians({name: run.forward for name, run in runs.items()}, repeats, first.q.device)
        hsa_ms[length] = found.pop("hsa")
        dense_ms[length] = min(found.values())
    return dense_ms, hsa_ms
