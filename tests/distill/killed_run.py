"""A distillation of a tiny model; run as a script it says each step, so that it can be killed in the middle."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retrofit.api import convert
from retrofit.configs import HSAConfig
from retrofit.distill import DistillConfig, DistillReport, distill

CONFIG = DistillConfig(
    stage="both", steps=6, steps_2=6, learning_rate_2=1e-3, length=128, accumulation=2, save_every=2, seed=3
)


def build() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=128,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
            initializer_range=0.2,
        )
    ).eval()
    target = HSAConfig(
        window=32,
        sink=8,
        budget=32,
        block=8,
        node=2,
        fanout=4,
        nodes_per_span=8,
        beam=4,
        query_block=8,
        pooling="learned",
    )
    convert(model, target)
    return model


def data() -> torch.Tensor:
    return torch.tensor([min(ord(character), 127) for character in topics["assert"][:2000]])


def run(model: Any, output: Path, *, resume: bool = False, tell: bool = False) -> DistillReport:
    def say(record: dict[str, Any]) -> None:
        print(record["stage"], record["step"], flush=True)
        time.sleep(0.05)

    return distill(model, data(), CONFIG, output=output, resume=resume, progress=say if tell else None)


if __name__ == "__main__":
    run(build(), Path(sys.argv[1]), tell=True)
