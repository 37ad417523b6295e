"""Operators with gradients, at little cost to the host.

    Differentiable(library, name, function, backward, setup_context)  →  the operator
    direct(name, function)                                            →  the operator of its backward pass

``torch.library.register_autograd`` goes through the schema at every call, and the dispatcher turns each argument into
its own kind of value and back: with some thirty arguments that takes the host longer than all launches of the operator.
So where nobody is seen to watch operators, their functions are called without the dispatcher. Who watches from within it
(``torch.profiler.ExecutionTraceObserver``) misses them, and so do functions that others register for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from retrofit.errors import ConfigError

KINDS = (Tensor, nn.Parameter)
"""Types of tensors that are no more than their elements."""


class Differentiable:
    """An operator with gradients, to be called with all arguments.

    Args:
        library: Where it is defined, in the namespace ``retrofit``: its arguments are tensors, None and lists of tensors,
            and by keyword what is none; it returns tensors, and no argument has a default.
        name: Of the operator.
        function: Its implementation, the same for every device.
        backward: From the context and the gradients of what it returned to those of its arguments, in lists as they are.
        setup_context: Keeps in the context what ``backward`` needs, of the arguments, the options and what it returned.
    """

    def __init__(
        self,
        library: torch.library.Library,
        name: str,
        function: Callable[..., Any],
        backward: Callable[..., Sequence[Any]],
        setup_context: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None],
    ) -> None:
        self._operator, self._function = getattr(torch.ops.retrofit, name).default, function

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx: Any, run: Any, arguments: tuple[Any, ...], options: dict[str, Any], *_: Any
            ) -> Any:
                out = _without_gradients(run, arguments, options)
                setup_context(ctx, arguments, options, out)
                ctx.lengths = [len(x) if isinstance(x, (list, tuple)) else None for x in arguments]
                return out

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                of_all: list[Any] = [None] * 3
                for grad, length in zip(backward(ctx, *grads), ctx.lengths, strict=True):
                    if length is None:
                        of_all.append(grad)
                    else:
                        of_all += [None] * length if grad is None else grad
                return tuple(of_all)

        # By the name of the class the nodes of a graph are told apart.
        self._apply: Callable[..., Any] = type(f"retrofit_{name}_", (Function,), {}).apply  # type: ignore[attr-defined]
        library.impl(name, self._dispatched, "Autograd", with_keyset=True)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the operator returns."""
        flat = _flat(arguments)
        if _needs_dispatcher(flat):
            return self._operator(*arguments, **options)
        return self._run(self._function, arguments, options, flat)

    def within(self, run: Callable[[], Any], *arguments: Any, **options: Any) -> Any:
        """What ``run`` returns, as one node of a graph of gradients.

        Args:
            run: Does what the operator does, and returns what it returns and whatever else, of which the operator's
                functions are told as well. Gradients flow back through nothing but the operator, and from nothing but
                what it returned.
            arguments: Those of the operator's that have gradients, and those that ``setup_context`` keeps.
            options: Those of the operator's that it keeps.
        """
        flat = _flat(arguments)
        if _needs_dispatcher(flat):
            return run()
        return self._run(lambda *_, **__: run(), arguments, options, flat)

    def _dispatched(self, keys: Any, *arguments: Any, **options: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            return self._operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments, **options)

        return self._run(run, arguments, options, _flat(arguments))

    def _run(
        self, run: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], flat: list[Any]
    ) -> Any:
        graded = torch.is_grad_enabled() and torch._C._any_requires_grad(*flat)
        if graded or forward_ad._current_level >= 0:  # of which the class says that there is none
            return self._apply(run, arguments, options, *flat)
        return _without_gradients(run, arguments, options)


def direct(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator that a backward pass is, to be called with all arguments.

    Args:
        name: Of the operator, in the namespace ``retrofit``.
        function: Its implementation, the same for every device.
    """
    operator = getattr(torch.ops.retrofit, name).default

    def called(*arguments: Any, **options: Any) -> Any:
        # In a backward pass gradients are on where those of gradients are asked for.
        if torch.is_grad_enabled() or _needs_dispatcher(_flat(arguments)):
            return operator(*arguments, **options)
        return function(*arguments, **options)

    return called


def check_kinds(tensors: Mapping[str, Any], integers: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is neither a tensor nor None, and for what is no integer: functions that are called
    without the dispatcher have no schema that does."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise ConfigError(f"{name} must be a tensor or None, got {type(x).__name__}")
    for name, n in integers.items():
        if not isinstance(n, int):
            raise ConfigError(f"{name} must be an integer, got {n!r}")


def is_watched(tensors: Sequence[Any]) -> bool:
    """Whether somebody watches or transforms operators: a compiler, a tracer, a profiler, a dispatch mode, a transform of
    functions, or tensors that are more than their elements."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() or torch.autograd.profiler._is_profiler_enabled:
        return True
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(type(x) not in KINDS for x in tensors if isinstance(x, Tensor))


def _needs_dispatcher(tensors: Sequence[Any]) -> bool:
    """Whether somebody watches, or has what is called from Python mean something else, as a default device does, or what
    tensors are does not stand in memory as it is."""
    if is_watched(tensors) or torch._C._len_torch_function_stack():
        return True
    return any(
        x.is_meta or x.is_neg() or x._is_zerotensor() or torch._C._functorch.is_legacy_batchedtensor(x)
        for x in tensors
        if isinstance(x, Tensor)
    )


def _without_gradients(run: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return run(*arguments, **options)


def _flat(arguments: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for x in arguments:
        found += x if isinstance(x, (list, tuple)) else (x,)
    return found
