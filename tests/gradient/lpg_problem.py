"""A small net with named sites, a batch with an absent class, and eqs. 11–17 in numpy: what the tests of LPG share."""

import jax
import jax.numpy as jnp
import numpy as np

import perturbjax as pj

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

quick = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # to compile, not to run
double = lambda: enable_x64(True)

C, B, D = 4, 9, 5
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
COUNTS = np.array([10, 40, 5, 20])
EPS = np.array([0.25, 0.125, 0.5, 0.125])  # exact in float32

HEAD = lambda w: (w["w"], w["b"])
NET = pj.line(
    {
        "stage1": lambda w, x: jnp.tanh(x @ w["a"]),
        "features": lambda w, x: x,
        "logits": lambda w, x: x @ w["w"].T + w["b"][None],
    },
    head=HEAD,
)
LINEAR = pj.line({"features": lambda w, x: x, "logits": lambda w, x: x @ w["w"].T + w["b"][None]}, head=HEAD)


def problem(seed=0):
    """Parameters, inputs and labels; the batch size is odd, and class 3 is absent."""
    rng = np.random.default_rng(seed)
    params = dict(a=rng.normal(size=(D, D)), w=rng.normal(size=(C, D)), b=rng.normal(size=C))
    return params, rng.normal(size=(B, D)), rng.permutation([0, 0, 0, 1, 1, 1, 1, 2, 2]).astype(np.int32)


def hidden(params, x):
    return jnp.tanh(x @ params["a"])


def forward(params, x):
    return hidden(params, x) @ params["w"].T + params["b"][None]


def linear(params, x):
    return x @ params["w"].T + params["b"][None]


def softmax(u):
    e = np.exp(np.asarray(u) - np.asarray(u).max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def logit_gradients(u, y):
    return softmax(u) - np.eye(C)[y]


def jacobians(f, params, x):
    """J [B, |W|, C] of each sample's logits, by C reverse passes; f(params, x) -> [B, C]."""
    rows = quick(jax.jacrev(lambda p: f(p, x)))(params)  # every leaf [B, C, ...]
    flat = [np.asarray(leaf).reshape(len(x), C, -1) for leaf in jax.tree.leaves(rows)]
    return np.concatenate(flat, axis=2).transpose(0, 2, 1)


def norm_of(jacobian, h, delta=0.0):
    """φ(δ) = ‖mean_i J_i (h_i + δ)‖ over the samples given."""
    return np.linalg.norm(np.mean([j @ (g + delta) for j, g in zip(jacobian, h)], axis=0))


def searched(jacobian, h, *, sign, eps, num_steps=3, step_size=None, step="sign", clamp=True):
    """Eqs. 16–17 for one group [n, ...]: ∇φ from its definition, the lowest point of the line by least squares."""
    delta, mean = np.zeros(C), jacobian.mean(0)
    rate = 2 * eps / num_steps if step_size is None else step_size
    for _ in range(num_steps):
        total = np.mean([j @ (g + delta) for j, g in zip(jacobian, h)], axis=0)
        slope = mean.T @ total / max(np.linalg.norm(total), 1e-300)
        along = np.sign(slope) if step == "sign" else slope / max(np.linalg.norm(slope), 1e-300)
        length = sign * rate
        if clamp and sign < 0:
            [lowest], *_ = np.linalg.lstsq((mean @ along)[:, None], -total, rcond=None)
            length = max(length, lowest)
        delta = delta + length * along
        delta = delta * min(1.0, eps / max(np.linalg.norm(delta), 1e-300))
    return delta


def searched_by_class(jacobian, h, y, *, sign=SIGN, eps=EPS, granularity="category", **options):
    """h̃ − h [B, C]."""
    delta = np.zeros([len(y), C])
    groups = [[i] for i in range(len(y))] if granularity == "sample" else [np.flatnonzero(y == c) for c in np.unique(y)]
    for own in groups:
        c = y[own[0]]
        delta[own] = searched(jacobian[own], h[own], sign=sign[c], eps=eps[c], **options)
    return delta


def gradients(links, model=NET, *, seed=0, counts=COUNTS, states=None, **place):
    """(gradients, loss, Output) of one pass."""
    params, x, y = problem(seed)
    if model is LINEAR:
        params = {name: params[name] for name in ("w", "b")}
    params, x = jax.tree.map(jnp.asarray, (params, x))
    made = pj.objective(model, links, num_classes=C, class_counts=counts)
    states = made.init(params, x) if states is None else states
    run = quick(jax.value_and_grad(lambda p: made(p, states, pj.batch(x, y), **place), has_aux=True))
    (loss, out), grads = run(params)
    return grads, loss, out


def assert_close(a, b, **tolerance):
    """Two trees of arrays."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)
