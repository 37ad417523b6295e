"""Times a converted site's attention against the fastest dense attention, on what the model really computes.

    q, k, v of one site, recorded on real text  →  correctness check  →  median times, speed-up, memory

The cost of a selection depends on the data, so random inputs would say nothing: queries that stand together
choose much the same leaves, independent random ones do not.
"""

from __future__ import annotations

import datetime
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.configs import HSAConfig, config_to_dict
from retrofit.data import DEFAULT_SOURCE, Source, tokens
from retrofit.errors import BenchmarkError
from retrofit.progress import track
from retrofit.site import AttentionCall
from retrofit.targets.base import TargetAttention

CHECK_LENGTH = 2048
"""Tokens on which every timed implementation is first compared with the reference."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float64: 1e-9}


@dataclass(frozen=True)
class Timing:
    """Forward times of one sequence length, in milliseconds; memory in bytes beyond the inputs.

    Attributes:
        length: Tokens in the sequence; the batch is 1.
        dense_ms: Median of the fastest dense backend.
        target_ms: Median of the converted attention, pooling and selection included.
        target_from_0_ms: The same with ``dense_until=0``; None for a target without that option.
        keys: Keys executed per query and kv head, mean over all positions.
        dense_bytes: Peak memory of the dense attention.
        target_bytes: Peak memory of the converted attention.
    """

    length: int
    dense_ms: float
    target_ms: float
    target_from_0_ms: float | None
    keys: float
    dense_bytes: int
    target_bytes: int

    @property
    def speedup(self) -> float:
        """Dense time over converted time."""
        return self.dense_ms / self.target_ms


@dataclass(frozen=True)
class BenchmarkReport:
    """What was timed, where, and with what result."""

    site: str
    config: dict[str, Any]
    shape: dict[str, int]
    dtype: str
    error: float
    timings: list[Timing]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        timings = [{**asdict(timing), "speedup": timing.speedup} for timing in self.timings]
        return {**asdict(self), "timings": timings}


def benchmark(
    model: nn.Module,
    *,
    tokenizer: Any,
    source: Source = DEFAULT_SOURCE,
    lengths: Sequence[int] = (4096, 8192, 16384, 32768, 65536),
    site: str | None = None,
    repeats: int = 3,
    dense_until: int | None = None,
) -> BenchmarkReport:
    """Times one site of a converted model, the whole op with selection, against dense attention.

    The queries, keys and values are those the site computes on ``source``. Beyond the positions the model
    has, segments recorded one after the other are joined.

    Args:
        model: A converted model.
        tokenizer: Its tokenizer.
        source: Text to run it on; anything ``retrofit.data.documents`` takes.
        lengths: Sequence lengths, in tokens.
        site: Path of the site; None takes the middle one.
        repeats: Timed runs a length; the median counts.
        dense_until: Overrides the site's own, for HSA.

    Returns:
        The times, with hardware, versions and date.

    Raises:
        BenchmarkError: If the model is not converted, the site unknown, the text too short, or the op
            differs from its reference on these very inputs: a wrong result is not timed.
    """
    from retrofit.api import sites

    found = dict(sites(model))
    if not found:
        raise BenchmarkError("the model has no converted site; convert it first")
    path = site if site is not None else list(found)[len(found) // 2]
    if path not in found:
        raise BenchmarkError(f"no converted site {path!r}; there are {', '.join(found)}")
    target = found[path].retrofit
    if dense_until is not None:
        target = _with(target, dense_until=dense_until)
    q, k, v = record(model, path, tokenizer, source, max(*lengths, CHECK_LENGTH))
    error = check(target, q, k, v)
    variants = {"target": target}
    if isinstance(target.config, HSAConfig):
        variants["from_0"] = _with(target, dense_until=0)
    timings = [
        _time(variants, q[:, :, :length], k[:, :, :length], v[:, :, :length], repeats)
        for length in track(lengths, "time")
    ]
    return BenchmarkReport(
        site=path,
        config=config_to_dict(target.config),
        shape={"heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[3], "batch": q.shape[0]},
        dtype=str(q.dtype).removeprefix("torch."),
        error=error,
        timings=timings,
        environment=environment(q.device),
    )


def record(
    model: nn.Module,
    path: str,
    tokenizer: Any,
    source: Source,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Records what the target at ``path`` receives on ``source``.

    Returns:
        q [1, Hq, length, D], k [1, Hkv, length, D] and v [1, Hkv, length, Dv].

    Raises:
        BenchmarkError: If the text has fewer tokens than ``length``.
    """
    ids = tokens(source, tokenizer, limit=length)[None, :length]
    if ids.shape[1] < length:
        raise BenchmarkError(f"the text has {ids.shape[1]} tokens, {length} are needed; give a longer text")
    step = min(length, getattr(model.config, "max_position_embeddings", length))
    device = next(model.parameters()).device
    segments = [
        _record_once(model, path, ids[:, begin : min(begin + step, length)].to(device))
        for begin in track(range(0, length, step), "record")
    ]
    q, k, v = (torch.cat(parts, dim=2).contiguous() for parts in zip(*segments, strict=True))
    return q, k, v


