"""What is exported computes what the operators define, called from Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.configs import HSAConfig
from retrofit.kernels.dense.reference import dense_attention as dense_reference
from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.hsa.reference import hsa_attention as hsa_reference
from retrofit.kernels.maha.ops import maha_attention as maha_operator
from retrofit.kernels.pyramid.blocked import extend_pyramid, extend_spreads
from retrofit.onnx.bodies.dense import dense_attention
from retrofit.onnx.bodies.hsa import hsa_attention
from retrofit.onnx.bodies.maha import maha_attention
from retrofit.onnx.bodies.pyramid import extend_spreads as exported_spreads

SHAPES = [(1, 1, 1), (2, 17, 17), (2, 300, 300), (3, 40, 300), (2, 1, 333)]
"""Batch, queries, index slots."""


def call(batch: int, tokens: int, slots: int) -> tuple[Tensor, ...]:
    start = torch.arange(batch) * 5 % max(slots - tokens, 1 if slots == 1 else 11)
    q, k, v = (torch.randn(batch, heads, n, 16) for heads, n in ((4, tokens), (2, slots), (2, slots)))
    return q, k, v, start, slots - start


def levels(x: Tensor, start: Tensor, ratios: tuple[int, ...], offset: int) -> list[Tensor]:
    weights = [None] * len(ratios)
    return extend_pyramid(
        x, None, start, new=x.shape[2], ratios=ratios, offset=offset, pooling="mean", weights=weights
    )


@pytest.mark.parametrize(("batch", "tokens", "slots"), SHAPES)
@pytest.mark.parametrize("window", [0, 20])
def test_dense(batch: int, tokens: int, slots: int, window: int) -> None:
    arguments = call(batch, tokens, slots)
    options: dict[str, Any] = {"scale": 0.25, "causal": True, "sliding_window": window}
    out = dense_attention(*arguments, **options, implementation="auto")
    torch.testing.assert_close(out, dense_reference(*arguments, **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("batch", "tokens", "slots"), SHAPES)
@pytest.mark.parametrize("last_width", [None, 48])
@pytest.mark.parametrize("regularizer", ["entropy", "euclidean"])
def test_maha(batch: int, tokens: int, slots: int, last_width: int | None, regularizer: str) -> None:
    q, k, v, start, length = call(batch, tokens, slots)
    keys, values = (levels(x, start, (2, 2, 2), 0) for x in (k, v))
    options: dict[str, Any] = {
        "scale": 0.25,
        "causal": True,
        "widths": [32, 16, 16],
        "last_width": last_width,
        "sink": 8,
        "ratio": 2,
        "aggregation": "convex",
        "regularizer": regularizer,
    }
    arguments = (q, k, v, start, length, keys, values, torch.randn(4, 4))
    out = maha_attention(*arguments, **options, implementation="auto")
    expected = maha_operator(*arguments, **options, implementation="reference")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("batch", "tokens", "slots"), SHAPES)
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 100), (False, 0)])
@pytest.mark.parametrize("summaries", [False, True])
@pytest.mark.parametrize("dense_until", [0, 128])
def test_hsa(
    tiny_hsa: HSAConfig,
    batch: int,
    tokens: int,
    slots: int,
    causal: bool,
    window: int,
    summaries: bool,
    dense_until: int,
) -> None:
    if not causal and tokens != slots:
        pytest.skip("an encoder has no past")
    names = ("window", "sink", "budget", "block", "node", "fanout", "nodes_per_span", "beam", "query_block")
    sizes = {name: getattr(tiny_hsa, name) for name in (*names, "threshold", "spread")}
    sizes["dense_until"] = dense_until
    geometry = Geometry(**sizes)
    options: dict[str, Any] = {"scale": 0.25, "causal": causal, "sliding_window": window}
    q, k, v, start, length = call(batch, tokens, slots)
    gate = torch.rand(4) if summaries else None

    def pooled(n: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        nodes, values = (levels(x[:, :, :n], start, geometry.ratios, geometry.sink) for x in (k, v))
        grid = {"ratio": geometry.node, "offset": geometry.sink}
        spreads = extend_spreads(k[:, :, :n], nodes[0], None, start, new=n, **grid)
        return nodes, spreads, values if summaries else []

    past = slots - tokens
    spans = choices = None
    if past:
        earlier = torch.randn(batch, 4, past, 16)
        arguments = (
            earlier,
            k[:, :, :past],
            v[:, :, :past],
            start,
            past - start,
            *pooled(past),
            gate,
            None,
            None,
        )
        _, spans, choices = hsa_reference(*arguments, **options, geometry=geometry)
    arguments = (q, k, v, start, length, *pooled(slots), gate, spans, choices)
    found = hsa_attention(*arguments, **options, **geometry.options, padded=True, implementation="auto")
    expected = hsa_reference(*arguments, **options, geometry=geometry)
    # A vote may be rounded to the next of the 4,096 steps in which a leaf fades in.
    torch.testing.assert_close(found[0], expected[0], atol=5e-5, rtol=1e-5)
    assert torch.equal(found[1], expected[1])
    risen = [geometry.risen(x).float() for x in (found[2], expected[2])]
    torch.testing.assert_close(*risen, atol=2, rtol=0)


@pytest.mark.parametrize("new", [1, 2, 37])
def test_spreads(new: int) -> None:
    x, start, grid = torch.randn(2, 2, 90, 16), torch.tensor([0, 13]), {"ratio": 4, "offset": 8}
    (cells,) = levels(x, start, (4,), 8)
    whole = extend_spreads(x, cells, None, start, new=90, **grid)
    past = extend_spreads(
        x[:, :, :-new], *levels(x[:, :, :-new], start, (4,), 8), None, start, new=90, **grid
    )
    for spreads in (None, past):
        found = exported_spreads(
            x, x[:, :, -new:] if spreads is not None else x, cells, spreads, start, **grid
        )
        assert found.shape == whole.shape
        for row, begin in enumerate(start.tolist()):
            complete = (90 - begin - 8) // 4
            assert torch.equal(found[row, :, :complete], whole[row, :, :complete])
