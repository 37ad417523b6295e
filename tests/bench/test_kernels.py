"""Of the kernels of HSA's forward pass, those that pool and select are known by name."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from retrofit.attention_call import unpadded
from retrofit.bench.kernels import SELECTING, kernel_times, selection_share
from retrofit.configs import HSAConfig
from retrofit.targets.hsa import HSAAttention

pytest.importorskip("triton")

ATTENDING = {"attend_listed", "attend_by_roles", "attend_run"}


def launched_from(*modules: ModuleType) -> set[str]:
    """The kernels that the modules define."""
    from retrofit.kernels.launch import Kernel

    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Kernel) and value.function.fn.__module__ == module.__name__
    }


def test_every_kernel_that_selects_is_counted() -> None:
    from retrofit.kernels.hsa import (
        triton_advance,
        triton_choose,
        triton_roles_vote,
        triton_select,
        triton_vote,
    )
    from retrofit.kernels.pyramid import triton_pool

    modules = triton_advance, triton_choose, triton_roles_vote, triton_select, triton_vote, triton_pool
    lists_again = {"list_blocks"}  # in the backward pass
    assert launched_from(*modules) == SELECTING | lists_again


def test_kernels_that_attend_are_not() -> None:
    from retrofit.kernels.hsa import triton_execute, triton_roles

    assert launched_from(triton_execute, triton_roles) == ATTENDING


def test_the_share_is_that_of_all_kernels() -> None:
    times = {"attend_by_roles": 6.0, "vote": 2.0, "settle": 1.0, "pool_levels": 0.5, "fill": 0.5}
    assert selection_share(times) == 0.35
    assert (
        selection_share({"pool_levels": 0.5, "elementwise_kernel": 2.0}) is None
    )  # blocked on a GPU, or MAHA


@pytest.mark.gpu
def test_kernels_are_found_on_a_gpu() -> None:
    sizes = {"heads": 8, "kv_heads": 2, "head_dim": 128, "value_dim": 128, "scale": 0.1}
    target = HSAAttention(
        HSAConfig(dense_until=0), **sizes, causal=True, sliding_window=0, softcap=0.0, sinks=False
    )
    q, k, v = (torch.randn(1, heads, 4096, 128, device="cuda").bfloat16() for heads in (8, 2, 2))
    call = unpadded(q)
    times = kernel_times(lambda: target(q, k, v, call))
    assert {"pool_levels", "top_scores", "keep", "settle"} <= times.keys()
    assert times.keys() & ATTENDING
    assert list(times.values()) == sorted(times.values(), reverse=True)
    share = selection_share(times)
    assert share is not None and 0.1 < share < 0.9
