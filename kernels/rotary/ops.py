"""``retrofit::rotary``: the rotary positions of queries and keys in one pass over both.

rotary(q, k, cos, sin)  →  q · cos + turn(q) · sin, and the same of k;  turn([x₁, x₂]) = [−x₂, x₁]

Source: https://arxiv.org/abs/2104.09864, with the halves of a head in the places of pairs, as in GPT-NeoX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrofit.kernels.autograd import Differentiable, direct
from retrofit.kernels.repeat import has_triton, repeated_call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = torch.library.Library("retrofit", "FRAGMENT")
_LIBRARY.define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")
_LIBRARY.define(
    "rotary_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, ScalarType dtype) -> (Tensor, Tensor)"
)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Gives queries and keys their positions: by one kernel on a GPU, and else operator by operator.

    The kernel rounds as the operators do; gradients of half-precision queries by angles of float32 it sums before it rounds
    them. While a program is compiled or exported, it gets the operators.

    Args:
        q: Queries [B, Hq, T, D].
        k: Keys [B, Hk, T, D], of the dtype of q.
        cos: Cosines, broadcast to [B, 1, T, D].
        sin: Sines, broadcast as ``cos``.

    Returns:
        Both rotated, in the dtype of their products with ``cos``.
    """
    if _is_for_kernel(q, k, cos, sin):
        found: tuple[Tensor, Tensor] = _operator(q, k, cos, sin)
        return found
    return rotated(q, cos, sin), rotated(k, cos, sin)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + turn(x) · sin, operator by operator."""
    low, high = x.tensor_split([x.shape[-1] // 2], -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def _is_for_kernel(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not q.is_cuda or torch.compiler.is_compiling() or not has_triton():
        return False
    if any(type(x) is not Tensor for x in (q, k, cos, sin)):
        return False
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return False
    dtypes = (q.dtype, cos.dtype)
    if (k.dtype, sin.dtype) != dtypes or not all(dtype in DTYPES for dtype in dtypes):
        return False
    batch, _, tokens, dim = q.shape
    angles = ((1, 1, tokens, dim), (batch, 1, tokens, dim))
    alike = k.shape[0] == batch and k.shape[2:] == q.shape[2:] and sin.shape == cos.shape
    return alike and q.numel() > 0 and dim % 2 == 0 and cos.shape in angles


@torch.library.impl(_LIBRARY, "rotary", "CompositeExplicitAutograd")
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if not q.is_cuda:
        return rotated(q, cos, sin), rotated(k, cos, sin)
    from retrofit.kernels.rotary import triton  # not at import time: it is optional and slow to import

    found: tuple[Tensor, Tensor] = repeated_call(
        triton.rotary, (q, k, cos, sin), {"dtype": torch.result_type(q, cos)}
    )
    return found


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.result_type(q, cos)
    return torch.empty_like(q, dtype=dtype), torch.empty_like(k, dtype=dtype)


torch.library.register_fake("retrofit::rotary", _fake, lib=_LIBRARY)


@torch.library.impl(_LIBRARY, "rotary_backward", "CompositeExplicitAutograd")
def _rotary_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not grad_q.is_cuda:
        back_q, back_k = (rotated_back(grad, cos, sin).to(dtype) for grad in (grad_q, grad_k))
        return back_q, back_k
    from retrofit.kernels.rotary import triton  # as above

    found: tuple[Tensor, Tensor] = repeated_call(
        triton.rotary_backward, (grad_q, grad_k, cos, sin), {"dtype": dtype}
    )
    return found


def rotated_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of x from that of ``rotated(x, cos, sin)``."""
    low, high = (grad * sin).tensor_split([grad.shape[-1] // 2], -1)
    return grad * cos + torch.cat([high, -low], -1)


def _backward_fake(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_q, dtype=dtype), torch.empty_like(grad_k, dtype=dtype)


torch.library.register_fake("retrofit::rotary_backward", _backward_fake, lib=_LIBRARY)
_backward_operator = direct("rotary_backward", _rotary_backward)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, ...], options: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    q, _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)
    ctx.dtype = q.dtype


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return (*_backward_operator(grad_q, grad_k, cos, sin, ctx.dtype), None, None)


_operator = Differentiable(_LIBRARY, "rotary", _rotary, _backward, _setup_context)
