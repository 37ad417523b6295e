"""Operators that are called without the dispatcher, and with it where somebody watches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.kernels.autograd import Differentiable, direct

calls: list[str] = []
"""Which functions of the operators have run."""


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


@pytest.fixture(scope="module")
def operator() -> Iterator[Differentiable]:
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

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        x, *others = ctx.saved_tensors
        of_x, *of_others = back(grad, x, others, **ctx.options)
        return of_x, of_others if ctx.options["factor"] else None, grad if ctx.has_bias else None

    yield Differentiable(library, "weigh", weigh, backward, keep)
    library._destroy()


def inputs(*, graded: bool = True) -> tuple[Tensor, list[Tensor], Tensor]:
    x, *others, bias = (torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(4))
    for y in (x, others[1], bias):
        y.requires_grad_(graded)
    return x, others, bias


def gradients(out: Tensor, x: Tensor, others: Sequence[Tensor], bias: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sum(), (x, others[1], bias))


@pytest.mark.parametrize("watched", [False, True])
def test_gradients(operator: Differentiable, watched: bool) -> None:
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


@pytest.mark.parametrize("watched", [False, True])
def test_what_an_operator_is_called_within_is_one_node(operator: Differentiable, watched: bool) -> None:
    x, others, bias = inputs()
    rest = x.detach() + 1

    def run() -> tuple[Tensor, Tensor, list[Tensor | None]]:
        return *operator(x, others, bias, factor=2.0), [rest * 2, None]

    with Seen() if watched else nullcontext():
        out, positive, (twice, nothing) = operator.within(run, x, others, bias, factor=2.0)
    assert torch.equal(twice, rest * 2) and nothing is None
    assert not positive.requires_grad and not twice.requires_grad
    assert "retrofit_weigh" in out.grad_fn.name()
    expected = operator(x, others, bias, factor=2.0)[0]
    for own, other in zip(gradients(out, x, others, bias), gradients(expected, x, others, bias), strict=True):
        assert torch.equal(own, other)
    with torch.no_grad():
        assert not operator.within(run, x, others, bias, factor=2.0)[0].requires_grad


def test_a_list_without_gradients_and_an_argument_that_is_none(operator: Differentiable) -> None:
    x, others, bias = inputs()
    out, _ = operator(x, others, bias, factor=0.0)
    of_x, of_other, of_bias = torch.autograd.grad(out.sum(), (x, others[1], bias), allow_unused=True)
    assert of_other is None
    assert torch.equal(of_x, torch.zeros(5)) and torch.equal(of_bias, torch.ones(5))
    out, _ = operator(x, (), None, factor=1.0)
    assert torch.equal(out, torch.zeros(5))
    out.sum().backward()


@pytest.mark.filterwarnings("ignore:retrofit..weigh_back. an autograd kernel was not registered")
def test_gradients_of_gradients_are_those_of_the_backward_pass(operator: Differentiable) -> None:
    x, others, bias = inputs()

    def of_gradients(out: Tensor) -> tuple[Tensor, ...]:
        (found,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(found.square().sum(), (x, others[1], bias))

    own = of_gradients(operator(x, others, bias, factor=2.0)[0])
    for one, other in zip(own, of_gradients(2 * x * (others[0] + others[1]) + bias), strict=True):
        assert torch.allclose(one, other)


@pytest.mark.filterwarnings("error")
def test_the_backward_pass_is_the_operator_where_its_gradients_are_asked_for(
    operator: Differentiable,
) -> None:
    x, others, bias = inputs()
    (found,) = torch.autograd.grad(operator(x, others, bias, factor=2.0)[0].sum(), x, create_graph=True)
    with pytest.raises(UserWarning, match="weigh_back"):
        found.sum().backward()


@pytest.fixture
def reached() -> Iterator[list[str]]:
    """What the dispatcher is asked for on a CPU."""
    found: list[str] = []
    library = torch.library.Library("retrofit", "FRAGMENT")
    for name, function in (("weigh", weigh), ("weigh_back", weigh_back)):

        def through(*arguments: Any, _name: str = name, _run: Any = function, **options: Any) -> Any:
            found.append(_name)
            return _run(*arguments, **options)

        library.impl(name, through, "CPU")
    yield found
    library._destroy()


def test_the_dispatcher_is_left_out_where_nobody_watches(
    operator: Differentiable, reached: list[str]
) -> None:
    x, others, bias = inputs()
    operator(x, others, bias, factor=2.0)[0].sum().backward()
    assert reached == []


def test_the_dispatcher_is_asked_under_a_profiler(operator: Differentiable, reached: list[str]) -> None:
    with torch.profiler.profile():
        operator(*inputs(), factor=2.0)[0].sum().backward()
    assert reached == ["weigh", "weigh_back"]


def test_the_dispatcher_is_asked_where_there_is_a_default_device(
    operator: Differentiable, reached: list[str]
) -> None:
    given = inputs()
    with torch.device("meta"):
        out, _ = operator(*given, factor=2.0)
    assert reached == ["weigh"] and out.device.type == "cpu"


def test_the_dispatcher_is_asked_for_tensors_that_are_not_what_stands_in_memory(
    operator: Differentiable, reached: list[str]
) -> None:
    x, others, bias = inputs(graded=False)
    turned = torch.complex(x, x).conj().imag
    assert turned.is_neg()
    out, _ = operator(turned, others, bias, factor=2.0)
    assert torch.equal(out, -2 * x * (others[0] + others[1]) + bias)
    assert reached == ["weigh"]
    assert operator(x.to("meta"), (), None, factor=2.0)[0].is_meta


def test_nodes_have_the_names_of_their_operators(operator: Differentiable) -> None:
    node = operator(*inputs(), factor=2.0)[0].grad_fn
    assert "retrofit_weigh" in node.name()


def test_forward_mode_is_refused(operator: Differentiable) -> None:
    x, others, bias = inputs(graded=False)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda y: operator(y, others, bias, factor=2.0)[0], (x,), (torch.ones(5),))


def test_opcheck_and_compiler(operator: Differentiable) -> None:
    torch.library.opcheck(torch.ops.retrofit.weigh, inputs(), {"factor": 2.0})
    x, others, bias = inputs()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, others: list[Tensor], bias: Tensor) -> Tensor:
        out: Tensor = operator(x, others, bias, factor=2.0)[0]
        return out

    calls.clear()
    out = compiled(x, others, bias)
    found = gradients(out, x, others, bias)
    assert calls == ["forward", "backward"]
    expected = operator(x, others, bias, factor=2.0)[0]
    for own, other in zip(found, gradients(expected, x, others, bias), strict=True):
        assert torch.equal(own, other)
