from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from retrofit.api import convert, sites
from retrofit.configs import HSAConfig, MAHAConfig
from retrofit.errors import DataError
from retrofit.evaluate import evaluate
from retrofit.evaluate.account import counting
from retrofit.evaluate.logits import run

LENGTH = 200


@pytest.fixture
def ids(text: Callable[[int], str]) -> Tensor:
    return torch.tensor([min(ord(character), 127) for character in text(3 * LENGTH)])


@pytest.fixture
def original(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(initializer_range=0.2)


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


@pytest.fixture
def converted(original: Any, tiny_hsa: HSAConfig, cache: dict[str, Any]) -> Any:
    if "model" not in cache:
        model = copy.deepcopy(original)
        convert(model, tiny_hsa)
        cache["model"] = model
    return copy.deepcopy(cache["model"])


@torch.no_grad()
def losses(model: Any, windows: Tensor) -> Tensor:
    """Negative log-likelihoods [S, n − 1] by one plain forward over everything."""
    logits = model(windows).logits[:, :-1].double().log_softmax(-1)
    return -logits.gather(-1, windows[:, 1:, None])[..., 0]


def test_both_perplexities_equal_a_plain_computation(original: Any, converted: Any, ids: Tensor) -> None:
    report = evaluate(converted, ids, length=LENGTH)
    windows = ids.view(3, LENGTH)
    dense, own = losses(original, windows), losses(converted, windows)
    assert report.all.dense == pytest.approx(math.exp(dense.mean()), rel=1e-5)
    assert report.all.perplexity == pytest.approx(math.exp(own.mean()), rel=1e-5)
    assert report.all.perplexity != pytest.approx(report.all.dense, rel=1e-4)
    assert report.all.ratio == pytest.approx(report.all.perplexity / report.all.dense)
    assert (report.sequences, report.length, report.all.tokens) == (3, LENGTH, 3 * (LENGTH - 1))
    assert report.warnings == ()

    assert report.start == 72  # sink + window + budget
    assert report.after is not None
    assert report.after.perplexity == pytest.approx(math.exp(own[:, 72:].mean()), rel=1e-5)
    assert report.after.tokens == 3 * (LENGTH - 1 - 72)
    assert [(one.first, one.last) for one in report.bins][::7] == [(0, 25), (174, 199)]
    for one in report.bins:
        assert one.perplexity == pytest.approx(math.exp(own[:, one.first : one.last].mean()), rel=1e-5)
        assert one.dense == pytest.approx(math.exp(dense[:, one.first : one.last].mean()), rel=1e-5)
    assert json.loads(json.dumps(report.to_dict()))["all"]["dense"] == report.all.dense


def test_a_model_that_is_not_converted_and_a_function(original: Any, converted: Any, ids: Tensor) -> None:
    expected = evaluate(converted, ids, length=LENGTH)
    plain = evaluate(original, ids, length=LENGTH)
    assert plain.all.perplexity == pytest.approx(expected.all.dense, rel=1e-6)
    assert (plain.all.dense, plain.keys, plain.sites, plain.start) == (None, None, (), 0)

    def session(window: Tensor) -> numpy.ndarray[Any, Any]:
        result: numpy.ndarray[Any, Any] = converted(window).logits.detach().numpy()
        return result

    exported = evaluate(session, ids, length=LENGTH, start=72)
    assert exported.all.perplexity == pytest.approx(expected.all.perplexity, rel=1e-6)
    assert exported.after is not None
    assert expected.after is not None
    assert exported.after.perplexity == pytest.approx(expected.after.perplexity, rel=1e-6)


def test_strides_score_each_token_once_with_the_most_before_it(converted: Any, ids: Tensor) -> None:
    report = evaluate(converted, ids[:500], length=LENGTH, stride=100, against_dense=False)
    windows = [ids[first : first + LENGTH] for first in (0, 100, 200, 300)]
    scored = [losses(converted, window[None])[0] for window in windows]
    parts = [scored[0], *(loss[-100:] for loss in scored[1:])]
    assert report.all.tokens == 499
    assert report.all.perplexity == pytest.approx(math.exp(torch.cat(parts).mean()), rel=1e-5)
    assert report.all.dense is None
    assert evaluate(converted, ids, length=LENGTH, stride=100, sequences=2).sequences == 2


@pytest.mark.usefixtures("whole_leaves")  # one that fades in in two steps is executed twice
def test_keys_are_those_that_the_output_depends_on(converted: Any, ids: Tensor) -> None:
    """Counts by gradient: a key is executed for a query if the query's output depends on its value."""
    model = converted
    window = ids[None, :LENGTH]
    caught: dict[str, Any] = {}
    for path, site in sites(model):
        site.tap = lambda q, k, v, call, out, path=path: caught.update({path: (q, k, v, call)})
    with torch.no_grad():
        model(window, use_cache=False)
    report = evaluate(model, window[0], length=LENGTH, against_dense=False)
    with counting(model, first=72) as counts, torch.no_grad():
        model(window, use_cache=False)
    assert counts.sites() == report.sites
    assert report.keys == pytest.approx(sum(site.keys for site in report.sites) / 2)
    assert report.dense_keys == pytest.approx(sum(range(73, LENGTH + 1)) / (LENGTH - 72))

    for (path, site), account in zip(sites(model), report.sites, strict=True):
        assert path == account.path
        q, k, v, call = caught[path]
        v = v.detach().requires_grad_()
        out = site.retrofit(q, k, v, call)
        found = []
        for query in range(72, LENGTH):
            for head in (0, 2):  # one query head of each kv head; the heads of a group share their keys
                (gradient,) = torch.autograd.grad(out[0, head, query].sum(), v, retain_graph=True)
                found.append(int((gradient[0, head // 2].abs().sum(-1) > 0).sum()))
        assert account.keys == pytest.approx(sum(found) / len(found), rel=1e-6)
        assert account.keys < account.dense_keys
        assert account.nodes > 0


def test_maha_is_counted_too(original: Any, tiny_maha: MAHAConfig, ids: Tensor) -> None:
    model = copy.deepcopy(original)
    convert(model, tiny_maha)
    report = evaluate(model, ids, length=LENGTH)
    assert report.keys is not None
    assert report.dense_keys is not None
    assert report.keys < report.dense_keys
    assert report.all.ratio != 1


def test_a_text_too_short_to_be_sparse_is_told(converted: Any, ids: Tensor) -> None:
    report = evaluate(converted, ids[:60], length=LENGTH)
    assert report.length == 60
    assert report.after is None
    assert report.all.ratio == pytest.approx(1, rel=1e-5)
    assert report.keys == report.dense_keys
    assert "end before position 72" in report.warnings[0]
    assert "no query of these 60 tokens was sparse" in report.warnings[1]
    assert f"the data has 60 tokens, fewer than the length of {LENGTH}" in report.warnings[2]


def test_the_length_is_held_to_the_models_positions(tiny_llama: Callable[..., Any], ids: Tensor) -> None:
    model = tiny_llama(max_position_embeddings=128)
    with pytest.raises(DataError, match="at most the model's 128 positions, got 129; pass length="):
        evaluate(model, ids, length=129)
    assert evaluate(model, ids).length == 128
    with pytest.raises(DataError, match="stride must lie between 1 and length=100"):
        evaluate(model, ids, length=100, stride=101)
    with pytest.raises(DataError, match="at least 2 tokens, got 1"):
        evaluate(model, ids[:1])


def test_bad_text_is_named(converted: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xff at offset 0"):
        evaluate(converted, tmp_path / "a.txt", tokenizer=lambda *args, **kwargs: None)


def test_the_model_is_left_as_it_was(converted: Any, ids: Tensor) -> None:
    converted.train()
    converted.lm_head.eval()
    evaluate(converted, ids, length=LENGTH, sequences=1)
    assert converted.training
    assert not converted.lm_head.training
    assert "forward" not in vars(converted.model)
    for _, site in sites(converted):
        assert site.training
        assert not site.dense_mode
        assert site.retrofit.observer is None


def test_pieces_of_logits_pass_through_the_models_own_head() -> None:
    """Gemma 2 caps its logits after the head: what a bare product with the head's weight would miss."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=64,
            initializer_range=0.5,
            final_logit_softcapping=1.0,
        )
    ).eval()
    window = torch.randint(64, (2, 30))
    with torch.no_grad():
        whole = model(window).logits
        outputs = run(model, window)
        assert outputs.hidden is not None
        pieces = torch.cat([outputs.logits(0, 7), outputs.logits(7, 30)], 1)
        plain = model.lm_head(outputs.hidden)
    torch.testing.assert_close(pieces, whole)
    assert not torch.allclose(plain, whole, atol=1e-2)


def test_a_module_of_another_library_gives_its_logits_whole() -> None:
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.table(ids)
            return logits

    model, window = Bigram(), torch.randint(8, (50,))
    expected = torch.nn.functional.cross_entropy(model.table(window[:-1]), window[1:])
    assert evaluate(model, window).all.perplexity == pytest.approx(math.exp(expected.item()), rel=1e-5)
