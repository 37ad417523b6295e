"""Saved folders describe themselves, load converted, and never load as dense by silence."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import retrofit
from retrofit import admit
from retrofit.configs import HSAConfig, MAHAConfig
from retrofit.errors import ConfigError, ModelLoadError, OutputError
from retrofit.saving import check_folder, new_folder
from retrofit.verify import verify_site

IDS = torch.arange(1, 101)[None] % 127 + 1


@pytest.fixture(params=["hsa", "maha"])
def converted(request: pytest.FixtureRequest, tiny_llama: Callable) -> Any:
    model = _converted(tiny_llama, request.getfixturevalue(f"tiny_{request.param}"))
    _stir(model)
    return model


@pytest.fixture
def sparse(tiny_llama: Callable, tiny_hsa: HSAConfig) -> Any:
    """A model converted to HSA, for what does not depend on the target and takes long."""
    model = _converted(tiny_llama, tiny_hsa)
    _stir(model)
    return model


@pytest.fixture
def dense(tiny_llama: Callable) -> Any:
    """A model converted to the identity target, which is quick to make."""
    return _converted(tiny_llama, retrofit.DenseConfig())


_made: dict[str, Any] = {}


def _converted(tiny_llama: Callable, config: Any) -> Any:
    """A fresh copy of a model that is converted once."""
    if repr(config) not in _made:
        model = tiny_llama()
        retrofit.convert(model, config)
        _made[repr(config)] = model
    return copy.deepcopy(_made[repr(config)])


def _stir(model: Any) -> None:
    """Moves every parameter of the targets away from where a conversion starts."""
    with torch.no_grad():
        for _, site in retrofit.sites(model):
            for parameter in site.retrofit.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)


def _in_new_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_new_process_gives_the_same_logits(sparse: Any, folder: Path, tmp_path: Path) -> None:
    retrofit.save_pretrained(sparse, folder)
    torch.save(sparse(IDS).logits, tmp_path / "logits.pt")
    code = """
import sys, torch, retrofit
from transformers import AutoModelForCausalLM
ids, expected = torch.arange(1, 101)[None] % 127 + 1, torch.load(sys.argv[2])
for model in (retrofit.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])):
    assert len(retrofit.sites(model)) == 2
    assert torch.equal(model(ids).logits, expected)
"""
    done = _in_new_process(code, str(folder), str(tmp_path / "logits.pt"))
    assert done.returncode == 0, done.stderr


def test_without_retrofit_it_does_not_load(dense: Any, folder: Path) -> None:
    dense.save_pretrained(folder)
    code = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for each in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        each.from_pretrained(sys.argv[1])
    except ValueError as error:
        assert "retrofit" in str(error), error
    else:
        raise SystemExit("it loaded")
assert "retrofit" not in sys.modules
"""
    done = _in_new_process(code, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_way_to_save_and_to_load(converted: Any, tmp_path: Path) -> None:
    converted.save_pretrained(tmp_path / "theirs")
    retrofit.save_pretrained(converted, tmp_path / "ours")
    records = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert records[0] == records[1]
    expected = converted(IDS).logits
    for model in (
        retrofit.load_model(tmp_path / "ours").model,
        LlamaForCausalLM.from_pretrained(tmp_path / "theirs"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager"),
    ):
        assert torch.equal(model(IDS).logits, expected)
    body = AutoModel.from_pretrained(tmp_path / "ours")
    assert [path for path, _ in retrofit.sites(body)] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert torch.equal(body(IDS).last_hidden_state, converted.model(IDS).last_hidden_state)


def test_the_record(tiny_llama: Callable, tiny_hsa: HSAConfig, tiny_maha: MAHAConfig, folder: Path) -> None:
    model = tiny_llama()
    plain = model.config.to_dict()
    retrofit.convert(model, {"*.0.*": tiny_hsa, "*.1.*": tiny_maha})
    retrofit.save_pretrained(model, folder)
    record = json.loads((folder / "config.json").read_text())["retrofit"]
    assert record["version"] == 1
    assert record["sites"]["model.layers.0.self_attn"]["target"] == "hsa"
    assert record["sites"]["model.layers.1.self_attn"]["widths"] == [32, 16, 16]
    loaded = retrofit.from_pretrained(folder)
    assert [site.retrofit.config for _, site in retrofit.sites(loaded)] == [tiny_hsa, tiny_maha]
    retrofit.revert(model)
    assert model.config.to_dict().keys() == plain.keys()
    assert model.config._attn_implementation == "sdpa"


def test_a_loaded_model_is_an_ordinary_one(dense: Any, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model, "quantization_method")
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    again.float().half()
    retrofit.revert(model)
    model.save_pretrained(tmp_path / "c")
    code = "import sys, transformers as t; t.LlamaForCausalLM.from_pretrained(sys.argv[1])"
    assert _in_new_process(code, str(tmp_path / "c")).returncode == 0


def test_tied_weights_stay_tied(tiny_llama: Callable, folder: Path) -> None:
    from safetensors import safe_open

    model = tiny_llama(tie_word_embeddings=True)
    retrofit.convert(model, retrofit.DenseConfig())
    retrofit.save_pretrained(model, folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = retrofit.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_partial_conversion_is_loaded_in_part(
    tiny_llama: Callable, tiny_hsa: HSAConfig, folder: Path
) -> None:
    model = tiny_llama(attn_implementation="eager")
    retrofit.convert(model, tiny_hsa, where="model.layers.1.*")
    retrofit.save_pretrained(model, folder)
    loaded = retrofit.from_pretrained(folder)
    assert [path for path, _ in retrofit.sites(loaded)] == ["model.layers.1.self_attn"]
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    retrofit.revert(loaded)
    assert loaded.config._attn_implementation == "eager"


def test_an_encoder(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=128
        )
    ).eval()
    retrofit.convert(model, retrofit.DenseConfig())
    retrofit.save_pretrained(model, folder)
    assert torch.equal(retrofit.from_pretrained(folder)(IDS).logits, model(IDS).logits)


def test_a_model_that_needs_an_example_is_loaded_with_one_like_it(folder: Path) -> None:
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**shape, image_size=32, patch_size=4), add_pooling_layer=False).eval()
    pixels = torch.randn(2, 3, 32, 32)
    retrofit.convert(model, retrofit.DenseConfig(), {"pixel_values": pixels, "return_dict": True})
    retrofit.save_pretrained(model, folder)
    loaded = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    assert [path for path, _ in retrofit.sites(loaded)] == [path for path, _ in retrofit.sites(model)]
    assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)


