"""perturbjax.parameter.amp: five steps in numpy for both norms and several climbing steps, the ball, and where it is SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.parameter.problem import added, as_numpy, assert_close, by_link, enable_x64, make, norm, one_update, same_as_by_hand


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


@pytest.mark.parametrize("norm_of", ["tensor", "global"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem, norm_of, num_steps):
    """ρ = 0.15 lies between the tensors' climbs, so that some are cut and some are not."""

    def direction(w, t):
        delta = {n: np.zeros_like(v) for n, v in w.items()}
        for _ in range(num_steps):
            delta = added(delta, problem.gradient(added(w, delta)), 0.6)
            for n in delta:
                size = norm(delta) if norm_of == "global" else np.linalg.norm(delta[n])
                delta[n] = delta[n] * min(1, 0.15 / size) if norm_of == "tensor" else delta[n]
            if norm_of == "global":
                delta = {n: v * min(1, 0.15 / norm(delta)) for n, v in delta.items()}
        return problem.gradient(added(w, delta))

    link = pj.amp(radius=0.15, step_size=0.6, num_steps=num_steps, norm=norm_of)
    same_as_by_hand(problem, link, direction, evaluations=5 * num_steps)


def test_every_tensor_or_all_together_stay_within_the_ball(problem):
    far = {n: 10 * v for n, v in problem.params.items()}
    each = as_numpy(pj.amp_project(far, radius=0.5, norm="tensor"))
    np.testing.assert_allclose([np.linalg.norm(v) for v in each.values()], 0.5, rtol=1e-9)
    np.testing.assert_allclose(norm(as_numpy(pj.amp_project(far, radius=0.5))), 0.5, rtol=1e-9)
    near = {n: 1e-3 * v for n, v in problem.params.items()}
    assert_close(pj.amp_project(near, radius=0.5), near, rtol=0)


def test_by_default_the_ball_is_the_paper_s_one_over_all_parameters(problem):
    """The authors' code bounds each of its tensors instead, and so goes √3 times as far here."""
    for settings, length in ((dict(), 0.3), (dict(norm="global"), 0.3), (dict(norm="tensor"), 0.3 * 3**0.5)):
        _, [moved] = one_update(problem, pj.amp(radius=0.3, step_size=1e6, **settings))
        np.testing.assert_allclose(norm(added(moved, problem.params, -1)), length, rtol=1e-9)


def test_a_long_first_step_is_sam(problem):
    """Cut to the global ball it is ρ g/‖g‖."""
    ours, _ = one_update(problem, pj.amp(radius=0.3, step_size=1e6, norm="global"))
    assert_close(ours, one_update(problem, pj.sam(radius=0.3))[0], rtol=1e-9)


def test_zero_gradients_give_no_nan_and_nan_is_not_hidden():
    np.testing.assert_array_equal(pj.amp_project(jnp.zeros(2), radius=0.0), 0.0)
    assert np.isnan(pj.amp_project(jnp.array([1.0, jnp.nan]), radius=0.5)).all()


def test_the_number_of_steps_is_structure(problem):
    with pytest.raises(ValueError, match="amp needs num_steps to be a whole number >= 1 .*, got 0"):
        pj.amp(num_steps=0)
    injected = optax.inject_hyperparams(pj.amp, static_args=("num_steps",))(radius=0.1, num_steps=2)
    update = jax.jit(lambda g, s, p: injected.update(g, s, p, grad_fn=problem.slope)[0])
    params = problem.params
    ours = update(problem.slope(params), injected.init(params), params)
    assert_close(ours, one_update(problem, pj.amp(radius=0.1, num_steps=2))[0], rtol=1e-6, atol=1e-9)
    wrong = optax.inject_hyperparams(pj.amp)(radius=0.1, num_steps=2)
    with pytest.raises(ValueError, match="static_args"):
        jax.jit(lambda g, s, p: wrong.update(g, s, p, grad_fn=problem.slope))(problem.slope(params), wrong.init(params), params)
    with pytest.raises(ValueError, match="amp needs norm to be one of its names, got 'layer'"):
        by_link(problem, pj.amp(norm="layer"))
