"""Sites are selected by pattern, number, range and kind; what matches nothing is an error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrofit import api
from retrofit.capture.analyse import Found
from retrofit.capture.site_plan import Refused
from retrofit.configs import DenseConfig
from retrofit.errors import ConfigError
from retrofit.selection import matching, of_kind

KINDS = {
    "encoder.0.attention": "self",
    "encoder.0.router": "other",
    "encoder.1.attention": "self",
    "decoder.0.attention": "self",
    "decoder.0.cross": "cross",
    "head.attention": "unknown",
}
FOUND = [Found(path, nn.Identity(), Refused("", kind), (), (), 0) for path, kind in KINDS.items()]
NUMBERED = [path for path, kind in KINDS.items() if kind != "other"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("*", list(KINDS)),
        ("encoder.*.attention", ["encoder.0.attention", "encoder.1.attention"]),
        (["encoder.0.*", "head.*"], ["encoder.0.attention", "encoder.0.router", "head.attention"]),
        (1, NUMBERED[1:2]),
        (-1, NUMBERED[-1:]),
        (range(1, 4), NUMBERED[1:4]),
        (slice(3, None), NUMBERED[3:]),
        ("1", NUMBERED[1:2]),
        ("0, 3:", [NUMBERED[0], *NUMBERED[3:]]),
        ("::2", NUMBERED[::2]),
        ([0, "head.*"], [NUMBERED[0], "head.attention"]),
    ],
)
def test_patterns_and_numbers(selection, expected):
    assert matching(selection, FOUND, "where") == set(expected)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            "encoder.*.atention",
            r"where='encoder.\*.atention' matches no attention module; the nearest are encoder",
        ),
        (5, "where=5 is no attention module; there are 5, from 0 to 4"),
        ("7:9", "where=7:9 is no attention module"),
        (range(4, 6), "is no attention module"),
        (1.5, "where must be a pattern, a number or a range, got 1.5"),
    ],
)
def test_what_matches_nothing_is_an_error(selection, message):
    with pytest.raises(ConfigError, match=message):
        matching(selection, FOUND, "where")


def test_a_path_that_is_a_number_comes_first():
    found = [Found(path, nn.Identity(), Refused("", "self"), (), (), 0) for path in ("1", "0")]
    assert matching("0", found, "where") == {"0"}
    assert matching(0, found, "where") == {"1"}


def test_kinds():
    assert of_kind("cross", FOUND) == {"decoder.0.cross"}
    assert of_kind("decoder", FOUND) == {"decoder.0.attention", "decoder.0.cross"}
    assert of_kind(["encoder", "cross"], FOUND) >= {"encoder.0.attention", "decoder.0.cross"}
    with pytest.raises(ConfigError, match="kind must be one of self, cross, encoder, decoder, got 'all'"):
        of_kind("all", FOUND)
    with pytest.raises(
        ConfigError, match="kind='cross' matches no attention module; there are encoder, self"
    ):
        of_kind("cross", FOUND[:2])


class Attention(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.qkv, self.causal = nn.Linear(8, 24), causal

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[:, 0]


def test_convert_takes_them():
    model = nn.Sequential(*(Attention(causal) for causal in (False, True, True, True))).eval()
    example = (torch.randn(2, 11, 8),)
    assert [site.side for site in api.inspect(model, example).sites] == ["encoder"] + 3 * ["decoder"]
    report = api.convert(model, DenseConfig(), example, kind="decoder", skip=-1)
    assert [site.path for site in report.converted] == ["1", "2"]
    assert report.skipped == {"0": "left out by kind", "3": "kept dense by skip"}
    assert report.coverage == 0.5
    report = api.convert(model, DenseConfig(), example, where=range(2), skip="1")
    assert [path for path, _ in api.sites(model)] == ["0", "2"]
    assert report.skipped["2"] == "left out by where; stays dense"
    assert report.skipped["1"] == "kept dense by skip"
