"""perturbjax.parameter.pugd: five steps in numpy, the unit length, and the limits (radius 0, zero weights, zero gradient)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj


@pytest.fixture
def problem():
    """A small MLP, in float64: parameters, inputs, one-hot labels."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, 5)), "b": 0.1 * rng.normal(size=5), "c": rng.normal(size=(5, 3))}
    with jax.enable_x64(True):
        yield params, rng.normal(size=(9, 4)), np.eye(3)[rng.integers(0, 3, 9)]


def loss(params, x, y):
    u = jnp.tanh(x @ params["a"] + params["b"][None]) @ params["c"]
    return -(y * jax.nn.log_softmax(u)).sum(1).mean()


slope = jax.jit(jax.grad(loss))


def gradient(params, x, y):
    """By hand: the chain rule of the loss above, in numpy."""
    hidden = np.tanh(x @ params["a"] + params["b"])
    e = np.exp(hidden @ params["c"])
    h = (e / e.sum(1, keepdims=True) - y) / len(x)
    inner = h @ params["c"].T * (1 - hidden**2)
    return {"a": x.T @ inner, "b": inner.sum(0), "c": hidden.T @ h}


def unit(tree):
    length = np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))
    return {name: leaf / length for name, leaf in tree.items()}


def assert_close(a, b, **tolerance):
    for name in b:
        np.testing.assert_allclose(a[name], b[name], **tolerance)


def step(params, x, y, **settings):
    """U of one step, and where it asked for the second gradient."""
    link, seen = pj.pugd(**settings), []
    grad_fn = lambda p: seen.append(p) or slope(p, x, y)
    updates, _ = link.update(slope(params, x, y), link.init(params), params, grad_fn=grad_fn)
    return updates, seen[0]


@pytest.mark.parametrize("radius", [1.0, 0.2])
def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem, radius):
    """RTS eqs. 1–3 (ρ = 1); decay is added to the unit gradient, then momentum, as the official code does."""
    params, x, y = problem
    tx = optax.chain(pj.pugd(radius=radius), optax.add_decayed_weights(0.01), optax.sgd(0.2, momentum=0.9))
    state, ours = tx.init(params), params
    w, m = params, {name: np.zeros_like(value) for name, value in params.items()}
    for _ in range(5):
        updates, state = tx.update(slope(ours, x, y), state, ours, grad_fn=lambda p: slope(p, x, y))
        ours = optax.apply_updates(ours, updates)
        g = gradient(w, x, y)
        climb = unit({name: np.abs(w[name]) * g[name] for name in w})
        above = gradient({name: w[name] + radius * climb[name] for name in w}, x, y)
        U = unit({name: above[name] + g[name] for name in w})
        m = {name: 0.9 * m[name] + U[name] + 0.01 * w[name] for name in w}
        w = {name: w[name] - 0.2 * m[name] for name in w}
    assert_close(ours, w, rtol=1e-9, atol=1e-12)
    assert (int(state[0].count), int(state[0].evaluations)) == (5, 5)


def test_update_and_climb_have_unit_length_over_all_parameters_together(problem):
    params, x, y = problem
    U, moved = step(params, x, y)
    np.testing.assert_allclose(sum((np.asarray(u) ** 2).sum() for u in U.values()), 1, rtol=1e-9)
    climb = {name: np.asarray(moved[name] - params[name]) for name in params}
    np.testing.assert_allclose(sum((c**2).sum() for c in climb.values()), 1, rtol=1e-9)
    ascent = pj.pugd_ascent(params, slope(params, x, y))
    assert_close(climb, ascent, rtol=1e-9, atol=1e-12)
    grads = gradient(params, x, y)
    assert all((np.sign(climb[n]) == np.sign(grads[n])).all() for n in params)  # up hill in every coordinate


def test_radius_zero_is_the_unit_gradient(problem):
    """The one method whose zero bound is not plain training."""
    params, x, y = problem
    U, moved = step(params, x, y, radius=0.0)
    assert_close(U, unit(gradient(params, x, y)), rtol=1e-9)
    assert_close(moved, params, rtol=0)


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
    """A cosine radius reaches zero."""
    params, x, y = problem
    link = pj.pugd(radius=lambda count: 0.5 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float32) / 2)))
    state, lengths = link.init(params), []
    for _ in range(3):
        moved = []
        _, state = link.update(gradient(params, x, y), state, params, grad_fn=lambda p: moved.append(p) or p)
        lengths.append(np.sqrt(sum((np.asarray(moved[0][n] - params[n]) ** 2).sum() for n in params)))
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
