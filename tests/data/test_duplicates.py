"""perturbjax.data.duplicates: found exactly, told or refused by their share, dropped by the view."""

import csv
import dataclasses
import re

import numpy as np
import pytest

from perturbjax.data import (
    Dataset,
    apply_views,
    check,
    check_duplicates,
    drop_duplicates,
    find_copies,
    load,
    longtail,
    noise,
    validation,
    write_copies,
)

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
        "made: 1 of 200 test images are training images, bit for bit (first: training image 0, 'cat', is test image 10, "
        "'dog').",
        "made: 2 images are the same as one under another label, bit for bit, so that not both labels are right (first: training "
        "image 0, 'cat', is test image 10, 'dog').",
    )
    clean = made(0, dtype)
    assert check_duplicates(clean) is clean


@pytest.mark.parametrize("shared", [2, 20])
def test_one_percent_is_an_error(shared):
    message = f"under 1% known from training), got {shared} of 200 test images that are training images, bit for bit (first: "
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_duplicates(made(shared))
    assert "--view drop_duplicates+..." in str(error.value) and "or give another test set" in str(error.value)


def test_a_test_image_counts_once_and_a_near_one_does_not():
    train = np.concatenate([TRAIN[:59], TRAIN[:1]])  # image 0 twice
    test = TEST.copy()
    test[7] = TRAIN[0]
    test[8] = TRAIN[1]
    test[8, 0, 0, 0] ^= 1
    labels = np.arange(60) % 3
    labels[59] = 0
    d = check_duplicates(check(Dataset("x", train, labels, test, np.array([0] * 8 + [1, 2] * 96))))
    assert len(d.notes) == 2 and d.notes[0].startswith("x: 1 of 200 test images")
    assert d.notes[1] == "x: 1 of 60 training images are copies of others there, bit for bit."


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


def test_a_copy_among_sixty_thousand_images_is_found():
    images = np.random.default_rng(0).integers(0, 256, [60000, 32, 32, 3], dtype=np.uint8)
    images[50000] = images[7]
    labels = np.arange(60000) % 10
    d = check(Dataset("x", images[:50000], labels[:50000], images[50000:], labels[50000:]))
    assert "first: training image 7, '7', is test image 0" in check_duplicates(d).notes[0]


def test_the_digits_have_none():
    assert check_duplicates(load("digits")).notes == ()


def test_labels_play_no_part_but_for_the_note_on_them():
    d = made(1)
    other = dataclasses.replace(d, train_labels=(d.train_labels + 1) % 3)  # 'dog', as in the test set
    assert len(check_duplicates(other).notes) == 1


def repeating():
    """Nine training images: 0 = 3 = 5, 1 = 4; four test images: 0 = training 0, 2 = 3; two validation images: 0 = test 1."""
    train, test, validation = TRAIN[:9].copy(), TEST[:4].copy(), TEST[10:12].copy()
    train[3] = train[5] = train[0]
    train[4] = train[1]
    test[0], test[3], validation[0] = train[0], test[2], test[1]
    names = lambda letter, n: np.array([f"{letter}/{k}.png" for k in range(n)], dtype=object)
    return check(
        Dataset(
            "x", train, np.array([0, 1, 2, 0, 1, 2, 0, 1, 2]), test, np.array([1, 0, 2, 2]), ("cat", "dog", "hen"),
            validation_images=validation, validation_labels=np.array([0, 1]),
            train_names=names("a", 9), test_names=names("b", 4), validation_names=names("c", 2),
        )
    )  # fmt: skip


def test_every_copy_is_found_in_every_part():
    copies = find_copies(repeating())
    assert copies.first.tolist() == [0, 1, 2, 0, 1, 0, 6, 7, 8, 0, 10, 11, 11, 10, 14] and copies.starts == (0, 9, 13, 15)
    assert copies.pairs.tolist() == [[0, 3], [0, 5], [0, 9], [1, 4], [10, 13], [11, 12]]
    assert np.flatnonzero(copies.disputed).tolist() == [0, 3, 5, 9]  # cat, cat, hen, dog
    for part, (start, end) in {"train": (0, 9), "test": (9, 13), "validation": (13, 15)}.items():
        assert copies.labels[copies.of(part)].tolist() == getattr(repeating(), f"{part}_labels").tolist()
        assert (copies.of(part).start, copies.of(part).stop) == (start, end)


