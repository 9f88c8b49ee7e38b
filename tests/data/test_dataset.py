"""perturbjax.data.dataset: what a data set knows about itself, and every error before training."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbjax.data import Dataset, agreement, check, dataset
from perturbjax.data.agreement import check_ranges
from perturbjax.data.dataset import draw, stratified


def small(**changes):
    """Twelve 4x4x3 images of three classes; not yet checked."""
    rng = np.random.default_rng(0)
    base = {
        "name": "small",
        "train_images": rng.integers(0, 256, [12, 4, 4, 3], dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": rng.integers(0, 256, [6, 4, 4, 3], dtype=np.uint8),
        "test_labels": np.arange(6) % 3,
    }
    return Dataset(**(base | changes))


def test_normal_form_and_properties():
    d = check(small(class_names=["a", b"b", np.str_("c")], train_labels=np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2])))
    assert (d.num_classes, d.class_names, d.image_shape) == (3, ("a", "b", "c"), (4, 4, 3))
    np.testing.assert_array_equal(d.class_counts, [7, 4, 1])
    np.testing.assert_array_equal(d.train_index, np.arange(12))
    np.testing.assert_array_equal(d.true_labels, d.train_labels)
    for array in (d.train_labels, d.test_labels, d.true_labels, d.train_index):
        assert array.dtype == np.int32
    assert not d.flipped.any() and d.flipped.dtype == bool and d.views == d.notes == () and d.source_size == 12
    assert repr(d) == "small: 12 training and 6 test images of 4x4x3 uint8, 3 classes of 1 to 7"


def test_check_twice_is_check_once():
    once = check(small(train_domains=np.arange(12) % 2, validation_images=small().test_images, validation_labels=[0] * 6))
    for field in dataclasses.fields(Dataset):
        np.testing.assert_array_equal(getattr(check(once), field.name), getattr(once, field.name))


def test_accepted_forms():
    d = check(small())
    keras = check(small(train_labels=np.arange(12, dtype=np.uint8)[:, None] % 3))  # labels [N, 1]
    np.testing.assert_array_equal(keras.train_labels, d.train_labels)
    grey = check(small(train_images=d.train_images[..., 0], test_images=d.test_images[..., 0]))
    assert grey.image_shape == (4, 4, 1)
    wide = check(small(train_images=d.train_images / 255, test_images=d.test_images / 255))  # float64
    assert wide.train_images.dtype == np.float32 and wide.class_names == ("0", "1", "2")
    listed = check(small(train_labels=[0, 1, 2] * 4, test_labels=[0] * 6))
    np.testing.assert_array_equal(listed.train_labels, d.train_labels)


@pytest.mark.parametrize("num", [12, 2500])  # less and more than a block
def test_channel_stats_are_those_of_all_pixels(num):
    images = np.random.default_rng(1).integers(0, 256, [num, 4, 4, 3], dtype=np.uint8)
    labels = np.arange(num) % 3
    for factor, dtype, tol in ((1, np.uint8, 1e-12), (255, np.float32, 1e-6)):
        d = check(small(train_images=(images / factor).astype(dtype), train_labels=labels,
                        test_images=(images / factor).astype(dtype), test_labels=labels))  # fmt: skip
        mean, std = d.channel_stats()
        np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=tol)
        np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=tol)
        assert all(type(x) is float for x in mean + std)


def test_a_mapped_file_stays_one_and_is_never_copied(tmp_path, monkeypatch):
    images = np.random.default_rng(1).integers(0, 256, [300, 4, 4, 3], dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    parts = dict(
        train_images=mapped[:200], train_labels=np.arange(200) % 3, test_images=mapped[200:], test_labels=np.zeros(100, int)
    )
    d = check(small(**parts))
    for part in (d.train_images, d.test_images):
        assert type(part) is np.memmap and np.shares_memory(part, mapped)
    assert type(check(d).train_images) is np.memmap
    whole = d.channel_stats()
    plain = check(
        small(
            train_images=images[..., 0][:200],
            train_labels=np.arange(200) % 3,
            test_images=images[..., 0][200:],
            test_labels=[0] * 100,
        )
    )
    assert np.shares_memory(check(plain).train_images, plain.train_images) and plain.image_shape == (4, 4, 1)
    monkeypatch.setattr(dataset, "BLOCK_VALUES", 50)  # of large images, one at a time
    assert [part.stop - part.start for part in dataset.in_blocks(mapped)] == [1] * 300
    np.testing.assert_allclose(d.channel_stats(), whole, rtol=1e-12)


def test_a_constant_channel_has_no_deviation():
    assert check(small(train_images=np.full([12, 4, 4, 3], 77, np.uint8))).channel_stats()[1] == (0.0, 0.0, 0.0)


def test_subset_hash_names_samples_labels_and_test_labels():
    d = check(small())
    changed = [
        d,
        dataclasses.replace(d, train_index=d.train_index[::-1]),
        dataclasses.replace(d, train_labels=(d.train_labels + 1) % 3),
        dataclasses.replace(d, test_labels=(d.test_labels + 1) % 3),
        dataclasses.replace(d, test_labels=d.test_labels[:5]),
    ]
    hashes = [x.subset_hash for x in changed]
    assert len(set(hashes)) == 5 and all(re.fullmatch("[0-9a-f]{12}", h) for h in hashes)
    assert dataclasses.replace(d, name="other", train_images=d.train_images + 1).subset_hash == d.subset_hash
    assert d.subset_hash == "eb612deaf062"  # the same on every machine and version


def test_parts_of_different_ranges_are_told_once_with_both_ranges():
    for dtype, scale in ((np.float64, 255), (np.float32, 16)):  # divided once more
        train, test = (TRAIN / 255).astype(dtype), (TEST / 255 / scale).astype(dtype)
        d = check(small(train_images=train, test_images=test, notes=("before",)))
        [note] = d.notes[1:]
        assert d.notes[0] == "before" and note.startswith(
            "small: value ranges differ: train_images 0 to 1, test_images 0 to 0."
        )
        assert check(d).notes == d.notes
        assert check(dataclasses.replace(d, test_images=d.train_images[:6])).notes == ("before",)
    black = check(small(test_images=np.zeros([6, 4, 4, 3], np.uint8)))
    assert black.notes[0].startswith("small: value ranges differ: train_images 0 to 255, test_images 0 to 0.")
    held = dict(validation_images=TEST // 16, validation_labels=np.zeros(6, int))
    assert "test_images 0 to 254, validation_images 0 to 15." in check(small(**held)).notes[0]
    for same in (
        {},
        {"train_images": TRAIN // 2, "test_images": TEST},
        {"train_images": TRAIN // 128, "test_images": TEST // 128},
    ):
        assert check(small(**same)).notes == ()


def test_a_range_is_that_of_images_at_equal_distances_of_a_large_set(monkeypatch):
    images = np.zeros([10, 2, 2], np.uint8)
    images[::3] = 200
    monkeypatch.setattr(agreement, "SAMPLED", 4)
    assert check_ranges("x", {"train_images": images, "test_images": images[::3]}) is None
    assert "train_images 0 to 0, test_images 200 to 201" in check_ranges(
        "x", {"train_images": images[1:3], "test_images": images[::3] + np.arange(4, dtype=np.uint8)[:, None, None] // 3}
    )


def test_a_class_without_a_test_sample_is_named_once():
    labels = np.array([0, 1, 2, 0, 1, 1] * 2)
    d = check(small(train_labels=labels, test_labels=np.zeros(6, int), class_names=("cat", "dog", "hen")))
    [note] = d.notes
    assert note.startswith("small: not tested, for want of test images: 2 of 3 classes: 'dog' (6 in training), 'hen' (2 ")
    assert check(d).notes == d.notes
    fewer = check(dataclasses.replace(d, test_labels=np.array([0, 1, 0, 0, 0, 0])))
    assert (
        "1 of 3 classes: 'hen' (2 in training). No number says how well they are learnt. Add some" in fewer.notes[0]
        and len(fewer.notes) == 1
    )
    many = check(Dataset("x", np.zeros([30, 2, 2], np.uint8), np.arange(30), np.zeros([1, 2, 2], np.uint8), np.zeros(1, int)))
    assert (
        "29 of 30 classes: '1' (1 in training)" in many.notes[0]
        and "'10' (1 in training) and 19 more." in many.notes[0]
        and "single" in many.notes[0]
    )


def test_four_channels_are_told_until_they_are_three():
    images = np.random.default_rng(0).integers(0, 256, [12, 6, 6, 4], dtype=np.uint8)
    d = check(small(train_images=images, test_images=images[:6]))
    assert d.image_shape == (6, 6, 4) and d.notes[0].startswith(
        "small: the images have 4 channels, and all of them are trained on"
    )
    assert len(check(d).notes) == 1
    three = check(dataclasses.replace(d, train_images=d.train_images[..., :3], test_images=d.test_images[..., :3]))
    assert three.notes == ()


NAN = np.zeros([12, 4, 4, 3])
NAN[3, 0, 0, 0], NAN[5, 1, 1, 1] = np.nan, np.inf
TWO = {"train_images": np.zeros([0, 4, 4, 3], np.uint8), "train_labels": np.zeros(0, int)}
TRAIN, TEST = small().train_images, small().test_images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([0, 1, 2, 7, 0, 1, 2, 7, 0, 1, 2, 0]), "class_names": "abc"},
         "train_labels of small in 0..2, got 7 at position 3 (2 such labels)"),
        ({"train_labels": np.array([0, 1, 2, 0, -1, 1, 2, 0, 0, 1, 2, 0])}, "got -1 at position 4 (1 such labels)"),
        ({"test_labels": np.array([0, 1, 2, 3, 0, 1]), "class_names": "abc"}, "test_labels of small in 0..2, got 3 at"),
        ({"train_labels": np.array([0, 1, 10**9] * 4)}, "got 1000000000 at position 2"),
        ({"train_labels": np.array([0, 1, 2**40] * 4)}, f"got {2**40} at position 2"),
        ({"train_labels": np.arange(12) % 3 + 1}, "got none of class 0 ('0'; 1 such classes)"),
        ({"train_labels": np.arange(12) % 3 + 1}, "labels - 1"),
        ({"class_names": "abcd"}, "got none of class 3 ('d'; 1 such classes)"),
        ({"train_labels": np.arange(12) % 3 * 1.0}, "as integers, got dtype float64. Write labels.astype(np.int32)"),
        ({"train_labels": np.array(["a", "b", "c"] * 4)}, "np.unique(labels, return_inverse=True)[1] for names"),
        ({"train_labels": np.eye(3, dtype=int)[np.arange(12) % 3]}, "got shape [12, 3]. Write labels.argmax(-1)"),
        ({"train_labels": np.arange(11) % 3}, "one for each of the 12 images, got 11"),
        ({"test_labels": np.arange(5) % 3}, "one for each of the 6 images, got 5"),
        ({"train_labels": np.zeros(12, int), "test_labels": np.zeros(6, int)}, "at least 2 classes of small, got 1"),
        ({"train_images": NAN}, "finite train_images of small, got 2 pixels that are not, the first in image 3"),
        ({"train_images": TRAIN.astype(np.int64)}, "got dtype int64. Write images.astype(np.uint8)"),
        ({"train_images": TRAIN > 9}, "got dtype bool. Write images.astype(np.float32) for"),
        ({"train_images": TRAIN * 1.0}, "write images / 255"),
        ({"train_images": TRAIN / 16.0}, "got 0 to 15.9375. They look like 0..16 (scikit-learn's digits): write"),
        ({"train_images": TRAIN / 127.5 - 1}, "They look normalised already"),
        ({"train_images": TRAIN / 250.0}, "got 0 to 1.02. Write np.clip(images, 0, 1)"),
        ({"train_images": TRAIN / 254.99999}, "got 0 to 1.00000004. Write np.clip(images, 0, 1)"),
        ({"train_images": TRAIN / 255 - 0.01, "test_images": TEST / 255}, "(float64). Write np.clip(train_images, 0, 1), if these"),
        ({"train_images": TRAIN / 250.0, "test_images": TEST / 255}, "got 0 to 1.02 (float64) and 0 to 0.996 (float64). Write np.clip("),
        ({"train_images": TRAIN * 257.0}, "Write images / 65535."),
        ({"train_images": TRAIN.reshape(12, -1)}, "got shape [12, 48]. Write images.reshape(-1, H, W, channels)"),
        ({"train_images": np.zeros([12, 3, 8, 8], np.uint8)}, "channels last, got shape [12, 3, 8, 8]"),
        ({"train_images": TRAIN[..., :0]}, "got shape [12, 4, 4, 0]"),
        ({"test_images": TEST / 255}, "in one range, got 0 to 255 (uint8) and 0 to 0.996 (float64). Write train_images / 255."),
        ({"test_images": TEST / 2.0 + 0.0, "train_images": TRAIN / 255}, "0 to 127 (float64). Write test_images / 255."),
        ({"test_images": TEST // 128}, "got 0 to 255 (uint8) and 0 to 1 (uint8). test_images looks divided by 255 before it"),
        ({"test_images": TEST / 255 - 1, "train_images": TRAIN / 255}, "(float64). test_images looks normalised: give the raw"),
        ({"validation_images": TEST / 2.0, "validation_labels": np.zeros(6, int), "train_images": TRAIN / 255,
          "test_images": TEST / 255}, "train_images and validation_images of small in one range, got 0 to 1 (float64) and 0 to 127"),
        ({"train_images": np.zeros([12, 3, 6, 8], np.uint8)}, "which has them first. Write images.transpose(0, 2, 3, 1); if these"),
        ({"train_images": np.zeros([12, 4, 8, 8], np.uint8)}, "channels last, got shape [12, 4, 8, 8], which has them first"),
        ({"train_images": np.zeros([12, 10, 64, 64], np.uint8)}, "which has them first"),
        ({"train_images": np.zeros([12, 1, 100, 12], np.uint8)}, "1x100 pixels of 12 channels, images.transpose(0, 2, 1, 3)."),
        ({"test_images": TEST[:, :2]}, "got [2, 4, 3] uint8"),
        ({"test_images": TEST[:0], "test_labels": np.zeros(0, int)}, "test_images of small with at least one"),
        (TWO, "train_images of small with at least one image, got none"),
        ({"validation_images": TEST}, "got validation_images only. Give validation_labels too"),
        ({"validation_labels": np.zeros(6, int)}, "got validation_labels only. Give validation_images too"),
        ({"validation_images": TEST, "validation_labels": np.full(6, 3)}, "validation_labels of small in 0..2, got 3"),
        ({"validation_images": TEST[:, :2], "validation_labels": np.zeros(6, int)}, "validation_images of small like"),
        ({"train_domains": np.zeros(5, int)}, "train_domains of small, one for each of the 12 images, got 5"),
        ({"test_domains": np.full(6, 2), "domain_names": ("x", "y")}, "test_domains of small in 0..1, got 2"),
        ({"train_index": np.arange(12) + 9, "source_size": 20}, "train_index of small in 0..19 for source_size 20, got 9 to 20"),
        ({"train_index": np.arange(12) - 1, "source_size": 20}, "got -1 to 10. Give the size"),
        ({"train_names": np.array(["x"] * 5, object)}, "train_names of small, one for each of the 12 samples, got 5"),
        ({"validation_names": np.array(["x"] * 5, object)}, "validation_names of small, one for each of the 0 samples, got 5"),
        ({"train_index": np.arange(5)}, "train_index of small as 12 integers, got int64 [5]"),
        ({"true_labels": np.full(12, 3)}, "true_labels of small in 0..2, got 3 at position 0 (12 such labels)"),
    ],
)  # fmt: skip
def test_errors_say_what_was_found_and_what_to_write(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(small(**changes))


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.lists(st.integers(0, 8), min_size=5, max_size=5),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_draw_takes_each_groups_quota_once(groups, quota, seed):
    groups, quota = np.array(groups), np.array(quota)
    drawn = draw(groups, quota, np.random.default_rng(seed))
    assert (np.diff(drawn) > 0).all()  # sorted, none twice
    np.testing.assert_array_equal(np.bincount(groups[drawn], minlength=5), np.minimum(np.bincount(groups, minlength=5), quota))
    assert np.isin(draw(groups, quota // 2, np.random.default_rng(seed)), drawn).all()  # nested


def test_draw_is_uniform():
    groups, hits = np.array([0] * 6 + [1] * 2), np.zeros(8)
    for seed in range(1500):
        hits[draw(groups, np.array([3, 1]), np.random.default_rng(seed))] += 1
    np.testing.assert_allclose(hits / 1500, 0.5, atol=0.065)  # 5 standard deviations of a mean of 1500


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40), st.floats(0.01, 0.99), st.integers(0, 9)
)
@settings(deadline=None, max_examples=50)
def test_stratified_share_of_every_class_in_every_domain(pairs, share, seed):
    labels, domains = np.array(pairs).T
    held = stratified(share, labels, domains, np.random.default_rng(seed))
    for c, d in set(pairs):
        here = (labels == c) & (domains == d)
        want = 0 if here.sum() == 1 else min(max(round(share * here.sum()), 1), here.sum() - 1)
        assert held[here].sum() == want
