"""perturbjax.parameter.pugd: five steps in numpy, the unit length, and the limits (radius 0, zero weights, zero gradient)."""

import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.parameter.problem import added, as_numpy, assert_close, enable_x64, make, norm, one_update, same_as_by_hand, unit


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


@pytest.mark.parametrize("radius", [1.0, 0.2])
def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem, radius):
    """RTS eqs. 1–3 (ρ = 1); decay is added to the unit gradient, then momentum, as the official code does."""

    def direction(w, t):
        g = problem.gradient(w)
        climb = unit({name: np.abs(w[name]) * g[name] for name in w})
        return unit(added(problem.gradient(added(w, climb, radius)), g))

    same_as_by_hand(problem, pj.pugd(radius=radius), direction)


def test_epsilon_is_added_to_both_norms(problem):
    """The official guard, here large enough to see."""
    w, g = problem.params, problem.gradient(problem.params)
    up = {name: np.abs(w[name]) * g[name] for name in w}
    total = added(problem.gradient(added(w, up, 1 / (norm(up) + 0.5))), g)
    ours, _ = one_update(problem, pj.pugd(epsilon=0.5))
    assert_close(ours, {name: total[name] / (norm(total) + 0.5) for name in w}, rtol=1e-9)


def test_update_and_climb_have_unit_length_over_all_parameters_together(problem):
    U, [moved] = one_update(problem, pj.pugd())
    np.testing.assert_allclose(norm(U), 1, rtol=1e-9)
    climb = added(moved, problem.params, -1)
    np.testing.assert_allclose(norm(climb), 1, rtol=1e-9)
    assert_close(climb, pj.pugd_ascent(problem.params, problem.slope(problem.params)), rtol=1e-9, atol=1e-12)
    grads = problem.gradient(problem.params)
    assert all((np.sign(climb[n]) == np.sign(grads[n])).all() for n in climb)  # up hill in every coordinate


def test_radius_zero_is_the_unit_gradient(problem):
    """The one method whose zero bound is not plain training."""
    U, [moved] = one_update(problem, pj.pugd(radius=0.0))
    assert_close(U, unit(problem.gradient(problem.params)), rtol=1e-9)
    assert_close(moved, problem.params, rtol=0)


def test_zero_weights_are_not_moved_and_nothing_is_nan():
    """|w| ⊙ g = 0: no climb, so U is the unit gradient; a zero gradient gives a zero update."""
    link, zero = pj.pugd(), jnp.zeros(2)
    g = jnp.array([3.0, 4.0])
    U, _ = link.update(g, link.init(zero), zero, grad_fn=lambda w: g + w)
    np.testing.assert_allclose(U, [0.6, 0.8], rtol=1e-6)
    U, _ = link.update(zero, link.init(zero), jnp.ones(2), grad_fn=lambda w: w - 1)
    np.testing.assert_array_equal(U, 0.0)
    np.testing.assert_array_equal(pj.pugd_ascent(jnp.array([0.0, 2.0]), jnp.array([5.0, -1.0])), [0.0, -1.0])


def test_the_radius_may_be_a_schedule(problem):
    """A cosine radius reaches zero; counted by the link, since this loop gives it no step."""
    link = pj.pugd(radius=lambda count: 0.5 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / 2)))
    params, lengths = problem.params, []
    state = link.init(params)
    for _ in range(3):
        moved = []
        _, state = link.update(problem.gradient(params), state, params, grad_fn=lambda p: moved.append(p) or p)
        lengths.append(norm(added(as_numpy(moved[0]), params, -1)))
    np.testing.assert_allclose(lengths, [1.0, 0.5, 0.0], atol=1e-6)


def test_errors_name_the_call():
    link, w = pj.pugd(), jnp.ones(2)
    with pytest.raises(
        ValueError, match="pugd needs `grad_fn`, got none: call tx.update.grads, state, params, grad_fn=lambda p"
    ):
        link.update(w, link.init(w), w)
    with pytest.raises(ValueError, match="pugd needs `params`, got none"):
        link.update(w, link.init(w), grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="pugd needs radius >= 0, got -1"):
        pj.pugd(radius=-1.0)
