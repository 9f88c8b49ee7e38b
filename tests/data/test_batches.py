"""perturbjax.data.batches: every sample once an epoch, the same order after resuming."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbjax.data import balanced_order, epoch_order, evaluation_batches


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_an_epoch_is_a_permutation_without_its_last_partial_batch(num, size, seed, epoch):
    if size > num:
        with pytest.raises(ValueError, match=rf"in 1..{num} \(the number of examples\), got {size}"):
            epoch_order(num, size, seed, epoch)
        return
    order = epoch_order(num, size, seed, epoch)
    assert order.shape == (num // size, size) and order.dtype == np.int32
    assert len(np.unique(order)) == order.size and order.min() >= 0 and order.max() < num
    np.testing.assert_array_equal(order, epoch_order(num, size, seed, epoch))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {epoch_order(100, 100, seed, epoch).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    left_out = {frozenset(range(10)) - frozenset(epoch_order(10, 4, 0, epoch).flat) for epoch in range(50)}
    assert len(left_out) > 20  # of 45 pairs: nobody is dropped for good


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((50, 128, 0, 0), "in 1..50 (the number of examples), got 128. Write batch_size=32"),
        ((50, 0, 0, 0), "got 0"),
        ((0, 8, 0, 0), "at least one example, got 0"),
        ((50, 8, -1, 0), "seed and epoch >= 0, got -1 and 0"),
    ],
)
def test_epoch_order_errors(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        epoch_order(*args)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50), st.integers(1, 50), st.integers(0, 9), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_balanced_epoch_has_all_classes_alike_and_each_sample_of_a_class_alike(labels, size, seed, epoch):
    labels, size = np.array(labels), min(size, len(labels))
    order = balanced_order(labels, size, seed, epoch)
    assert order.shape == epoch_order(len(labels), size, seed, epoch).shape and order.dtype == np.int32
    number = np.bincount(order.reshape(-1), minlength=len(labels))
    per_class = [number[labels == c].sum() for c in np.unique(labels)]
    assert max(per_class) - min(per_class) <= 1
    for c in np.unique(labels):
        assert np.ptp(number[labels == c]) <= 1
    np.testing.assert_array_equal(order, balanced_order(labels, size, seed, epoch))


def test_balanced_epochs_and_seeds_have_orders_of_their_own():
    labels = np.arange(90) % 3 // 2
    orders = {balanced_order(labels, 90, seed, epoch).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    first = [labels[balanced_order(labels, 9, 0, epoch)[0]].mean() for epoch in range(40)]
    assert np.std(first) > 0.05  # shuffled: single batches vary


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_evaluation_sees_every_sample_once_in_order(num, size):
    index, mask = evaluation_batches(num, size)
    assert index.shape == mask.shape == (-(-num // size), size) and (index.dtype, mask.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(index[mask == 1], np.arange(num))
    assert mask.sum() == num and (index[mask == 0] == num - 1).all()


def test_evaluation_errors():
    for args in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=f"got {args[0]} and {args[1]}"):
            evaluation_batches(*args)
