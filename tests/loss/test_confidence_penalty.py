"""perturbjax.loss.confidence_penalty: the equation with the sign of the source, both forms, and the threshold's range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import C, cross_entropy, difference, linear, log_softmax, onehot, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def entropy(u):
    return -(np.exp(log_softmax(u)) * log_softmax(u)).sum(1)


@pytest.mark.parametrize("tau", [None, 0.0, 0.7, np.log(C)])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, tau):
    w, x, y = problem
    out, grad = run(w, x, y, pj.confidence_penalty(weight=0.3, tau=tau))
    cost = lambda u: -entropy(u) if tau is None else np.maximum(0, tau - entropy(u))
    loss = lambda w: cross_entropy(x @ w, onehot(y)) + 0.3 * cost(x @ w)
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-8)
    np.testing.assert_allclose(out.metrics["confidence_penalty/entropy"], entropy(x @ w).mean(), rtol=1e-9)


def test_no_threshold_is_the_largest_one_up_to_a_constant(problem):
    """τ = log C is reached by no prediction, so the hinge never closes."""
    w, x, y = problem
    (free, g), (hinge, h) = (run(w, x, y, pj.confidence_penalty(weight=0.3, tau=tau)) for tau in (None, np.log(C)))
    np.testing.assert_allclose(hinge.losses - free.losses, 0.3 * np.log(C), rtol=1e-9)
    np.testing.assert_allclose(g, h, atol=1e-12)


def test_it_makes_predictions_less_confident(problem):
    """Not more: eq. 20 of the taxonomy prints the other sign. A step against the gradient raises the entropy."""
    w, x, y = problem
    grad = run(w, x, y, pj.confidence_penalty(weight=1.0))[1] - run(w, x, y, ())[1]
    assert entropy(x @ (w - 1e-3 * np.asarray(grad))).mean() > entropy(x @ w).mean()


def test_certain_predictions_are_no_nan():
    log_p = jnp.array([[0.0, -jnp.inf], [0.0, -1e9]])
    np.testing.assert_array_equal(pj.entropy(log_p), 0.0)
    grad = jax.grad(lambda u: pj.entropy(jax.nn.log_softmax(u)).sum())(jnp.array([[1e4, 0.0]]))
    assert np.isfinite(grad).all()


def test_a_threshold_beyond_the_largest_entropy_is_an_error(problem):
    w, x, _ = problem
    made = pj.objective(lambda w, x: x @ w, pj.confidence_penalty(tau=1.5), num_classes=C)
    with pytest.raises(ValueError, match="confidence_penalty needs 0 <= tau <= 1.386.*, got 1.5"):
        made.init(w, x)
    with pytest.raises(ValueError, match="confidence_penalty needs tau >= 0, got -1"):
        pj.confidence_penalty(tau=-1.0)
    with pytest.raises(ValueError, match="confidence_penalty needs weight >= 0, got -0.1"):
        pj.confidence_penalty(weight=-0.1)
