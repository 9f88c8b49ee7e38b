"""perturbjax.parameter.sam: five steps in numpy, optax's SAM, the norms, the switches, and where the gradient vanishes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.parameter.problem import (
    added,
    as_numpy,
    assert_close,
    by_link,
    enable_x64,
    inner,
    make,
    norm,
    one_update,
    same_as_by_hand,
)


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem):
    """g̃ = ∇f(w + ρ g/‖g‖); decay and momentum come after it."""

    def direction(w, t):
        g = problem.gradient(w)
        return problem.gradient(added(w, g, 0.3 / norm(g)))

    same_as_by_hand(problem, pj.sam(radius=0.3), direction)


def test_decay_may_be_inside_the_perturbed_loss(problem):
    """The official code: f + λ/2 ‖w‖² is perturbed, and the optimiser has no decay of its own."""

    def direction(w, t):
        g = added(problem.gradient(w), w, 0.1)
        moved = added(w, g, 0.3 / norm(g))
        return added(problem.gradient(moved), moved, 0.1)

    same_as_by_hand(problem, pj.sam(radius=0.3, decay=0.1), direction, decay=0.0)


@pytest.mark.parametrize("p", [1.5, 3.0, np.inf])
def test_other_norms_are_those_of_the_printed_formula(problem, p):
    """RTS draft, section 3.2: ρ sign(g)|g|^(q−1)/(‖g‖_q^q)^(1/p), here in numpy with q = p/(p − 1)."""
    q = 1.0 if p == np.inf else p / (p - 1)

    def direction(w, t):
        g = problem.gradient(w)
        below = sum((np.abs(v) ** q).sum() for v in g.values()) ** (1 / p)
        return problem.gradient({n: w[n] + 0.1 * np.sign(v) * np.abs(v) ** (q - 1) / below for n, v in g.items()})

    same_as_by_hand(problem, pj.sam(radius=0.1, p=p), direction)


@pytest.mark.parametrize("p", [1.2, 2.0, 4.0, np.inf])
def test_the_climb_has_length_rho_in_its_norm_and_is_the_steepest(problem, p):
    """‖ε̂‖_p = ρ and ε̂·g = ρ‖g‖_q, which no ε of that length exceeds (Hölder)."""
    g = problem.gradient(problem.params)
    q = 1.0 if p == np.inf else p / (p - 1)
    length = lambda tree, p: np.linalg.norm(np.concatenate([np.ravel(v) for v in tree.values()]), p)
    climb = as_numpy(pj.sam_ascent({n: jnp.asarray(v) for n, v in g.items()}, radius=0.4, p=p))
    np.testing.assert_allclose(length(climb, p), 0.4, rtol=1e-9)
    np.testing.assert_allclose(inner(climb, g), 0.4 * length(g, q), rtol=1e-9)


def test_a_traced_norm_is_the_same_climb(problem):
    """As under optax.inject_hyperparams, where p is an array."""
    g = jax.tree.map(jnp.asarray, problem.gradient(problem.params))
    for p in (2.0, 3.0, np.inf):
        assert_close(jax.jit(lambda p: pj.sam_ascent(g, radius=0.4, p=p))(p), pj.sam_ascent(g, radius=0.4, p=p), rtol=1e-6)


def test_the_first_order_loss_at_the_climb_is_off_by_rho_squared(problem):
    """max_{‖ε‖_p ≤ ρ} f ≈ f + ρ‖g‖_q, and ∇f(w + ε̂) ≈ g + ρ∇²f·ĝ (LPG eq. 2): halving ρ quarters both errors."""
    w, g = problem.params, problem.gradient(problem.params)
    hessian = jax.jvp(problem.slope, (jax.tree.map(jnp.asarray, w),), (jax.tree.map(lambda x: jnp.asarray(x / norm(g)), g),))[1]
    errors = []
    for rho in (0.02, 0.01, 0.005):
        seen = one_update(problem, pj.sam(radius=rho))[1][0]
        duality = problem.loss(seen) - problem.loss(w) - rho * norm(g)
        errors.append([abs(duality), norm(added(problem.gradient(seen), added(g, as_numpy(hessian), rho), -1))])
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.05)


def test_one_step_is_optax_s(problem):
    params, grads = problem.params, problem.slope(problem.params)
    tx = optax.chain(pj.sam(radius=0.3), optax.sgd(0.2))
    ours, _ = tx.update(grads, tx.init(params), params, grad_fn=problem.slope)
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
    other = optax.contrib.sam(optax.sgd(0.2), climb, opaque_mode=True)
    theirs, _ = other.update(grads, other.init(params), params, grad_fn=lambda p, _: problem.slope(p))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_on_a_quadratic_it_is_the_gradient_a_radius_further_up():
    """f = ½ wᵀAw: g = Aw and g̃ = A(w + ρ Aw/‖Aw‖), so g̃ − g = ρ A ĝ, LPG's eq. 2 without a remainder."""
    A, w = jnp.diag(jnp.array([1.0, 4.0, 9.0])), jnp.array([1.0, -2.0, 0.5])
    link = pj.sam(radius=0.7)
    g = A @ w
    perturbed, _ = link.update(g, link.init(w), w, grad_fn=lambda w: A @ w)
    np.testing.assert_allclose(perturbed - g, 0.7 * A @ (g / jnp.linalg.norm(g)), rtol=1e-5)


