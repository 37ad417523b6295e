"""Masks that sizes alone make are looked at as far as the numbers in them reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.errors import NoAttentionFound

HEADS, DIM = 4, 8
WIDTH = HEADS * DIM


class Masked(nn.Module):
    """Attends under a mask made of the length alone.

    Args:
        make: The mask [T, T] of the index [T] and the distance [T, T].
        of_scores: Whether it is made in the shape of the scores.
    """

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor], of_scores: bool = False) -> None:
        super().__init__()
        self.qkv, self.make, self.of_scores = nn.Linear(WIDTH, 3 * WIDTH), make, of_scores

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        index = torch.arange(x.shape[1])
        mask = self.make(index, index[:, None] - index)
        if self.of_scores:
            mask = mask.expand(x.shape[0], HEADS, -1, -1).clone()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Held(Masked):
    """Cuts its mask from one that it holds."""

    def __init__(self, window: int, most: int) -> None:
        super().__init__(lambda index, distance: self.mask[: index.shape[0], : index.shape[0]])
        distance = torch.arange(most)[:, None] - torch.arange(most)
        self.register_buffer("mask", (distance >= 0) & (distance < window))


def _around(site: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), site).eval()


def _seen(site: nn.Module, batch: int = 2) -> retrofit.SiteInfo:
    (found,) = retrofit.inspect(_around(site), (torch.randn(batch, 11, WIDTH),)).sites
    return found


WINDOWS = {
    "compared": (lambda i, d: (d >= 0) & (d < 2200), 2200),
    "compared with a tensor": (lambda i, d: (d >= 0) & (d < torch.tensor(2300)), 2300),
    "as a diagonal": (lambda i, d: torch.ones_like(d, dtype=torch.bool).tril().triu(-3000), 3001),
    "subtracted on both sides": (lambda i, d: (d >= 0) & (i[:, None] - 1500 < i + 1500), 3000),
    "in blocks": (lambda i, d: (d >= 0) & (d // 64 < 40), 2560),
    "in float": (lambda i, d: (d >= 0) & (d.float() * 0.01 < 25.0), 2500),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_wider_than_2048(name: str) -> None:
    make, window = WINDOWS[name]
    assert _seen(Masked(make)).mask == f"sliding window({window})"


def test_a_window_in_a_mask_of_the_scores_shape_of_many_rows() -> None:
    assert _seen(Masked(lambda i, d: (d >= 0) & (d < 700), of_scores=True), 16).mask == "sliding window(700)"


def test_a_converted_window_is_right_beyond_it() -> None:
    model = _around(Masked(WINDOWS["compared"][0]))
    x = torch.randn(1, 2300, WIDTH)
    with torch.no_grad():
        expected = model(x)
        retrofit.convert(model, retrofit.DenseConfig(), (torch.randn(2, 11, WIDTH),))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_chunks_longer_than_2048() -> None:
    found = _seen(Masked(lambda i, d: (d >= 0) & (i[:, None] // 2500 == i // 2500)))
    assert not found.convertible
    assert "its own chunk of 2500 tokens" in found.reason


@pytest.mark.parametrize("make", [lambda i, d: (d >= 0) & (d < 50000), lambda i, d: (d >= 0) & (-d > -50000)])
def test_numbers_out_of_reach_are_refused(make: Callable) -> None:
    model = _around(Masked(make))
    with pytest.raises(NoAttentionFound, match=r"its mask has the number 50000 in it.*do not reach"):
        retrofit.convert(model, retrofit.DenseConfig(), (torch.randn(2, 11, WIDTH),))


@pytest.mark.parametrize(
    "make",
    [
        lambda i, d: d >= 0,
        lambda i, d: (d >= 0) & (d < 2**31 - 1),
        lambda i, d: torch.full(d.shape, -1e9).triu(1),
        lambda i, d: torch.where(d >= 0, 0.0, -10000.0),
        lambda i, d: (d < 0).float() * -10000.0,
        lambda i, d: torch.zeros(d.shape).masked_fill(d < 0, torch.finfo(torch.float32).min),
    ],
)
def test_numbers_that_stand_for_infinity_are_none(make: Callable) -> None:
    assert _seen(Masked(make)).mask == "causal"


@pytest.mark.parametrize(("window", "most"), [(1200, 1500), (3000, 5000)])
def test_a_mask_that_the_module_holds_is_looked_at_to_its_end(window: int, most: int) -> None:
    assert _seen(Held(window, most)).mask == f"sliding window({window})"


def test_a_held_mask_that_is_too_large_is_refused() -> None:
    found = _seen(Held(14000, 16384))
    assert "it holds a mask for 16384 tokens, more than can be looked at" in found.reason


def test_modules_that_hold_different_masks_do_not_share_them() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Held(1200, 1500), Held(1500, 1500)).eval()
    sites = retrofit.inspect(model, (torch.randn(2, 11, WIDTH),)).sites
    assert [site.mask for site in sites] == ["sliding window(1200)", "causal"]


class Looked(Masked):
    """Looks its mask up by distance in a table, which ends before the number that is added to the index."""

    def __init__(self, window: int, most: int) -> None:
        super().__init__(lambda index, distance: self.table[distance + (most - 1)])
        distance = torch.arange(-most + 1, most)
        self.register_buffer("table", (distance >= 0) & (distance < window))


@pytest.mark.parametrize(("window", "seen"), [(140, "sliding window(140)"), (150, "causal")])
def test_a_table_is_looked_up_to_its_end(window: int, seen: str) -> None:
    assert _seen(Looked(window, 150)).mask == seen


class Two(nn.Module):
    """Two attentions in one module, one of them in a window."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.a, self.b, self.window = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH), window

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])
        distance = index[:, None] - index
        for linear, window in ((self.a, None), (self.b, self.window)):
            q, k, v = (part.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for part in linear(x).chunk(3, -1))
            mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x


def test_of_several_attentions_in_one_module() -> None:
    sites = retrofit.inspect(_around(Two(2200)), (torch.randn(2, 11, WIDTH),)).sites
    assert [site.mask for site in sites] == ["causal", "sliding window(2200)"]
    (site,) = retrofit.inspect(_around(Two(50000)), (torch.randn(2, 11, WIDTH),)).sites
    assert "its mask has the number 50000 in it" in site.reason
