"""What the tests of label methods share: a linear net in float64, its losses by hand, a run of steps."""

import jax
import jax.numpy as jnp
import numpy as np

import perturbjax as pj

C, B, D = 4, 8, 5
MODEL = pj.line(lambda w, x: x @ w)


def batches(number, seed=0):
    """Inputs, labels, positions in a data set of 20."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        index = rng.permutation(20)[:B].astype(np.int32)
        yield rng.normal(size=(B, D)), rng.integers(0, C, B).astype(np.int32), index


def weights(seed=1):
    """A linear net [D, C]."""
    return np.random.default_rng(seed).normal(size=(D, C))


def softmax(u):
    """Row by row."""
    return np.exp(u - u.max(1, keepdims=True)) / np.exp(u - u.max(1, keepdims=True)).sum(1, keepdims=True)


def losses(u, targets):
    """Cross entropies with soft targets."""
    return -(targets * np.log(softmax(u))).sum(1)


def run(w, x, y, link, *, states=None, num_examples=20, key=0, step=None, **fields):
    """(Output, gradient) of one step."""
    made = pj.objective(MODEL, link, num_classes=C, num_examples=num_examples)
    states = made.init(w, x) if states is None else states
    data = pj.batch(x, jnp.asarray(y), **fields)
    (_, out), grad = jax.value_and_grad(made, has_aux=True)(w, states, data, key=jax.random.key(key), **(step or {}))
    return out, grad


def numeric_gradient(loss, w):
    """By central differences."""
    steps = 1e-6 * np.eye(w.size).reshape(-1, *w.shape)
    return np.array([(loss(w + e) - loss(w - e)) / 2e-6 for e in steps]).reshape(w.shape)
