"""The whole path on SmolLM2-135M with real text: what the tiny models cannot show.

One long forward of each converted model is what everything shorter is compared with.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import retrofit
from retrofit.configs import HSAConfig, MAHAConfig, TargetConfig
from retrofit.evaluate.account import counting
from retrofit.evaluate.logits import run
from retrofit.evaluate.perplexity import next_token_losses

pytestmark = pytest.mark.slow

NEW = 64
LONGEST = 4096
KEPT = range(1000, 1220)
"""Positions whose logits are kept: beyond the dense start of HSA and the first scale of MAHA."""


@dataclass(frozen=True)
class Case:
    """A conversion, its prompt, and how far it may be from dense attention on that prompt."""

    config: TargetConfig
    prompt: int
    ratio: float
    keys: float


CASES = {
    "hsa": Case(HSAConfig(), LONGEST, 1.02, 1400),
    "maha": Case(MAHAConfig(), 2048, 1.08, 800),
}


@dataclass(frozen=True)
class Long:
    """What a converted model does with a prompt and the 64 tokens it goes on with."""

    case: Case
    model: Any
    tokens: Tensor
    losses: Tensor
    keys: float
    following: Tensor
    kept: Tensor


@pytest.fixture(scope="module")
def ids(smollm2: tuple[Any, Any]) -> Tensor:
    from retrofit.data import tokens

    return tokens("pydoc_data.topics", smollm2[1], limit=3000 + LONGEST)[None, 3000:]


@pytest.fixture(scope="module")
def dense_losses(smollm2: tuple[Any, Any], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return next_token_losses(smollm2[0], ids)[0]


@pytest.fixture(scope="module", params=list(CASES))
def long(request: pytest.FixtureRequest, smollm2: tuple[Any, Any], ids: Tensor) -> Long:
    model, case = copy.deepcopy(smollm2[0]), CASES[request.param]
    report = retrofit.convert(model, case.config)
    assert len(report.converted) == 30 and not report.skipped
    prompt = ids[:, : case.prompt]
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with torch.no_grad():
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        with counting(model, case.prompt // 2) as counts:
            outputs = run(model, tokens)
        losses = [
            torch.nn.functional.cross_entropy(
                outputs.logits(first, min(first + 512, case.prompt - 1))[0],
                tokens[0, first + 1 : min(first + 513, case.prompt)],
                reduction="none",
            )
            for first in range(0, case.prompt - 1, 512)
        ]
        following = outputs.logits(case.prompt - 1, case.prompt - 1 + NEW)[0]
        kept = outputs.logits(KEPT.start, KEPT.stop)[0]
    accounts = counts.sites()
    return Long(
        case,
        model,
        tokens,
        torch.cat(losses),
        sum(site.keys for site in accounts) / len(accounts),
        following,
        kept,
    )


def _close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_untrained_it_keeps_the_perplexity(long: Long, dense_losses: Tensor) -> None:
    dense = dense_losses[: len(long.losses)]
    assert len(dense) == long.case.prompt - 1
    # Over all positions, and over the later half, where little is dense.
    for first in (0, len(dense) // 2):
        ratio = float((long.losses[first:].mean() - dense[first:].mean()).exp())
        assert ratio <= long.case.ratio
    assert long.keys <= long.case.keys


def test_greedy_tokens_are_the_argmax_of_one_full_forward(long: Long) -> None:
    assert long.tokens.shape[1] == long.case.prompt + NEW
    logits = long.following.clone()
    # min_new_tokens forbids the end token while generating; the full forward must not choose it either.
    logits[:, long.model.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1), long.tokens[0, long.case.prompt :])


@torch.no_grad()
def test_chunked_prefill_and_decode_equal_one_forward(long: Long, ids: Tensor) -> None:
    cache, parts = None, []
    for piece in ids[:, : KEPT.stop].split([KEPT.start, 100, 77, 1, 1, 1, 1, 39], dim=1):
        out = long.model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[0])
    _close(torch.cat(parts)[KEPT.start :], long.kept)


@torch.no_grad()
def test_a_left_padded_batch_equals_its_rows(long: Long, ids: Tensor) -> None:
    lengths, steps = (1120, 1050), 3
    width = max(lengths)
    batch = torch.stack([torch.cat([ids.new_zeros(width - length), ids[0, :length]]) for length in lengths])
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    out = long.model(input_ids=batch, attention_mask=mask, use_cache=True)
    logits = [out.logits[:, -50:]]
    for step in range(steps):
        following = torch.stack([ids[0, length + step][None] for length in lengths])
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        out = long.model(
            input_ids=following, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
        )
        logits.append(out.logits)
    for row, length in enumerate(lengths):
        first = length - 50 - KEPT.start
        _close(torch.cat(logits, dim=1)[row], long.kept[first : first + 50 + steps])


@torch.no_grad()
def test_beam_search_runs(long: Long, ids: Tensor) -> None:
    prompt = ids[:, : KEPT.start]
    out = long.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4, num_beams=2
    )
    assert out.shape == (1, KEPT.start + 4)


@torch.no_grad()
def test_revert_gives_the_original_back_to_the_bit(smollm2: tuple[Any, Any], long: Long, ids: Tensor) -> None:
    model = copy.deepcopy(long.model)
    retrofit.revert(model)
    assert list(model.state_dict()) == list(smollm2[0].state_dict())
    assert torch.equal(model(input_ids=ids[:, :300]).logits, smollm2[0](input_ids=ids[:, :300]).logits)
