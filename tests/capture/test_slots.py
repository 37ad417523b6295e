"""The place of a site in the cache, seen in its calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache

import retrofit
from retrofit.capture.call import Signature
from retrofit.capture.record import record
from retrofit.capture.slots import Slot, slot_of


class Attention(nn.Module):
    def __init__(self, places):
        super().__init__()
        self.layer_idx = 1
        self.places = iter(places)

    def forward(self, x, past_key_values, cycle=0):
        q = x[:, None]
        place = next(self.places)
        for layer in place if isinstance(place, tuple) else (place,):
            k, v = past_key_values.update(q, q, layer)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Twice(nn.Module):
    def __init__(self, places):
        super().__init__()
        self.attention = Attention(places)

    def forward(self, x):
        cache = DynamicCache()
        for cycle in (0, 2):
            x = self.attention(x, cache, cycle=cycle)
        return x


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ((1, 1), Slot(1)),
        ((0, 0), Slot(0)),
        ((1, 3), Slot(1, "cycle")),
        ((1, 2), "it writes to layers 1, 2 of the cache, and no argument says to which"),
        ((1, (1, 2)), "it writes to several layers of the cache in one call (1, 2)"),
    ],
)
def test_the_layer_a_module_writes_to(places, expected):
    model = Twice(places)
    calls = record(model, (torch.randn(2, 5, 8),), {}).owners["attention"]
    assert slot_of(model.attention, Signature.of(model.attention), calls) == expected


def test_the_layer_of_a_call():
    assert Slot(1, "cycle").in_call({"cycle": 4}) == 5
    assert Slot(1).in_call({"cycle": 4}) == 1
    assert Slot(None).in_call({}) is None


class Cached(nn.Module):
    """Attends to the keys in the first layer of the cache, with its own put there or only beside them."""

    def __init__(self, writes):
        super().__init__()
        self.layer_idx, self.writes = 0, writes

    def forward(self, x, past_key_values=None):
        q = k = v = x[:, None]
        if past_key_values is not None and self.writes:
            k, v = past_key_values.update(k, v, 0)
        elif past_key_values is not None:
            layer = past_key_values.layers[0]
            k, v = (torch.cat([held, q], 2) for held in (layer.keys, layer.values))
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Borrows(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Cached(True), Cached(False)

    def forward(self, x):
        cache = DynamicCache()
        return self.second(self.first(x, cache), cache)


def test_keys_that_another_module_has_put_there():
    first, second = retrofit.inspect(Borrows(), (torch.randn(2, 5, 8),)).sites
    assert first.convertible
    assert "it attends to keys in the cache that another module has put there" in second.reason


class Masked(Cached):
    """Is handed a mask of all keys in the cache."""

    def forward(self, x, mask, past_key_values=None):
        q = k = v = x[:, None]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, 0)
        return F.scaled_dot_product_attention(q, k, v, mask)[:, 0]


class Continues(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Cached(True), Masked(True)

    def forward(self, x):
        cache = DynamicCache()
        x = self.first(x, cache)
        return self.second(x, x.new_zeros(x.shape[1], 2 * x.shape[1]), cache)


def test_keys_beside_those_that_another_module_has_put_there():
    first, second = retrofit.inspect(Continues(), (torch.randn(2, 5, 8),)).sites
    assert first.convertible
    assert second.reason == "it attends to keys in the cache that another module has put there"
