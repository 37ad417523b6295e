"""Converted models as ONNX, run by onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import retrofit
from retrofit.configs import DenseConfig, HSAConfig, MAHAConfig
from retrofit.errors import ExportError, OutputError
from retrofit.folders import EXPORT_RECORD, is_export, new_folder
from retrofit.onnx import OnnxModel, export_onnx


def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: int) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    result: np.ndarray[Any, Any] = out[:, ids.shape[1] :].numpy()
    return result


def check(model: Any, folder: Path, nodes: dict[str, int], lengths: tuple[int, ...]) -> None:
    report = export_onnx(model, folder)
    assert report.worst is not None and report.worst.value < report.worst.tolerance
    pooling = report.custom_nodes.keys() - nodes.keys()
    assert report.custom_nodes.items() >= nodes.items() and pooling <= {"ExtendPyramid", "ExtendSpreads"}
    pyramids = len(nodes) if "ExtendPyramid" in pooling else 0  # layers of one target share them
    assert report.functions == len(nodes) + pyramids + ("ExtendSpreads" in pooling)
    exported = OnnxModel(folder)
    assert exported.with_past
    for length in lengths:
        for batch in (1, 3):
            ids = torch.randint(1, 128, (batch, length))
            mask = torch.ones_like(ids)
            for row in range(1, batch):
                mask[row, : row * length // 5] = 0
            with torch.no_grad():
                ours = model(input_ids=ids, attention_mask=mask).logits.numpy()
            theirs = exported.logits(ids.numpy(), mask.numpy())
            difference = np.abs(ours - theirs)[mask.bool().numpy()]
            assert difference.max() < 1e-3, (length, batch)
    expected = greedy(model, ids, mask, 32)
    assert (exported.generate(ids.numpy(), mask.numpy(), max_new_tokens=32) == expected).all()


def test_dense_with_past(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    retrofit.convert(model, DenseConfig())
    check(model, tmp_path / "out", {"DenseAttention": 2}, (1, 17, 130))
    saved = onnx.load(tmp_path / "out" / "model.onnx")
    names = [value.name for value in saved.graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert "past_key_values.1.value" in names
    assert "present.0.key" in [value.name for value in saved.graph.output]
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["tied_embeddings"] and record["opset"] == 20
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
def test_two_targets_with_past(
    tiny_llama: Callable[..., Any], tmp_path: Path, tiny_hsa: HSAConfig, tiny_maha: MAHAConfig
) -> None:
    model = tiny_llama()
    # Wide spans make few levels, which trace in less time; 700 tokens still need a coarse step that drops some.
    hsa = replace(tiny_hsa, fanout=16, nodes_per_span=32, beam=2)
    maha = replace(tiny_maha, regularizer="euclidean")
    retrofit.convert(model, {"model.layers.0.*": hsa, "model.layers.1.*": maha})
    check(model, tmp_path / "out", {"HSAAttention": 1, "MAHAAttention": 1}, (1, 17, 700))


def test_a_difference_leaves_nothing_behind(
    tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrofit.onnx.verify.TOLERANCES", {torch.float32: 1e-12})
    with pytest.raises(ExportError, match="differs from torch"):
        export_onnx(tiny_llama(), tmp_path / "out", with_past=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"), new_folder(tmp_path, is_export, "earlier export"):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_and_a_saved_model_never_replace_each_other(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_llama(num_hidden_layers=1)
    retrofit.convert(model, DenseConfig())
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    retrofit.save_pretrained(model, saved)
    with new_folder(exported, is_export, "earlier export") as folder:
        for name in ("model.onnx", EXPORT_RECORD, "config.json"):
            (folder / name).write_text("{}")
    with pytest.raises(OutputError, match=r"exported is not empty .* but an ONNX export"):
        retrofit.save_pretrained(model, exported)
    with pytest.raises(OutputError, match=r"saved is not empty .* but a model"):
        export_onnx(model, saved)
    assert (exported / "model.onnx").is_file() and (saved / "model.safetensors").is_file()


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        with new_folder(target, is_export, "earlier export") as folder:
            (folder / "export.json").write_text(text)
    assert (target / "export.json").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_what_does_not_run_is_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"float32, float16 or float64 .* got torch.bfloat16"):
        export_onnx(tiny_llama().bfloat16(), tmp_path / "out")
    for option in ({"aggregation": "nash"}, {"dilated_branch": True}):
        model = tiny_llama()
        retrofit.convert(model, MAHAConfig(scales=2, widths=(32,), sink=8, **option))
        with pytest.raises(ExportError, match=f"{next(iter(option))} must be .* at model.layers.0"):
            export_onnx(model, tmp_path / "out")


def test_options_are_checked(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset"):
        export_onnx(tiny_llama(), tmp_path / "out", opset=7)
    with pytest.raises(ExportError, match="inline must be"):
        export_onnx(tiny_llama(), tmp_path / "out", inline="never")
    with pytest.raises(ExportError, match="no exported model"):
        OnnxModel(tmp_path)
