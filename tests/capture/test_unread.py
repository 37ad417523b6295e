"""Other arguments than the recorded ones are taken only where the code never reads them, or makes the same graph of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrofit
from retrofit.capture.unread import unread_parameters
from retrofit.errors import CaptureError


class Attention(nn.Module):
    """Rotates by what it is given; subclasses differ in what they do with ``position_ids``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def attend(self, x: Tensor, scale: Any) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 16)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q * scale, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Leaves(Attention):
    def forward(self, x: Tensor, position_embeddings: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return self.attend(x, position_embeddings)


class Reads(Attention):
    def forward(self, x: Tensor, position_embeddings: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is not None:
            position_embeddings = position_embeddings * torch.log1p(position_ids.float())[:, None, :, None]
        return self.attend(x, position_embeddings)


class ReadsWithin(Attention):
    def forward(self, x: Tensor, position_embeddings: Tensor, position_ids: Tensor | None = None) -> Tensor:
        def scale() -> Tensor:
            return position_embeddings if position_ids is None else position_embeddings * 2

        return self.attend(x, scale())


class Looks(Attention):
    def forward(self, x: Tensor, position_embeddings: Tensor, position_ids: Tensor | None = None) -> Tensor:
        given = locals()["position_ids"] is not None
        return self.attend(x, position_embeddings * (2 if given else 1))


class HandsOn(Attention):
    """Hands positions on to a function that has no use for them, as to a kernel that another setting would take."""

    def forward(self, x: Tensor, position_embeddings: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return self._kernel(x, position_embeddings, position_ids=position_ids)

    def _kernel(self, x: Tensor, scale: Tensor, **options: Any) -> Tensor:
        return self.attend(x, scale)


class Model(nn.Module):
    def __init__(self, attention: Attention, by_position: bool = False) -> None:
        super().__init__()
        self.attention, self.by_position = attention, by_position

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        angles = torch.cos(torch.arange(x.shape[1]).float())[:, None]
        if self.by_position:
            found: Tensor = self.attention(x, angles, position_ids)
        else:
            found = self.attention(x, angles, position_ids=position_ids)
        return found


def test_only_what_is_never_read_is_unread() -> None:
    assert unread_parameters(Leaves()) == {"position_ids"}
    for kind in (Reads, ReadsWithin, Looks, HandsOn):
        assert "position_ids" not in unread_parameters(kind())


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("kind", [Leaves, HandsOn])
def test_what_is_not_used_may_be_given_later(kind: type[Attention], by_position: bool) -> None:
    model, x, positions = (
        Model(kind(), by_position).eval(),
        torch.randn(2, 21, 32),
        torch.arange(21).expand(2, -1),
    )
    expected = model(x, positions)
    retrofit.convert(model, retrofit.DenseConfig(), (x,))
    torch.testing.assert_close(model(x, positions), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("kind", [Reads, ReadsWithin, Looks])
def test_what_may_be_read_is_refused(kind: type[Attention], by_position: bool) -> None:
    model, x, positions = (
        Model(kind(), by_position).eval(),
        torch.randn(2, 21, 32),
        torch.arange(21).expand(2, -1),
    )
    retrofit.convert(model, retrofit.DenseConfig(), (x,))
    with pytest.raises(CaptureError, match="captured with position_ids=None, got a tensor"):
        model(x, positions)


class Options(Attention):
    """Has a say in what it does, and some that it has not."""

    def forward(
        self,
        x: Tensor,
        causal: bool = True,
        factor: float = 1.0,
        checked: bool = False,
        shift: Tensor | tuple[Tensor] | None = None,
        **more: Any,
    ) -> Tensor:
        if checked:
            assert x.dim() == 3
        q, k, v = (m(x).unflatten(-1, (2, 16)).transpose(1, 2) for m in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        out = out * torch.tensor(factor) * more.get("gain", 1.0)
        return out if shift is None else out + (shift[0] if isinstance(shift, tuple) else shift)


class Passes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Options()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        found: Tensor = self.attention(x, **options)
        return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "captured with causal=True, got False"),
        ({"factor": 2.0}, r"captured with factor=1.0, got 2.0"),
        ({"shift": torch.ones(32)}, "captured with shift=None, got a tensor"),
        ({"shift": (torch.ones(32),)}, "captured with shift=None, got a tuple"),
        ({"gain": 3.0}, "captured without gain, got 3.0"),
    ],
)
def test_what_was_another_in_the_example_is_refused(options: dict[str, Any], message: str) -> None:
    model, x = Passes().eval(), torch.randn(2, 21, 32)
    for given, later in (({}, options), (options, {})):
        expected = model(x, **given)
        retrofit.convert(model, retrofit.DenseConfig(), {"x": x, **given})
        torch.testing.assert_close(model(x, **given), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(CaptureError, match=message if later else "attention (was captured with|needs)"):
            model(x, **later)
        retrofit.revert(model)


def test_what_makes_no_difference_may_be_another() -> None:
    model, x = Passes().eval(), torch.randn(2, 21, 32)
    expected = model(x)
    retrofit.convert(model, retrofit.DenseConfig(), (x,))
    torch.testing.assert_close(model(x, checked=True, use_cache=False), expected, rtol=1e-5, atol=1e-5)
