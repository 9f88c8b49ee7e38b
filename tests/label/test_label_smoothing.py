"""perturbjax.label.label_smoothing: the equation, optax, the gradient, and company (mixed targets, hard limits)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj

C = 4
MODEL = pj.line(lambda w, x: x @ w)


@pytest.fixture
def problem():
    """Weights, inputs and labels in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        yield rng.normal(size=(5, C)), rng.normal(size=(7, 5)), rng.integers(0, C, 7).astype(np.int32)


def log_softmax(u):
    return u - np.log(np.exp(u).sum(1, keepdims=True))


def run(w, x, y, **settings):
    made = pj.objective(MODEL, pj.label_smoothing(**settings), num_classes=C)
    batch = pj.batch(x, jnp.asarray(y))
    (_, out), grad = jax.value_and_grad(made, has_aux=True)(w, made.init(w, x), batch)
    return out, grad


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_losses_are_those_of_the_smoothed_targets(problem, weight):
    """y + λ(1/C − y) (taxonomy eq. 13), and optax's function."""
    w, x, y = problem
    out, _ = run(w, x, y, weight=weight)
    onehot = np.eye(C)[y]
    targets = onehot + weight * (1 / C - onehot)
    np.testing.assert_allclose(out.losses, -(targets * log_softmax(x @ w)).sum(1), rtol=1e-12)
    smoothed = optax.smooth_labels(jnp.asarray(onehot), weight)
    np.testing.assert_allclose(out.losses, optax.softmax_cross_entropy(jnp.asarray(x @ w), smoothed), rtol=1e-12)


def test_gradient_is_the_finite_difference(problem):
    w, x, y = problem
    _, grad = run(w, x, y, weight=0.3)
    targets = 0.7 * np.eye(C)[y] + 0.3 / C
    loss = lambda w: -(targets * log_softmax(x @ w)).sum(1).mean()
    steps = 1e-6 * np.eye(w.size).reshape(-1, *w.shape)
    numeric = np.array([(loss(w + e) - loss(w - e)) / 2e-6 for e in steps]).reshape(w.shape)
    np.testing.assert_allclose(grad, numeric, atol=1e-9)


def test_mixed_targets_are_smoothed_as_they_are(problem):
    w, x, y = problem
    targets = 0.6 * np.eye(C)[y] + 0.4 * np.eye(C)[y[::-1]]
    made = pj.objective(MODEL, pj.label_smoothing(weight=0.2), num_classes=C)
    _, out = made(w, made.init(w, x), pj.batch(x, jnp.asarray(y), targets=jnp.asarray(targets)))
    np.testing.assert_allclose(out.losses, -((0.8 * targets + 0.05) * log_softmax(x @ w)).sum(1), rtol=1e-12)


def test_confident_predictions_pay_and_wrong_ones_gain(problem):
    """± by sample: the loss rises where −log p_y is below the mean of −log p, and falls where it is above."""
    w, x, y = problem
    change = run(w, x, y, weight=0.1)[0].losses - run(w, x, y, weight=0.0)[0].losses
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
    out, grad = run(w, x, y, weight=weight, on="prediction")
    loss = lambda w: -np.log((1 - weight) * np.exp(log_softmax(x @ w)) + weight / C)[np.arange(7), y]
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-10)
    steps = 1e-6 * np.eye(w.size).reshape(-1, *w.shape)
    numeric = np.array([(loss(w + e).mean() - loss(w - e).mean()) / 2e-6 for e in steps]).reshape(w.shape)
    np.testing.assert_allclose(grad, numeric, atol=1e-8)
