"""For links of the optimiser: a small problem that gives it all that a trainer does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import perturbjax as pj

C, B = 3, 6
LABELS = jnp.array([0, 1, 2, 0, 1, 0], jnp.int32)
STEPS_TOTAL = 10
QUIET = {pj.dp_sgd: dict(noise_multiplier=0.0), pj.gradient_noise: dict(eta=0.0)}  # where a draw covers what is compared


def parameters(dtype=jnp.float32):
    """Two layers: {"first": {"kernel", "bias"}, "last": {"kernel"}}."""
    a, b, c = jax.random.split(jax.random.key(0), 3)
    first = {"kernel": 0.5 * jax.random.normal(a, [4, 5]), "bias": 0.1 * jax.random.normal(b, [5])}
    return jax.tree.map(lambda w: w.astype(dtype), {"first": first, "last": {"kernel": 0.5 * jax.random.normal(c, [5, C])}})


def losses(params, activation=jnp.tanh):
    """[B], in the parameters' type."""
    x = jax.random.normal(jax.random.key(9), [B, 4]).astype(params["last"]["kernel"].dtype)
    u = activation(x @ params["first"]["kernel"] + params["first"]["bias"][None]) @ params["last"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(u, LABELS)


def given(losses_of, step=0, **more):
    """What a trainer gives every link, for losses [B] of the parameters."""

    def mean(p, weights=None):
        found = losses_of(p)
        return (found if weights is None else found * weights.astype(found.dtype)).mean()

    place = dict(step=jnp.int32(step), progress=jnp.float32(step / STEPS_TOTAL), value=jnp.float32(1), rate=jnp.float32(1))
    domain = jnp.arange(B, dtype=jnp.int32) % 2
    return dict(
        grad_fn=lambda p, *, weights=None: jax.grad(mean)(p, weights), loss_fn=losses_of, key=jax.random.key(step), labels=LABELS,
        num_classes=C, side={"domain": domain}, num_domains=2, axis_name=None, **place,
    ) | more  # fmt: skip


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)
