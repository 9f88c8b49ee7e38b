"""perturbjax.parameter.gsam: five steps in numpy with a radius that follows the learning rate, orthogonality, and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.parameter.problem import added, as_numpy, assert_close, enable_x64, inner, make, norm, one_update, same_as_by_hand


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


@pytest.mark.parametrize("rate", [1.0, 0.55, 0.1])
def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem, rate):
    """ρ_t = ρ_min + (ρ_max − ρ_min)(lr_t − lr_min)/(lr_max − lr_min), with lr_max = 1 and lr_min = 0.1."""
    rho = {1.0: 0.4, 0.55: 0.3, 0.1: 0.2}[rate]

    def direction(w, t):
        g = problem.gradient(w)
        high = problem.gradient(added(w, g, rho / norm(g)))
        across = added(g, high, -inner(g, high) / inner(high, high))
        return added(high, across, -0.4)

    radius = pj.by_rate(high=0.4, low=0.2, floor=0.1)
    # The radius is computed in float32.
    ours = pj.gsam(radius=radius)
    np.testing.assert_allclose(radius.at(pj.parameter.timing.Place(0, None, None, rate)), rho, rtol=1e-6)
    exact = pj.gsam(radius=rho)
    same_as_by_hand(problem, exact, direction)
    assert_close(one_update(problem, ours, rate=rate)[0], one_update(problem, exact)[0], rtol=1e-5, atol=1e-8)


def test_by_default_the_radius_is_a_constant_and_by_rate_follows_the_learning_rate(problem):
    """From ρ_max at the highest rate to ρ_min at the lowest, given as its share of the highest."""
    climbed = lambda link, rate: norm(added(one_update(problem, link, rate=rate)[1][0], problem.params, -1))
    radius = pj.by_rate(high=0.4, low=0.1, floor=0.2)
    for rate, rho in ((1.0, 0.4), (0.6, 0.25), (0.2, 0.1)):
        np.testing.assert_allclose(climbed(pj.gsam(radius=radius), rate), rho, rtol=1e-5)
        np.testing.assert_allclose(climbed(pj.gsam(), rate), 0.05, rtol=1e-6)


def test_what_is_taken_away_is_orthogonal_to_the_perturbed_gradient(problem):
    """So the perturbed loss falls as fast as with SAM, to first order."""
    g = problem.gradient(problem.params)
    high, _ = one_update(problem, pj.sam(radius=0.5))
    out = as_numpy(pj.gsam_direction(high, g, alpha=0.4))
    np.testing.assert_allclose(inner(added(out, high, -1), high), 0, atol=1e-12)
    np.testing.assert_allclose(inner(out, high), inner(high, high), rtol=1e-9)
    assert inner(added(out, high, -1), g) < -1e-4  # against the plain gradient: that loss falls less fast


def test_alpha_zero_is_sam_bit_for_bit(problem):
    ours, _ = one_update(problem, pj.gsam(radius=0.3, alpha=0.0))
    assert_close(ours, one_update(problem, pj.sam(radius=0.3))[0], rtol=0)


def test_zero_gradients_give_no_nan():
    zero = jnp.zeros(2)
    np.testing.assert_array_equal(pj.gsam_direction(zero, zero), 0.0)
    np.testing.assert_allclose(pj.gsam_direction(zero, jnp.ones(2), alpha=0.4), -0.4, rtol=1e-6)


def test_errors_name_the_value(problem):
    with pytest.raises(ValueError, match="gsam needs alpha >= 0, got -0.4"):
        pj.gsam(alpha=-0.4)
    with pytest.raises(ValueError, match="by_rate needs `rate`, got none: call tx.update"):
        one_update(problem, pj.gsam(radius=pj.by_rate()))
    with pytest.raises(ValueError, match="gsam needs radius >= 0, got -0.1"):
        pj.gsam(radius=pj.by_rate(high=0.1, low=-0.1))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_adaptive_climb_is_that_of_the_first_author_s_code(problem, adaptive):
    """e_w = p² · g · ρ/‖|p| · g‖, in numpy; the rest of the step is the same."""
    w, g = problem.params, problem.gradient(problem.params)
    scaled = {n: np.abs(w[n]) * g[n] if adaptive else g[n] for n in w}
    climb = {n: 0.5 * (w[n] ** 2 if adaptive else 1) * g[n] / norm(scaled) for n in w}
    ours, [point] = one_update(problem, pj.gsam(radius=0.5, alpha=0.4, adaptive=adaptive))
    assert_close(point, added(w, climb), rtol=1e-12)
    above = problem.gradient(added(w, climb))
    across = added(g, above, -inner(g, above) / inner(above, above))
    assert_close(ours, added(above, across, -0.4), rtol=1e-9, atol=1e-12)


def test_the_adaptive_climb_is_asam_s_without_eta(problem):
    ours = pj.gsam_ascent(problem.params, problem.slope(problem.params), adaptive=True)
    wanted = pj.asam_ascent(problem.params, problem.slope(problem.params), radius=1.0, eta=0.0)
    assert_close(ours, wanted, rtol=1e-12, atol=1e-15)
