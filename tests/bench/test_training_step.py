"""A training step is timed on all sides alike, on attention that was trained."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from retrofit.configs import HSAConfig, config_to_dict

Script = Callable[[str], ModuleType]


def _sizes(**changes: Any) -> argparse.Namespace:
    sizes = {"hidden": 96, "heads": 6, "layers": 2, "intermediate": 176, "lengths": [4096]}
    return argparse.Namespace(**{**sizes, **changes})


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_widened_model_computes_what_it_did(
    script: Script, tiny_llama: Callable[..., Any], tied: bool
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    for norm in (model.model.norm, *(layer.input_layernorm for layer in model.model.layers)):
        norm.weight.uniform_(0.5, 1.5)
    wide = script("training_step").widened(model, _sizes(), "eager")
    assert wide.model.layers[0].self_attn.k_proj.weight.shape == (96, 96)
    ids = torch.randint(0, 128, (2, 50))
    torch.testing.assert_close(wide(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)

    first = script("training_step").widened(model, _sizes(layers=1), "sdpa")
    hidden = model(ids, output_hidden_states=True).hidden_states[1]
    kept = first(ids, output_hidden_states=True).hidden_states[1]  # the last is normalised
    torch.testing.assert_close(kept[..., :64], model.model.norm(hidden), atol=1e-5, rtol=1e-4)


def test_a_loss_by_chunks_is_the_loss(script: Script, tiny_llama: Callable[..., Any]) -> None:
    model, ids = tiny_llama(), torch.randint(0, 128, (2, 50))
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected_gradients = torch.autograd.grad(expected, [*model.parameters()])
    loss = script("training_step").loss_of(model, ids, 16)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [*model.parameters()]), expected_gradients)


@pytest.mark.parametrize("weights", ["smollm2", "random"])
def test_all_sides_take_the_same_step(
    script: Script, tiny_folder: Path, tiny_hsa: HSAConfig, tmp_path: Path, weights: str
) -> None:
    (tmp_path / "hsa.json").write_text(json.dumps(config_to_dict(tiny_hsa)))
    sizes = (
        "--lengths 192 256 --eager-until 192 --layers 2 --hidden 96 --heads 6 --intermediate 176 --repeats 1"
    )
    where = f"--config {tmp_path / 'hsa.json'} --dense-until 128 --output {tmp_path / 'out.json'}"
    arguments = f"--weights {weights} --model {tiny_folder} {sizes} {where}".split()
    assert script("training_step").main(arguments) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["config"]["dense_until"] == 128
    short, long = record["rows"]
    assert "eager" in short and "eager" not in long
    for row in (short, long):
        assert row["hsa"]["loss"] == pytest.approx(row["sdpa"]["loss"], rel=2e-2)
        assert row["speedup"]["sdpa"] == pytest.approx(row["sdpa"]["ms"] / row["hsa"]["ms"])
        assert row["hsa"]["keys"] < (row["length"] + 1) / 2
    assert short["eager"]["loss"] == pytest.approx(short["sdpa"]["loss"], rel=1e-3)
