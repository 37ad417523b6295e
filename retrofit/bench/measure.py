"""How long something takes, how much memory it needs, and where that was measured."""

from __future__ import annotations

import datetime
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from retrofit.targets.base import TargetAttention

CUDA_MS = 100
"""Milliseconds spent on timing one function on a GPU, repetitions included."""
IN_A_GRAPH, REPLAYS = 10, 30
"""Runs in a CUDA graph, and how often it is replayed."""


def medians(runs: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Returns the median time of each function, in milliseconds.

    On CPU they take turns, ``repeats`` times, so that a busy moment hits all of them. On CUDA each is repeated
    for ``CUDA_MS``, at least ``repeats`` times, with a cold L2 cache; what takes longer than that, just so often.
    """
    if device.type == "cuda":
        return {name: _median_on_cuda(run, repeats, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _median_on_cuda(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    from triton.testing import do_bench

    found = median_ms(run, repeats, device)
    if found > CUDA_MS:
        return found
    return float(do_bench(run, warmup=CUDA_MS / 4, rep=max(CUDA_MS, repeats * found), return_mode="median"))


def median_ms(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Returns the median time of something long, in milliseconds, after one run that is not counted.

    On CUDA by events, and more often than ``repeats`` as long as that takes less than ``CUDA_MS``.
    """
    run()
    times: list[float] = []
    while len(times) < repeats or (device.type == "cuda" and sum(times) < CUDA_MS):
        times.append(_once_ms(run, device))
    return statistics.median(times)


def graph_ms(run: Callable[[], Any]) -> float:
    """Returns the median time of ``run`` within a CUDA graph of several, in milliseconds: without the host's time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_A_GRAPH):
            run()
    graph.replay()
    device = torch.device("cuda")
    return statistics.median(_once_ms(graph.replay, device) for _ in range(REPLAYS)) / IN_A_GRAPH


def _once_ms(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end))


@contextmanager
def executed_keys(target: TargetAttention) -> Iterator[list[Tensor]]:
    """Collects, of each call of ``target``, the keys that it executes per query and kv head, float [B, Hkv, T]."""
    keys: list[Tensor] = []
    target.observer = lambda counts: keys.append(counts["keys"].float())
    try:
        yield keys
    finally:
        target.observer = None


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Runs ``run`` and returns the bytes it needed at its peak beyond what was held before.

    On CUDA this is the allocator's own account; on CPU the process's resident memory, sampled each millisecond.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _sampled_memory() as sampled:
        run()
    return max(sampled) - sampled[0]


@contextmanager
def _sampled_memory() -> Iterator[list[int]]:
    import psutil

    process = psutil.Process()
    gc.collect()
    samples = [process.memory_info().rss]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(1e-3):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        samples.append(process.memory_info().rss)
        done.set()
        thread.join()


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date, for a result that says where it comes from."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    if device.type == "cuda":
        import triton

        facts["triton"] = triton.__version__
        facts["processor"] = _processor()
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
