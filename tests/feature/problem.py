"""A linear softmax net on small images, whose gradients with respect to the images are known: what adversarial tests share."""

import jax
import jax.numpy as jnp
import numpy as np

import perturbjax as pj

C, B, H, W = 3, 8, 2, 3
D = H * W


def onehot(y, classes=C):
    return np.eye(classes)[y]


def weights(classes=C, seed=0, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=(D, classes))


def images(count=B, low=0.3, high=0.7, seed=1):
    return np.random.default_rng(seed).uniform(low, high, size=(count, H, W))


def log_softmax(u):
    return u - np.log(np.exp(u).sum(1, keepdims=True))


def losses_of(w, x, y):
    return -log_softmax(x.reshape(len(x), -1) @ w)[np.arange(len(y)), y]


def slope_of(w, x, y, beta=np.inf):
    """∂ min(ℓ_i, β)/∂x_i [B, H, W] of the linear net, in numpy."""
    p = np.exp(log_softmax(x.reshape(len(x), -1) @ w))
    return (((p - onehot(y, w.shape[1])) @ w.T) * (losses_of(w, x, y) < beta)[:, None]).reshape(x.shape)


def model():
    return pj.line(lambda w, x: x.reshape(x.shape[0], -1) @ w)


def seen_steps(links, w, batches, *, index=None, classes=C, side=None, num_domains=None, key=0):
    """[what each batch's images are after the links], the links' states, the last Output; the weights stay as they are."""
    see = pj.Perturbation("input", lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made = pj.objective(model(), pj.chain(links, see), num_classes=classes, num_domains=num_domains)
    w = jnp.asarray(w)
    states, found, out = made.init(w, jnp.asarray(batches[0][0], w.dtype)), [], None
    step = jax.jit(lambda states, batch, number: made(w, states, batch, key=jax.random.fold_in(jax.random.key(key), number))[1])
    for number, (x, y) in enumerate(batches):
        extra = {} if side is None else {"side": jax.tree.map(jnp.asarray, side[number])}
        batch = pj.batch(jnp.asarray(x, w.dtype), jnp.asarray(y, jnp.int32), index=index, **extra)
        out = step(states, batch, number)
        states = out.states
        found.append(np.asarray(out.metrics["seen/value"]))
    return found, states, out
