"""perturbjax.data.batches: every sample once an epoch, the same order after resuming, augmentation sample by sample."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbjax.data import augment, epoch_order, evaluation_batches

SHAPE = (24, 5, 6, 3)
crop = jax.jit(augment, static_argnames=("pad", "flip"))


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


@pytest.fixture(params=["uint8", "bfloat16"])
def images(request):
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, SHAPE)).astype(request.param)  # no zero: padding shows


def crops(image, pad, flip):
    """All crops of one image (and their mirror images), made with numpy."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    height, width = image.shape[:2]
    out = [padded[y : y + height, x : x + width] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    return out + [crop[:, ::-1] for crop in out] if flip else out


@pytest.mark.parametrize(("pad", "flip"), [(2, True), (2, False), (0, True), (0, False)])
def test_each_image_becomes_one_of_its_crops(images, pad, flip):
    out = crop(images, jax.random.key(0), jnp.arange(24), pad=pad, flip=flip)
    assert out.shape == images.shape and out.dtype == images.dtype
    chosen = []
    for got, image in zip(np.asarray(out), np.asarray(images), strict=True):
        same = [np.array_equal(got, crop) for crop in crops(image, pad, flip)]
        assert sum(same) == 1
        chosen.append(same.index(True))
    assert len(set(chosen)) > 8 if pad else len(set(chosen)) == 1 + flip


def test_crops_and_flips_are_uniform():
    image = jnp.arange(1, 26, dtype=jnp.float32).reshape(1, 5, 5, 1)
    num, known = 9000, {np.asarray(crop).tobytes(): k for k, crop in enumerate(crops(np.asarray(image[0]), 1, True))}
    out = crop(jnp.broadcast_to(image, (num, 5, 5, 1)), jax.random.key(1), jnp.arange(num), pad=1, flip=True)
    counts = np.bincount([known[x.tobytes()] for x in np.asarray(out)], minlength=18)
    np.testing.assert_allclose(counts, num / 18, atol=5 * np.sqrt(num / 18))  # 5 standard deviations


def test_a_samples_draw_belongs_to_its_index_not_to_its_place(images):
    key, index = jax.random.key(3), jnp.arange(24) * 7
    f = lambda x, i: crop(x, key, i, pad=2, flip=True)
    whole, order = f(images, index), np.random.default_rng(0).permutation(24)
    np.testing.assert_array_equal(f(images[order], index[order]), whole[order])
    np.testing.assert_array_equal(jnp.concatenate([f(images[:12], index[:12]), f(images[12:], index[12:])]), whole)
    other = crop(images, jax.random.key(4), index, pad=2, flip=True)
    assert not np.array_equal(other, whole) and not np.array_equal(f(images, index + 1), whole)


def test_the_same_numbers_on_several_devices(images):
    devices = jax.devices()[: max(n for n in (1, 2, 4, 8) if n <= jax.device_count())]
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "d"), jax.sharding.PartitionSpec("d"))
    f = lambda x, i: crop(x, jax.random.key(0), i, pad=2, flip=True)
    split = f(jax.device_put(images, sharding), jax.device_put(jnp.arange(24), sharding))
    np.testing.assert_array_equal(split, f(images, jnp.arange(24)))


def test_augment_errors(images):
    key, index = jax.random.key(0), jnp.arange(24)
    with pytest.raises(ValueError, match=re.escape("got (5, 6, 3) and (24,). For one image, write images[None]")):
        augment(images[0], key, index, pad=2, flip=True)
    with pytest.raises(ValueError, match=re.escape("got (24, 5, 6, 3) and (3,)")):
        augment(images, key, index[:3], pad=2, flip=True)
    with pytest.raises(ValueError, match="pad >= 0, got -1"):
        augment(images, key, index, pad=-1, flip=True)
