"""A linear problem in float64, and what tests of losses, labels and logits compute beside it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

import perturbjax as pj

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

C, D, B = 4, 5, 7
MODEL = pj.line(lambda w, x: x @ w)
DEEP = pj.line(
    {"features": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, a: a @ w["w"].T + w["b"][None]},
    head=lambda w: (w["w"], w["b"]),
)


@contextlib.contextmanager
def linear(num_classes=C, size=B):
    """Weights, inputs and labels in float64."""
    rng = np.random.default_rng(0)
    with enable_x64(True):
        w, x = rng.normal(size=(D, num_classes)), rng.normal(size=(size, D))
        yield w, x, rng.integers(0, num_classes, size).astype(np.int32)


@contextlib.contextmanager
def deep():
    """The same for a model with features and a head."""
    rng = np.random.default_rng(1)
    params = dict(a=rng.normal(size=(D, 6)), w=rng.normal(size=(C, 6)), b=rng.normal(size=C))
    with enable_x64(True):
        yield params, rng.normal(size=(B, D)), rng.integers(0, C, B).astype(np.int32)


def log_softmax(u):
    return u - np.log(np.exp(u).sum(1, keepdims=True))


def onehot(y):
    return np.eye(C)[y]


def cross_entropy(u, targets):
    return -(targets * log_softmax(u)).sum(1)


def mixed(y):
    """Targets of two classes a sample."""
    return 0.7 * onehot(y) + 0.3 * onehot(y[::-1])


def run(w, x, y, links, *, model=MODEL, settings=None, states=None, options=None, **fields):
    """(Output, gradient) of one pass."""
    made = pj.objective(model, links, num_classes=C, **(settings or {}))
    states = made.init(w, x) if states is None else states
    data = pj.batch(x, jnp.asarray(y), **fields)
    (_, out), grad = jax.value_and_grad(made, has_aux=True)(w, states, data, **(options or {}))
    return out, grad


def difference(loss, w, size=1e-6):
    """Central finite differences of a function of an array, or of a dictionary of arrays."""
    if isinstance(w, dict):
        return {k: difference(lambda v, k=k: loss({**w, k: v}), w[k], size) for k in w}
    steps = size * np.eye(w.size).reshape(-1, *w.shape)
    return np.array([(loss(w + e) - loss(w - e)) / (2 * size) for e in steps]).reshape(w.shape)


def assert_close(a, b, **tolerance):
    """Of trees."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)
