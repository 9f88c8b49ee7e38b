"""perturbjax.table: rows by position in the data set, on one device and on several, and positions that aren't there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import perturbjax as pj
from perturbjax.analysis.dynamics import dynamics
from perturbjax.checks import check_index
from perturbjax.classes import gather, own_share
from perturbjax.link import Context
from perturbjax.table import add, new_table, read, write

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


KEEPERS = {
    "logpert acs": lambda: pj.logpert(inference="acs"),
    "logpert joint": lambda: pj.logpert(inference="joint"),
    "logpert memory": lambda: pj.logpert(memory=True),
    "bootstrapping soft": lambda: pj.bootstrapping(previous=True),
    "bootstrapping hard": lambda: pj.bootstrapping(kind="hard", previous=True),
    "dynamics": dynamics,
}
every_keeper = pytest.mark.parametrize("link", KEEPERS)


def problem(*links):
    made = pj.objective(lambda w, x: x @ w, links, num_classes=3, num_examples=N)
    w, x = jnp.arange(6.0).reshape(2, 3), jnp.linspace(-1, 1, 8).reshape(4, 2)
    return made, w, x, jnp.array([0, 1, 2, 0]), made.init(w, x)


@every_keeper
def test_a_table_with_a_forgotten_index_is_an_error_not_the_first_rows_over_and_over(link):
    made, w, x, y, states = problem(pj.label_smoothing(), KEEPERS[link]())
    message = f"{link.split()[0]} needs each sample's position .*, got a batch without index. Pass pj.batch\\(x, y, index=positions\\)"
    for call in (made, jax.jit(made)):
        with pytest.raises(ValueError, match=message):
            call(w, states, pj.batch(x, y))
    assert np.isfinite(made(w, states, pj.batch(x, y, index=jnp.array([7, 0, 9, 3])))[0])


def test_methods_that_only_draw_by_the_index_go_on_without_one():
    for links in ((), (pj.dropout(site="input"), pj.disturb_label(), pj.logpert(), pj.bootstrapping())):
        made, w, x, y, states = problem(*links)
        places = jnp.arange(4, dtype=jnp.int32)
        np.testing.assert_array_equal(made(w, states, pj.batch(x, y))[0], made(w, states, pj.batch(x, y, index=places))[0])


@every_keeper
def test_a_position_beyond_the_table_makes_its_loss_nan_inside_jit_and_is_an_error_outside(link):
    made, w, x, y, states = problem(KEEPERS[link]())
    inside, outside = (pj.batch(x, y, index=jnp.array(index)) for index in ([7, 0, 9, 3], [7, -1, 10, 3]))
    with pytest.raises(ValueError, match=rf"{link.split()[0]} needs indices in 0\.\.9, got -1 at position 1 of the batch"):
        made(w, states, outside)
    step = jax.jit(made)
    loss, out = step(w, states, outside)
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(out.losses), [False, True, True, False])
    loss, out = step(w, states, inside)
    assert np.isfinite(loss) and np.isfinite(out.losses).all()
