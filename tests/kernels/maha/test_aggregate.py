import cvxpy
import numpy as np
import pytest
import torch

from retrofit.errors import ConfigError
from retrofit.kernels.maha.aggregate import (
    best_response,
    equilibrium,
    payoffs,
    project_on_simplex,
    scale_weights,
    scale_weights_backward,
)


def case(seed, scales=4, empty=()):
    generator = torch.Generator().manual_seed(seed)
    lse = torch.randn(1, 2, 1, scales, generator=generator, dtype=torch.float64)
    outputs = torch.randn(1, 2, 1, scales, 5, generator=generator, dtype=torch.float64)
    offsets = torch.randn(2, scales, generator=generator, dtype=torch.float64)
    for scale in empty:
        lse[..., scale] = -torch.inf
    return lse, outputs, offsets


@pytest.mark.parametrize("regularizer", ["entropy", "euclidean"])
@pytest.mark.parametrize("seed", range(4))
def test_convex_weights_against_cvxpy(regularizer, seed):
    lse, outputs, offsets = case(seed)
    found = scale_weights(lse, outputs, offsets, aggregation="convex", regularizer=regularizer)
    for head in range(2):
        s = (lse[0, head, 0] + offsets[head]).numpy()
        w = cvxpy.Variable(4)
        cost = cvxpy.sum_squares(w) / 2 if regularizer == "euclidean" else -cvxpy.sum(cvxpy.entr(w))
        cvxpy.Problem(cvxpy.Maximize(s @ w - cost), [w >= 0, cvxpy.sum(w) == 1]).solve(solver="CLARABEL")
        np.testing.assert_allclose(found[0, head, 0].numpy(), w.value, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("empty", [(), (1,), (1, 3)])
def test_no_scale_gains_by_deviating(seed, empty):
    lse, outputs, offsets = case(seed, empty=empty)
    x = equilibrium(lse, outputs, offsets)
    assert (x >= 0).all()
    norm = (outputs.square().sum(-1) * ~lse.isinf()).sum(-1) / (~lse.isinf()).sum(-1)
    outputs = outputs.masked_fill(lse.isinf()[..., None], 0)
    goal = (lse.softmax(-1)[..., None] * outputs).sum(-2)
    claims = (lse + offsets[:, None]).softmax(-1)

    def costs(choice):
        missing = (goal - (choice[..., None] * outputs).sum(-2)).square().sum(-1) / norm
        return missing[..., None] / 2 + (choice - claims).square() / 2

    at_rest = costs(x)
    for scale in range(4):
        for other in np.linspace(0, 2, 81):
            deviation = x.clone()
            deviation[..., scale] = other
            assert (costs(deviation)[..., scale] >= at_rest[..., scale] - 1e-10).all()


@pytest.mark.parametrize("seed", range(3))
def test_equilibrium_against_cvxpy(seed):
    lse, outputs, offsets = case(seed)
    game, target, _ = payoffs(lse, outputs, 3 * offsets)
    found = equilibrium(lse, outputs, 3 * offsets)
    for head in range(2):
        x = cvxpy.Variable(4)
        matrix = cvxpy.psd_wrap(game[0, head, 0].numpy())
        cost = cvxpy.quad_form(x, matrix) / 2 - target[0, head, 0].numpy() @ x
        cvxpy.Problem(cvxpy.Minimize(cost), [x >= 0]).solve(solver="CLARABEL")
        np.testing.assert_allclose(found[0, head, 0].numpy(), x.value, atol=1e-5)


def test_equilibrium_is_a_fixed_point_also_of_nearly_equal_outputs():
    lse, outputs, offsets = case(5)
    outputs = outputs[..., :1, :] + 1e-3 * outputs
    game, target, _ = payoffs(lse, outputs, 4 * offsets)
    x = equilibrium(lse, outputs, 4 * offsets)
    torch.testing.assert_close(best_response(game, target, x), x, rtol=0, atol=1e-9)


def test_without_offsets_the_equilibrium_is_one_softmax():
    lse, outputs, offsets = case(0, empty=(2,))
    found = scale_weights(lse, outputs, 0 * offsets, aggregation="nash", regularizer="entropy")
    torch.testing.assert_close(found, lse.softmax(-1))


@pytest.mark.parametrize(
    ("aggregation", "regularizer"), [("convex", "entropy"), ("convex", "euclidean"), ("nash", "entropy")]
)
@pytest.mark.parametrize("empty", [(), (1,)])
def test_gradients(aggregation, regularizer, empty):
    lse, outputs, offsets = case(1, empty=empty)
    present = ~lse.isinf()
    finite = torch.where(present, lse / 3, 0).requires_grad_()

    def weights(finite, outputs, offsets):
        lse = finite.masked_fill(~present, -torch.inf)
        return scale_weights(lse, outputs, offsets / 3, aggregation=aggregation, regularizer=regularizer)

    assert torch.autograd.gradcheck(
        weights, (finite, outputs.requires_grad_(), offsets.requires_grad_()), atol=1e-6
    )


@pytest.mark.parametrize(
    ("aggregation", "regularizer"), [("convex", "entropy"), ("convex", "euclidean"), ("nash", "entropy")]
)
def test_weights_are_on_the_simplex_and_empty_scales_have_none(aggregation, regularizer):
    lse, outputs, offsets = case(2, empty=(0, 3))
    w = scale_weights(lse, outputs, offsets, aggregation=aggregation, regularizer=regularizer)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    assert not w[..., [0, 3]].any()


@pytest.mark.parametrize(
    ("aggregation", "regularizer"), [("convex", "entropy"), ("convex", "euclidean"), ("nash", "entropy")]
)
@pytest.mark.parametrize("empty", [(), (1,)])
@pytest.mark.parametrize("stretch", [0.3, 3])
def test_written_out_gradients_are_autograds(aggregation, regularizer, empty, stretch):
    inputs = list(case(3, empty=empty))
    inputs[2] = stretch * inputs[2]
    options = dict(aggregation=aggregation, regularizer=regularizer)
    leaves = [x.requires_grad_() for x in inputs]
    w = scale_weights(*leaves, **options)
    grad = torch.randn_like(w)
    expected = torch.autograd.grad(w, leaves, grad, materialize_grads=True)
    found = scale_weights_backward(grad, *(x.detach() for x in inputs), **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.nan_to_num(), rtol=1e-6, atol=1e-9)


def test_projection_keeps_a_point_of_the_simplex():
    point = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)
    torch.testing.assert_close(project_on_simplex(point), point)
    torch.testing.assert_close(project_on_simplex(point + 7), point)


def test_unknown_kinds_are_refused():
    lse, outputs, offsets = case(0)
    with pytest.raises(ConfigError, match="aggregation must be"):
        scale_weights(lse, outputs, offsets, aggregation="mean", regularizer="entropy")
    with pytest.raises(ConfigError, match="regularizer must be"):
        scale_weights(lse, outputs, offsets, aggregation="convex", regularizer="l1")
