"""Rotary positions by a Triton kernel: every query and key is read and written once.

rotate   q, k, cos, sin  →  q · cos + turn(q) · sin and the same of k, or the gradients of q and k from those of these
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.kernels.launch import INTERPRETED, kernel

ROWS, WARPS = 64, 4
"""Rows of a program, heads times tokens, and its warps."""
TOKENS = 16
"""Tokens of a program, at most."""


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rotated q and k in ``dtype``, each laid out as it is; arguments are those of ``ops.rotary``."""
    return _launched(q, k, cos, sin, dtype, back=False)


def rotary_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k in ``dtype``, from those of what they became."""
    return _launched(grad_q, grad_k, cos, sin, dtype, back=True)


def _launched(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, *, back: bool
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    batch, heads, tokens, dim = q.shape
    new_q, new_k = (torch.empty_like(x, dtype=dtype) for x in (q, k))
    at_once = min(TOKENS, triton.next_power_of_2(tokens))
    each = ROWS // at_once
    of_angles = [stride for x in (cos, sin) for stride in x.expand(batch, -1, -1, -1).stride()[:3:2]]
    rotate[(triton.cdiv(tokens, at_once), triton.cdiv(heads, each) + triton.cdiv(k.shape[1], each), batch)](
        q, k, cos, sin, new_q, new_k,
        *q.stride()[:3], *k.stride()[:3], *of_angles,
        *new_q.stride()[:3], *new_k.stride()[:3], tokens,
        Q_HEADS=heads, K_HEADS=k.shape[1], HEADS=each, TOKENS=at_once, HALF=dim // 2,
        HALF_PAD=triton.next_power_of_2(dim // 2), BACK=back, num_warps=WARPS,
    )  # fmt: skip
    return new_q, new_k


@triton.jit
def product(x, y, dtype: tl.constexpr):
    """x · y as a product in ``dtype``, never one instruction with a sum that follows."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    if INTERPRETED:
        exact = x * y
    else:
        exact = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    return exact.to(dtype).to(tl.float32)


@triton.jit
def rotate_part(
    x, new, head, t, known, cos, sin, dim, known_angles, stride_h, stride_t, stride_nh, stride_nt,
    HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rotates rows (head, t), dims ``dim`` and HALF + ``dim`` of each; of no rows but those that are ``known``."""
    dtype: tl.constexpr = x.dtype.element_ty if BACK else new.dtype.element_ty
    at = x + (head * stride_h + t * stride_t)[:, None] + dim[None]
    inside = known[:, None] & (dim < HALF)[None]
    low = tl.load(at, mask=inside, other=0.0)
    high = tl.load(at + HALF, mask=inside, other=0.0)
    cos_low = tl.load(cos, mask=known_angles, other=0.0)
    cos_high = tl.load(cos + HALF, mask=known_angles, other=0.0)
    sin_low = tl.load(sin, mask=known_angles, other=0.0)
    sin_high = tl.load(sin + HALF, mask=known_angles, other=0.0)
    if BACK:
        new_low = product(low, cos_low, dtype) + product(high, sin_high, dtype)
        new_high = product(high, cos_high, dtype) - product(low, sin_low, dtype)
    else:
        new_low = product(low, cos_low, dtype) - product(high, sin_low, dtype)
        new_high = product(high, cos_high, dtype) + product(low, sin_high, dtype)
    to = new + (head * stride_nh + t * stride_nt)[:, None] + dim[None]
    tl.store(to, new_low.to(new.dtype.element_ty), mask=inside)
    tl.store(to + HALF, new_high.to(new.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["tokens"])
def rotate(
    q, k, cos, sin, new_q, new_k,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_cb, stride_ct, stride_sb, stride_st,
    stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, tokens,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Writes ``new_q`` and ``new_k``; a program does TOKENS tokens of HEADS heads of one of them.

    Rounds as separate products and a sum do. BACK is for gradients: the same with the rotation turned round.
    """
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    part, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, HEADS * TOKENS)
    dim = tl.arange(0, HALF_PAD)
    at = tl.program_id(0) * TOKENS + row % TOKENS
    t = at.to(tl.int64)
    known_angles = (at < tokens)[:, None] & (dim < HALF)[None]
    own_cos = cos + b * stride_cb + (t * stride_ct)[:, None] + dim[None]
    own_sin = sin + b * stride_sb + (t * stride_st)[:, None] + dim[None]
    if part < Q_PARTS:
        head = part * HEADS + row // TOKENS
        rotate_part(
            q + b * stride_qb, new_q + b * stride_xb, head.to(tl.int64), t, (at < tokens) & (head < Q_HEADS),
            own_cos, own_sin, dim, known_angles, stride_qh, stride_qt, stride_xh, stride_xt, HALF, BACK,
        )  # fmt: skip
    else:
        head = (part - Q_PARTS) * HEADS + row // TOKENS
        rotate_part(
            k + b * stride_kb, new_k + b * stride_yb, head.to(tl.int64), t, (at < tokens) & (head < K_HEADS),
            own_cos, own_sin, dim, known_angles, stride_kh, stride_kt, stride_yh, stride_yt, HALF, BACK,
        )  # fmt: skip
