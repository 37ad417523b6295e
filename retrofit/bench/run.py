"""Times one site of a converted model by length, after a check of the very same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.attention_call import AttentionCall, unpadded
from retrofit.bench.decoding import Decoding, decoding
from retrofit.bench.inputs import Inputs, record
from retrofit.bench.kernels import kernel_times, selection_share
from retrofit.bench.measure import environment, executed_keys, graph_ms, medians, peak_memory
from retrofit.bench.rivals import Run, dense_runs, flex_run, nsa_run
from retrofit.bench.scaling import Scaling, time_scaling
from retrofit.cache import RetrofitLayer
from retrofit.configs import HSAConfig, config_to_dict
from retrofit.data import DEFAULT_SOURCE, Source
from retrofit.errors import BenchmarkError
from retrofit.kernels.hsa.state import HSAState
from retrofit.progress import track
from retrofit.targets.base import TargetAttention
from retrofit.targets.hsa import HSAAttention

CHECK_LENGTH = 2048
"""Tokens on which every timed implementation is first compared with the reference."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float64: 1e-9}


@dataclass(frozen=True)
class Timing:
    """Times of one sequence length, in milliseconds; memory in bytes beyond the inputs.

    Attributes:
        length: Tokens in the sequence; the batch is 1.
        inputs: ``recorded``, or ``random`` for independent normal numbers.
        dense_ms: Median of the fastest dense backend.
        dense_backends_ms: The medians of all of them.
        target_ms: Median of the converted attention, pooling and selection included.
        target_graph_ms: The same in a CUDA graph, without the time the host takes to launch kernels;
            None if it was not asked for.
        target_from_0_ms: As ``target_ms`` with ``dense_until=0``, of which it is the same number where the dense start is
            the shortest there is; None for a target without that option.
        kernels_us: Time that each kernel of the converted attention takes on the GPU, in microseconds, the longest
            first; for HSA with ``dense_until=0``. None if it was not asked for.
        keys: Keys executed per query and kv head, mean over all positions.
        target_tflops: Products with those keys alone, in TFLOP/s.
        dense_bytes: Peak memory of the fastest dense backend.
        target_bytes: Peak memory of the converted attention.
        rivals_ms: Medians of FlexAttention and fla's NSA where they were asked for and ran.
        backward: The same times for forward and backward together; None if it was not asked for.
    """

    length: int
    inputs: str
    dense_ms: float
    dense_backends_ms: Mapping[str, float]
    target_ms: float
    target_graph_ms: float | None
    target_from_0_ms: float | None
    kernels_us: Mapping[str, float] | None
    keys: float
    target_tflops: float
    dense_bytes: int
    target_bytes: int
    rivals_ms: Mapping[str, float]
    backward: Mapping[str, float] | None

    @property
    def speedup(self) -> float:
        """Dense time over converted time."""
        return self.dense_ms / self.target_ms

    @property
    def selection_share(self) -> float | None:
        """The part of the kernels' time that HSA's pooling and selection take; None without ``kernels_us``, and where no
        Triton kernel selects."""
        return None if self.kernels_us is None else selection_share(self.kernels_us)


@dataclass(frozen=True)
class BenchmarkReport:
    """What was timed, where, and with what result; ``left_out`` says why a rival is missing.

    ``scaling`` is None where it was not asked for.
    """

    site: str
    config: dict[str, Any]
    shape: dict[str, int]
    dtype: str
    error: float
    timings: list[Timing]
    decoding: list[Decoding]
    scaling: Scaling | None
    left_out: dict[str, str]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        timings = [
            {**asdict(row), "speedup": row.speedup, "selection_share": row.selection_share}
            for row in self.timings
        ]
        decoding = [{**asdict(row), "speedup": row.speedup} for row in self.decoding]
        return {**asdict(self), "timings": timings, "decoding": decoding}


