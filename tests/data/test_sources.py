"""perturbjax.data.sources: digits, every family of .npz keys, every unusable file."""

import pathlib
import re

import numpy as np
import pytest

from perturbjax.data import SOURCES, load

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, [30, 4, 4, 3], dtype=np.uint8), (np.arange(30) % 3).astype(np.int64)
SPLIT = {"train_images": IMAGES[:20], "train_labels": LABELS[:20], "test_images": IMAGES[20:], "test_labels": LABELS[20:]}


@pytest.fixture
def write(tmp_path):
    def write(save=np.savez, **arrays):
        save(tmp_path / "mine.npz", **arrays)
        return tmp_path / "mine.npz"

    return write


def test_digits_are_sklearns_split_once_and_for_all():
    from sklearn.datasets import load_digits

    d, source = load("digits"), load_digits()
    assert d.train_images.dtype == np.float32 and d.image_shape == (8, 8, 1) and d.class_names == tuple("0123456789")
    np.testing.assert_array_equal(d.train_images[..., 0] * 16, source.images[d.train_index])  # exact
    np.testing.assert_array_equal(d.train_labels, source.target[d.train_index])
    assert len(np.unique(d.train_index)) == len(d.train_index) == 1258 and d.source_size == 1797 and d.notes == ()
    rest = np.setdiff1d(np.arange(1797), d.train_index)  # the test set is all the others
    np.testing.assert_array_equal(d.test_images[..., 0] * 16, source.images[rest])
    np.testing.assert_array_equal(np.bincount(d.test_labels), np.rint(0.3 * np.bincount(source.target)))
    assert d.subset_hash == load("digits").subset_hash == "df80c53d505b"  # on every machine and version of numpy


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_split_keys_and_options(write, save):
    names = {"class_names": np.array(["a", "b", "c"]), "domain_names": np.array([b"x", b"y", b"z"])}
    domains = {"train_domains": np.arange(20) % 2, "test_domains": np.full(10, 2)}
    held = {"validation_images": IMAGES[:3], "validation_labels": LABELS[:3]}
    path = write(save, **SPLIT, **names, **domains, **held, train_index=np.arange(20) + 100, other=np.zeros(3))
    for name in (path, str(path)):
        d = load(name)
        assert (d.name, d.class_names, d.domain_names) == ("mine", ("a", "b", "c"), ("x", "y", "z"))
        for key in SPLIT:
            np.testing.assert_array_equal(getattr(d, key), SPLIT[key])
        np.testing.assert_array_equal(d.train_index, np.arange(20) + 100)
        assert d.source_size is None  # nothing says how long the set is that the file's train_index counts in
        np.testing.assert_array_equal(d.test_domains, np.full(10, 2))
        np.testing.assert_array_equal(d.validation_images, IMAGES[:3])


def test_keras_keys(write):
    path = write(x_train=IMAGES[:20], y_train=LABELS[:20, None], x_test=IMAGES[20:], y_test=LABELS[20:, None])
    d = load(path)
    assert d.source_size == 20
    np.testing.assert_array_equal(d.train_labels, LABELS[:20])
    np.testing.assert_array_equal(d.test_images, IMAGES[20:])


def test_single_set_is_split_by_class_and_domain(write):
    domains = np.repeat([0, 1], 15)
    d = load(write(images=IMAGES, labels=LABELS, domains=domains, class_names=np.array(["a", "b", "c"])))
    assert (len(d.train_labels), len(d.test_labels)) == (18, 12)  # round(0.3 · 5) = 2 of each of 6 strata
    np.testing.assert_array_equal(d.train_images, IMAGES[d.train_index])
    np.testing.assert_array_equal(d.train_domains, domains[d.train_index])
    rest = np.setdiff1d(np.arange(30), d.train_index)
    np.testing.assert_array_equal(d.test_images, IMAGES[rest])
    np.testing.assert_array_equal(np.bincount(d.test_labels * 2 + d.test_domains), [2] * 6)
    assert d.class_names == ("a", "b", "c") and d.domain_names == ("0", "1")
    plain = load(write(images=IMAGES, labels=LABELS))
    assert plain.train_domains is None and len(plain.test_labels) == 9
    assert plain.subset_hash == load(write(images=IMAGES, labels=LABELS)).subset_hash


