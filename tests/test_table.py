"""perturbjax.table: rows by position in the data set, on one device and on several, and positions that aren't there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from perturbjax.checks import check_index
from perturbjax.core import Context
from perturbjax.table import add, gather, new_table, own_share, read, write

N, B = 10, 8
INDEX, ROWS = jnp.array([3, 1, 9, 0, 4, 5, 2, 7]), jnp.arange(2.0 * B).reshape(B, 2)


def test_rows_are_written_added_and_read_by_position():
    table = new_table("f", "memory=True", Context(4, num_examples=N), (2,))
    expected = np.zeros((N, 2))
    expected[np.asarray(INDEX)] = ROWS
    table = write(table, INDEX, ROWS)
    np.testing.assert_array_equal(table, expected)
    np.testing.assert_array_equal(add(table, INDEX, ROWS), 2 * expected)
    np.testing.assert_array_equal(read("f", table, INDEX[::-1]), ROWS[::-1])


def test_a_sample_that_occurs_twice_is_added_twice():
    twice = add(jnp.zeros(3), jnp.array([1, 1, 0]), jnp.array([1.0, 2.0, 5.0]))
    np.testing.assert_array_equal(twice, [5, 3, 0])


def test_every_device_keeps_the_whole_table():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def f(table, index, rows):
        changed = add(write(table, index, rows, axis_name="d"), index, rows, axis_name="d")
        return changed, read("f", changed, index), own_share(gather(rows, "d"), "d")

    mapped = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=(P(), P("d"), P("d")), check_vma=False)
    table, found, own = jax.jit(mapped)(jnp.zeros([N, 2]), INDEX, ROWS)
    np.testing.assert_array_equal(table, add(write(jnp.zeros([N, 2]), INDEX, ROWS), INDEX, ROWS))
    np.testing.assert_array_equal(found, 2 * ROWS)
    np.testing.assert_array_equal(own, ROWS)


def test_a_position_beyond_the_table_is_an_error_or_nan_but_never_another_samples_row():
    with pytest.raises(ValueError, match=r"f needs indices in 0\.\.9, got 10 at position 1 of the batch. Pass num_examples=11"):
        read("f", jnp.zeros([N]), jnp.array([0, 10]))
    with pytest.raises(ValueError, match="got -1 at position 0"):
        check_index("f", np.array([-1, 2]), N)
    outside = jnp.array([-1, 10, 2])
    np.testing.assert_array_equal(jax.jit(lambda i: read("f", jnp.ones([N]), i))(outside), [np.nan, np.nan, 1])
    np.testing.assert_array_equal(jax.jit(lambda i: write(jnp.zeros([N]), i, jnp.ones(3)))(outside), np.eye(N)[2])


def test_the_number_of_samples_must_be_known():
    with pytest.raises(ValueError, match="f needs num_examples for memory=True, got none. Pass pj.objective"):
        new_table("f", "memory=True", Context(4))