def benchmark(
    model: nn.Module,
    *,
    tokenizer: Any,
    source: Source = DEFAULT_SOURCE,
    lengths: Sequence[int] = (4096, 8192, 16384, 32768, 65536),
    site: str | None = None,
    repeats: int = 3,
    dense_until: int | None = None,
    shape: tuple[int, int, int] | None = None,
    backward: bool = False,
    rivals: Sequence[str] = (),
    graph: bool = False,
    kernels: bool = False,
    random: bool = False,
    decode: int = 0,
    scaling: Sequence[int] = (),
) -> BenchmarkReport:
    """Times one site of a converted model, the whole op with selection, against dense attention.

    The queries, keys and values are those the site computes on ``source``, as ``inputs.record`` says.

    Args:
        model: A converted model.
        tokenizer: Its tokenizer.
        source: Text to run it on; anything ``retrofit.data.documents`` takes.
        lengths: Sequence lengths, in tokens.
        site: Path of the site; None takes the middle one.
        repeats: Timed runs a length, at least; the median counts.
        dense_until: Overrides the site's own, for HSA.
        shape: Heads, kv heads and dims to bring the inputs to; None leaves the site's. In another shape learned
            parameters have their initial values.
        backward: Whether to time forward and backward together as well.
        rivals: What else to time: ``flex`` (FlexAttention on the blocks that HSA selected, without the selection)
            and ``nsa`` (fla's native sparse attention).
        graph: Whether to time the converted attention in a CUDA graph as well.
        kernels: Whether to time each of its kernels as well, on CUDA.
        random: Whether to time independent random inputs as well, which share no selection.
        decode: Rows of the batches in which to time one decoded token as well, for HSA on CUDA; 0 for none.
        scaling: Lengths at which to time the converted attention alone, for the exponent with which its time grows.

    Returns:
        The times, with hardware, versions and date.

    Raises:
        BenchmarkError: If the model is not converted, the site or a rival unknown, the text too short, the shape
            does not fit, ``graph`` or ``kernels`` is asked for without CUDA, or the op differs from its reference on
            these very inputs: a wrong result is not timed.
    """
    from retrofit.api import sites

    if repeats < 1:
        raise BenchmarkError(f"repeats must be at least 1, got {repeats}")
    if unknown := set(rivals) - {"flex", "nsa"}:
        raise BenchmarkError(f"rivals must be among flex and nsa, got {', '.join(sorted(unknown))}")
    for name, asked in (("graph", graph), ("kernels", kernels)):
        if asked and not next(model.parameters()).is_cuda:
            raise BenchmarkError(
                f"{name} needs a model on CUDA, got one on the CPU; load it with device='cuda'"
            )
    if scaling and len(set(scaling)) < 2:
        raise BenchmarkError(f"scaling needs at least two lengths, got {scaling[0]:,} alone")
    found = dict(sites(model))
    if not found:
        raise BenchmarkError("the model has no converted site; convert it first")
    path = site if site is not None else list(found)[len(found) // 2]
    if path not in found:
        raise BenchmarkError(f"no converted site {path!r}; there are {', '.join(found)}")
    target = found[path].retrofit
    if target.softcap or target.sinks:
        raise BenchmarkError(
            f"{path} caps its scores or has attention sinks, which no rival does; choose another site"
        )
    inputs = record(model, path, tokenizer, source, max(*lengths, *scaling, CHECK_LENGTH), target.scale)
    if shape is not None:
        inputs = inputs.shaped(*shape)
        heads, kv_heads, dim = shape
        target = with_changes(
            target, heads=heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim, scale=inputs.scale
        )
    if dense_until is not None:
        if not isinstance(target.config, HSAConfig):
            raise BenchmarkError(f"dense_until is an option of HSA; {path} is {target.config.target!r}")
        target = with_changes(target, config=replace(target.config, dense_until=dense_until))
    error = check(target, inputs)
    timings, left_out = [], dict[str, str]()
    kinds = {"recorded": inputs, **({"random": inputs.random()} if random else {})}
    for length in track(lengths, "time"):
        for kind, tensors in kinds.items():
            timings.append(
                _time(
                    target,
                    tensors.first(length),
                    kind,
                    repeats,
                    rivals,
                    left_out,
                    backward=backward,
                    graph=graph,
                    kernels=kernels,
                )
            )
    decoded = []
    if decode:
        if not isinstance(target, HSAAttention):
            raise BenchmarkError(f"decoding is timed for HSA, {path} is {target.config.target!r}")
        for length in track(lengths, "decode"):
            if length <= target.geometry.dense_end + target.geometry.query_block:
                left_out[f"decoding behind {length} tokens"] = "what comes next is dense"
            else:
                decoded.append(decoding(target, inputs.first(length), decode))
    grown = time_scaling(target, inputs, scaling, repeats) if scaling else None
    q, k = inputs.q, inputs.k
    return BenchmarkReport(
        site=path,
        config=config_to_dict(target.config),
        shape={"heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[3], "batch": q.shape[0]},
        dtype=str(q.dtype).removeprefix("torch."),
        error=error,
        timings=timings,
        decoding=decoded,
        scaling=grown,
        left_out=left_out,
        environment=environment(q.device),
    )


def check(target: TargetAttention, inputs: Inputs) -> float:
    """Compares the op with its reference on the first tokens of the inputs, for HSA with ``dense_until=0`` as well.

    Returns:
        ‖out − reference‖ / ‖reference‖, the larger one.

    Raises:
        BenchmarkError: If it is above the dtype's tolerance.
    """
    first = inputs.first(CHECK_LENGTH)
    error = max(_error(one, first) for one in {target, _from_0(target)})
    if not error <= TOLERANCES[inputs.q.dtype]:
        raise BenchmarkError(
            f"the op differs from its reference by {error:.2e} on the inputs to be timed, at most "
            f"{TOLERANCES[inputs.q.dtype]:.0e} is allowed for {inputs.q.dtype}; nothing was timed"
        )
    return error


def _error(target: TargetAttention, inputs: Inputs) -> float:
    call = unpadded(inputs.q)
    reference = with_changes(target, implementation="reference")
    with torch.no_grad():
        out, expected = (x(inputs.q, inputs.k, inputs.v, call).double() for x in (target, reference))
    return float((out - expected).norm() / expected.norm())


def _from_0(target: TargetAttention) -> TargetAttention:
    """The target with ``dense_until=0``; itself where that changes nothing."""
    if not isinstance(target, HSAAttention) or target.geometry.dense_end == target.geometry.fitting_end:
        return target
    return with_changes(target, config=replace(target.config, dense_until=0))


def with_changes(target: TargetAttention, **changes: Any) -> TargetAttention:
    """A target like ``target``; its learned parameters are kept where the shape is."""
    names = (
        "heads",
        "kv_heads",
        "head_dim",
        "value_dim",
        "scale",
        "softcap",
        "sinks",
        "causal",
        "sliding_window",
        "implementation",
    )
    options = {name: getattr(target, name) for name in ("config", *names)} | changes
    copied = type(target)(options.pop("config"), **options)
    if changes.keys() <= {"config", "implementation"}:
        copied.load_state_dict(target.state_dict())
    parameter = next(target.parameters(), None)
    return (copied if parameter is None else copied.to(parameter.device, parameter.dtype)).eval()


def _time(
    target: TargetAttention,
    inputs: Inputs,
    kind: str,
    repeats: int,
    rivals: Sequence[str],
    left_out: dict[str, str],
    *,
    backward: bool,
    graph: bool,
    kernels: bool,
) -> Timing:
    tensors, device = (inputs.q, inputs.k, inputs.v), inputs.q.device
    call = unpadded(inputs.q)
    runs = {"target": Run(partial(attend, target, call), tensors)}
    from_0 = _from_0(target)
    if from_0 is not target:
        runs["from_0"] = Run(partial(attend, from_0, call), tensors)
    dense = dense_runs(inputs, target.causal)
    others = _rivals(target, inputs, call, rivals, left_out)
    everyone = {**runs, **dense, **others}

    with executed_keys(target) as counted:
        runs["target"].forward()
    keys = counted[0].mean().item()
    forward = medians({name: run.forward for name, run in everyone.items()}, repeats, device)
    fastest = min(dense, key=forward.__getitem__)
    products = 2 * inputs.q.shape[1] * inputs.q.shape[2] * (inputs.q.shape[3] + inputs.v.shape[3])
    return Timing(
        length=inputs.q.shape[2],
        inputs=kind,
        dense_ms=forward[fastest],
        dense_backends_ms={name: forward[name] for name in dense},
        target_ms=forward["target"],
        target_graph_ms=graph_ms(runs["target"].forward) if graph else None,
        target_from_0_ms=forward.get("from_0", forward["target"])
        if isinstance(target, HSAAttention)
        else None,
        kernels_us=kernel_times(runs.get("from_0", runs["target"]).forward) if kernels else None,
        keys=keys,
        target_tflops=products * keys / forward["target"] / 1e9,
        dense_bytes=peak_memory(dense[fastest].forward, device),
        target_bytes=peak_memory(runs["target"].forward, device),
        rivals_ms={name: forward[name] for name in others},
        backward=_backward(everyone, dense, repeats, left_out, device) if backward else None,
    )


def attend(target: TargetAttention, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The target on q, k and v."""
    found: Tensor = target(q, k, v, call)
    return found


def _backward(
    runs: Mapping[str, Run],
    dense: Mapping[str, Run],
    repeats: int,
    left_out: dict[str, str],
    device: torch.device,
) -> dict[str, float]:
    """Forward and backward together: ``target_ms``, ``dense_ms`` and the times of all that took part."""
    able: dict[str, Callable[[], None]] = {}
    for name, run in runs.items():
        if name == "flex":
            left_out["flex, backward"] = "its block lists are for the forward pass only"
        else:
            able[name] = run.both
    found = medians(able, repeats, device)
    return {
        "target_ms": found["target"],
        "dense_ms": min(found[name] for name in dense),
        **{f"{name}_ms": found[name] for name in found if name != "target"},
    }


def _rivals(
    target: TargetAttention,
    inputs: Inputs,
    call: AttentionCall,
    names: Sequence[str],
    left_out: dict[str, str],
) -> dict[str, Run]:
    runs = {}
    for name in names:
        try:
            if name == "nsa":
                runs[name] = nsa_run(inputs)
            elif isinstance(target, HSAAttention) and inputs.q.device.type == "cuda":
                layer = RetrofitLayer()
                Run(
                    partial(attend, target, replace(call, layer=layer)), (inputs.q, inputs.k, inputs.v)
                ).forward()
                if isinstance(layer.state, HSAState):
                    runs[name] = flex_run(inputs, layer.state.spans, layer.state.choices, target.geometry)
                else:
                    left_out[f"{name}, {inputs.q.shape[2]} tokens"] = "nothing is selected: all is dense"
            else:
                left_out[name] = "only HSA on CUDA has blocks to give it"
        except BenchmarkError as error:
            left_out[name] = str(error)
    return runs
