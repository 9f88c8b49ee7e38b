"""Boxes in images: what CutMix and random erasing share."""

import jax
import jax.numpy as jnp


def box_mask(low: jax.Array, high: jax.Array, height: int, width: int) -> jax.Array:
    """[height, width] bool, true from corner `low` [2] up to (not including) `high` [2]; what lies outside the image is cut off.

    >>> print(box_mask(jnp.array([0, 1]), jnp.array([1, 9]), 2, 3).astype(int))
    [[0 1 1]
     [0 0 0]]
    """
    rows, columns = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    low, high = low.astype(jnp.int32), high.astype(jnp.int32)
    in_rows, in_columns = (rows >= low[0]) & (rows < high[0]), (columns >= low[1]) & (columns < high[1])
    return in_rows[:, None] & in_columns[None]


def require_images(function: str, value: jax.Array, site: str) -> tuple[int, int]:
    """(height, width) of images [B, height, width, ...] of floats at the input; ValueError for anything else."""
    if site != "input" or value.ndim < 3 or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{function} needs images [B, height, width, ...] of floats at the input, got {value.dtype} {value.shape} at {site!r}. "
            "Write mixup for anything else, images / 255 for grey levels."
        )
    return value.shape[1], value.shape[2]
