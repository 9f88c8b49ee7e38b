"""perturbjax.classes: counts, means, running means and covariances by class, against numpy, on one device and on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from perturbjax.classes import (
    class_count,
    class_mean,
    class_sum,
    running_covariance_init,
    running_covariance_update,
    running_mean_init,
    running_mean_update,
    wide,
)

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

C = 4
rng = np.random.default_rng(0)


def numpy_mean(values, labels, num_classes=C):
    rows = [values[labels == c] for c in range(num_classes)]
    return np.stack([row.mean(0) if len(row) else np.zeros(values.shape[1:]) for row in rows])


def draw(batch=12, shape=(3,), classes=3, seed=0):
    """Values and labels; the last class never occurs."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=[batch, *shape]).astype(np.float32), rng.integers(0, classes, batch).astype(np.int32)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 2)])
def test_sums_counts_and_means_are_numpy_s(shape):
    values, labels = draw(shape=shape)
    counts = np.bincount(labels, minlength=C)
    assert counts[3] == 0
    np.testing.assert_array_equal(class_count(labels, C), counts)
    np.testing.assert_allclose(class_mean(values, labels, C), numpy_mean(values, labels), rtol=1e-5, atol=1e-6)
    sums = numpy_mean(values, labels) * counts.reshape([C] + [1] * len(shape))
    np.testing.assert_allclose(class_sum(values, labels, C), sums, rtol=1e-5, atol=1e-6)


def test_labels_outside_the_classes_belong_to_none():
    values, labels = draw()
    padded = np.concatenate([values, values[:3] + 100]), np.concatenate([labels, np.array([-1, C, 99], np.int32)])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), statistics(*padded), statistics(values, labels)
    )


def test_narrow_types_are_summed_in_float32_and_float64_stays():
    ones, labels = jnp.ones([600], jnp.bfloat16), jnp.zeros([600], jnp.int32)
    assert class_sum(ones, labels, 2).dtype == class_mean(ones, labels, 2).dtype == jnp.float32
    assert class_sum(ones, labels, 2)[0] == 600  # in bfloat16 the sum would stop at 256
    assert wide(labels).dtype == jnp.float32
    with enable_x64(True):
        values = rng.normal(size=[6])
        found = class_mean(jnp.asarray(values), jnp.asarray([0, 0, 0, 1, 1, 1]), 2)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, [values[:3].mean(), values[3:].mean()], rtol=1e-14)


@given(st.lists(st.tuples(st.integers(-1, C), st.integers(-8, 8)), min_size=6, max_size=6))
def test_any_labels(pairs):
    labels, values = np.array(pairs, np.int32).T
    np.testing.assert_allclose(class_mean(values, labels, C), numpy_mean(values.astype(float), labels), rtol=1e-6)


# Running means.


def test_running_mean_over_steps():
    """decay·mean + (1 − decay)·batch mean; the first batch of a class sets it; an absent class stays as it is."""
    state, expected, seen = running_mean_init(C, (2,)), np.zeros([C, 2]), np.zeros(C, bool)
    update = jax.jit(lambda state, v, y: running_mean_update(state, v, y, decay=0.8))
    batches = [[0, 0, 1], [1, 2, 2], [0, 1, 1], [2, 2, 2]]
    for number, labels in enumerate(batches):
        values, labels = np.random.default_rng(number).normal(size=[3, 2]).astype(np.float32), np.array(labels, np.int32)
        for c in set(labels.tolist()):
            now = values[labels == c].mean(0)
            expected[c] = 0.8 * expected[c] + 0.2 * now if seen[c] else now
            seen[c] = True
        state = update(state, values, labels)
        np.testing.assert_allclose(state.mean, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state.seen, seen)


def test_running_mean_over_epochs():
    """Exact over an epoch, in use from the next epoch's first batch on; nothing is seen in the first epoch."""
    state = running_mean_init(C)
    update = jax.jit(lambda state, v, y, e: running_mean_update(state, v, y, update="epoch", epoch=e))
    epochs = [
        [([1.0, 2.0, 6.0], [0, 0, 1]), ([3.0, 8.0, 0.0], [0, 1, 1])],
        [([5.0, 5.0, 7.0], [0, 0, 2]), ([1.0, 1.0, 1.0], [2, 2, 2])],  # class 1 is absent: keeps its mean
        [([0.0, 0.0, 0.0], [3, 3, 3])],
        [([0.0, 0.0, 0.0], [0, 0, 0])],
    ]
    in_use = [
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([2, 14 / 3, 0, 0], [1, 1, 0, 0]),
        ([5, 14 / 3, 2.5, 0], [1, 1, 1, 0]),
        ([5, 14 / 3, 2.5, 0], [1, 1, 1, 1]),
    ]
    for number, (batches, (mean, seen)) in enumerate(zip(epochs, in_use, strict=True)):
        for values, labels in batches:
            state = update(state, np.array(values, np.float32), np.array(labels, np.int32), number)
            np.testing.assert_allclose(state.mean, mean, rtol=1e-6)
            np.testing.assert_array_equal(state.seen, np.array(seen, bool))


