"""Projection of group deltas [G, ...] onto balls, one radius per group: l2, l∞, l1 (over all axes but the first).

optax projects a whole tree onto one ball, and its l2 and l1 projections divide by zero at a zero delta; here every group has
its own radius, and a zero delta and a zero or infinite radius are fine, with finite derivatives.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from perturbjax.checks import check_choice

Norm = Literal["l2", "linf", "l1"]
NORMS = ("l2", "linf", "l1")


def per_group(x: jax.Array, like: jax.Array) -> jax.Array:
    """[G] as [G, 1, ...], to multiply with `like` [G, ...]."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def group_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm of each group's delta: [G, ...] -> [G]; its derivative at zero is zero, not nan."""
    square = jnp.sum(jnp.square(x).reshape(x.shape[0], -1), axis=1)
    safe = jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, jnp.sqrt(safe), 0)


def unit(x: jax.Array) -> jax.Array:
    """x / ‖x‖ for each group; zero stays zero."""
    norm = group_norm(x)
    return x / per_group(jnp.where(norm > 0, norm, 1), x)


def project(delta: jax.Array, bound: jax.Array, norm: Norm = "l2") -> jax.Array:
    """The nearest point of the ball of radius `bound` [G] around zero, for each group of `delta` [G, ...].

    Source: l2 and l∞ in closed form; l1 after Duchi et al., ICML 2008.
    """
    check_choice("project", "norm", norm, NORMS)
    if norm == "linf":
        radius = per_group(bound, delta)
        return jnp.clip(delta, -radius, radius)
    if norm == "l2":
        length = group_norm(delta)
        outside = ~(length <= bound)  # also for a bound that is nan, which then shows
        # Both branches stay finite, also for an infinite radius, so that derivatives do too.
        shrink = jnp.where(outside, bound, 1) / jnp.where(outside, length, 1)
        return delta * per_group(jnp.where(outside, shrink, 1), delta)
    # Every entry shrinks by θ = max_k ((sum of the k largest) − ε)/k, which is at most 0 inside the ball.
    flat = delta.reshape(delta.shape[0], -1)
    size = jnp.abs(flat)
    largest = jnp.sort(size, axis=1, descending=True)
    excess = (jnp.cumsum(largest, axis=1) - bound[:, None]) / jnp.arange(1, flat.shape[1] + 1, dtype=flat.dtype)[None]
    theta = jnp.maximum(excess.max(axis=1), 0)
    return (jnp.sign(flat) * jnp.maximum(size - theta[:, None], 0)).reshape(delta.shape)
