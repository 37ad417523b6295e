"""What a kernel is launched with a second time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from retrofit.attention_call import unpadded
from retrofit.configs import MAHAConfig
from retrofit.kernels import launch
from retrofit.kernels.launch import Kernel
from retrofit.targets.maha import MAHAAttention


class Compiled:
    """Notes how it is launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self.hooked: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.hooked.append((grid, *arguments))


class Function:
    """Compiles anew each time that it is launched."""

    arg_names = ("x", "n", "SIZE")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_(*arguments: Any, **constants: Any) -> Compiled:
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return compile_


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch.driver, "_active", SimpleNamespace(get_current_stream=lambda device: "stream"))
    return Kernel(Function())


def test_what_was_compiled_is_launched_with_addresses(kernel: Kernel) -> None:
    x = torch.zeros(64)
    for n in (48, 32):
        kernel[(3, 2)](x, n, SIZE=8, num_warps=4)
    (compiled,) = kernel.function.compiled
    given = (3, 2, 1, "stream", "function", "metadata", None, None, None)
    assert compiled.runs == [(*given, x.data_ptr(), 32, 8)]


@pytest.mark.parametrize(
    "changed",
    [
        (torch.zeros(64, dtype=torch.float16), 32, 8),
        (torch.zeros(64)[1:], 32, 8),
        (torch.zeros(64), 33, 8),
        (torch.zeros(64), 1, 8),
        (torch.zeros(64), 2**31, 8),
        (torch.zeros(64), 32.0, 8),
        (torch.zeros(64), 32, 16),
    ],
    ids=["dtype", "alignment", "no multiple", "one", "64 bits", "float", "constant"],
)
def test_what_differs_is_compiled_anew(kernel: Kernel, changed: tuple[Any, ...]) -> None:
    for x, n, size in ((torch.zeros(64), 32, 8), changed):
        kernel[(1,)](x, n, SIZE=size)
    assert len(kernel.function.compiled) == 2


@pytest.mark.parametrize(
    "changed",
    [(torch.zeros(8, 64, dtype=torch.bfloat16), [8, 64]), (torch.zeros(8, 64, dtype=torch.float16), [4, 64])],
    ids=["dtype", "blocks"],
)
def test_descriptors_that_differ_are_compiled_for_anew(kernel: Kernel, changed: Any) -> None:
    layout = NVMMASharedLayout(128, 16, 2)
    same = torch.zeros(8, 64, dtype=torch.float16), [8, 64]
    for x, block in (same, same, changed):
        kernel[(1,)](TensorDescriptor.from_tensor(x, block, layout), 32, SIZE=8)
    assert len(kernel.function.compiled) == 2


def test_profilers_are_told(kernel: Kernel) -> None:
    x = torch.zeros(64)
    kernel[(1,)](x, 32, SIZE=8)
    hook = launch.knobs.runtime.launch_enter_hook
    told = lambda metadata: None  # noqa: E731
    hook.add(told)
    try:
        kernel[(1,)](x, 32, SIZE=8)
    finally:
        hook.remove(told)
    assert kernel.function.compiled[0].hooked == [((1, 1, 1), x, 32, 8)]


def test_a_thread_has_a_context_of_each_device_that_it_launches_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    device = [0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    event = SimpleNamespace(record=lambda: asked.append(device[0]))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    for _ in range(2):  # threads
        with ThreadPoolExecutor(1) as thread:
            for device[0] in (0, 0, 1, 0, 1):
                assert thread.submit(launch.current_device).result() == device[0]
    assert asked == [0, 1, 0, 1]


@pytest.mark.gpu
def test_on_a_gpu_a_thread_may_begin_with_what_reads_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.kernels.maha import triton as kernels

    backward, calls = kernels.maha_attention_backward, []

    @wraps(backward)
    def noted(*tensors: Any, **options: Any) -> Any:
        calls.append((tensors, options))
        return backward(*tensors, **options)

    monkeypatch.setattr(kernels, "maha_attention_backward", noted)
    target = MAHAAttention(
        MAHAConfig(scales=4, widths=(64, 128, 256)),
        **{"heads": 4, "kv_heads": 2, "head_dim": 64, "value_dim": 64, "scale": 0.125, "causal": True},
        **{"sliding_window": 0, "softcap": 0.0, "sinks": False},
    ).to("cuda", torch.bfloat16)
    given = [torch.randn(1, heads, 1024, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    given = [x.requires_grad_() for x in given]
    target(*given, unpadded(given[0])).sum().backward()
    (tensors, options), *_ = calls
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(lambda: backward(*tensors, **options)[0]).result()
    assert torch.equal(found, backward(*tensors, **options)[0])
