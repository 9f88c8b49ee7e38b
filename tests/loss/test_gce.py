"""perturbjax.loss.gce: L_q and its limits, the truncation, and the alternating weights that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import assert_close, cross_entropy, difference, linear, log_softmax, mixed, onehot, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def lq(p, q):
    return (1 - p**q) / q


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, q):
    w, x, y = problem
    out, grad = run(w, x, y, pj.gce(q=q))
    loss = lambda w: lq(np.exp(log_softmax(x @ w))[np.arange(len(y)), y], q)
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-10)
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-9)


def test_one_is_the_mean_absolute_error(problem):
    w, x, y = problem
    p = np.exp(log_softmax(x @ w))
    np.testing.assert_allclose(run(w, x, y, pj.gce(q=1.0))[0].losses, np.abs(p - onehot(y)).sum(1) / 2, rtol=1e-10)


def test_zero_is_cross_entropy_and_small_q_is_near_it(problem):
    w, x, y = problem
    plain, ours = run(w, x, y, ()), run(w, x, y, pj.gce(q=0.0))
    jax.tree.map(np.testing.assert_array_equal, (ours[0].losses, ours[1]), (plain[0].losses, plain[1]))
    assert_close(run(w, x, y, pj.gce(q=1e-7))[0].losses, plain[0].losses, rtol=1e-6)


def test_small_losses_keep_their_digits():
    """In float32, 1 − p^q for p = 1 − 1e-6 would be off by percents."""
    log_p = jnp.log1p(-jnp.float32(1e-6))
    np.testing.assert_allclose(pj.gce_terms(log_p, q=0.7), 1e-6, rtol=1e-4)


@pytest.mark.parametrize("q", [0.0, 0.5])
@pytest.mark.parametrize("gap", [0.0, 20.0, 1e4])
def test_values_and_gradients_stay_finite(q, gap):
    loss = lambda u, q: pj.gce_terms(jax.nn.log_softmax(u), q=q, truncate=0.5)[0]
    for leaf in jax.tree.leaves(jax.value_and_grad(loss, argnums=(0, 1))(jnp.array([-gap, 0.0]), jnp.float32(q))):
        assert np.isfinite(leaf).all()


def test_truncated_samples_have_a_constant_loss_and_no_gradient(problem):
    w, x, y = problem
    p = np.exp(log_softmax(x @ w))[np.arange(len(y)), y]
    k = np.sort(p)[3] + 1e-3
    links = pj.gce(q=0.7, truncate=k, start=0.5)
    out, grad = run(w, x, y, links, options=dict(progress=0.5))
    np.testing.assert_allclose(out.losses, np.where(p > k, lq(p, 0.7), lq(k, 0.7)), rtol=1e-10)
    np.testing.assert_allclose(out.metrics["gce/kept"], (p > k).mean(), rtol=1e-6)
    pruned, only = run(w, x, y, pj.gce(q=0.7), weights=jnp.asarray(p > k, float))  # the weights [p > k]
    np.testing.assert_allclose(grad, only, atol=1e-12)
    early, _ = run(w, x, y, links, options=dict(progress=0.49))
    np.testing.assert_allclose(early.losses, lq(p, 0.7), rtol=1e-10)


def test_the_truncated_loss_is_the_minimum_over_the_weights(problem):
    """min over w in [0, 1] of w L_q(p) + (1 − w) L_q(k), up to a constant."""
    log_p = jnp.asarray(np.log(np.linspace(0.01, 0.99, 50)))
    by_weight = np.minimum(lq(np.exp(log_p), 0.7), lq(0.5, 0.7))
    np.testing.assert_allclose(pj.gce_terms(log_p, q=0.7, truncate=0.5), by_weight, rtol=1e-10)


def test_soft_targets_take_the_mean_of_their_classes(problem):
    w, x, y = problem
    out, _ = run(w, x, y, pj.gce(), targets=jnp.asarray(mixed(y)))
    np.testing.assert_allclose(out.losses, (mixed(y) * lq(np.exp(log_softmax(x @ w)), 0.7)).sum(1), rtol=1e-10)


def test_it_lowers_every_loss_and_is_bounded(problem):
    w, x, y = problem
    losses = run(10 * w, x, y, pj.gce())[0].losses
    assert (losses <= cross_entropy(10 * x @ w, onehot(y))).all() and (losses <= 1 / 0.7).all()


def test_errors_say_what_was_given():
    for wrong, message in [
        (dict(q=-0.1), "gce needs 0 <= q <= 1, got -0.1"),
        (dict(q=1.1), "gce needs 0 <= q <= 1, got 1.1"),
        (dict(truncate=1.0), "gce needs 0 <= truncate <= 0.999999, got 1"),
        (dict(start=2.0), "gce needs 0 <= start <= 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            pj.gce(**wrong)
