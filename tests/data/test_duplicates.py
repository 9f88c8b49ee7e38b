"""perturbjax.data.duplicates: found exactly, told or refused by their share, dropped by the view."""

import dataclasses
import re
import time

import numpy as np
import pytest

from perturbjax.data import Dataset, apply_views, check, check_duplicates, drop_duplicates, load, longtail, noise, validation

RNG = np.random.default_rng(0)
TRAIN, TEST = (RNG.integers(0, 256, [n, 4, 4, 3], dtype=np.uint8) for n in (60, 200))


def made(shared, dtype=np.uint8, **extra):
    """60 training and 200 test images of three classes; test image 10 + k is training image 2k for k < shared."""
    test = TEST.copy()
    test[10 : 10 + shared] = TRAIN[: 2 * shared : 2]
    scale = lambda x: x if dtype == np.uint8 else (x / 255).astype(dtype)
    names = ("cat", "dog", "hen")
    return check(Dataset("made", scale(TRAIN), np.arange(60) % 3, scale(test), np.arange(200) % 3, names, **extra))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_under_one_percent_is_a_note(dtype):
    d = check_duplicates(made(1, dtype, notes=("before",)))
    assert d.notes == (
        "before",
        "made: 1 of 200 test images, which are training images bit for bit (first: training image 0, 'cat', is test image 10, "
        "'dog').",
    )
    clean = made(0, dtype)
    assert check_duplicates(clean) is clean


@pytest.mark.parametrize("shared", [2, 20])
def test_one_percent_is_an_error(shared):
    message = f"under 1% known from training), got {shared} of 200 test images, which are training images bit for bit (first: "
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_duplicates(made(shared))
    assert "--view drop_duplicates+..." in str(error.value) and "or give another test set" in str(error.value)


def test_a_test_image_counts_once_and_a_near_one_does_not():
    train = np.concatenate([TRAIN[:59], TRAIN[:1]])  # image 0 twice
    test = TEST.copy()
    test[7] = TRAIN[0]
    test[8] = TRAIN[1]
    test[8, 0, 0, 0] ^= 1
    d = check_duplicates(check(Dataset("x", train, np.arange(60) % 3, test, np.arange(200) % 3)))
    assert len(d.notes) == 1 and d.notes[0].startswith("x: 1 of 200 test images")


def test_dropping_removes_exactly_them_and_comes_before_the_check():
    d = made(20)
    view = drop_duplicates()
    dropped = view(d, 0)
    np.testing.assert_array_equal(dropped.train_index, np.setdiff1d(np.arange(60), np.arange(0, 40, 2)))
    np.testing.assert_array_equal(dropped.train_images, d.train_images[dropped.train_index])
    np.testing.assert_array_equal(dropped.test_images, d.test_images)
    assert dropped.views == ("drop_duplicates()",) and dropped.source_size == 60
    assert dropped.notes == ("made: 20 training images that are in the test or validation set were dropped.",)
    assert check_duplicates(dropped) is dropped
    chain = apply_views(d, [drop_duplicates(), longtail(2), noise("pair", 0.1)], 0)
    assert check_duplicates(check(chain)).notes == dropped.notes


def test_dropping_nothing_keeps_everything():
    d = drop_duplicates()(made(0), 0)
    assert d.train_images is not None and len(d.train_labels) == 60
    assert d.notes == ("made: 0 training images that are in the test or validation set were dropped.",)


def test_images_of_the_validation_set_are_dropped_too():
    train = np.concatenate([TRAIN, TRAIN[:30]])
    d = validation(0.3)(check(Dataset("x", train, np.arange(90) % 3, TEST, np.arange(200) % 3)), 0)
    dropped = drop_duplicates()(d, 0)
    held = {image.tobytes() for image in d.validation_images}
    assert not held & {image.tobytes() for image in dropped.train_images}
    assert len(dropped.train_labels) == sum(image.tobytes() not in held for image in d.train_images)
    assert len({image.tobytes() for image in dropped.train_images}) < len(dropped.train_labels)  # repeated ones stay


def test_a_test_set_that_is_the_training_set():
    d = check(Dataset("x", TRAIN, np.arange(60) % 3, TRAIN, np.arange(60) % 3))
    with pytest.raises(ValueError, match="got 60 of 60 test images"):
        check_duplicates(d)
    with pytest.raises(ValueError, match=r"got 60 duplicates among 60, without which class 0 \('0'\) has none. Give another"):
        drop_duplicates()(d, 0)


def test_sixty_thousand_images_take_less_than_a_second():
    images = np.random.default_rng(0).integers(0, 256, [60000, 32, 32, 3], dtype=np.uint8)
    images[50000] = images[7]
    labels = np.arange(60000) % 10
    d = check(Dataset("x", images[:50000], labels[:50000], images[50000:], labels[50000:]))
    start = time.process_time()  # not the wall clock: others may use the machine
    assert "first: training image 7, '7', is test image 0" in check_duplicates(d).notes[0]
    assert time.process_time() - start < 1


def test_the_digits_have_none():
    assert check_duplicates(load("digits")).notes == ()


def test_labels_play_no_part():
    d = made(1)
    other = dataclasses.replace(d, train_labels=(d.train_labels + 1) % 3)
    assert len(check_duplicates(other).notes) == 1
