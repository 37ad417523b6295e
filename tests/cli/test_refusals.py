"""What cannot be converted is named: all of a model ends in an error, a part of it in the share that was converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose attention adds to its scores what it makes of the tokens."""
    from transformers import DogeConfig, DogeForCausalLM

    folder = tmp_path_factory.mktemp("refused") / "model"
    DogeForCausalLM(DogeConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder-decoder with four self-attentions and two cross-attentions."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("partly") / "model"
    layers = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")
    }
    widths = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 128}
    config = BartConfig(**layers, **widths, max_position_embeddings=64)
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder-decoder whose self-attentions have a position bias: DenseConfig takes all, HSA none."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("biased") / "model"
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(**sizes, vocab_size=128)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_every_reason_is_named_with_its_sites(
    retrofit: Run, biased: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = retrofit("convert", biased, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "encoder.block.0.layer.0.SelfAttention and 1 more: a position bias is added to its scores" in line
    assert "decoder.block.0.layer.1.EncDecAttention: cross-attention takes DenseConfig() alone" in line
    assert not (tmp_path / "out").exists()


def test_what_one_target_leaves_another_takes_in_full(retrofit: Run, biased: Path, tmp_path: Path) -> None:
    result = retrofit("convert", biased, tmp_path / "out", "--target", "dense")
    assert result.exit_code == 0, result.stderr
    line = "converted 3 of 3 sites to dense (3): 100% of the attention FLOPs of the example"
    assert line in " ".join(result.stdout.split())


def test_a_model_that_is_refused_whole_exits_non_zero_with_the_reasons(
    retrofit: Run, refused: Path, tmp_path: Path
) -> None:
    result = retrofit("convert", refused, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "no attention of DogeForCausalLM can be converted" in line
    assert "model.layers.0.self_attn and 1 more: the bias added to the scores depends on the tokens" in line
    assert "modeling_doge.py:" in line
    assert not (tmp_path / "out").exists()


def test_inspect_shows_why_and_how_much(retrofit: Run, refused: Path) -> None:
    result = retrofit("inspect", refused)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert "2 attention sites, 0 convertible: 0% of the attention FLOPs" in shown
    assert "model.layers.{0–1}.self_attn (100% of attention FLOPs): the bias added to the scores" in shown


def test_a_model_that_is_converted_in_part_says_which_share(
    retrofit: Run, partly: Path, tmp_path: Path
) -> None:
    result = retrofit("convert", partly, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    converted, left = document["converted"], document["left"]
    assert len(converted) == 4
    assert len(left) == 2
    assert all(site["reason"].startswith("cross-attention takes DenseConfig() alone") for site in left)
    # Queries times keys, counted by hand: the encoder has 45 tokens, the decoder 38.
    pairs = {"encoder": 45 * 45, "decoder": 38 * 38, "cross": 38 * 45}
    share = (pairs["encoder"] + pairs["decoder"]) / sum(pairs.values())
    assert document["coverage"] == pytest.approx(share, abs=1e-6)
    shown = retrofit("convert", partly, tmp_path / "shown")
    assert shown.exit_code == 0, shown.stderr
    line = f"converted 4 of 6 sites to hsa (4): {100 * share:.0f}% of the attention FLOPs of the example"
    assert line in shown.stdout
    assert "left as they are:" in shown.stdout
    assert (
        f"({100 - 100 * share:.0f}% of attention FLOPs): cross-attention takes DenseConfig()" in shown.stdout
    )
