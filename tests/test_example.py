from __future__ import annotations

import json

import pytest
import torch

from retrofit import example
from retrofit.errors import ModelLoadError

HERE = {"device": torch.device("cpu"), "dtype": torch.float32}


def _again(value: object) -> object:
    return example.from_record(json.loads(json.dumps(example.to_record(value))), **HERE)


def test_small_values_come_back() -> None:
    given = {"ids": torch.arange(6).view(2, 3), "flag": True, "parts": (torch.tensor([[0.5]]), [None, "x"])}
    got = _again(given)
    assert isinstance(got, dict) and got["flag"] is True and got["parts"][1] == [None, "x"]
    assert torch.equal(got["ids"], given["ids"]) and isinstance(got["parts"], tuple)
    assert torch.equal(got["parts"][0], torch.tensor([[0.5]]))


def test_large_tensors_come_back_alike() -> None:
    floats, ids = torch.randn(2, 3, 40, 40), torch.randint(5, 9, (2, 5000))
    got = _again((floats.half(), ids, ids > 6))
    assert [(part.shape, part.dtype) for part in got] == [
        (floats.shape, torch.float32),
        (ids.shape, torch.int64),
        (ids.shape, torch.bool),
    ]
    assert got[1].min() == 5 and got[1].max() == 8


def test_what_cannot_be_kept_is_named() -> None:
    with pytest.raises(ModelLoadError, match="an example that holds a Generator"):
        _again({"generator": torch.Generator()})
