"""Operators with gradients, at little cost to the host.

    differentiable(library, name, function, backward, setup_context)  →  the operator
    direct(name, function)                                            →  an operator without gradients

``torch.library.register_autograd`` goes through the schema at every call, and the dispatcher turns each argument into
its own kind of value and back: with some thirty arguments that takes the host longer than all launches of the operator.
So where nobody watches operators, the functions are called without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class _Call:
    """A call.

    Attributes:
        run: What is called, without gradients.
        arguments: Tensors, None, and lists of tensors.
        options: Arguments by keyword.
    """

    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def made(self) -> Any:
        """What it returns."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.run(*self.arguments, **self.options)


def differentiable(
    library: torch.library.Library,
    name: str,
    function: Callable[..., Any],
    backward: Callable[..., Sequence[Any]],
    setup_context: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None],
) -> Callable[..., Any]:
    """Gives an operator gradients, which themselves have none.

    Args:
        library: Where it is defined: its arguments are tensors, None and lists of tensors, and by keyword what is none;
            it returns tensors, and no argument has a default.
        name: Of the operator.
        function: Its implementation on every device.
        backward: From the context and the gradients of what it returned to those of its arguments, in lists as they are.
        setup_context: Keeps in the context what ``backward`` needs, of the arguments, the options and what it returned.

    Returns:
        The operator, to be called with all arguments.
    """
    operator = getattr(torch.ops.retrofit, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: _Call, *_: Tensor | None) -> Any:
            out = call.made()
            setup_context(ctx, call.arguments, call.options, out)
            ctx.lengths = [len(x) if isinstance(x, (list, tuple)) else None for x in call.arguments]
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            found: list[Any] = [None]
            for grad, length in zip(backward(ctx, *grads), ctx.lengths, strict=True):
                if length is None:
                    found.append(grad)
                else:
                    found += [None] * length if grad is None else grad
            return tuple(found)

    def made(call: _Call) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*call.arguments)):
            return call.made()
        return Function.apply(call, *_flat(call.arguments))  # type: ignore[no-untyped-call]

    def dispatched(keys: Any, *arguments: Any, **options: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments, **options)

        return made(_Call(run, arguments, options))

    def called(*arguments: Any, **options: Any) -> Any:
        if is_watched(_flat(arguments)):
            return operator(*arguments, **options)
        return made(_Call(function, arguments, options))

    library.impl(name, dispatched, "Autograd", with_keyset=True)
    return called


def direct(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator without gradients, to be called with all arguments.

    Args:
        name: Of the operator.
        function: Its implementation on every device.
    """
    operator = getattr(torch.ops.retrofit, name).default

    def called(*arguments: Any, **options: Any) -> Any:
        if is_watched(_flat(arguments)):
            return operator(*arguments, **options)
        return function(*arguments, **options)

    return called


def is_watched(tensors: Sequence[Any]) -> bool:
    """Whether somebody watches or transforms operators: a compiler, a tracer, a profiler, a mode, a transform of
    functions, or tensors of a kind of their own."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() or torch.autograd.profiler._is_profiler_enabled:
        return True
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(type(x) not in PLAIN for x in tensors if isinstance(x, Tensor))


def _flat(arguments: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for x in arguments:
        found += x if isinstance(x, (list, tuple)) else (x,)
    return found
