"""perturbjax.label.label_smoothing: the equation, optax, the gradient, and company (mixed targets, hard limits)."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.loss.problem import C, cross_entropy, difference, linear, log_softmax, mixed, onehot, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_losses_are_those_of_the_smoothed_targets(problem, weight):
    """y + λ(1/C − y) (taxonomy eq. 13), and optax's function."""
    w, x, y = problem
    out, _ = run(w, x, y, pj.label_smoothing(weight=weight))
    targets = onehot(y) + weight * (1 / C - onehot(y))
    np.testing.assert_allclose(out.losses, cross_entropy(x @ w, targets), rtol=1e-12)
    smoothed = optax.smooth_labels(jnp.asarray(onehot(y)), weight)
    np.testing.assert_allclose(out.losses, optax.softmax_cross_entropy(jnp.asarray(x @ w), smoothed), rtol=1e-12)


def test_gradient_is_the_finite_difference(problem):
    w, x, y = problem
    _, grad = run(w, x, y, pj.label_smoothing(weight=0.3))
    loss = lambda w: cross_entropy(x @ w, 0.7 * onehot(y) + 0.3 / C).mean()
    np.testing.assert_allclose(grad, difference(loss, w), atol=1e-9)


def test_mixed_targets_are_smoothed_as_they_are(problem):
    w, x, y = problem
    out, _ = run(w, x, y, pj.label_smoothing(weight=0.2), targets=jnp.asarray(mixed(y)))
    np.testing.assert_allclose(out.losses, cross_entropy(x @ w, 0.8 * mixed(y) + 0.05), rtol=1e-12)


def test_confident_predictions_pay_and_wrong_ones_gain(problem):
    """± by sample: the loss rises where −log p_y is below the mean of −log p, and falls where it is above."""
    w, x, y = problem
    change = run(w, x, y, pj.label_smoothing(weight=0.1))[0].losses - run(w, x, y, ())[0].losses
    gap = -log_softmax(x @ w).mean(1) + log_softmax(x @ w)[np.arange(7), y]
    np.testing.assert_allclose(change, 0.1 * gap, rtol=1e-9, atol=1e-12)
    assert (gap > 0).any() and (gap < 0).any()


def test_weight_outside_0_to_1_is_an_error():
    with pytest.raises(ValueError, match="label_smoothing needs 0 <= weight <= 1, got 1.5"):
        pj.label_smoothing(weight=1.5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_on_the_prediction(problem, weight):
    """Taxonomy eq. 6-ii: ℓ(p + λ(1/C − p), y)."""
    w, x, y = problem
    out, grad = run(w, x, y, pj.label_smoothing(weight=weight, on="prediction"))
    loss = lambda w: -np.log((1 - weight) * np.exp(log_softmax(x @ w)) + weight / C)[np.arange(7), y]
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-10)
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-8)