class _Recorded(Exception):
    """Ends a forward pass as soon as the wanted site has been reached."""


def _record_once(model: nn.Module, path: str, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from retrofit.api import sites

    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.extend(tensor.detach() for tensor in args[:3])
        raise _Recorded

    handle = dict(sites(model))[path].retrofit.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except _Recorded:
        assert kept  # the forward pass has done what it was for
    finally:
        handle.remove()
    if not kept:
        raise BenchmarkError(f"the forward pass never reached {path}")
    return kept[0], kept[1], kept[2]


def check(target: TargetAttention, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Compares the op with its reference on the first tokens of the inputs.

    Returns:
        ‖out − reference‖ / ‖reference‖.

    Raises:
        BenchmarkError: If it is above the dtype's tolerance.
    """
    length = min(CHECK_LENGTH, q.shape[2])
    inputs = (q[:, :, :length], k[:, :, :length], v[:, :, :length])
    with torch.no_grad():
        out = target(*inputs, _call(length, q.device)).double()
        expected = _with(target, implementation="reference")(*inputs, _call(length, q.device)).double()
    error = float((out - expected).norm() / expected.norm())
    if not error <= TOLERANCES[q.dtype]:
        raise BenchmarkError(
            f"the op differs from its reference by {error:.2e} on the inputs to be timed, at most "
            f"{TOLERANCES[q.dtype]:.0e} is allowed for {q.dtype}; nothing was timed"
        )
    return error


def _with(target: TargetAttention, *, implementation: str | None = None, **changes: Any) -> TargetAttention:
    copied = type(target)(
        replace(target.config, **changes),
        heads=target.heads,
        kv_heads=target.kv_heads,
        head_dim=target.head_dim,
        value_dim=target.value_dim,
        scale=target.scale,
        causal=target.causal,
        sliding_window=target.sliding_window,
        implementation=implementation or target.implementation,
    )
    copied.load_state_dict(target.state_dict())
    parameter = next(target.parameters(), None)
    return copied.to(parameter.device if parameter is not None else "cpu").eval()


def _call(length: int, device: torch.device) -> AttentionCall:
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return AttentionCall(start=zero, length=zero + length)


def _time(variants: dict[str, TargetAttention], q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Timing:
    call = _call(q.shape[2], q.device)
    target = variants["target"]
    runs: dict[str, Callable[[], Any]] = {
        name: partial(module, q, k, v, call) for name, module in variants.items()
    }
    runs["dense"] = lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=target.causal, scale=target.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    keys: list[float] = []
    with torch.no_grad():
        target.observer = lambda counts: keys.append(counts["keys"].float().mean().item())
        runs["target"]()
        target.observer = None
        for name, run in runs.items():
            peaks[name] = peak_memory(run, q.device)
        for _ in range(repeats):  # interleaved, so that a busy moment hits all of them
            for name, run in runs.items():
                times[name].append(_milliseconds(run, q.device))
    median = {name: statistics.median(values) for name, values in times.items()}
    return Timing(
        length=q.shape[2],
        dense_ms=median["dense"],
        target_ms=median["target"],
        target_from_0_ms=median.get("from_0"),
        keys=keys[0],
        dense_bytes=peaks["dense"],
        target_bytes=peaks["target"],
    )


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


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
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
