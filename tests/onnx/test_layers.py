"""A model of many equal layers is translated by a few of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import retrofit
from retrofit.configs import DenseConfig
from retrofit.onnx import OnnxModel, export_onnx
from retrofit.onnx.layers import TRANSLATED, equal_layers


def test_layers_are_copied(
    tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(num_hidden_layers=6)
    retrofit.convert(model, DenseConfig())
    torch.nn.init.normal_(model.model.layers[4].self_attn.q_proj.weight, std=0.5)
    seen = []
    exporter = torch.onnx.export

    def export(program: Any, *args: Any, **options: Any) -> Any:
        seen.append(sum("layers" in name and "q_proj" in name for name in program.state_dict))
        return exporter(program, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", export)
    report = export_onnx(model, tmp_path / "out")
    assert max(seen) == TRANSLATED
    assert report.custom_nodes == {"DenseAttention": 6} and report.functions == 1
    assert report.worst is not None and report.worst.value < 1e-4
    assert len(model.model.layers) == model.config.num_hidden_layers == 6
    assert report.inputs[-2:] == ("past_key_values.5.key", "past_key_values.5.value")
    assert report.outputs[-2:] == ("present.5.key", "present.5.value")
    exported = OnnxModel(tmp_path / "out")
    ids = torch.randint(1, 128, (2, 30))
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 30:]
    assert np.array_equal(exported.generate(ids.numpy(), max_new_tokens=6), expected.numpy())


def test_layers_that_differ_are_not_taken_for_equal(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(num_hidden_layers=5)
    assert equal_layers(model) is not None
    retrofit.convert(model, DenseConfig(), where="*.3.*")
    assert equal_layers(model) is None
    model = tiny_llama(num_hidden_layers=5)
    model.model.layers[4].mlp.act_fn = torch.nn.GELU()
    assert equal_layers(model) is None
    model = tiny_llama(num_hidden_layers=5)
    model.model.layers[2].register_forward_hook(lambda *_: None)
    assert equal_layers(model) is None
    assert equal_layers(tiny_llama()) is None
