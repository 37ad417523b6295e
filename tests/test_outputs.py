from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import retrofit
from retrofit.configs import HSAConfig
from retrofit.errors import ConfigError

IDS = torch.arange(60)[None] % 97 + 1


def test_attention_weights_are_refused_until_the_model_is_reverted(
    tiny_llama: Callable, tiny_hsa: HSAConfig
) -> None:
    model = tiny_llama(attn_implementation="eager")
    retrofit.convert(model, tiny_hsa, where="*.0.*")
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(
            ConfigError, match=r"output_attentions must be False.*layers.0.self_attn.*retrofit.revert"
        ):
            one(IDS, output_attentions=True)
        with pytest.raises(ConfigError, match="output_attentions"):
            one.generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 3
    retrofit.revert(model)
    assert [weights.shape for weights in model(IDS, output_attentions=True).attentions] == [
        (1, 4, 60, 60)
    ] * 2


def test_attention_weights_asked_for_in_the_configuration_are_refused(
    tiny_llama: Callable, tiny_hsa: HSAConfig
) -> None:
    model = tiny_llama(attn_implementation="eager")
    retrofit.convert(model, tiny_hsa)
    model.config._output_attentions = True
    with pytest.raises(ConfigError, match="output_attentions"):
        model(IDS)
    assert model(IDS, output_attentions=False).attentions is None
