"""What a module keeps on itself: nothing that somebody needs goes missing, or stays as it was, behind his back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.errors import NoAttentionFound

WIDTH, HEADS = 32, 4
SIZES = [(2, 11), (1, 7), (3, 23)]


class Attention(nn.Module):
    """Hands its weights to ``keep``, which subclasses define, and its keys to ``keys``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.box: dict[str, Tensor] = {}
        self.maps: list[Tensor] = []
        self.tokens, self.weights = 0, None
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        k, v = self.keys(k, v)
        weights = (q @ k.mT * 8**-0.5).softmax(-1)
        self.keep(weights)
        return (weights @ v).transpose(1, 2).flatten(2)

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v

    def keep(self, weights: Tensor) -> None:
        self.weights = weights


class InList(Attention):
    def keep(self, weights: Tensor) -> None:
        self.maps.append(weights)


class InDict(Attention):
    def keep(self, weights: Tensor) -> None:
        self.box["weights"] = weights


class InTuple(Attention):
    def keep(self, weights: Tensor) -> None:
        self.weights = (weights, weights.mean(1))


class InBuffer(Attention):
    def keep(self, weights: Tensor) -> None:
        self.seen = weights


class Model(nn.Module):
    def __init__(self, attention: nn.Module, read: object = None) -> None:
        super().__init__()
        self.attention, self.read = attention, read

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        return y if self.read is None else y * self.read(self.attention).amax()


KEPT = {
    Attention: lambda module: module.weights,
    InList: lambda module: module.maps[-1],
    InDict: lambda module: module.box["weights"],
    InTuple: lambda module: module.weights[1],
    InBuffer: lambda module: module.seen,
}


@pytest.mark.parametrize("kind", KEPT)
def test_weights_that_are_read_from_the_module_are_refused(kind: type[Attention]) -> None:
    model, inputs = Model(kind(), KEPT[kind]).eval(), [torch.randn(*size, WIDTH) for size in SIZES]
    with torch.no_grad():
        before = [model(x) for x in inputs]  # and the last of them is still there when it is converted
        for x in inputs:
            with pytest.raises(NoAttentionFound, match=r"what it keeps on itself \(\w+\) is used elsewhere"):
                retrofit.convert(model, retrofit.DenseConfig(), (x,))
        assert all(torch.equal(model(x), expected) for x, expected in zip(inputs, before, strict=True))


@pytest.mark.parametrize("kind", KEPT)
def test_weights_that_nobody_reads_do_not_stay_as_they_were(kind: type[Attention]) -> None:
    model, x = Model(kind()).eval(), torch.randn(2, 11, WIDTH)
    expected, kept = model(x), KEPT[kind](model.attention)
    assert len(retrofit.convert(model, retrofit.DenseConfig(), (x,)).converted) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    if kind is not InBuffer:  # which is in the state of the model
        name = {InList: "maps", InDict: "box"}.get(kind, "weights")
        assert getattr(model.attention, name) is None
    retrofit.revert(model)
    assert KEPT[kind](model.attention) is kept
    assert torch.equal(model(x), expected)


class Remembers(Attention):
    """Keys and values of earlier calls, in attributes or in buffers."""

    def __init__(self, *, buffers: bool) -> None:
        super().__init__()
        for name in ("earlier_k", "earlier_v"):
            if buffers:
                self.register_buffer(name, None, persistent=False)
            else:
                setattr(self, name, None)

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.earlier_k is not None:
            k, v = torch.cat([self.earlier_k, k], 2), torch.cat([self.earlier_v, v], 2)
        self.earlier_k, self.earlier_v = k, v
        return k, v


class Counts(Attention):
    """Turns queries and keys by how many tokens there were before."""

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        turned = k * torch.cos(torch.arange(k.shape[2])[:, None] + float(self.tokens))
        self.tokens += 11
        return turned, v


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (Remembers(buffers=False), "earlier_k, earlier_v, weights"),
        (Remembers(buffers=True), "earlier_k, earlier_v, weights"),
        (Counts(), "tokens, weights"),
    ],
    ids=["attributes", "buffers", "a number"],
)
def test_a_module_that_remembers_is_refused_and_has_not_seen_the_example(
    module: Attention, names: str
) -> None:
    model, x = Model(module).eval(), torch.randn(2, 11, WIDTH)
    with pytest.raises(NoAttentionFound, match=rf"it keeps something for its next call \({names}\)"):
        retrofit.convert(model, retrofit.DenseConfig(), (x,))
    retrofit.inspect(model, (x,))
    assert getattr(module, "earlier_k", None) is None
    assert module.tokens == 0
    assert module.weights is None


class Table(Attention):
    """Makes a table when it first needs it, and a longer one later."""

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n = k.shape[2]
        if "table" not in self.box or len(self.box["table"]) < n:
            self.box["table"] = torch.cos(torch.arange(64)[:, None] / torch.arange(1, 9))
        return k * self.box["table"][:n], v

    def keep(self, weights: Tensor) -> None:
        pass


@pytest.mark.parametrize("called", [False, True])
def test_a_table_for_itself_is_no_hindrance(called: bool) -> None:
    model, inputs = Model(Table()).eval(), [torch.randn(*size, WIDTH) for size in SIZES]
    expected = [Model(model.attention)(x) for x in inputs]
    if not called:
        model.attention.box.clear()
    assert F.mse_loss(model(inputs[0]), expected[0]) == 0
    assert len(retrofit.convert(model, retrofit.DenseConfig(), (inputs[0],)).converted) == 1
    for x, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
