"""Whole numbers of steps and samples from shares, as exact arithmetic has them: 0.15 · 190 is 28.5, whatever rounding makes of it."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from perturbjax.classes import number


def _nearly(x: jax.Array, place: jax.Array) -> jax.Array:
    """Whether x ≥ 0 is `place` but for the rounding of a few products of x's float type."""
    return jnp.abs(x - place) <= 8 * jnp.finfo(x.dtype).eps * jnp.maximum(place, 1)


def rounded(x: ArrayLike) -> jax.Array:
    """x ≥ 0 to the nearest whole number, halves to the even one; what is a half but for rounding counts as one.

    >>> print(rounded(jnp.float32(0.15) * 190))  # 28.500002
    28.0
    """
    x = number(x)
    half = jnp.floor(x) + 0.5
    return jnp.round(jnp.where(_nearly(x, half), half, x))


def rounded_down(x: ArrayLike) -> jax.Array:
    """⌊x⌋ of x ≥ 0; what is a whole number but for rounding counts as one.

    >>> print(rounded_down(jnp.float32(0.9) / jnp.float32(0.3)))  # 2.9999998
    3.0
    """
    x = number(x)
    near = jnp.round(x)
    return jnp.where(_nearly(x, near), near, jnp.floor(x))


def rounded_up(x: ArrayLike) -> jax.Array:
    """⌈x⌉ of x ≥ 0; what is a whole number but for rounding counts as one.

    >>> print(rounded_up(jnp.float32(0.008) * 375))  # 3.0000002
    3.0
    """
    x = number(x)
    near = jnp.round(x)
    return jnp.where(_nearly(x, near), near, jnp.ceil(x))
