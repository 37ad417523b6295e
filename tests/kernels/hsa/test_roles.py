"""The kernel whose warps have roles, without a GPU: on a machine that plays the roles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gluon_machine import Machine

from retrofit.kernels import tuned
from retrofit.kernels.hsa import hopper, triton_roles
from retrofit.kernels.hsa.geometry import Geometry

SMALL = Geometry(
    window=64,
    sink=16,
    budget=64,
    block=16,
    node=4,
    fanout=4,
    nodes_per_span=8,
    beam=4,
    query_block=32,
    dense_until=0,
    threshold=0.002,
    spread=1.2,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


@pytest.fixture
def implementation() -> str:
    return "triton"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Takes the place of the kernel, on a GPU of two multiprocessors."""
    machine = Machine(triton_roles, "attend_by_roles")
    monkeypatch.setattr(hopper, "attend_by_roles", machine)
    monkeypatch.setattr(hopper, "INTERPRETED", triton_roles.gl.constexpr(False))
    monkeypatch.setattr(hopper, "_processors", lambda device: 2)
    return machine


@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [
        ({"tokens": 189, "heads": 8}, {}),
        ({"tokens": 210, "heads": 3, "kv_heads": 1, "sinks": 0.5}, {}),
        ({"tokens": 180, "kv_heads": 1, "batch": 2}, {"block": 32, "sink": 32}),
        ({"tokens": 250, "heads": 2, "kv_heads": 1}, {"query_block": 64, "window": 128}),
        ({"tokens": 180, "kv_heads": 1, "sharpness": 9.0}, {"budget": 16}),
    ],
    ids=["groups of 4", "group of 3, sinks", "batch, leaves of 32", "blocks of 64", "sharp"],
)
def test_roles_change_nothing(
    machine: Machine, build: Callable[..., Any], inputs: dict[str, Any], sizes: dict[str, int]
) -> None:
    case = build(**{"dim": 128, **inputs})
    case = replace(case, geometry=replace(SMALL, **sizes), padded=False).to("cpu", torch.float16)
    actual = case.run()
    chunks = case.run(case.tokens - 70, case.tokens, case.run(0, case.tokens - 70)).out
    assert machine.programs == 2
    assert bool(machine.added) == ("sharpness" in inputs)  # rows beyond the range
    with tuned.using(case.q.device, replace(tuned.SM_90, attend_by_roles=None)):
        expected = case.run().out
    torch.testing.assert_close(actual.out, expected, rtol=2e-3, atol=1e-4)
    assert torch.equal(chunks, actual.out[:, :, -70:])