def test_epochs_may_start_anywhere_and_leave_gaps():
    state = running_mean_init(C)
    update = lambda state, value, epoch: running_mean_update(
        state, jnp.full([2], value), jnp.array([0, 1]), update="epoch", epoch=epoch
    )
    state = update(state, 3.0, 7)
    assert not state.seen.any()
    state = update(update(state, 5.0, 7), 9.0, 9)
    np.testing.assert_allclose(state.mean, [4, 4, 0, 0])


def test_one_epoch_with_a_nan_doesn_t_spoil_the_epochs_after_it():
    state = running_mean_init(C)
    for epoch, value in enumerate([jnp.nan, 2.0, 3.0]):
        state = running_mean_update(state, jnp.full([4], value), jnp.arange(4), update="epoch", epoch=epoch)
    np.testing.assert_array_equal(state.mean, 2)


def test_no_gradient_flows_through_running_statistics():
    values, labels = draw()

    def total(values):
        mean = running_mean_update(running_mean_init(C, (3,)), values, labels).mean
        state = running_covariance_update(running_covariance_init(C, 3), values, labels)
        return mean.sum() + state.mean.sum() + state.covariance.sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(values), 0)


def test_running_covariance_is_numpy_cov_of_everything_so_far():
    state, update = running_covariance_init(C, 3), jax.jit(running_covariance_update)
    every = []
    for seed, classes in enumerate([2, 3, 1, 3]):  # classes 1 and 2 come and go, class 3 never comes
        every.append(draw(seed=seed, classes=classes))
        state = update(state, *every[-1])
        values, labels = (np.concatenate(x) for x in zip(*every))
        np.testing.assert_array_equal(state.count, np.bincount(labels, minlength=C))
        np.testing.assert_allclose(state.mean, numpy_mean(values, labels), rtol=1e-5, atol=1e-6)
        for c in range(C):
            rows = values[labels == c]
            expected = np.cov(rows.T, bias=True) if len(rows) else np.zeros([3, 3])
            np.testing.assert_allclose(state.covariance[c], expected, rtol=1e-4, atol=1e-6)


def test_covariance_far_from_the_origin_does_not_cancel():
    values, labels = draw(batch=16, classes=1)
    state = running_covariance_init(1, 3)
    for part in range(4):
        rows = slice(4 * part, 4 * part + 4)
        state = jax.jit(running_covariance_update)(state, values[rows] + 1000, labels[rows])
    np.testing.assert_allclose(state.covariance[0], np.cov(values.T, bias=True), atol=2e-3)


# Several devices: classes have unequal shares of each device's batch.


@functools.partial(jax.jit, static_argnames="axis_name")
def statistics(values, labels, axis_name=None):
    options = dict(axis_name=axis_name)
    return (
        class_sum(values, labels, C, **options), class_mean(values, labels, C, **options), class_count(labels, C, **options),
        running_mean_update(running_mean_init(C, (3,)), values, labels, **options),
        running_mean_update(running_mean_init(C, (3,)), values, labels, update="epoch", **options),
        running_covariance_update(running_covariance_init(C, 3), values, labels, **options),
    )  # fmt: skip


@pytest.mark.parametrize("check_vma", [True, False])
def test_four_devices_have_the_statistics_of_one(check_vma):
    values, labels = draw()
    mesh, P = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]), PartitionSpec
    mapped = jax.shard_map(
        lambda v, y: statistics(v, y, "d"), mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P(), check_vma=check_vma
    )
    expected = statistics(values, np.sort(labels))
    got = jax.jit(mapped)(values, np.sort(labels))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_an_axis_of_vmap_is_like_devices():
    values, labels = draw()
    split = lambda x: x.reshape((4, 3) + x.shape[1:])
    got = jax.jit(jax.vmap(lambda v, y: statistics(v, y, "d"), axis_name="d"))(split(values), split(labels))
    expected = statistics(values, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2], b, rtol=1e-5, atol=1e-6), got, expected)