def test_a_held_out_domain_file_loads_by_its_split(write):  # the keys of the PACS file
    whole = {"images": IMAGES, "labels": LABELS, "domains": np.arange(30) // 10}
    names = {"class_names": np.array(["a", "b", "c"]), "domain_names": np.array(["art", "photo", "sketch"])}
    d = load(write(**SPLIT, **whole, **names, train_domains=np.arange(20) // 10))
    np.testing.assert_array_equal(d.train_images, SPLIT["train_images"])
    np.testing.assert_array_equal(d.train_domains, np.arange(20) // 10)
    np.testing.assert_array_equal(d.test_domains, np.full(10, 2))  # what the training domains leave of the whole
    assert d.domain_names == ("art", "photo", "sketch")
    other = whole | {"labels": np.roll(LABELS, 1)}  # not the whole of these parts: their domains are unknown
    assert load(write(**SPLIT, **other, **names, train_domains=np.arange(20) // 10)).test_domains is None


def test_errors_count_positions_in_the_whole_single_set(write):
    with pytest.raises(ValueError, match=re.escape("labels of mine in 0..2, got 9 at position 25 (1 such labels)")):
        load(write(images=IMAGES, labels=np.where(np.arange(30) == 25, 9, LABELS), class_names=np.array(list("abc"))))
    with pytest.raises(ValueError, match="one for each of the 30 images, got 29"):
        load(write(images=IMAGES, labels=LABELS[:29]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({k: SPLIT[k] for k in list(SPLIT)[:2]}, "got train_images, train_labels in"),
        ({k: SPLIT[k] for k in list(SPLIT)[:2]}, "Add test_images and test_labels: np.savez(path, train_images=..."),
        ({"X": IMAGES, "y": LABELS}, "test_labels; or x_train, y_train, x_test, y_test; or images, labels, got X, y"),
        ({"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES}, "Add y_test: np.savez(path, x_train=..."),
        ({}, "got no array at all"),
        ({"train_text": IMAGES, "train_labels": LABELS}, "Add test_text and test_labels: np.savez(path, train_text=..., train_labels=..."),
        (SPLIT | {"train_labels": LABELS[:20].astype(object)}, "got Python objects (dtype object)"),
        (SPLIT | {"class_names": np.array(["a", "b", "c"], object)}, "got Python objects (dtype object)"),
        (SPLIT | {"train_images": IMAGES[:20].astype(np.int16)}, "got dtype int16"),
        (SPLIT | {"train_images": IMAGES[:20] * (1 + 0j)}, "got dtype complex128"),
    ],
)  # fmt: skip
def test_unusable_arrays(write, arrays, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(write(**arrays))


def test_unknown_names_get_the_nearest_one(write, monkeypatch):
    folder = write(**SPLIT).parent
    with pytest.raises(
        ValueError, match=re.escape("a folder of images or a CIFAR archive, got 'digit'. Did you mean load('digits')?")
    ):
        load("digit")
    message = "load needs 'digits', 'cifar10', 'cifar100', 'tfds:NAME' or the path of an .npz file, a folder of images or a "
    with pytest.raises(ValueError, match=re.escape(message + "CIFAR archive, got 'imagenet'. Write load(\"digits\"), load(")):
        load("imagenet")
    with pytest.raises(ValueError, match=re.escape("Did you mean load('cifar100')?")):
        load("cifar-100")
    with pytest.raises(FileNotFoundError, match=re.escape(f"Did you mean load({str(folder / 'mine.npz')!r})?")):
        load(folder / "Mine2.npz")
    with pytest.raises(FileNotFoundError, match="got 'nowhere/x.npz', where there is none. Check the path"):
        load(pathlib.Path("nowhere/x.npz"))
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=re.escape("Did you mean load('mine.npz')?")):
        load("MINE")
    (folder / "photos").mkdir()
    with pytest.raises(ValueError, match=re.escape("Did you mean load('photos')?")):
        load("photo")
    assert tuple(SOURCES) == ("digits", "cifar10", "cifar100")


def test_files_that_are_no_npz(tmp_path):
    path = tmp_path / "x.npz"
    for content, message in ((b"", "which is empty"), (b"hello", "which starts with b'hell'"), (b"\x93NUMPY", "np.savez")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            load(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_never_load_as_something_else(write, save):
    path = write(save, **SPLIT)
    whole, good = path.read_bytes(), load(path)
    for length in range(4, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged or cut short"):
            load(path)
    for position in range(0, len(whole), 23):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            d = load(path)
        except ValueError as error:
            assert str(error).startswith("load needs")
        else:  # a byte that nobody reads
            for key in SPLIT:
                np.testing.assert_array_equal(getattr(d, key), getattr(good, key))
