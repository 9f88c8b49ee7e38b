"""perturbjax.parameter.looksam: eleven steps in numpy, orthogonality, cost, and the limits in which it is SAM or plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.parameter.problem import added, as_numpy, assert_close, by_hand, by_link, enable_x64, inner, make, norm, one_update


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


def test_eleven_steps_with_momentum_and_decay_are_those_of_numpy(problem):
    """SAM at steps 0, 3, 6, 9; g + α ‖g‖/‖g_v‖ g_v between."""
    memory = {}

    def direction(w, t):
        g = problem.gradient(w)
        if t % 3 == 0:
            high = problem.gradient(added(w, g, 0.3 / norm(g)))
            memory["v"] = added(high, g, -inner(high, g) / inner(g, g))
            return high
        return added(g, memory["v"], 0.7 * norm(g) / norm(memory["v"]))

    ours, state = by_link(problem, pj.looksam(radius=0.3, every=3), steps=11)
    assert_close(ours, by_hand(problem, direction, steps=11), rtol=1e-8, atol=1e-11)
    assert (int(state.count), int(state.evaluations)) == (11, 4)
    assert_close(state.across, memory["v"], rtol=1e-6, atol=1e-9)


def test_what_is_kept_is_orthogonal_to_the_gradient(problem):
    g, (high, _) = problem.gradient(problem.params), one_update(problem, pj.sam(radius=0.3))
    across = as_numpy(pj.looksam_across(high, g))
    np.testing.assert_allclose(inner(across, g), 0, atol=1e-14)
    reused = as_numpy(pj.looksam_reuse(g, across, alpha=0.7))
    np.testing.assert_allclose(norm(added(reused, g, -1)), 0.7 * norm(g), rtol=1e-9)


def test_every_step_is_sam_and_alpha_zero_is_plain_between(problem):
    ours, state = by_link(problem, pj.looksam(radius=0.3, every=1))
    assert_close(ours, by_link(problem, pj.sam(radius=0.3))[0], rtol=1e-12)
    link = pj.looksam(every=2, alpha=0.0)
    g, params = problem.slope(problem.params), problem.params
    ours, _ = link.update(g, link.init(params), params, grad_fn=problem.slope, step=jnp.int32(1))
    assert_close(ours, g, rtol=0)


def test_gradients_are_asked_for_at_every_kth_step_only(problem):
    """Counted where they are computed, under jit; steps are counted by `step=` or, without it, by the link."""
    calls, link, params = [], pj.looksam(every=3), problem.params

    def grad_fn(p):
        jax.debug.callback(lambda: calls.append(1))
        return problem.slope(p)

    for given in (lambda t: {"step": t}, lambda t: {}):
        calls.clear()
        update = jax.jit(lambda state, t: link.update(problem.slope(params), state, params, grad_fn=grad_fn, **given(t))[1])
        state = link.init(params)
        for t in range(7):
            state = update(state, jnp.int32(t))
        jax.effects_barrier()
        assert len(calls) == int(state.evaluations) == 3


def test_zero_gradients_give_no_nan():
    zero = jnp.zeros(2)
    np.testing.assert_array_equal(pj.looksam_across(zero, zero), 0.0)
    np.testing.assert_array_equal(pj.looksam_reuse(jnp.ones(2), zero), 1.0)
    np.testing.assert_array_equal(pj.looksam_reuse(zero, jnp.ones(2)), 0.0)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="looksam needs every >= 1, got 0"):
        pj.looksam(every=0)
    with pytest.raises(ValueError, match="looksam needs alpha >= 0, got -1"):
        pj.looksam(alpha=-1)
