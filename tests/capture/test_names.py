"""Names of a module's own children that a site needs, and modules that are no Python."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import retrofit
from retrofit.capture.reserved import RESERVED
from retrofit.captured_module import CapturedModule
from retrofit.errors import NoAttentionFound
from retrofit.site import RetrofittedAttention

DENSE = retrofit.DenseConfig()


class Attention(nn.Module):
    def __init__(self, name: str = "last", child: object = None) -> None:
        super().__init__()
        self.qkv, self.named = nn.Linear(32, 96), name
        setattr(self, name, nn.Linear(32, 32) if child is None else child)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        last = getattr(self, self.named)
        if isinstance(last, nn.Softmax):
            return (last(q @ k.mT) @ v).transpose(1, 2).flatten(2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return y * last if isinstance(last, nn.Parameter) else last(y)


def _convert_and_revert(model, x, paths):
    with torch.no_grad():
        before = model(x)
        report = retrofit.convert(model, DENSE, (x,))
        assert [site.path for site in report.converted] == paths
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert torch.equal(model(x), before)
    return report


CHILDREN = [lambda: nn.Linear(32, 32), lambda: nn.Softmax(-1), lambda: nn.Parameter(torch.rand(32))]


@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("name", ["attend", "bias_of_step", "target", "mask"])
def test_names_that_models_use(name, child):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(name, child()), nn.Linear(32, 32)).eval()
    _convert_and_revert(model, torch.randn(2, 11, 32), ["0"])


@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("name", ["plan", "path", "dense_mode", "tap", "original", "retrofit", "restored"])
def test_names_that_a_site_needs(name, child):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(name, child()), Attention()).eval()
    report = _convert_and_revert(model, torch.randn(2, 11, 32), ["1"])
    assert f"named {name}, which a site needs for itself" in report.skipped["0"]


def test_all_that_a_site_needs_is_reserved():
    model = nn.Sequential(Attention(), nn.Linear(32, 32)).eval()
    retrofit.convert(model, DENSE, (torch.randn(2, 11, 32),))
    own = {*vars(model[0]), *vars(RetrofittedAttention), *vars(CapturedModule), "retrofit"} - set(
        dir(nn.Module())
    )
    assert {name for name in own if not name.startswith("_")} == RESERVED


class Scripted(nn.Module):
    def __init__(self, inside: bool, script: nn.Module) -> None:
        super().__init__()
        self.attention = Attention("last", script) if inside else Attention()
        self.after = nn.Identity() if inside else script

    def forward(self, x):
        return self.after(self.attention(x))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.jit.trace(nn.Linear(32, 32), x),
        lambda x: torch.jit.script(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(11))),
    ],
)
def test_script_modules_stay_as_they_are(make, inside):
    torch.manual_seed(0)
    x = torch.randn(2, 11, 32)
    _convert_and_revert(Scripted(inside, make(x)).eval(), x, ["attention"])


def test_attention_in_a_script_module_is_refused():
    torch.manual_seed(0)
    x = torch.randn(2, 11, 32)
    model = Scripted(False, torch.jit.trace(Attention().eval(), x)).eval()
    report = _convert_and_revert(model, x, ["attention"])
    assert "it is a ScriptModule" in report.skipped["after"]
    with pytest.raises(NoAttentionFound, match="it is a ScriptModule"):
        retrofit.convert(nn.Sequential(model.after, nn.Linear(32, 32)), DENSE, (x,))
