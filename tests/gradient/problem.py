"""A small classifier in float64 for the links that look at several gradients of one batch."""

import jax
import jax.numpy as jnp
import numpy as np

import perturbjax as pj

C, B = 4, 12
MODEL = {"stage1": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, x: x @ w["b"] + w["c"][None]}
KEY = jax.random.key(5)


def data():
    """Parameters, inputs, labels (class 3 is absent) and domains 0..2, with domain 1 absent."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(5, 6)), "b": 0.3 * rng.normal(size=(6, C)), "c": np.zeros(C)}
    labels = rng.permutation([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]).astype(np.int32)
    return params, rng.normal(size=(B, 5)), labels, np.array([0, 2] * (B // 2), np.int32)


def losses(params, x, y):
    """Cross entropies [B]."""
    u = jnp.tanh(x @ params["a"]) @ params["b"] + params["c"][None]
    return -jnp.take_along_axis(jax.nn.log_softmax(u), jnp.asarray(y)[:, None], axis=1)[:, 0]


def grad_fn_of(links=()):
    """(params, *, weights=None) -> gradient of the objective on the batch, as a trainer makes it."""
    params, x, y, _ = data()
    params, x = jax.tree.map(jnp.asarray, (params, x))  # float32 unless the test asks for more
    made = pj.objective(MODEL, links, num_classes=C)
    states = made.init(params, x)
    return lambda p, *, weights=None: jax.grad(made, has_aux=True)(p, states, pj.batch(x, jnp.asarray(y)), weights=weights)[0]


_part = jax.jit(jax.grad(lambda p, x, y, chosen: (losses(p, x, y) * chosen).sum() / len(y)))


def part(params, x, y, chosen):
    """Gradient of the chosen samples' part of the mean loss, as a flat numpy vector."""
    return flat(_part(params, x, y, np.asarray(chosen, float)))


def flat(tree):
    return np.concatenate([np.asarray(tree[name]).ravel() for name in sorted(tree)])


def unflat(vector, like):
    found, at = {}, 0
    for name in sorted(like):
        size = like[name].size
        found[name] = vector[at : at + size].reshape(like[name].shape)
        at += size
    return found
