"""A small model with a tokenizer in a folder, and a way to run the command line on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from retrofit.cli import app

TINY_HSA = [
    f"--set={option}"
    for option in (
        "window=32",
        "sink=8",
        "budget=32",
        "block=8",
        "node=2",
        "fanout=4",
        "nodes_per_span=8",
        "beam=4",
        "query_block=8",
    )
]


@pytest.fixture
def retrofit() -> Callable[..., Any]:
    """Runs ``retrofit`` with the arguments given, in this process."""

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved two-layer Llama over bytes with its tokenizer; read only."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: index for index, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def converted_folder(tiny_folder: Path) -> Path:
    """The same model, converted by the command line; read only."""
    folder = tiny_folder.parent / "tiny-hsa"
    result = CliRunner().invoke(app, ["convert", str(tiny_folder), str(folder), *TINY_HSA])
    assert result.exit_code == 0, result.stderr
    return folder
