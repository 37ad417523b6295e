"""Decoding a converted model on a GPU, through its cache, gives what one forward gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import retrofit

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

TOKENS, PROMPT = 1200, 1100


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    found = tiny_llama()
    retrofit.convert(found, retrofit.HSAConfig())
    return found.cuda()


def step_by_step(model: Any, ids: Tensor, mask: Tensor | None, cuts: list[int]) -> Tensor:
    """Logits of all tokens, the prompt's from one call and the others' from a call between each two cuts."""
    cache, outs, begin = retrofit.RetrofitCache(model), [], 0
    for end in cuts:
        seen = None if mask is None else mask[:, :end]
        positions = None if mask is None else (seen.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        outs.append(
            model(
                ids[:, begin:end], attention_mask=seen, position_ids=positions, past_key_values=cache
            ).logits
        )
        begin = end
    return torch.cat(outs, 1)


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, [0, 150, 500]], ids=["whole", "padded"])
def test_tokens_one_by_one_equal_one_forward(model: Any, padding: list[int] | None) -> None:
    ids = torch.randint(2, 128, (3 if padding else 1, TOKENS), device="cuda")
    mask = None
    if padding:
        mask = (torch.arange(TOKENS, device="cuda") >= torch.tensor(padding, device="cuda")[:, None]).long()
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    steps = [PROMPT, PROMPT + 3, *range(PROMPT + 4, TOKENS + 1)]
    actual = step_by_step(model, ids, mask, steps)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_cache_is_cropped_and_continued(model: Any) -> None:
    ids = torch.randint(2, 128, (1, TOKENS), device="cuda")
    expected = model(ids, use_cache=False).logits
    cache = retrofit.RetrofitCache(model)
    model(ids[:, :PROMPT], past_key_values=cache)
    for _ in range(2):
        for at in range(PROMPT, PROMPT + 40):
            logits = model(ids[:, at : at + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, at : at + 1], rtol=0, atol=1e-4)
        cache.crop(PROMPT)


@torch.no_grad()
def test_dense_tokens_are_followed_by_sparse_ones(model: Any) -> None:
    """A cache that began within the dense start goes on behind it."""
    ids = torch.randint(2, 128, (1, 980), device="cuda")
    expected = model(ids, use_cache=False).logits
    actual = step_by_step(model, ids, None, [850, *range(851, 981)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
