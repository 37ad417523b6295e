"""The kernels whose warps have roles, without a GPU: on a machine that plays the roles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gluon_machine import Machine

from retrofit.kernels import tuned
from retrofit.kernels.hsa import (
    hopper,
    triton_roles,
    triton_roles_gradients,
    triton_roles_keys,
    triton_roles_vote,
)
from retrofit.kernels.hsa.geometry import Geometry

SMALL = Geometry(
    window=64,
    sink=16,
    budget=64,
    block=16,
    node=2,
    fanout=8,
    nodes_per_span=8,
    beam=4,
    query_block=32,
    dense_until=0,
    threshold=0.002,
    spread=1.2,
)

pytestmark = pytest.mark.interpreted


@pytest.fixture
def implementation() -> str:
    return "triton"


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Machine]:
    """Take the place of the kernels, on a GPU of the interpreter's two multiprocessors."""
    machines = {
        "vote_by_roles": Machine(
            triton_roles_vote, "vote_by_roles", rounded=lambda x: x.round().int(), layout_of=lambda x: None
        ),
        "attend_by_roles": Machine(triton_roles, "attend_by_roles"),
        "query_gradients_by_roles": Machine(triton_roles_gradients, "query_gradients_by_roles"),
        "key_gradients_by_roles": Machine(triton_roles_keys, "key_gradients_by_roles"),
    }
    for name, machine in machines.items():
        monkeypatch.setattr(hopper, name, machine)
    monkeypatch.setattr(hopper, "INTERPRETED", triton_roles.gl.constexpr(False))
    return machines


def run(case: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The results, and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    result = replace(case, q=inputs[0], k=inputs[1], v=inputs[2]).run()
    weights = torch.linspace(-1, 1, result.out.numel()).view_as(result.out)
    grads = torch.autograd.grad(result.out, inputs, weights.to(result.out))
    return replace(result, out=result.out.detach()), grads


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """‖actual − expected‖ / ‖expected‖ of each row, [B, Hq, T]."""
    return (actual - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)


def few_bits(case: Any, **sizes: int) -> Any:
    """The case in half precision, with scores that are exact in whatever order a processor adds."""
    exact = {name: (getattr(case, name) * 16).round() / 16 for name in "qk"}
    return replace(case, **exact, geometry=replace(SMALL, **sizes), padded=False).to("cpu", torch.float16)


@pytest.mark.parametrize(
    ("inputs", "sizes"),
    [
        ({"tokens": 189, "heads": 8}, {"node": 4}),
        ({"tokens": 210, "heads": 3, "kv_heads": 1, "sinks": 0.5}, {}),
        ({"tokens": 180, "kv_heads": 1, "batch": 2}, {"block": 32, "node": 4, "sink": 32}),
        ({"tokens": 250, "heads": 2, "kv_heads": 1}, {"query_block": 64, "window": 128}),
        ({"tokens": 262, "heads": 2}, {"query_block": 128, "window": 64}),
        ({"tokens": 170, "heads": 8, "kv_heads": 1}, {}),
        ({"tokens": 180, "kv_heads": 1, "sharpness": 9.0}, {"budget": 16}),
    ],
    ids=[
        "groups of 4",
        "group of 3, sinks",
        "batch, leaves of 32",
        "blocks of 64",
        "heads alone",
        "group of 8",
        "sharp",
    ],
)
@pytest.mark.parametrize("dim", [64, 128])
def test_roles_change_nothing(
    machines: dict[str, Machine],
    build: Callable[..., Any],
    inputs: dict[str, Any],
    sizes: dict[str, int],
    dim: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # For 64 dims as well where other kernels are the faster ones.
    row = tuned.SM_90
    listed = {name: {(2, dim): (getattr(row, name) or {})[2, 128]} for name in machines}
    monkeypatch.setitem(tuned.ROWS, (9, 0), replace(row, **(listed if dim == 64 else {})))
    case = build(**{"dim": dim, **inputs})
    case = few_bits(case, **sizes)  # so that weights are rounded alike
    actual, grads = run(case)
    chunks = case.run(case.tokens - 70, case.tokens, case.run(0, case.tokens - 70)).out
    programs = {name: machine.programs for name, machine in machines.items()}
    assert programs["attend_by_roles"] == programs["query_gradients_by_roles"] == 2
    assert programs["key_gradients_by_roles"] > 2  # one for each tile of keys
    # Two to a multiprocessor, of the last call's tiles, where a tile has the heads of a query.
    size = case.geometry.query_block
    tiles = case.k.shape[0] * case.k.shape[1] * (-(-case.tokens // size) - (case.tokens - 70) // size)
    assert programs["vote_by_roles"] == (min(tiles, 4) if case.q.shape[1] <= 4 * case.k.shape[1] else 0)
    # Tiles whose sums exceed the limit.
    assert bool(machines["attend_by_roles"].added[0]) == ("sharpness" in inputs)
    with tuned.using(case.q.device, replace(tuned.SM_90, **dict.fromkeys(machines))):
        expected, expected_grads = run(case)
    assert torch.equal(actual.spans, expected.spans)
    assert torch.equal(actual.choices, expected.choices)
    dense = case.geometry.dense_end
    torch.testing.assert_close(actual.out[:, :, dense:], expected.out[:, :, dense:], rtol=2e-3, atol=1e-4)
    # Where all is dense, weights are shifted by another score, so that they round otherwise.
    assert (row_errors(actual.out, expected.out)[:, :, :dense] < 1e-3).all()
    for found, other in zip(grads, expected_grads, strict=True):
        assert (found.float() - other.float()).norm() < 1e-3 * other.float().norm()
    assert torch.equal(chunks, actual.out[:, :, -70:])


def test_dense_rows_beyond_the_range_are_done_again(
    machines: dict[str, Machine], build: Callable[..., Any]
) -> None:
    """A key outweighs the others that is behind a tile's first step and, for sparse rows, within their window."""
    case = few_bits(build(140, dim=128, heads=8))
    heavy, dense = 70, case.geometry.dense_end
    assert dense == 128 and case.tokens - case.geometry.window < heavy + 16
    case = case.outweighed(heavy)
    actual = case.run().out
    assert machines["attend_by_roles"].added[0] > 0
    value = case.v[:, :, heavy : heavy + 1].repeat_interleave(4, 1)
    torch.testing.assert_close(actual[:, :, heavy:], value.expand_as(actual[:, :, heavy:]))
    expected = replace(case, implementation="blocked").run().out
    torch.testing.assert_close(actual[:, :, :heavy], expected[:, :, :heavy], rtol=2e-3, atol=1e-3)
