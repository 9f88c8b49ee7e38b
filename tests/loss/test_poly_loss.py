"""perturbjax.loss.poly_loss: optax's function, the expansion that it changes, and what it composes with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.loss.problem import cross_entropy, difference, linear, log_softmax, mixed, onehot, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


@pytest.mark.parametrize("epsilon", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("soft", [False, True])
def test_it_is_optax_s_function(problem, epsilon, soft):
    w, x, y = problem
    targets = jnp.asarray(mixed(y) if soft else onehot(y))
    out, grad = run(w, x, y, pj.poly_loss(epsilon=epsilon), targets=targets)
    theirs = lambda w: optax.losses.poly_loss_cross_entropy(jnp.asarray(x) @ w, targets, epsilon=epsilon)
    np.testing.assert_allclose(out.losses, theirs(jnp.asarray(w)), rtol=1e-10)
    np.testing.assert_allclose(grad, jax.grad(lambda w: theirs(w).mean())(jnp.asarray(w)), atol=1e-12)


def test_losses_and_gradient_are_the_expansion_with_its_first_coefficient_changed(problem):
    """Σ_j (1 − p)^j/j with 1 + ε₁ for j = 1."""
    w, x, y = problem
    out, grad = run(w, x, y, pj.poly_loss(epsilon=2.0))
    miss = 1 - np.exp(log_softmax(x @ w))[np.arange(len(y)), y]
    powers = np.arange(1, 20_000)
    series = (miss[:, None] ** powers / powers).sum(1) + 2 * miss
    np.testing.assert_allclose(out.losses, series, rtol=1e-6)
    loss = lambda w: (cross_entropy(x @ w, onehot(y)) + 2 - 2 * np.exp(log_softmax(x @ w))[np.arange(len(y)), y]).mean()
    np.testing.assert_allclose(grad, difference(loss, w), atol=1e-9)


def test_positive_epsilon_raises_every_loss_negative_lowers_it_zero_is_plain(problem):
    w, x, y = problem
    plain = run(w, x, y, ())[0].losses
    assert (run(w, x, y, pj.poly_loss(epsilon=1.0))[0].losses > plain).all()
    assert (run(w, x, y, pj.poly_loss(epsilon=-1.0))[0].losses < plain).all()
    np.testing.assert_array_equal(run(w, x, y, pj.poly_loss(epsilon=0.0))[0].losses, plain)


def test_it_adds_to_the_loss_so_far(problem):
    w, x, y = problem
    focal, _ = run(w, x, y, pj.focal())
    both, _ = run(w, x, y, pj.chain(pj.focal(), pj.poly_loss(epsilon=2.0)))
    miss = 1 - np.exp(log_softmax(x @ w))[np.arange(len(y)), y]
    np.testing.assert_allclose(both.losses, focal.losses + 2 * miss, rtol=1e-10)


def test_epsilon_below_minus_one_is_an_error():
    with pytest.raises(ValueError, match="poly_loss needs epsilon >= -1, got -2"):
        pj.poly_loss(epsilon=-2.0)
