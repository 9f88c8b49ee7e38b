"""perturbjax.parameter.asam: five steps in numpy, the scales, its invariance, and the limit in which it is SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.parameter.problem import added, as_numpy, assert_close, enable_x64, inner, make, norm, one_update, same_as_by_hand


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


@pytest.mark.parametrize("adaptive", ["all", "weights"])
def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem, adaptive):
    def direction(w, t):
        g, T = problem.gradient(w), {n: np.abs(v) + 0.05 for n, v in w.items()}
        if adaptive == "weights":
            T["bias"] = np.ones_like(T["bias"])
        below = norm({n: T[n] * g[n] for n in g})
        return problem.gradient({n: w[n] + 0.7 * T[n] ** 2 * g[n] / below for n in w})

    same_as_by_hand(problem, pj.asam(radius=0.7, eta=0.05, adaptive=adaptive), direction)


def test_decay_inside_and_epsilon(problem):
    """davda54's adaptive SAM: ρ w²g/(‖|w| g‖ + ε), and the official SAM's decay in the loss."""

    def direction(w, t):
        g = added(problem.gradient(w), w, 0.1)
        below = norm({n: w[n] * g[n] for n in g}) + 0.5
        moved = {n: w[n] + 2.0 * w[n] ** 2 * g[n] / below for n in w}
        return added(problem.gradient(moved), moved, 0.1)

    same_as_by_hand(problem, pj.asam(radius=2.0, eta=0.0, epsilon=0.5, decay=0.1), direction, decay=0.0)


def test_the_climb_is_the_steepest_of_its_length_in_units_of_the_weights(problem):
    """‖ε̂/T‖ = ρ and ε̂·g = ρ‖Tg‖."""
    g = problem.gradient(problem.params)
    T = {n: np.abs(v) + 0.01 for n, v in problem.params.items()}
    climb = as_numpy(pj.asam_ascent(problem.params, g, radius=0.3))
    np.testing.assert_allclose(norm({n: climb[n] / T[n] for n in g}), 0.3, rtol=1e-9)
    np.testing.assert_allclose(inner(climb, g), 0.3 * norm({n: T[n] * g[n] for n in g}), rtol=1e-9)


def test_with_weights_of_one_it_is_sam(problem):
    ones = {n: np.sign(v) for n, v in problem.params.items()}
    ours, _ = one_update(problem, pj.asam(radius=0.3, eta=0.0), ones)
    assert_close(ours, one_update(problem, pj.sam(radius=0.3), ones)[0], rtol=1e-9)


def test_rescaling_two_layers_against_each_other_changes_no_loss_at_the_climb(problem):
    """f(w₁, w₂) = h(w₂ w₁): with η = 0 the perturbed products of (w₁, w₂) and (2w₁, w₂/2) are equal; SAM's are not."""
    loss = lambda w: jnp.sum(jnp.cos(w["b"] @ w["a"]))
    rng = np.random.default_rng(1)
    w = {"a": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=(2, 3)))}
    scaled = {"a": 2 * w["a"], "b": w["b"] / 2}

    def reached(ascent, w):
        moved = added(w, ascent(w, jax.grad(loss)(w)))
        return moved["b"] @ moved["a"]

    adaptive = lambda w, g: pj.asam_ascent(w, g, radius=0.5, eta=0.0)
    np.testing.assert_allclose(reached(adaptive, w), reached(adaptive, scaled), rtol=1e-9)
    plain = lambda w, g: pj.sam_ascent(g, radius=0.5)
    assert np.abs(reached(plain, w) - reached(plain, scaled)).max() > 1e-2


def test_zero_gradients_and_weights_give_no_nan():
    np.testing.assert_array_equal(pj.asam_ascent(jnp.ones(2), jnp.zeros(2), radius=0.5), 0.0)
    np.testing.assert_array_equal(pj.asam_ascent(jnp.zeros(2), jnp.ones(2), radius=0.5, eta=0.0), 0.0)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="asam needs adaptive to be one of its names, got 'kernels'"):
        pj.asam(adaptive="kernels")
    with pytest.raises(ValueError, match="asam needs eta >= 0, got -1"):
        pj.asam(eta=-1)
    w = jnp.ones(2)
    with pytest.raises(ValueError, match="asam needs `grad_fn`"):
        pj.asam().update(w, pj.asam().init(w), w)
