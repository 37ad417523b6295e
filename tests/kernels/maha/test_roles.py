"""MAHA's kernel whose warps have roles, without a GPU: on a machine that plays the roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gluon_machine import Machine
from maha_case import Case, build

from retrofit.kernels import tuned
from retrofit.kernels.maha import hopper, triton_roles
from retrofit.kernels.maha import triton as maha
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.pyramid import triton as pyramid

pytestmark = pytest.mark.interpreted


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Takes the place of the kernel, on a GPU of the interpreter's two multiprocessors."""
    machine = Machine(triton_roles, "attend_by_roles", power=torch.exp2, layout_of=lambda x: None)
    monkeypatch.setattr(hopper, "attend_by_roles", machine)
    monkeypatch.setattr(hopper, "INTERPRETED", triton_roles.gl.constexpr(False))
    return machine


def call_of(case: Case, begin: int = 0) -> maha._Call:
    """The call of queries from ``begin`` on."""
    levels = [case.cells(case.k), case.cells(case.v)]
    return maha._Call(
        case.q[:, :, begin:],
        case.k,
        case.v,
        case.start,
        torch.minimum(case.length, case.k.shape[2] - case.start).clamp(min=0),
        *levels,
        case.offsets,
        scale=case.q.shape[3] ** -0.5,
        bands=case.bands,
    )


@pytest.mark.parametrize(
    ("case", "begin"),
    [
        ({"tokens": 333, "bands": Bands((96, 60), None, 64, 2), "heads": 4, "dim": 128}, 0),
        ({"tokens": 530, "bands": Bands((96, 60, 40), None, 64, 2), "heads": 4, "kv_heads": 2}, 360),
        ({"tokens": 301, "bands": Bands((40,), None, 16, 4), "heads": 3, "batch": 2, "kv_heads": 1}, 0),
        ({"tokens": 270, "bands": Bands((33, 30), 70, 0, 2), "heads": 16, "kv_heads": 2}, 0),
        ({"tokens": 290, "bands": Bands((100,), None, 0, 2), "heads": 2, "kv_heads": 2}, 131),
        ({"tokens": 210, "bands": Bands((), None, 0, 2), "heads": 5}, 77),
        (
            {
                "tokens": 260,
                "bands": Bands((32, 16), None, 8, 2),
                "batch": 3,
                "heads": 4,
                "start": [0, 53, 250],
                "length": [190, 207, 0],
            },
            0,
        ),
        (
            {"tokens": 258, "bands": Bands((20, 24), None, 8, 2), "batch": 2, "heads": 8, "start": [0, 248]},
            228,
        ),
    ],
    ids=[
        *(
            "group of 4",
            "four scales, continued",
            "group of 3, ratio 4, batch",
            "group of 8, last width",
            "group of 1, continued",
        ),
        *("one scale, group of 5", "padded", "starts among the new tokens"),
    ],
)
def test_roles_change_nothing(machine: Machine, case: dict[str, Any], begin: int) -> None:
    own = build(**{"dim": 64, **case}).on("cpu", torch.float16)
    # Of few bits, so that scores are exact in whatever order a processor adds, and weights are rounded alike.
    own = replace(own, q=(own.q * 8).round() / 8, k=(own.k * 16).round() / 16)
    out, lse = call_of(own, begin).attend()
    assert machine.programs
    with tuned.using(own.q.device, replace(tuned.SM_90, maha_attend_by_roles=None)):
        expected, expected_lse = call_of(own, begin).attend()
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=3e-4)
    at = torch.arange(begin, own.k.shape[2]) - own.start[:, None]
    real = ((at >= 0) & (at < own.length[:, None]))[:, None].expand(lse.shape)
    torch.testing.assert_close(lse[real], expected_lse[real], rtol=1e-5, atol=1e-5)
    assert bool((lse[~real] == -torch.inf).all())


def test_what_lies_elsewhere_is_not_read(machine: Machine) -> None:
    """Neither padding nor other rows nor other heads. Numbers behind a row's tokens have to be finite."""
    case = build(
        270,
        bands=Bands((32, 16), None, 8, 2),
        heads=4,
        kv_heads=2,
        dim=64,
        batch=2,
        start=[0, 20],
        length=[270, 240],
    ).on("cpu", torch.float16)
    out = call_of(case).attend()[0]
    assert machine.programs
    for x in (case.q, case.k, case.v):
        x[1, :, :20] = torch.nan
        x[1, :, 260:] = torch.nan if x is case.q else 1e4
    padded = call_of(case).attend()[0]
    assert torch.equal(padded, out)
    assert not padded[1, :, :20].any()
    assert not padded[1, :, 260:].any()
    for x in (case.k, case.v):
        x[0, 1], x[1, :] = torch.nan, torch.inf
    alone = call_of(case).attend()[0]
    assert torch.equal(alone[0, :2], out[0, :2])
    assert alone[0, 2:].isnan().all()


def test_a_step_that_would_reach_into_another_head_is_not_taken(machine: Machine) -> None:
    case = build(200, bands=Bands((32, 16), None, 8, 2), heads=4, dim=64).on("cpu", torch.float16)
    call_of(case).attend()
    assert not machine.programs


def test_few_rows_and_other_dims_have_the_other_kernel(machine: Machine) -> None:
    bands = Bands((32, 16), None, 8, 2)
    for changes, begin in (
        ({"heads": 4}, 146),
        ({"heads": 4, "value_dim": 32}, 0),
        ({"heads": 4, "dim": 80}, 0),
    ):
        own = build(**{"tokens": 150, "bands": bands, "dim": 64, **changes}).on("cpu", torch.float16)
        call_of(own, begin).attend()
    own = build(60, bands=Bands((9,), None, 9, 3), dim=64, heads=4).on("cpu", torch.float16)
    call_of(own).attend()
    assert not machine.programs


def pooled(x: Tensor, start: Tensor, levels: Sequence[Tensor] | None, new: int) -> list[Tensor]:
    return pyramid.extend_pyramid(
        x, levels, start, new=new, ratios=(2, 2, 2), offset=0, pooling="mean", weights=[None] * 3
    )


def test_levels_that_adjoin_are_not_copied() -> None:
    x, start = torch.randn(2, 3, 77, 64), torch.zeros(2, dtype=torch.int64)
    built = pooled(x, start, None, 77)
    extended = pooled(x, start, pooled(x[:, :, :60], start, None, 60), 17)
    apart = [level.clone() for level in built]
    expected = torch.cat([level.reshape(-1, 64) for level in apart])
    for levels in (built, extended, apart, apart[:1] + built[1:], built[:1] + extended[1:]):
        rows = hopper.joined(levels)
        assert rows.shape == (1, 1, 2 * 3 * (38 + 19 + 9), 64)
        assert torch.equal(rows[0, 0], expected)
        assert (rows.data_ptr() == levels[0].data_ptr()) == (levels is built or levels is extended)
    cut = [level[:, :, :-1] for level in built]
    assert torch.equal(hopper.joined(cut)[0, 0], torch.cat([level.reshape(-1, 64) for level in cut]))
    none = [level[:, :, :0] for level in built]
    assert hopper.joined(none).shape == (1, 1, 1, 64)
