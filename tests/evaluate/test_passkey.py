from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.api import convert
from retrofit.configs import HSAConfig
from retrofit.errors import DataError
from retrofit.evaluate import passkey
from retrofit.evaluate.passkey import _prompt


@pytest.fixture
def tokenizer() -> Any:
    """One token a character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def finder(ids: Tensor) -> Tensor:
    """A model that copies what followed the last equal pair of words: it finds every key."""
    text = "".join(map(chr, ids[0].tolist()))
    marker = "The pass key is "
    key = text.index(marker) + len(marker)
    asked = text.rindex(marker) + len(marker)
    logits = torch.zeros(1, len(text), 128)
    for step in range(len(text) - asked + 1):
        logits[0, asked - 1 + step - 1, ord(text[key - 1 + step])] = 1
    return logits


def test_the_table_has_a_cell_for_each_length_and_depth(tokenizer: Any) -> None:
    report = passkey(finder, tokenizer, [400, 600], [0.0, 0.5, 1.0], trials=2)
    assert [(cell.length, cell.depth) for cell in report.cells] == [
        (400, 0.0),
        (400, 0.5),
        (400, 1.0),
        (600, 0.0),
        (600, 0.5),
        (600, 1.0),
    ]
    assert {(cell.accuracy, cell.dense, cell.trials) for cell in report.cells} == {(1.0, None, 2)}
    assert json.loads(json.dumps(report.to_dict()))["accuracy"] == 1.0

    assert passkey(lambda ids: torch.zeros(1, ids.shape[1], 128), tokenizer, [400], [0.5]).accuracy == 0.0


def test_prompts_have_their_length_and_depth(tokenizer: Any) -> None:
    from random import Random

    hay = [ord("x")] * 2000
    for depth in (0.0, 0.25, 1.0):
        ids, answer = _prompt(tokenizer, hay, 500, depth, 5, Random(1))
        text = "".join(map(chr, ids.tolist()))
        assert len(text) == 500
        before, after = text.split("\n\nThe pass key is ", 1)
        filler = text.count("x")
        assert before.count("x") - 1 == pytest.approx(depth * (filler - 1), abs=1)  # one x is in "text"
        assert text.endswith("The pass key is" + text[-answer:])
        assert text[-answer:].strip() in after
    first, again, other = (_prompt(tokenizer, hay, 500, 0.5, 5, Random(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dense_and_converted_agree_in_the_dense_limit(tiny_llama: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny_llama()
    config = HSAConfig(
        window=32, sink=8, budget=1024, block=8, node=2, fanout=4, nodes_per_span=8, query_block=8
    )
    convert(model, config)
    report = passkey(model, tokenizer, [300], [0.0, 1.0], digits=1, trials=4)
    assert report.dense is not None
    assert [cell.accuracy for cell in report.cells] == [cell.dense for cell in report.cells]


def test_what_cannot_be_asked_is_refused(tiny_llama: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny_llama(max_position_embeddings=256)
    with pytest.raises(DataError, match="at most the model's 256 positions, got 257"):
        passkey(model, tokenizer, [257])
    with pytest.raises(DataError, match="depths must lie between 0 and 1, got 50"):
        passkey(model, tokenizer, [250], [50])
    with pytest.raises(DataError, match=r"needs at least .* tokens, got length 100"):
        passkey(model, tokenizer, [100])
    with pytest.raises(DataError, match="the filler text has 4 tokens"):
        passkey(finder, tokenizer, [400], filler=["tiny"])
    with pytest.raises(DataError, match="at least one length"):
        passkey(model, tokenizer, [])
