"""Operators that are called without the dispatcher, and with it where somebody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.kernels.autograd import differentiable, direct


class Seen(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def weigh(
    x: Tensor, others: Sequence[Tensor], bias: Tensor | None, *, factor: float
) -> tuple[Tensor, Tensor]:
    """factor · x · (sum of the others) + bias, and where it is positive."""
    calls.append("forward")
    out = factor * x * sum(others, torch.zeros_like(x)) + (0 if bias is None else bias)
    return out, out > 0


def weigh_back(grad: Tensor, x: Tensor, others: Sequence[Tensor], *, factor: float) -> list[Tensor]:
    calls.append("backward")
    total = sum(others, torch.zeros_like(x))
    return [factor * grad * total, *(factor * grad * x for _ in others)]


def keep(ctx: Any, arguments: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
    x, others, bias = arguments
    ctx.save_for_backward(x, *others)
    ctx.options, ctx.has_bias = options, bias is not None
    ctx.mark_non_differentiable(out[1])


calls: list[str] = []


@pytest.fixture(scope="module")
def operator() -> Iterator[Callable[..., Any]]:
    library = torch.library.Library("retrofit", "FRAGMENT")
    library.define(
        "weigh(Tensor x, Tensor[] others, Tensor? bias, *, float factor) -> (Tensor, Tensor)",
        tags=torch.Tag.pt2_compliant_tag,
    )
    library.define("weigh_back(Tensor grad, Tensor x, Tensor[] others, *, float factor) -> Tensor[]")
    for name, function in (("weigh", weigh), ("weigh_back", weigh_back)):
        torch.library.impl(library, name, "CompositeExplicitAutograd")(function)
    torch.library.register_fake(
        "retrofit::weigh",
        lambda x, *_, **__: (torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)),
        lib=library,
    )
    torch.library.register_fake(
        "retrofit::weigh_back",
        lambda grad, x, others, **_: [torch.empty_like(y) for y in (x, *others)],
        lib=library,
    )
    back = direct("weigh_back", weigh_back)

    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        x, *others = ctx.saved_tensors
        of_x, *of_others = back(grad, x, others, **ctx.options)
        return of_x, of_others if ctx.options["factor"] else None, grad if ctx.has_bias else None

    yield differentiable(library, "weigh", weigh, backward, keep)
    library._destroy()


def inputs(*, graded: bool = True) -> tuple[Tensor, list[Tensor], Tensor]:
    x, *others, bias = (torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(4))
    for y in (x, others[1], bias):
        y.requires_grad_(graded)
    return x, others, bias


def gradients(out: Tensor, x: Tensor, others: Sequence[Tensor], bias: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sum(), (x, others[1], bias))


@pytest.mark.parametrize("watched", [False, True])
def test_gradients(operator: Callable[..., Any], watched: bool) -> None:
    x, others, bias = inputs()
    if watched:
        with Seen() as seen:
            out, positive = operator(x, others, bias, factor=2.0)
            found = gradients(out, x, others, bias)
        assert "retrofit::weigh" in seen.names and "retrofit::weigh_back" in seen.names
    else:
        out, positive = operator(x, others, bias, factor=2.0)
        found = gradients(out, x, others, bias)
    expected = 2 * x * (others[0] + others[1]) + bias
    assert torch.equal(out, expected)
    assert torch.equal(positive, expected > 0)
    assert not positive.requires_grad
    for own, other in zip(found, gradients(expected, x, others, bias), strict=True):
        assert torch.allclose(own, other)
    assert not operator(*inputs(graded=False), factor=2.0)[0].requires_grad
    with torch.no_grad():
        assert not operator(x, others, bias, factor=2.0)[0].requires_grad


def test_a_list_without_gradients_and_an_argument_that_is_none(operator: Callable[..., Any]) -> None:
    x, others, bias = inputs()
    out, _ = operator(x, others, bias, factor=0.0)
    of_x, of_other, of_bias = torch.autograd.grad(out.sum(), (x, others[1], bias), allow_unused=True)
    assert of_other is None
    assert torch.equal(of_x, torch.zeros(5)) and torch.equal(of_bias, torch.ones(5))
    out, _ = operator(x, (), None, factor=1.0)
    assert torch.equal(out, torch.zeros(5))
    out.sum().backward()


def test_nobody_watches(operator: Callable[..., Any]) -> None:
    x, others, bias = inputs()
    reached = []
    library = torch.library.Library("retrofit", "FRAGMENT")
    library.impl("weigh", lambda *a, **o: reached.append("dispatcher") or weigh(*a, **o), "CPU")
    library.impl("weigh_back", lambda *a, **o: reached.append("dispatcher") or weigh_back(*a, **o), "CPU")
    try:
        out, _ = operator(x, others, bias, factor=2.0)
        out.sum().backward()
        assert not reached
        with torch.profiler.profile():
            operator(x, others, bias, factor=2.0)
        assert reached == ["dispatcher"]
    finally:
        library._destroy()


def test_gradients_of_gradients_are_refused(operator: Callable[..., Any]) -> None:
    x, others, bias = inputs()
    out, _ = operator(x, others, bias, factor=2.0)
    (found,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        found.sum().backward()


@pytest.mark.parametrize("factor", [2.0])
def test_opcheck_and_compiler(operator: Callable[..., Any], factor: float) -> None:
    torch.library.opcheck(torch.ops.retrofit.weigh, inputs(), {"factor": factor})
    x, others, bias = inputs()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, others: list[Tensor], bias: Tensor) -> Tensor:
        out: Tensor = operator(x, others, bias, factor=factor)[0]
        return out

    calls.clear()
    out = compiled(x, others, bias)
    found = gradients(out, x, others, bias)
    assert calls == ["forward", "backward"]
    expected = operator(x, others, bias, factor=factor)[0]
    for own, other in zip(found, gradients(expected, x, others, bias), strict=True):
        assert torch.equal(own, other)
