"""perturbjax.logit.mbls: the penalty, its gradient through the maximum, its limits, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import cross_entropy, difference, linear, onehot, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def excess(u, margin):
    return np.array([np.mean([max(0, max(row) - x - margin) for x in row]) for row in u])


@pytest.mark.parametrize("weight, margin", [(0.1, 1.0), (0.5, 0.0), (2.0, 3.0)])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, weight, margin):
    w, x, y = problem
    out, grad = run(w, x, y, pj.mbls(weight=weight, margin=margin))
    loss = lambda w: cross_entropy(x @ w, onehot(y)) + weight * excess(x @ w, margin)
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-10)
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-8)
    np.testing.assert_allclose(out.metrics["mbls/excess"], excess(x @ w, margin).mean(), rtol=1e-9)


def test_logits_stay_as_they_are_and_a_wide_margin_changes_nothing(problem):
    w, x, y = problem
    out, grad = run(w, x, y, pj.mbls(margin=100.0))
    plain, plain_grad = run(w, x, y, ())
    jax.tree.map(np.testing.assert_array_equal, (out.logits, out.losses, grad), (plain.logits, plain.losses, plain_grad))


def test_the_penalty_sees_the_logits_as_links_before_it_left_them(problem):
    w, x, y = problem
    counts = np.array([90, 4, 2, 1])
    links = pj.chain(pj.logit_adjustment(), pj.mbls(margin=1.0))
    u = x @ w + np.log(counts / 97)
    out, _ = run(w, x, y, links, settings=dict(class_counts=counts))
    np.testing.assert_allclose(out.losses, cross_entropy(u, onehot(y)) + 0.1 * excess(u, 1.0), rtol=1e-6)


def test_at_most_one_tenth_margins_apart_nothing_is_paid():
    u = jnp.array([[10.0, 0.0, 5.0, 10.0]])
    assert pj.margin_excess(u)[0] == 0 and pj.margin_excess(u + 7.0)[0] == 0  # a constant on all logits is nothing
    assert pj.margin_excess(2 * u)[0] == (10 + 0) / 4


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="mbls needs weight >= 0, got -1"):
        pj.mbls(weight=-1.0)
    with pytest.raises(ValueError, match="mbls needs margin >= 0, got -1"):
        pj.mbls(margin=-1.0)
