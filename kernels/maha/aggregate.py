"""How the outputs of the scales become one: O* = Σ_l w_l O_l, with w on the simplex, per token and head.

lse [B,H,T,L], outputs [B,H,T,L,D], offsets [H,L]  →  w [B,H,T,L]

A scale that is empty for a query has lse −∞ and weight 0. With s = lse + offsets:

``convex``, ``entropy``: argmax ⟨w, s⟩ + H(w) over the simplex = softmax(s). At zero offsets the result is one
softmax over the members of all scales.

``convex``, ``euclidean``: argmax ⟨w, s⟩ − ½‖w‖² over the simplex = the Euclidean projection of s on it.

``nash``: each scale l is a player who claims p_l = softmax(s)_l and chooses x_l ≥ 0. All want their sum
Σ_j x_j O_j to reproduce T = Σ_j softmax(lse)_j O_j, what attention without offsets gives; what is missing of it
is the residual. Player l pays

    c_l(x) = ½‖T − Σ_j x_j O_j‖²/ν² + ½(x_l − p_l)²,     ν² = mean of ‖O_j‖² over the scales that are not empty

With G = O Oᵀ/ν² this is a potential game: Φ(x) = ½‖·‖²/ν² + ½‖x − p‖² changes by exactly what the deviating player
gains or loses. Φ has the Hessian G + I, so it is strictly convex, its minimum over x ≥ 0 is the only equilibrium,
and there no scale gains by deviating. The best response is x_l = max(0, (b_l − Σ_{j≠l} G_lj x_j)/(G_ll + 1)) with
b = G softmax(lse) + p. All respond at once, damped by 1/L: the new point is the mean of L points in each of which
one player alone has improved, so Φ falls in every round until the fixed point. Then w = x/Σx. At zero offsets
x = p is the equilibrium, and the result again one softmax over all scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.errors import ConfigError

ROUNDS = 1000
EXPORTED_ROUNDS = 64
"""Rounds in an exported graph, which cannot stop early."""


def scale_weights(
    lse: Tensor, outputs: Tensor, offsets: Tensor, *, aggregation: str, regularizer: str
) -> Tensor:
    """Returns the weights of the scales, on the simplex.

    Args:
        lse: Log of each scale's attention mass [B, H, T, L]; −∞ where it is empty. Not all may be.
        outputs: Each scale's attention output [B, H, T, L, D]; finite where it is empty.
        offsets: Learned offsets [H, L].
        aggregation: ``convex`` or ``nash``.
        regularizer: ``entropy`` or ``euclidean``; of the convex aggregation.

    Raises:
        ConfigError: If ``aggregation`` or ``regularizer`` is unknown.
    """
    if aggregation == "nash":
        choices = equilibrium(lse, outputs, offsets)
        return choices / choices.sum(-1, keepdim=True)
    if aggregation != "convex":
        raise ConfigError(f"aggregation must be convex or nash, got {aggregation!r}")
    scores = lse + offsets[:, None]
    if regularizer == "entropy":
        return torch.softmax(scores, -1)
    if regularizer == "euclidean":
        return project_on_simplex(scores)
    raise ConfigError(f"regularizer must be entropy or euclidean, got {regularizer!r}")


def project_on_simplex(scores: Tensor) -> Tensor:
    """Returns the point of the simplex nearest to ``scores`` [..., L]; −∞ gets weight 0.

    Source: Duchi et al., Efficient projections onto the l1-ball, 2008.
    """
    # What is more than 1 below the largest has weight 0; so −∞ may be any such number.
    top = scores.amax(-1, keepdim=True).detach()
    scores = torch.where(scores.isinf(), torch.zeros_like(scores), scores - top) + torch.where(
        scores.isinf(), -2.0, 0.0
    ).to(scores.dtype)
    ordered = scores.detach().sort(-1, descending=True).values
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    supported = (ordered * rank > ordered.cumsum(-1) - 1).sum(-1, keepdim=True)
    last = (ordered.cumsum(-1).gather(-1, supported - 1) - 1) / supported
    inside = scores.detach() > last
    size = inside.sum(-1, keepdim=True)
    threshold = (torch.where(inside, scores, 0.0).sum(-1, keepdim=True) - 1) / size
    return torch.where(inside, scores - threshold, 0.0)


def equilibrium(lse: Tensor, outputs: Tensor, offsets: Tensor) -> Tensor:
    """Returns the players' choices x [B, H, T, L] at the equilibrium of the game described above.

    Differentiable by the implicit function theorem: where x > 0 the best responses are the linear equations
    (G + I) x = b, which give x its derivatives whatever the rounds that led there.
    """
    game, target, claims = payoffs(lse, outputs, offsets)
    point = _best_responses(game.detach(), target.detach(), claims.detach())
    if not (game.requires_grad or target.requires_grad):
        return point
    active = point > 0
    scales = point.shape[-1]
    identity = torch.eye(scales, dtype=point.dtype, device=point.device)
    both = active[..., :, None] & active[..., None, :]
    system = torch.where(both, game.detach(), identity)
    residual = torch.where(active, target - (game @ point[..., None])[..., 0], 0.0)
    step: Tensor = torch.linalg.solve(system, residual[..., None])[..., 0]
    # The value is that of the point: a row's bits must not depend on how a batched solver treats the others.
    return point + (step - step.detach())


def payoffs(lse: Tensor, outputs: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the game's matrix G + I [B, H, T, L, L], its vector b and the claims p [B, H, T, L]."""
    present = ~lse.isinf()
    outputs = torch.where(present[..., None], outputs, 0.0)
    gram = outputs @ outputs.transpose(-1, -2)
    norms = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / present.sum(-1) + torch.finfo(gram.dtype).tiny
    gram = gram / norms[..., None, None]
    claims = (lse + offsets[:, None]).softmax(-1)
    target = (gram @ lse.softmax(-1)[..., None])[..., 0] + claims
    return gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), target, claims


