"""A real model, converted and exported, on real text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import retrofit
from retrofit.configs import HSAConfig
from retrofit.onnx import OnnxModel, export_onnx
from retrofit.targets.hsa import geometry_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(
    smollm2: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, OnnxModel]:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    retrofit.convert(model, HSAConfig())
    folder = tmp_path_factory.mktemp("smollm2") / "out"
    report = export_onnx(model, folder, check=False)
    nodes = {"ExtendPyramid": 30, "ExtendSpreads": 30, "HSAAttention": 30}
    assert report.custom_nodes == nodes and report.functions == 3
    assert report.tied_embeddings
    return model, tokenizer, OnnxModel(folder, threads=1)


def rows(tokenizer: Any, text: Callable[[int], str], batch: int, length: int) -> tuple[Any, Any]:
    """Passages of the text, and a mask that hides the start of all but the first."""
    ids = torch.tensor(tokenizer(text(40_000), add_special_tokens=False)["input_ids"])
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, : row * length // 5] = 0
    return torch.stack([ids[row * 37 : row * 37 + length] for row in range(batch)]), mask


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 17), (2, 1150), (1, 3400)])
def test_logits(exported: Any, text: Callable[[int], str], batch: int, length: int) -> None:
    model, tokenizer, session = exported
    ids, mask = rows(tokenizer, text, batch, length)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits.numpy()
    found = session.logits(ids.numpy(), mask.numpy())
    assert np.abs(found - expected)[mask.bool().numpy()].max() < 1e-3


def test_dense_until_of_zero_exports_the_same() -> None:
    """With the default sizes the budget holds all there is up to the default's dense start."""
    assert geometry_of(HSAConfig(dense_until=0)).dense_end == geometry_of(HSAConfig()).dense_end


def test_greedy_tokens(exported: Any, text: Callable[[int], str]) -> None:
    model, tokenizer, session = exported
    ids, mask = rows(tokenizer, text, 2, 40)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
    assert (session.generate(ids.numpy(), mask.numpy(), max_new_tokens=32) == out[:, 40:].numpy()).all()