def test_what_was_verified_at_conversion_is_not_verified_again(
    dense: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []

    def watched(found: Any, site: Any) -> float:
        verified.append(found.path)
        return verify_site(found, site)

    monkeypatch.setattr(admit, "verify_site", watched)
    retrofit.save_pretrained(dense, folder)
    retrofit.from_pretrained(folder)
    assert verified == []
    retrofit.from_pretrained(folder, dtype=torch.float64)
    assert len(verified) == 2
    file = folder / "config.json"
    record = json.loads(file.read_text())
    record["retrofit"]["verified"]["model.layers.1.self_attn"] = "of something else"
    file.write_text(json.dumps(record))
    retrofit.from_pretrained(folder)
    assert verified[2:] == ["model.layers.1.self_attn"]


def test_the_tokenizer_goes_with_it(dense: Any, folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    retrofit.save_pretrained(dense, folder, PreTrainedTokenizerFast(tokenizer_object=backend))
    assert retrofit.load_model(folder).tokenizer("b").input_ids == [1]


def test_adapters_load_on_a_converted_model(sparse: Any, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

    retrofit.save_pretrained(sparse, tmp_path / "base")
    base = retrofit.from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).eval()
    expected = adapted(IDS).logits
    assert not torch.allclose(expected, sparse(IDS).logits)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(retrofit.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(again.eval()(IDS).logits, expected)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(auto.eval()(IDS).logits, expected)
    with pytest.raises(OutputError, match="merge its adapters first"):
        retrofit.save_pretrained(again, tmp_path / "no")
    merged = again.merge_and_unload()
    retrofit.save_pretrained(merged, tmp_path / "merged")
    torch.testing.assert_close(retrofit.from_pretrained(tmp_path / "merged")(IDS).logits, expected)


# Errors.


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_records_that_cannot_be_read(dense: Any, folder: Path) -> None:
    for change, error, message in (
        (lambda c: c["retrofit"].update(version=2), ModelLoadError, "version 2.*update retrofit-attention"),
        (lambda c: c.pop("retrofit"), ModelLoadError, "no record of what was converted"),
        (
            lambda c: c["retrofit"]["sites"]["model.layers.0.self_attn"].update(target="hsaa"),
            ConfigError,
            "did you mean hsa",
        ),
        (lambda c: c.update(num_hidden_layers=1), ModelLoadError, r"layers\.1\.self_attn, which Llama"),
    ):
        dense.save_pretrained(folder)
        _edit(folder, change)
        with pytest.raises(error, match=message):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_dense_folder_is_not_taken_for_a_converted_one(tiny_llama: Callable, folder: Path) -> None:
    model = tiny_llama()
    with pytest.raises(OutputError, match="not converted"):
        retrofit.save_pretrained(model, folder)
    model.save_pretrained(folder)
    with pytest.raises(ModelLoadError, match="not a converted model"):
        retrofit.from_pretrained(folder)


def test_output_folders_that_are_refused(dense: Any, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"full is not empty and holds no converted model"):
        retrofit.save_pretrained(dense, full)
    with pytest.raises(OutputError, match="is a file; give a folder"):
        retrofit.save_pretrained(dense, full / "thesis.txt")
    with pytest.raises(OutputError, match="is a file"):
        check_folder(full / "thesis.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.txt"]


def test_a_converted_folder_is_replaced(dense: Any, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    retrofit.save_pretrained(dense, target)
    (target / "stale.txt").touch()
    retrofit.save_pretrained(dense, target)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert not (target / "stale.txt").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    retrofit.save_pretrained(dense, empty)
    assert (empty / "model.safetensors").is_file()


def test_a_failure_leaves_nothing_behind(dense: Any, tmp_path: Path) -> None:
    retrofit.save_pretrained(dense, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_text()

    class FullDisk:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"cannot write .*out: .*No space left.*nothing was written"):
        retrofit.save_pretrained(dense, tmp_path / "out", FullDisk())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == before
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_while_writing_the_weights(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.modeling_utils as modeling

    original = modeling.safe_save_file

    def to_full_disk(tensors: Any, filename: str, **options: Any) -> None:
        Path(filename).symlink_to("/dev/full")
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x" * 4096)
        original(tensors, filename, **options)

    monkeypatch.setattr(modeling, "safe_save_file", to_full_disk)
    with pytest.raises(OutputError, match="No space left"):
        retrofit.save_pretrained(dense, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as filling:
        (filling / "part").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_wrong_config_is_still_readable(dense: Any, folder: Path) -> None:
    dense.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).retrofit["version"] == 1
