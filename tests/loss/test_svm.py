"""perturbjax.loss.svm: the multi-class hinge, the slack that minimises eq. 18, and the head's norm."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perturbjax as pj
from tests.loss.problem import DEEP, B, C, assert_close, deep, difference, enable_x64, linear, mixed, onehot, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def hinges(u):
    """max(0, 1 + max_{j≠c} u_j − u_c), entry by entry."""
    return np.array([[max(0, 1 + max(np.delete(row, c)) - row[c]) for c in range(C)] for row in u])


@pytest.mark.parametrize("weight", [0.3, 1.0, 5.0])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, weight):
    w, x, y = problem
    for targets in (onehot(y), mixed(y)):
        out, grad = run(w, x, y, pj.svm(weight=weight), targets=jnp.asarray(targets))
        loss = lambda w: min(weight, 1) * (targets * hinges(x @ w)).sum(1)
        np.testing.assert_allclose(out.losses, loss(w), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-8)


def test_the_hinge_is_optax_s(problem):
    w, x, y = problem
    theirs = optax.losses.multiclass_hinge_loss(jnp.asarray(x @ w), jnp.asarray(y))
    np.testing.assert_allclose(run(w, x, y, pj.svm())[0].losses, theirs, rtol=1e-12, atol=1e-12)


@given(st.floats(0, 5), st.floats(0.01, 3))
def test_slack_is_the_minimum_of_eq_18(loss, weight):
    """Against a search over ξ in steps of a thousandth, beyond the loss as well."""
    with enable_x64(True):
        xi, found = pj.slack(jnp.asarray(loss), weight=weight)
    objective = lambda xi: np.maximum(0, loss - xi) + weight * xi
    assert objective(float(xi)) == pytest.approx(float(found), abs=1e-9)
    assert float(found) <= objective(np.linspace(0, 6, 6001)).min() + 1e-9


def test_slack_lowers_every_hinge(problem):
    w, x, y = problem
    with_slack, without = (run(w, x, y, pj.svm(weight=weight))[0].losses for weight in (0.5, 1.0))
    assert (with_slack <= without).all() and (with_slack < without).any()


def test_margins_are_positive_for_the_prediction_only(problem):
    w, x, _ = problem
    found = np.asarray(pj.margins(jnp.asarray(x @ w)))
    np.testing.assert_array_equal(found > 0, np.eye(C, dtype=bool)[(x @ w).argmax(1)])
    np.testing.assert_allclose(np.maximum(0, 1 - found), hinges(x @ w), rtol=1e-10, atol=1e-12)


def test_margins_of_ties_are_zero():
    np.testing.assert_array_equal(pj.margins(jnp.array([[1.0, 1.0, 0.0]])), [[0, 0, -1]])


def test_decay_adds_half_the_square_of_the_head():
    with deep() as (params, x, y):
        out, grad = run(params, x, y, pj.svm(decay=0.1), model=DEEP)
        plain, _ = run(params, x, y, pj.svm(), model=DEEP)
        np.testing.assert_allclose(out.losses - plain.losses, 0.05 * (params["w"] ** 2).sum(), rtol=1e-10)

        def loss(params):
            u = np.tanh(x @ params["a"]) @ params["w"].T + params["b"]
            return hinges(u)[np.arange(B), y].mean() + 0.05 * (params["w"] ** 2).sum()

        assert_close(grad, difference(loss, params), atol=1e-8)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="svm needs weight > 0, got 0"):
        pj.svm(weight=0.0)
    with pytest.raises(ValueError, match="svm needs 'head', got none"):
        pj.objective(lambda w, x: x @ w, pj.svm(decay=0.1), num_classes=C)