def test_the_list_has_every_copy_with_name_and_label_the_disputed_ones_first(tmp_path):
    write_copies(tmp_path / "x.csv", repeating())
    with open(tmp_path / "x.csv", newline="") as file:
        head, *rows = list(csv.reader(file))
    assert head == [*("part position name label".split()), *("copy_part copy_position copy_name copy_label".split()), "labels"]
    assert rows == [
        "train 0 a/0.png cat train 5 a/5.png hen different".split(),
        "train 0 a/0.png cat test 0 b/0.png dog different".split(),
        "train 0 a/0.png cat train 3 a/3.png cat same".split(),
        "train 1 a/1.png dog train 4 a/4.png dog same".split(),
        "test 1 b/1.png cat validation 0 c/0.png cat same".split(),
        "test 2 b/2.png hen test 3 b/3.png hen same".split(),
    ]
    plain = dataclasses.replace(repeating(), train_names=None, test_names=None, train_index=np.arange(9) + 20, source_size=None)
    write_copies(tmp_path / "x.csv", plain)
    assert "train,0,train_images[20],cat,test,0,test_images[0],dog,different" in (tmp_path / "x.csv").read_text()


def test_copies_are_told_by_their_parts_and_never_refused_for_their_labels():
    d = repeating()
    with pytest.raises(
        ValueError, match=r"got 1 of 4 test images.*training image 0 \(a/0.png\), 'cat', is test image 0 \(b/0.png\), 'dog'"
    ):
        check_duplicates(d)
    told = check_duplicates(d, refuse=False).notes
    assert told[0].startswith("x: 1 of 4 test images are training images, bit for bit") and told[1:] == (
        "x: 3 of 9 training images are copies of others there, bit for bit.",
        "x: 1 of 4 test images are copies of others there, bit for bit.",
        "x: 1 of 2 validation images are there elsewhere too, bit for bit.",
        "x: 4 images are the same as one under another label, bit for bit, so that not both labels are right (first: training image 0 "
        "(a/0.png), 'cat', is training image 5 (a/5.png), 'hen').",
    )
    only_training = dataclasses.replace(d, test_images=TEST[20:24], validation_images=None, validation_labels=None)
    assert [note[:6] for note in check_duplicates(only_training).notes] == ["x: 3 o", "x: 3 i"]  # whatever their labels


def test_dropping_takes_the_test_copy_where_a_class_has_no_other_training_image():
    d = repeating()
    alone = dataclasses.replace(d, train_labels=np.array([2, 1, 0, 2, 1, 2, 0, 1, 0]))  # all hens are in the test set
    dropped = check(drop_duplicates()(alone, 0))
    np.testing.assert_array_equal(dropped.train_images, d.train_images)
    np.testing.assert_array_equal(dropped.test_images, d.test_images[1:])
    assert dropped.test_labels.tolist() == [0, 2, 2] and dropped.test_names.tolist() == ["b/1.png", "b/2.png", "b/3.png"]
    assert dropped.notes[0] == (
        "x: 0 training images that are in the test or validation set were dropped. 1 there were, instead, that are the only training "
        "images of 'hen'."
    )
    check_duplicates(dropped)
    held = dataclasses.replace(
        alone, validation_images=d.test_images[:1], validation_labels=np.array([2]), validation_names=None
    )
    assert drop_duplicates()(held, 0).validation_images is None
    partly = dataclasses.replace(alone, train_labels=np.array([2, 1, 0, 2, 1, 1, 0, 1, 0]))  # one copy is a dog's
    assert drop_duplicates()(partly, 0).train_index.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]


def test_copies_within_the_training_set_are_dropped_on_demand_but_for_one_of_each_label():
    d = dataclasses.replace(repeating(), test_images=TEST[20:24])
    assert drop_duplicates()(d, 0).train_index.tolist() == list(range(9))
    once = drop_duplicates(within=True)(d, 0)
    assert once.train_index.tolist() == [0, 1, 2, 5, 6, 7, 8] and once.views == ("drop_duplicates(within=True)",)
    assert once.notes == (
        "x: 0 training images that are in the test or validation set were dropped. 2 copies within the training set were dropped.",
    )
    both = drop_duplicates(within=True)(repeating(), 0)
    assert both.train_index.tolist() == [1, 2, 6, 7, 8]
    assert both.notes[0].startswith("x: 3 training images that are in the test or validation set were dropped. 1 copies within")
