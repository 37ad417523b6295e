"""Where HSA begins to pay is measured, set on every site alike, and kept with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import retrofit
from retrofit.bench.tuning import overtaking
from retrofit.errors import BenchmarkError
from retrofit.targets.hsa import HSAAttention

CONFIG = retrofit.HSAConfig(
    window=16, sink=8, budget=16, block=8, node=2, fanout=4, nodes_per_span=8, beam=2, query_block=8
)

IDS: Any = torch.randint(2, 128, (2048,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("dense", "hsa", "expected"),
    [
        ([1, 4, 16], [2, 4, 8], 2000),
        ([1, 4, 16], [8, 8, 8], 2000 * 2**0.5),
        ([1, 4, 16], [1, 3, 5], 0),
        ([1, 4, 16], [9, 9, 17], 4000),
        ([3, 4, 16], [2, 5, 4], 2000 * 2 ** (1 / (1 + 2 / 0.32192809))),
    ],
    ids=["at a length", "between two", "always faster", "never faster", "faster below by noise"],
)
def test_hsa_overtakes_where_the_times_cross(dense: list[float], hsa: list[float], expected: float) -> None:
    times = (dict(zip((1000, 2000, 4000), values, strict=True)) for values in (dense, hsa))
    assert overtaking(*times) == pytest.approx(expected, rel=1e-6)


def test_sites_stay_dense_up_to_where_they_are_slower(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_llama()
    retrofit.convert(model, CONFIG)
    times = {1024: 1.0, 2048: 4.0}, {1024: 2.0, 2048: 2.0}
    monkeypatch.setattr("retrofit.bench.tuning._times", lambda *_: times)
    report = retrofit.tune(model, tokenizer=None, source=IDS, longest=2048)
    assert [group.dense_until for group in report.tuned] == [1456]  # 1024·√2, in query blocks
    assert len(report.tuned[0].sites) == len(retrofit.sites(model))
    for _, site in retrofit.sites(model):
        assert isinstance(site.retrofit, HSAAttention)
        assert site.retrofit.geometry.dense_end == 1456
    retrofit.save_pretrained(model, tmp_path / "tuned")
    again: Any = retrofit.from_pretrained(tmp_path / "tuned")
    assert {site.retrofit.config.dense_until for _, site in retrofit.sites(again)} == {1456}


def test_positions_fit_the_blocks_of_any_site(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    retrofit.convert(model, retrofit.HSAConfig(budget=512))  # 672 tokens before anything is left out
    monkeypatch.setattr(
        "retrofit.bench.tuning._times", lambda *_: ({1024: 2.0, 2048: 4.0}, {1024: 1.0, 2048: 1.0})
    )
    report = retrofit.tune(model, tokenizer=None, source=IDS, longest=2048)
    assert [group.dense_until for group in report.tuned] == [768]


def test_times_are_taken_of_both(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    retrofit.convert(model, CONFIG)
    report = retrofit.tune(model, tokenizer=None, source=IDS, longest=2048, repeats=1)
    (group,) = report.tuned
    assert sorted(group.dense_ms) == sorted(group.hsa_ms) == [1024, 2048]
    assert 48 <= group.dense_until <= 2048
    assert group.dense_until % CONFIG.query_block == 0


def test_a_model_without_hsa_is_refused(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(BenchmarkError, match=r"no causal HSA site.*convert it with HSAConfig\(\) first"):
        retrofit.tune(tiny_llama(), tokenizer=None, source=IDS)
