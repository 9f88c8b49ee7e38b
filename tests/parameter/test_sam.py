"""perturbjax.parameter.sam: five steps in numpy, optax's SAM, the radius schedule, and where the gradient vanishes."""

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


def norm(tree):
    return np.sqrt(sum((leaf**2).sum() for leaf in tree.values()))


def added(a, b, factor=1.0):
    return {name: a[name] + factor * b[name] for name in a}


def assert_close(a, b, **tolerance):
    for name in b:
        np.testing.assert_allclose(a[name], b[name], **tolerance)


def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem):
    """g̃ = ∇f(w + ρ g/‖g‖); decay and momentum come after it: m ← μm + g̃ + λw, w ← w − ηm."""
    params, x, y = problem
    tx = optax.chain(pj.sam(radius=0.3), optax.add_decayed_weights(0.01), optax.sgd(0.2, momentum=0.9))
    state, ours = tx.init(params), params
    w, m = params, {name: np.zeros_like(value) for name, value in params.items()}
    for _ in range(5):
        updates, state = tx.update(slope(ours, x, y), state, ours, grad_fn=lambda p: slope(p, x, y))
        ours = optax.apply_updates(ours, updates)
        g = gradient(w, x, y)
        perturbed = gradient(added(w, g, 0.3 / norm(g)), x, y)
        m = {name: 0.9 * m[name] + perturbed[name] + 0.01 * w[name] for name in w}
        w = added(w, m, -0.2)
    assert_close(ours, w, rtol=1e-9, atol=1e-12)
    assert (int(state[0].count), int(state[0].evaluations)) == (5, 5)


def test_one_step_is_optax_s(problem):
    params, x, y = problem
    grads = slope(params, x, y)
    tx = optax.chain(pj.sam(radius=0.3), optax.sgd(0.2))
    ours, _ = tx.update(grads, tx.init(params), params, grad_fn=lambda p: slope(p, x, y))
    climb = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
    other = optax.contrib.sam(optax.sgd(0.2), climb, opaque_mode=True)
    theirs, _ = other.update(grads, other.init(params), params, grad_fn=lambda p, _: slope(p, x, y))
    assert_close(ours, theirs, rtol=1e-9)


def test_on_a_quadratic_it_is_the_gradient_a_radius_further_up():
    """f = ½ wᵀAw: g = Aw and g̃ = A(w + ρ Aw/‖Aw‖), so g̃ − g = ρ A ĝ, LPG's eq. 2 without a remainder."""
    A, w = jnp.diag(jnp.array([1.0, 4.0, 9.0])), jnp.array([1.0, -2.0, 0.5])
    link = pj.sam(radius=0.7)
    g = A @ w
    perturbed, _ = link.update(g, link.init(w), w, grad_fn=lambda w: A @ w)
    np.testing.assert_allclose(perturbed - g, 0.7 * A @ (g / jnp.linalg.norm(g)), rtol=1e-5)


def test_ascent_is_up_hill_by_the_radius_and_is_what_the_link_does(problem):
    params, x, y = problem
    grads, seen = gradient(params, x, y), []
    step = pj.sam_ascent(jax.tree.map(jnp.asarray, grads), radius=0.4)
    np.testing.assert_allclose(norm({name: np.asarray(v) for name, v in step.items()}), 0.4, rtol=1e-9)
    np.testing.assert_allclose(
        sum((step[n] * grads[n]).sum() for n in grads), 0.4 * norm(grads), rtol=1e-9
    )  # the most there is
    link = pj.sam(radius=0.4)
    link.update(grads, link.init(params), params, grad_fn=lambda p: seen.append(p) or p)
    assert_close(seen[0], added(params, step), rtol=1e-12)


@pytest.mark.optax_promotes
def test_the_radius_may_be_a_schedule(problem):
    params, x, y = problem
    link = pj.sam(radius=optax.piecewise_constant_schedule(0.1, {2: 3.0}))
    state, moved = link.init(params), []
    for _ in range(4):
        grads = gradient(params, x, y)
        _, state = link.update(grads, state, params, grad_fn=lambda p: moved.append(p) or p)
    lengths = [norm({n: np.asarray(p[n] - params[n]) for n in params}) for p in moved]
    np.testing.assert_allclose(lengths, [0.1, 0.1, 0.3, 0.3], rtol=1e-6)


def test_a_zero_gradient_stays_zero():
    w = jnp.array([1.0, 2.0])
    link = pj.sam(radius=0.5)
    out, _ = link.update(jnp.zeros(2), link.init(w), w, grad_fn=lambda w: w - jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(out, 0.0)
    np.testing.assert_array_equal(pj.sam_ascent(jnp.zeros(2), radius=0.5), 0.0)


def test_it_works_under_jit_with_a_traced_radius(problem):
    params, x, y = problem

    def update(radius):
        link = pj.sam(radius=radius)
        return link.update(slope(params, x, y), link.init(params), params, grad_fn=lambda p: slope(p, x, y))[0]

    assert_close(jax.jit(update)(0.3), update(0.3), rtol=1e-9)


def test_errors_name_the_call():
    link, w = pj.sam(), jnp.ones(2)
    with pytest.raises(
        ValueError, match="sam needs `grad_fn`, got none: call tx.update.grads, state, params, grad_fn=lambda p"
    ):
        link.update(w, link.init(w), w)
    with pytest.raises(ValueError, match="sam needs `params`, got none"):
        link.update(w, link.init(w), grad_fn=lambda p: p)
    with pytest.raises(ValueError, match="sam needs radius >= 0, got -0.1"):
        pj.sam(radius=-0.1)
