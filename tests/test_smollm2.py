"""The whole path on SmolLM2-135M with real text: what the tiny models cannot show."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import retrofit
from retrofit.configs import HSAConfig, MAHAConfig, TargetConfig

pytestmark = pytest.mark.slow

NEW = 64

# Prompt lengths: far beyond the dense start of HSA and the first scale of MAHA.
CONFIGS: dict[str, tuple[TargetConfig, int]] = {"hsa": (HSAConfig(), 4096), "maha": (MAHAConfig(), 1500)}


@pytest.fixture(scope="module", params=list(CONFIGS))
def converted(request: pytest.FixtureRequest, smollm2: tuple[Any, Any]) -> tuple[Any, Any, int]:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    config, prompt = CONFIGS[request.param]
    report = retrofit.convert(model, config)
    assert len(report.converted) == 30 and not report.skipped
    return model, tokenizer, prompt


@pytest.fixture(scope="module")
def ids(smollm2: tuple[Any, Any]) -> torch.Tensor:
    from retrofit.data import tokens

    return tokens("pydoc_data.topics", smollm2[1], limit=20_000)[None]


@torch.no_grad()
def test_greedy_tokens_are_the_argmax_of_one_full_forward(
    converted: tuple[Any, Any, int], ids: torch.Tensor
) -> None:
    model, _, prompt = converted
    out = model.generate(
        ids[:, :prompt],
        attention_mask=torch.ones(1, prompt),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
    )
    assert out.shape[1] == prompt + NEW
    logits = model(input_ids=out, use_cache=False, logits_to_keep=NEW + 1).logits[0]
    # min_new_tokens forbids the end token while generating; the full forward must not choose it either.
    logits[:, model.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(logits[:-1].argmax(-1), out[0, prompt:])


@torch.no_grad()
def test_chunked_prefill_and_decode_equal_prefill(converted: tuple[Any, Any, int], ids: torch.Tensor) -> None:
    model, _, _ = converted
    length = 2048
    whole = model(input_ids=ids[:, :length], use_cache=False, logits_to_keep=848).logits[0]
    cache, parts = None, []
    for piece in ids[:, :length].split([1200, 700, 77, 1, 1, 1, 1, 67], dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[0])
    assert (torch.cat(parts)[1200:] - whole).abs().max() <= 1e-4 * whole.abs().max()


@torch.no_grad()
def test_left_padded_batch_equals_its_rows(converted: tuple[Any, Any, int], ids: torch.Tensor) -> None:
    model, tokenizer, _ = converted
    rows = [ids[0, :1200], ids[0, 5000:6010]]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batch = torch.stack([torch.cat([row.new_full((width - len(row),), pad), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)
        assert torch.equal(alone[0, len(row) :], out[width:])


@torch.no_grad()
def test_beam_search_runs(converted: tuple[Any, Any, int], ids: torch.Tensor) -> None:
    model, _, _ = converted
    prompt = ids[:, :1200]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5, num_beams=3
    )
    assert out.shape == (1, 1205)


@torch.no_grad()
def test_revert_gives_the_original_back_to_the_bit(smollm2: tuple[Any, Any], ids: torch.Tensor) -> None:
    model = copy.deepcopy(smollm2[0])
    before = model(input_ids=ids[:, :300]).logits
    names = list(model.state_dict())
    retrofit.convert(model, HSAConfig(pooling="learned"))
    retrofit.revert(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=ids[:, :300]).logits, before)


def test_untrained_hsa_keeps_the_perplexity(smollm2: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    retrofit.convert(model, HSAConfig())
    report = retrofit.evaluate(model, ids[:, 3000 : 3000 + 8192], tokenizer=tokenizer, length=8192)
    assert report.after is not None and report.after.ratio is not None and report.keys is not None
    assert report.after.ratio <= 1.02
    assert report.keys <= 1400


def test_untrained_maha_keeps_the_perplexity(smollm2: tuple[Any, Any], ids: torch.Tensor) -> None:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    retrofit.convert(model, MAHAConfig())
    report = retrofit.evaluate(model, ids[:, 3000 : 3000 + 4096], tokenizer=tokenizer, length=4096, start=0)
    assert report.all.ratio is not None and report.keys is not None
    assert report.all.ratio <= 1.08
    assert report.keys <= 800