def test_ascent_is_what_the_link_does(problem):
    step = pj.sam_ascent(problem.slope(problem.params), radius=0.4)
    assert_close(one_update(problem, pj.sam(radius=0.4))[1][0], added(problem.params, step), rtol=1e-12)


def test_epsilon_shortens_the_climb(problem):
    """davda54's guard: ρ g/(‖g‖ + ε), here with an ε large enough to see."""
    g, moved = (
        problem.gradient(problem.params),
        one_update(problem, pj.sam(radius=0.4, epsilon=norm(problem.gradient(problem.params)))),
    )
    assert_close(moved[1][0], added(problem.params, g, 0.2 / norm(g)), rtol=1e-9)


@pytest.mark.optax_promotes
def test_the_radius_may_be_a_schedule(problem):
    link = pj.sam(radius=optax.piecewise_constant_schedule(0.1, {2: 3.0}))
    params, state, moved = problem.params, link.init(problem.params), []
    for _ in range(4):
        _, state = link.update(problem.gradient(params), state, params, grad_fn=lambda p: moved.append(p) or p)
    lengths = [norm({n: np.asarray(p[n] - params[n]) for n in params}) for p in moved]
    np.testing.assert_allclose(lengths, [0.1, 0.1, 0.3, 0.3], rtol=1e-6)


@pytest.mark.parametrize("p", [2.0, 3.0, np.inf])
def test_a_zero_gradient_stays_zero(p):
    w = jnp.array([1.0, 2.0])
    link = pj.sam(radius=0.5, p=p)
    out, _ = link.update(jnp.zeros(2), link.init(w), w, grad_fn=lambda w: w - jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(out, 0.0)
    np.testing.assert_array_equal(pj.sam_ascent(jnp.zeros(2), radius=0.5, p=p), 0.0)


def test_it_works_under_jit_with_a_traced_radius(problem):
    update = lambda radius: pj.sam(radius=radius).update(
        problem.slope(problem.params), pj.sam().init(problem.params), problem.params, grad_fn=problem.slope
    )[0]
    assert_close(jax.jit(update)(0.3), update(0.3), rtol=1e-9)


def test_unsynchronised_it_climbs_along_each_device_s_own_gradient(problem):
    """m-sharpness: the mean over devices of ∇f_d(w + ρ g_d/‖g_d‖), and under pmap's axis the same on all of them."""
    params, parts = problem.params, [problem._replace(x=problem.x[i : i + 3], y=problem.y[i : i + 3]) for i in (0, 3, 6)]

    def update(x, y):
        part = problem._replace(x=x, y=y)
        mean = lambda tree: jax.lax.pmean(tree, "d")
        link, own = pj.sam(radius=0.5, sync_perturbation=False), part.slope(params)
        return link.update(mean(own), link.init(params), params, grad_fn=lambda p: mean(part.slope(p)), local_grads=own)[0]

    ours = jax.vmap(update, axis_name="d")(np.stack([p.x for p in parts]), np.stack([p.y for p in parts]))
    own = [(p, p.gradient(params)) for p in parts]
    wanted = [p.gradient(added(params, g, 0.5 / norm(g))) for p, g in own]
    assert_close(
        ours, {n: np.broadcast_to(np.mean([w[n] for w in wanted], 0), (3, *params[n].shape)) for n in params}, rtol=1e-9
    )
    together, _ = one_update(problem, pj.sam(radius=0.5))
    assert max(np.abs(together[n] - np.asarray(ours[n][0])).max() for n in params) > 1e-3


def test_errors_name_the_call(problem):
    link, w = pj.sam(), jnp.ones(2)
    with pytest.raises(
        ValueError, match="sam needs `grad_fn`, got none: call tx.update.grads, state, params, grad_fn=lambda p"
    ):
        link.update(w, link.init(w), w)
    with pytest.raises(ValueError, match="sam needs `params`, got none"):
        link.update(w, link.init(w), grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="sam needs radius >= 0, got -0.1"):
        pj.sam(radius=-0.1)
    with pytest.raises(ValueError, match="sam needs p > 1, got 1"):
        pj.sam(p=1)
    with pytest.raises(
        ValueError, match="sam needs `local_grads` .* sync_perturbation=False, got none.* Write --parallel pmap"
    ):
        by_link(problem, pj.sam(sync_perturbation=False))
