"""What a model is called with, and that random choices are the same before and after a conversion."""

from __future__ import annotations

from typing import Any

import torch

import retrofit
from retrofit.capture.probes import BEYOND_WINDOW, make_probes

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def test_a_masked_autoencoder_chooses_the_same_patches() -> None:
    from transformers import ViTMAEConfig, ViTMAEModel

    torch.manual_seed(0)
    model = ViTMAEModel(ViTMAEConfig(image_size=32, patch_size=8, **TINY)).eval()
    state = torch.random.get_rng_state()
    report = retrofit.convert(model, retrofit.DenseConfig(), {"pixel_values": torch.zeros(2, 3, 32, 32)})
    assert len(report.converted) == 2
    assert torch.equal(torch.random.get_rng_state(), state)


def test_windows_of_single_layers_count() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    windows: Any = {"sliding_window": 24, "per_layer_config": {0: {"sliding_window": 99}}}
    model = MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=4, **windows, **TINY))
    assert make_probes(model, None)[0].kwargs["input_ids"].shape[1] >= 99 + BEYOND_WINDOW


def test_a_mask_has_a_row_for_each_sequence_where_each_codebook_has_one_of_tokens() -> None:
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MusicgenForCausalLM(MusicgenDecoderConfig(num_codebooks=4, vocab_size=64, **sizes)).eval()
    ids = torch.randint(1, 60, (2 * 4, 17))
    example = {"input_ids": ids, "attention_mask": torch.ones(2, 17, dtype=torch.long)}
    keeps = [probe.keep for probe in make_probes(model, example)]
    assert all(keep is not None and keep.shape == (2, 17) for keep in keeps)
    report = retrofit.convert(model, retrofit.DenseConfig(), example)
    assert len(report.converted) == 2