def best_response(game: Tensor, target: Tensor, point: Tensor) -> Tensor:
    """Returns each player's best choice if all others stay at ``point``."""
    diagonal = game.diagonal(dim1=-2, dim2=-1)
    others = (game * point[..., None, :]).sum(-1) - diagonal * point
    response: Tensor = (target - others) / diagonal
    return response.clamp(min=0)


def scale_weights_backward(
    grad: Tensor, lse: Tensor, outputs: Tensor, offsets: Tensor, *, aggregation: str, regularizer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of lse, outputs and offsets for the gradient ``grad`` [B, H, T, L] of the weights.

    What autograd would give through :func:`scale_weights`, for use where there is no autograd.
    """
    scores = lse + offsets[:, None]
    if aggregation == "nash":
        return _equilibrium_backward(grad, lse, outputs, offsets)
    if regularizer == "entropy":
        found = _softmax_backward(grad, scores.softmax(-1))
    else:
        inside = project_on_simplex(scores) > 0
        mean = torch.where(inside, grad, 0.0).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
        found = torch.where(inside, grad - mean, 0.0)
    return found, torch.zeros_like(outputs), found.sum((0, 2))


def _softmax_backward(grad: Tensor, shares: Tensor) -> Tensor:
    return shares * (grad - (grad * shares).sum(-1, keepdim=True))


def _equilibrium_backward(
    grad: Tensor, lse: Tensor, outputs: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    game, target, claims = payoffs(lse, outputs, offsets)
    point = _best_responses(game, target, claims)
    total = point.sum(-1, keepdim=True)
    grad = (grad - (grad * point).sum(-1, keepdim=True) / total) / total
    identity = torch.eye(point.shape[-1], dtype=point.dtype, device=point.device)
    active = point > 0
    system = torch.where(active[..., :, None] & active[..., None, :], game, identity)
    of_target = torch.linalg.solve(system, torch.where(active, grad, 0.0)[..., None])[..., 0]
    # Through x = (G + I)⁻¹ b, b = G a + p and G = O Oᵀ/ν².
    present = ~lse.isinf()
    shares = lse.softmax(-1)
    gram = game - identity
    of_gram = of_target[..., :, None] * (shares - point)[..., None, :]
    outputs = torch.where(present[..., None], outputs, 0.0)
    norms = outputs.square().sum((-1, -2)) / present.sum(-1) + torch.finfo(gram.dtype).tiny
    of_norms = -(of_gram * gram).sum((-1, -2)) / norms
    of_products = of_gram / norms[..., None, None] + (of_norms / present.sum(-1))[..., None, None] * identity
    of_outputs = (of_products + of_products.transpose(-1, -2)) @ outputs
    of_scores = _softmax_backward(of_target, claims)
    of_lse = of_scores + _softmax_backward((gram @ of_target[..., None])[..., 0], shares)
    return of_lse, of_outputs, of_scores.sum((0, 2))


def _best_responses(game: Tensor, target: Tensor, claims: Tensor) -> Tensor:
    # A row stops when its own residual is small, so that no row's bits depend on the others.
    point = claims
    tolerance = 1e-6 if point.dtype == torch.float32 else 1e-11
    damping = 1 / point.shape[-1]
    exporting = torch.compiler.is_exporting()
    for _ in range(EXPORTED_ROUNDS if exporting else ROUNDS):
        response = best_response(game, target, point)
        moving = (response - point).abs().amax(-1, keepdim=True) > tolerance
        if not exporting and not moving.any():
            break
        point = torch.where(moving, point + damping * (response - point), point)
    return point
