"""What a residual net is made of, in numpy: images [B, H, W, C], as they come; and variables to compare with."""

import jax
import jax.numpy as jnp
import numpy as np


def relu(x):
    return np.maximum(x, 0)


def conv(x, kernel, stride=1, padding=None):
    """padding: on each side; None: so much that the size stays."""
    edge = kernel.shape[0] // 2 if padding is None else padding
    x = np.pad(x, [(0, 0), (edge, edge), (edge, edge), (0, 0)])
    rows = range(0, x.shape[1] - kernel.shape[0] + 1, stride)
    patch = lambda i, j: x[:, i : i + kernel.shape[0], j : j + kernel.shape[1]]
    return np.stack([np.stack([np.einsum("bhwi,hwio->bo", patch(i, j), kernel) for j in rows], 1) for i in rows], 1)


def norm(x, p, s):
    """In evaluation mode."""
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def drawn(model, images):
    """Variables of the model with every number drawn, variances above 1."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    made = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.1, 0.4, leaf.shape), leaf.dtype), shapes)
    return made | {"batch_stats": jax.tree.map(lambda x: jnp.abs(x) + 1, made["batch_stats"])}
