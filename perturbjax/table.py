"""Tables with one row per training sample, found by its position in the data set: what a method remembers of every sample.

A table is state, so it is checkpointed and restored with the run. In per-device code every device holds the whole table and sees a
share of the batch: rows are gathered over devices before they are written, so that all copies stay the same.
"""

from typing import Any

import jax
import jax.numpy as jnp

from perturbjax.checks import check_index
from perturbjax.classes import AxisName, gather
from perturbjax.link import Context


def new_table(function: str, setting: str, context: Context, shape: tuple[int, ...] = (), dtype: Any = None) -> jax.Array:
    """Zeros, one row of `shape` per training sample: [N, *shape]. `setting` is what asks for it, for the message; dtype
    None: the float type of the pass.

    Raises:
      ValueError: the number of training samples is not known.
    """
    if context.num_examples is None:
        raise ValueError(
            f"{function} needs num_examples for {setting}, got none. Pass pj.objective(..., num_examples=len(labels)), and each "
            "batch's positions in the data set: pj.batch(inputs, labels, index=index)."
        )
    return jnp.zeros((context.num_examples, *shape), context.dtype if dtype is None else dtype)


def read(function: str, table: jax.Array, index: jax.Array) -> jax.Array:
    """The rows of the samples `index` [B]: [B, ...].

    A position beyond the table is an error where it can be seen; inside jit it gives nan (False, 0), never another sample's row.
    """
    check_index(function, index, table.shape[0])
    fill = jnp.nan if jnp.issubdtype(table.dtype, jnp.floating) else 0
    return table.at[index].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def write(table: jax.Array, index: jax.Array, rows: jax.Array, *, axis_name: AxisName = None) -> jax.Array:
    """The table with the rows [B, ...] of the samples `index` [B] replaced; positions beyond it are left out."""
    index, rows = gather(index, axis_name), gather(rows, axis_name)
    return table.at[index].set(rows.astype(table.dtype), mode="drop", wrap_negative_indices=False)


def add(table: jax.Array, index: jax.Array, rows: jax.Array, *, axis_name: AxisName = None) -> jax.Array:
    """The table with `rows` [B, ...] added to those of the samples `index` [B]; a sample that occurs twice is added twice."""
    index, rows = gather(index, axis_name), gather(rows, axis_name)
    return table.at[index].add(rows.astype(table.dtype), mode="drop", wrap_negative_indices=False)
