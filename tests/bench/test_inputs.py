"""What is timed was recorded: in one pass where positions are angles, in segments where they are a table."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

import retrofit
from retrofit.bench.inputs import Inputs, record
from retrofit.errors import BenchmarkError

POSITIONS, LENGTH, SCALE = 64, 160, 0.25
LLAMA = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=POSITIONS,
)
GPT2 = GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=POSITIONS)


@pytest.mark.parametrize(
    ("config", "site", "passes"),
    [
        pytest.param(LLAMA, "model.layers.0.self_attn", [0, 160], id="angles"),
        pytest.param(GPT2, "transformer.h.0.attn", [0, 64, 128, 160], id="a table"),
    ],
)
def test_positions_go_on_or_begin_again(config: PreTrainedConfig, site: str, passes: list[int]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    retrofit.convert(model, retrofit.DenseConfig())
    ids = torch.arange(LENGTH) * 7 % 100

    def recorded(ids: torch.Tensor) -> Inputs:
        return record(model, site, None, ids, len(ids), SCALE)

    found = recorded(ids)
    assert found.scale == SCALE
    for begin, end in pairwise(passes):
        alone = recorded(ids[begin:end])
        for name in ("q", "k", "v"):
            torch.testing.assert_close(getattr(found, name)[:, :, begin:end], getattr(alone, name))
    with pytest.raises(BenchmarkError, match="the text has 160 tokens, 161 are needed"):
        record(model, site, None, ids, LENGTH + 1, SCALE)
