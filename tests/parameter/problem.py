"""A small MLP in float64 for the links that ask for a second gradient: the gradient in JAX and by hand, and steps with either."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64  # noqa: F401  (for the tests)

RATE, MOMENTUM, DECAY = 0.2, 0.9, 0.01


class Problem(NamedTuple):
    """Parameters, inputs [9, 4], one-hot labels [9, 3]; numpy, float64."""

    params: dict
    x: np.ndarray
    y: np.ndarray

    def slope(self, params):
        """By JAX."""
        return _slope(params, self.x, self.y)

    def gradient(self, params):
        """By hand: the chain rule of the loss below, in numpy."""
        hidden = np.tanh(self.x @ params["kernel"] + params["bias"])
        e = np.exp(hidden @ params["head"])
        h = (e / e.sum(1, keepdims=True) - self.y) / len(self.x)
        inner = h @ params["head"].T * (1 - hidden**2)
        return {"kernel": self.x.T @ inner, "bias": inner.sum(0), "head": hidden.T @ h}

    def loss(self, params):
        return float(_loss(params, self.x, self.y))


def make():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(4, 5)), "bias": 0.1 * rng.normal(size=5), "head": rng.normal(size=(5, 3))}
    return Problem(params, rng.normal(size=(9, 4)), np.eye(3)[rng.integers(0, 3, 9)])


def _loss(params, x, y):
    u = jnp.tanh(x @ params["kernel"] + params["bias"][None]) @ params["head"]
    return -(y * jax.nn.log_softmax(u)).sum(1).mean()


_slope = jax.jit(jax.grad(_loss))


def added(a, b, factor=1.0):
    return {name: a[name] + factor * b[name] for name in a}


def inner(a, b):
    return sum((a[name] * b[name]).sum() for name in a)


def norm(tree):
    return np.sqrt(inner(tree, tree))


def unit(tree):
    return {name: leaf / norm(tree) for name, leaf in tree.items()}


def as_numpy(tree):
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


def assert_close(a, b, **tolerance):
    assert set(a) == set(b)
    for name in b:
        np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)


def one_update(problem, link, params=None, **extra):
    """(the link's update of the first step, the points where it asked for gradients)."""
    params, seen = problem.params if params is None else params, []
    grad_fn = lambda p: seen.append(as_numpy(p)) or problem.slope(p)
    updates, _ = link.update(problem.slope(params), link.init(params), params, grad_fn=grad_fn, **extra)
    return as_numpy(updates), seen


def by_link(problem, link, steps=5, decay=DECAY, **extra):
    """(parameters, the link's state) after some steps with momentum and weight decay."""
    tx = optax.chain(link, optax.add_decayed_weights(decay), optax.sgd(RATE, momentum=MOMENTUM))
    state, params = tx.init(problem.params), problem.params
    for step in range(steps):
        place = dict(step=jnp.int32(step), progress=jnp.float32(step / steps), value=problem.loss(params)) | extra
        updates, state = tx.update(problem.slope(params), state, params, grad_fn=problem.slope, **place)
        params = optax.apply_updates(params, updates)
    return params, state[0]


def by_hand(problem, direction, steps=5, decay=DECAY):
    """The same in numpy: m ← μm + d + λw, w ← w − ηm, with d = direction(w, t)."""
    w, m = problem.params, {name: np.zeros_like(value) for name, value in problem.params.items()}
    for t in range(steps):
        d = direction(w, t)
        m = {name: MOMENTUM * m[name] + d[name] + decay * w[name] for name in w}
        w = added(w, m, -RATE)
    return w


def same_as_by_hand(problem, link, direction, evaluations=5, **options):
    """Asserts that five steps are those of numpy, and how often the link asked for a gradient."""
    ours, state = by_link(problem, link, **options)
    assert_close(ours, by_hand(problem, direction, **options), rtol=1e-9, atol=1e-12)
    assert int(state.evaluations) == evaluations
