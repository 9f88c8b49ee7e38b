"""perturbjax.loss.sce: the equation, what stands for log 0, soft targets, and when it raises and lowers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import cross_entropy, difference, enable_x64, linear, log_softmax, mixed, onehot, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def reverse(u, targets, floor):
    with np.errstate(divide="ignore"):
        return -(np.exp(log_softmax(u)) * np.maximum(np.log(targets), floor)).sum(1)


@pytest.mark.parametrize("settings", [{}, dict(alpha=6.0, beta=0.1), dict(alpha=0.5, beta=2.0, log_zero=np.log(1e-4))])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, settings):
    w, x, y = problem
    alpha, beta, floor = (dict(alpha=0.1, beta=1.0, log_zero=-4.0) | settings).values()
    for targets in (onehot(y), mixed(y)):
        out, grad = run(w, x, y, pj.sce(**settings), targets=jnp.asarray(targets))
        loss = lambda w: alpha * cross_entropy(x @ w, targets) + beta * reverse(x @ w, targets, floor)
        np.testing.assert_allclose(out.losses, loss(w), rtol=1e-10)
        np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-8)


def test_reverse_of_hard_labels_is_the_mean_absolute_error(problem):
    """−A(1 − p_y) = −A/2 · ‖p − ŷ‖₁ (the mean absolute error is RCE with A = −2)."""
    w, x, y = problem
    log_p = jnp.asarray(log_softmax(x @ w))
    mae = np.abs(np.exp(log_p) - onehot(y)).sum(1)
    np.testing.assert_allclose(pj.reverse_cross_entropy(log_p, jnp.asarray(onehot(y)), log_zero=-2.0), mae, rtol=1e-10)


def test_without_the_reverse_it_is_cross_entropy(problem):
    w, x, y = problem
    ours, plain = run(w, x, y, pj.sce(alpha=1.0, beta=0.0)), run(w, x, y, ())
    jax.tree.map(np.testing.assert_array_equal, (ours[0].losses, ours[1]), (plain[0].losses, plain[1]))


def test_it_raises_small_losses_and_lowers_large_ones():
    with enable_x64(True):
        u = np.array([[2.0, 0, 0, 0], [-50.0, 0, 0, 0]])
        out, _ = run(np.eye(4), u, np.array([0, 0]), pj.sce())
        plain = cross_entropy(u, onehot([0, 0]))
        assert out.losses[0] > plain[0] and out.losses[1] < plain[1]


def test_it_acts_on_the_loss_so_far(problem):
    w, x, y = problem
    out, _ = run(w, x, y, pj.chain(pj.poly_loss(epsilon=3.0), pj.sce()))
    p = np.exp(log_softmax(x @ w))[np.arange(len(y)), y]
    before = cross_entropy(x @ w, onehot(y)) + 3 * (1 - p)
    np.testing.assert_allclose(out.losses, 0.1 * before + 4 * (1 - p), rtol=1e-10)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="sce needs alpha >= 0, got -1"):
        pj.sce(alpha=-1.0)
    with pytest.raises(ValueError, match="sce needs log_zero <= 0, got 4"):
        pj.sce(log_zero=4.0)
