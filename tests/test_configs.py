"""Options of the wrong type are refused where they are set, not where they would be used."""

from __future__ import annotations

from typing import Any

import pytest

from retrofit.cli.options import assignments
from retrofit.configs import HSAConfig, MAHAConfig
from retrofit.distill.config import DistillConfig
from retrofit.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "text", "message"),
    [
        (HSAConfig, "summaries=no", "summaries must be true or false, got 'no'"),
        (HSAConfig, "beam=true", "beam must be a whole number, got True"),
        (HSAConfig, "dense_until=64.0", "dense_until must be a whole number or None, got 64.0"),
        (HSAConfig, "dense_until=abc", "dense_until must be a whole number or None, got 'abc'"),
        (HSAConfig, "pooling=3", "pooling must be a word, got 3"),
        (MAHAConfig, "widths=8.5,8,8", "widths must be whole numbers with commas between"),
        (MAHAConfig, "dilated_branch=no", "dilated_branch must be true or false"),
        (DistillConfig, "learning_rate=abc", "learning_rate must be a number, got 'abc'"),
        (DistillConfig, "clip=none", "clip must be a number, got 'none'"),
        (DistillConfig, "merge_lora=no", "merge_lora must be true or false, got 'no'"),
        (DistillConfig, "seed=x", "seed must be a whole number, got 'x'"),
    ],
)
def test_a_value_of_another_type_is_refused(config: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**assignments([text]))


def test_the_forms_of_a_value() -> None:
    assert MAHAConfig(**assignments(["widths=[600,8,8]"])) == MAHAConfig(**assignments(["widths=600,8,8"]))
    assert MAHAConfig(**assignments(["widths=600"])).widths == (600, 600, 600)
    assert DistillConfig(**assignments(["stage=1", "learning_rate=1"])).stage == "1"
