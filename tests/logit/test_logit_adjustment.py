"""perturbjax.logit.logit_adjustment: the shift, its sign on head and tail, its gradient, and classes without samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perturbjax as pj
from tests.loss.problem import MODEL, difference, linear

C, COUNTS = 3, np.array([20, 100, 5])
PRIOR = COUNTS / COUNTS.sum()


def cross_entropy(u, y):
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(y)), y]


def objective(tau, counts=COUNTS):
    return pj.objective(MODEL, pj.logit_adjustment(tau=tau), num_classes=C, class_counts=counts)


@pytest.fixture
def problem():
    with linear(C) as found:
        yield found


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.5, -1.0])
def test_losses_are_those_of_the_shifted_logits(problem, tau):
    w, x, y = problem
    made = objective(tau)
    _, out = made(w, made.init(w, x), pj.batch(x, y))
    np.testing.assert_allclose(out.losses, cross_entropy(x @ w + tau * np.log(PRIOR), y), rtol=1e-12)


def test_paper_equations_2_and_4_are_the_same(problem):
    """−log[e^{u_y} / Σ_c e^{u_c + λ(log π_c − log π_y)}] (LPL eq. 4)."""
    w, x, y = problem
    u = x @ w
    made = objective(1.5)
    _, out = made(w, made.init(w, x), pj.batch(x, y))
    shifted = u + 1.5 * (np.log(PRIOR)[None] - np.log(PRIOR)[y][:, None])
    np.testing.assert_allclose(out.losses, np.log(np.exp(shifted).sum(1)) - u[np.arange(7), y], rtol=1e-12)


@given(st.lists(st.floats(-20, 20), min_size=C, max_size=C), st.floats(0.1, 2.5))
def test_head_losses_fall_and_tail_losses_rise_whatever_the_logits(logits, tau):
    u, head, tail = np.array([logits]), COUNTS.argmax(), COUNTS.argmin()
    shifted = u + np.asarray(pj.logit_adjustment_delta(COUNTS, tau=tau))
    change = lambda c: (cross_entropy(shifted, np.array([c])) - cross_entropy(u, np.array([c])))[0]
    assert change(head) <= 1e-6 and change(tail) >= -1e-6


def test_gradient_is_the_finite_difference(problem):
    w, x, y = problem
    made = objective(1.5)
    grad, _ = jax.grad(made, has_aux=True)(w, made.init(w, x), pj.batch(x, y))
    loss = lambda w: cross_entropy(x @ w + 1.5 * np.log(PRIOR), y).mean()
    np.testing.assert_allclose(grad, difference(loss, w), atol=1e-9)


def test_balanced_softmax_is_the_softmax_weighted_by_counts_and_la_with_tau_1(problem):
    """−log(n_y e^{u_y} / Σ_c n_c e^{u_c}) (Ren et al., eq. 3)."""
    w, x, y = problem
    made = pj.objective(MODEL, pj.balanced_softmax(), num_classes=C, class_counts=COUNTS)
    loss, out = made(w, made.init(w, x), pj.batch(x, y))
    weighted = COUNTS * np.exp(x @ w)
    np.testing.assert_allclose(out.losses, -np.log(weighted[np.arange(7), y] / weighted.sum(1)), rtol=1e-12)
    la = objective(1.0)
    np.testing.assert_array_equal(loss, la(w, la.init(w, x), pj.batch(x, y))[0])


def test_the_delta_undoes_itself_after_training():
    """argmax(u − τ log π) of plain logits: the post-hoc form uses the same function with −τ."""
    np.testing.assert_allclose(pj.logit_adjustment_delta(COUNTS, tau=-0.7), -0.7 * np.log(PRIOR), rtol=1e-6)


def test_a_class_without_samples_is_an_error():
    with pytest.raises(ValueError, match="needs at least one sample of every class, got none of class 1. Drop the class"):
        pj.logit_adjustment_delta(np.array([3, 0, 2]))
    with pytest.raises(ValueError, match="got none of class 2"):
        objective(1.0, np.array([3, 1, 0])).init(jnp.ones([5, C]), jnp.ones([7, 5]))
    with pytest.raises(ValueError, match="needs 'class_counts'"):
        pj.objective(MODEL, pj.logit_adjustment(), num_classes=C)
    with pytest.raises(ValueError, match="needs a finite tau, got nan"):
        pj.logit_adjustment(tau=float("nan"))
