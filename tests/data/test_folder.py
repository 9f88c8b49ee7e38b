"""perturbjax.data.folder: layouts, modes, sizes, the file for large sets, and every folder that can't be read."""

import os
import re
import time

import numpy as np
import pytest
from PIL import Image

from perturbjax.data import (
    apply_views,
    check,
    decode,
    drop_duplicates,
    images,
    leave_out,
    load,
    longtail,
    noise,
    thin,
    validation,
)
from perturbjax.data import folder as module
from perturbjax.data.domains import pooled

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def photos(write):
    """A folder with 10 images of each of two classes, and the images by their name."""
    made = {f"{name}/{n}.png": pixels(4, 5, 3) for name in ("dog", "cat") for n in range(10)}
    for name, image in made.items():
        root = write(name, image)
    return root, made


def test_classes_are_folders_and_a_test_set_is_split_off(photos):
    root, made = photos
    for name in (root, str(root), f"{root}/"):
        d = load(name)
        assert (d.name, d.class_names, d.image_shape, d.source_size, d.notes) == ("photos", ("cat", "dog"), (4, 5, 3), 20, ())
        source = np.stack([made[name] for name in sorted(made)])
        rest = np.setdiff1d(np.arange(20), d.train_index)
        np.testing.assert_array_equal(d.train_images, source[d.train_index])
        np.testing.assert_array_equal(d.test_images, source[rest])
        np.testing.assert_array_equal(d.train_labels, d.train_index // 10)
        np.testing.assert_array_equal(np.bincount(d.test_labels), [3, 3])
        assert d.train_domains is None and d.train_images.dtype == np.uint8 and len(d.train_labels) == 14


def test_a_single_image_of_a_class_is_trained_on_and_said_not_to_be_tested(photos, write):
    root = write("hen/1.png", pixels(4, 5, 3))
    d = load(root)
    assert d.class_names == ("cat", "dog", "hen") and d.class_counts.tolist() == [7, 7, 1]
    np.testing.assert_array_equal(np.bincount(d.test_labels, minlength=3), [3, 3, 0])
    assert d.notes == (
        "photos: not tested, for want of test images: 1 of 3 classes: 'hen' (1 in training). No number says how well they "
        "are learnt. A single sample can be trained on only: add some.",
    )


def test_folders_whose_names_differ_in_case_only_are_told(photos, write):
    """Two classes all the same: the letters A and a are."""
    d = load(write("Cat/1.png", pixels(4, 5, 3)))
    assert (
        len(d.class_names) == 3
        and "photos: 'Cat' and 'cat' are different classes. Rename the folders if they are one." in d.notes
    )


def test_names_stay_beside_their_images_through_all_views(write):
    made = {f"{d}/{c}/{n}.png": pixels(3, 3, 3) for d in ("art", "photo") for c in ("a", "b") for n in range(10)}
    for name, image in made.items():
        root = write(name, image)
    write("art/a/10.png", made["photo/a/9.png"]), write("art/a/11.png", made["photo/a/9.png"])
    d = load(root)
    chains = (
        [],
        [leave_out("photo")],
        [validation(0.3), thin(3)],
        [longtail(3)],
        [drop_duplicates(within=True), noise("pair", 0.2)],
    )
    for views in chains:
        made_of = apply_views(d, views, 0)
        for part in ("train", "test", "validation"):
            found = getattr(made_of, f"{part}_images")
            assert (found is None) == (getattr(made_of, f"{part}_names") is None)
            for name, image in zip(getattr(made_of, f"{part}_names"), found, strict=True) if found is not None else ():
                np.testing.assert_array_equal(image, made.get(name, made["photo/a/9.png"]), err_msg=name)
        assert len(check(made_of).train_names) == len(made_of.train_labels)
    whole = pooled(d)
    assert sorted(whole.train_names) == sorted([*made, "art/a/10.png", "art/a/11.png"])
    np.testing.assert_array_equal(whole.train_images[whole.train_names.tolist().index("photo/b/3.png")], made["photo/b/3.png"])


def test_the_same_split_as_of_the_same_arrays_in_an_npz(photos, tmp_path):
    root, made = photos
    np.savez(tmp_path / "same.npz", images=np.stack([made[name] for name in sorted(made)]), labels=np.repeat([0, 1], 10))
    assert load(root).subset_hash == load(tmp_path / "same.npz").subset_hash


def test_domains(write):
    made = {f"{d}/{c}/{n}.png": pixels(3, 3, 3) for d in ("photo", "art") for c in ("a", "b") for n in range(4)}
    for name, image in made.items():
        root = write(name, image)
    d = load(root)
    assert d.domain_names == ("art", "photo") and d.class_names == ("a", "b")
    names = np.array(sorted(made))[d.train_index]
    for n, name in enumerate(names):
        assert name.startswith(f"{d.domain_names[d.train_domains[n]]}/{d.class_names[d.train_labels[n]]}/")
        np.testing.assert_array_equal(d.train_images[n], made[name])
    np.testing.assert_array_equal(np.bincount(d.test_domains * 2 + d.test_labels), [1] * 4)


@pytest.mark.parametrize("test, val", [("test", "val"), ("testing", "validation"), ("Test", "valid")])
def test_splits(write, test, val):
    made = {f"{s}/{c}/{n}.png": pixels(3, 3, 3) for s in ("train", test, val) for c in ("a", "b") for n in range(3)}
    for name, image in made.items():
        root = write(name, image)
    d = load(root)
    of = lambda split: np.stack([made[name] for name in sorted(made) if name.startswith(split + "/")])
    for part, split in (("train", "train"), ("test", test), ("validation", val)):
        np.testing.assert_array_equal(getattr(d, f"{part}_images"), of(split))
        np.testing.assert_array_equal(getattr(d, f"{part}_labels"), [0, 0, 0, 1, 1, 1])
    assert d.notes == () and d.domain_names == () and d.source_size == 6
    np.testing.assert_array_equal(d.train_index, np.arange(6))


def test_validation_is_the_test_set_where_there_is_no_other(write):
    for split in ("train", "val"):
        for c in "ab":
            root = write(f"{split}/{c}/1.JPEG", pixels(4, 4, 3))
    d = load(root)
    assert d.validation_images is None and len(d.test_labels) == 2
    assert d.notes == ("photos has no test set: its validation set (2 images) is used as the test set.",)


def test_a_train_folder_alone_is_split(write):
    for c in "ab":
        for n in range(4):
            root = write(f"train/{c}/{n}.png", pixels(4, 4, 3))
    d = load(root)
    assert (len(d.train_labels), len(d.test_labels), d.domain_names, d.source_size) == (6, 2, (), 8)


def test_whole_numbers_are_in_order_of_their_value(write):
    for name in ("10", "9", "0"):
        for n in range(2):
            root = write(f"{name}/{n}.png", np.full([2, 2], int(name), np.uint8))
    d = load(root)
    assert d.class_names == ("0", "9", "10")
    np.testing.assert_array_equal(d.train_images[:, 0, 0, 0], [0, 9, 10])
    assert module.in_order({"10", "9", "x"}) == ("10", "9", "x") and module.in_order({"b", "B", "a"}) == ("B", "a", "b")


def test_a_class_may_be_called_train(write):
    for name in ("train", "ship"):
        for n in range(2):
            root = write(f"{name}/{n}.png", pixels(2, 2))
    assert load(root).class_names == ("ship", "train")


def test_grey_images_have_one_channel(write):
    grey = pixels(4, 4)
    for n in range(2):
        write(f"a/{n}.png", grey)
        root = write(f"b/{n}.png", Image.fromarray(grey).convert("1" if n else "LA"))
    d = load(root)
    assert d.image_shape == (4, 4, 1)
    np.testing.assert_array_equal(d.train_images[0, ..., 0], grey)


@pytest.mark.parametrize("first", [True, False])  # the order in which grey and colour come
def test_one_colour_image_makes_all_of_them_rgb(write, first):
    grey, colour = pixels(4, 4), pixels(4, 4, 3)
    for n in range(2):
        write(f"a/{n}.png", colour if first else grey)
        root = write(f"b/{n}.png", grey if first else colour)
    d = load(root)
    want = [colour, np.repeat(grey[..., None], 3, 2)]
    np.testing.assert_array_equal(d.train_images, want if first else want[::-1])


def test_modes_formats_and_alpha_become_rgb(write):
    colour = np.repeat(np.repeat(pixels(2, 2, 3), 4, 0), 4, 1)  # blocks: JPEG keeps them
    image = Image.fromarray(colour)
    write("a/rgb.png", image), write("a/rgba.png", image.convert("RGBA")), write("a/x.bmp", image)
    write("a/x.webp", image, lossless=True)
    write("a/x.tiff", image), write("a/x.ppm", image)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    write("b/palette.gif", palette), write("b/palette.png", palette)
    write("b/palette_bytes.png", palette, transparency=bytes([255] * 4))
    write("b/cmyk.jpg", image.convert("CMYK"), quality=100)
    root = write("b/x.JPG", image, quality=100, subsampling=0)
    d = load(root)
    assert d.notes == ()
    every = np.concatenate([d.train_images, d.test_images]).astype(int)
    assert len(every) == 11 and np.abs(every - colour).max() < 8  # palettes and JPEG round


def test_exif_orientation_is_followed(write):
    image = pixels(4, 6, 3)
    for orientation, want in ((6, np.rot90(image, -1)), (3, np.rot90(image, 2)), (2, image[:, ::-1])):
        for name in "ab":
            for n in range(2):
                exif = Image.Exif()
                exif[0x0112] = orientation
                root = write(f"{name}/{n}.png", image, exif=exif)
        np.testing.assert_array_equal(load(root).train_images[0], want)


def test_image_size_resizes_the_shorter_side_and_keeps_the_middle(write):
    wide = np.zeros([8, 16, 3], np.uint8)
    wide[:, 4:12] = 200  # the middle square
    for n in range(2):
        write(f"a/{n}.png", wide)
        root = write(f"b/{n}.png", wide.transpose(1, 0, 2))
    d = load(root, image_size=4)
    assert d.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(d.train_images[:, 1:3, 1:3], 200)
    whole = pixels(8, 8, 3)
    for n in range(2):
        write(f"a/{n}.png", whole), write(f"b/{n}.png", whole)
    small = load(root, image_size=4).train_images[0]
    assert np.abs(small.astype(float) - whole.reshape(4, 2, 4, 2, 3).mean((1, 3))).max() < 60  # antialiased: near block means
    np.testing.assert_array_equal(load(root, image_size=8).train_images[0], whole)
    assert load(root, image_size=11).image_shape == (11, 11, 3)


def test_resizing_has_torchvisions_sizes():
    for width, height in ((500, 375), (375, 500), (7, 7), (33, 100)):
        image = Image.fromarray(np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0))
        assert images.resize(image, 32).size == (32, 32)
        whole = np.asarray(
            image.resize((32 * width // min(width, height), 32 * height // min(width, height)), Image.Resampling.BILINEAR)
        )
        left, top = (round((n - 32) / 2) for n in whole.shape[::-1])
        np.testing.assert_array_equal(images.resize(image, 32), whole[top : top + 32, left : left + 32])


def test_known_files_beside_the_images_are_ignored_with_a_note(photos):
    root, _ = photos
    (root / ".DS_Store").write_bytes(b"x")
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "dog" / "notes.txt").write_text("x")
    (root / "dog" / "._1.png").write_bytes(b"x")
    (root / ".ipynb_checkpoints").mkdir()
    (root / "devkit.tar").write_bytes(b"x")
    (note,) = load(root).notes
    assert note == "photos: 6 files (.DS_Store, .ipynb_checkpoints, cat/Thumbs.db, ...) ignored."


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBJAX_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "LIMIT", 100)
    return tmp_path / "cache"


@pytest.mark.parametrize("split", [False, True])
def test_large_sets_are_mapped_from_a_file_that_is_used_again(write, cache, monkeypatch, split):
    for part in ("train", "test") if split else (".",):
        for name in ("a", "b"):
            for n in range(5):
                root = write(f"{part}/{name}/{n}.png", pixels(4, 4) if name == "a" else pixels(4, 4, 3))
    monkeypatch.setattr(images, "LIMIT", 10**9)
    plain = load(root)
    monkeypatch.setattr(images, "LIMIT", 100)
    for _ in range(2):
        d = load(root)
        assert type(d.train_images) is type(d.test_images) is np.memmap  # through check
        np.testing.assert_array_equal(d.train_images, plain.train_images)
        np.testing.assert_array_equal(d.test_images, plain.test_images)
        assert d.subset_hash == plain.subset_hash and d.channel_stats() == plain.channel_stats()
        assert [file.suffix for file in cache.iterdir()] == [".npy"]  # one file, no half of one
        assert thin(1)(d, 0).train_images.shape == (2, 4, 4, 3)
        monkeypatch.setattr(
            module, "decode", lambda path, form: decode.Decoded(np.zeros([4, 4, 3], np.uint8))
        )  # not read again
    assert load(root).train_images.any()


def test_a_changed_image_or_size_is_another_file(write, cache, photos):
    root, made = photos
    seen = [load(root, image_size=4), load(root, image_size=2)]
    write("cat/3.png", 255 - made["cat/3.png"])
    os.utime(root / "cat" / "3.png", ns=(time.time_ns(), time.time_ns() + 10**9))
    seen.append(load(root, image_size=4))
    assert len(list(cache.iterdir())) == 3 and seen[1].image_shape == (2, 2, 3)
    every = lambda d: np.concatenate([d.train_images, d.test_images])
    assert (every(seen[0]) != every(seen[2])).any((1, 2, 3)).sum() == 1
    for file in cache.iterdir():  # a damaged file is written again
        file.write_bytes(file.read_bytes()[:-5])
    np.testing.assert_array_equal(load(root, image_size=4).train_images, seen[2].train_images)


def test_a_full_disk_is_an_error_and_leaves_nothing(photos, cache, monkeypatch):
    monkeypatch.setattr(images.shutil, "disk_usage", lambda _: type("usage", (), {"free": 5}))
    with pytest.raises(ValueError, match=r"decoded images, got '.*cache' \(0.0 GiB free\). Set PERTURBJAX_DATA to"):
        load(photos[0])
    monkeypatch.undo()
    monkeypatch.setenv("PERTURBJAX_DATA", str(photos[0] / "cat" / "1.png"))  # no folder
    monkeypatch.setattr(images, "LIMIT", 100)
    with pytest.raises(ValueError, match="needs a folder for 0.0 GiB of decoded images"):
        load(photos[0])


def test_a_damaged_image_leaves_no_images(photos, cache):
    (photos[0] / "dog" / "9.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"dog.9.png', which can't be decoded \(UnidentifiedImageError"):
        load(photos[0])
    [file] = cache.iterdir()
    assert file.name.endswith("-damaged.json")  # so that it is named at once the next time


def test_images_of_several_sizes(photos, write):
    root = write("dog/5.png", pixels(7, 4, 3))
    with pytest.raises(ValueError) as error:
        load(root)
    assert re.search(r"got 'cat/0.png' of 5x4 and 'dog/5.png' of 4x7 pixels", str(error.value))
    assert "load(..., image_size=64), on the command line --image-size 64" in str(error.value)
    assert load(root, image_size=4).image_shape == (4, 4, 3)


def test_damaged_images_are_named(photos):
    root, _ = photos
    path = root / "cat" / "4.png"
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-30], b"GIF89a" + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"whole images, got '.*cat.4.png', which can't be decoded .* Replace or remove"):
            load(root)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_without_a_known_range_are_refused(photos, mode):
    Image.new(mode, (5, 4)).save(photos[0] / "cat" / "0.tiff")
    with pytest.raises(
        ValueError, match=f"8 or 16 bits, got '.*0.tiff' of Pillow's mode {mode}, whose values have no known range"
    ):
        load(photos[0], skip_damaged=True)  # it isn't damaged


BAD = {
    "none": ([], "photos', which has no image below it. Put them in FOLDER/class/image"),
    "only arrays": (["x.npz"], r"Write load\("),
    "flat": (["1.png", "2.png"], "got '1.png' directly in"),
    "flat splits": (["train/1.png", "test/1.png"], "got '1.png' directly in"),
    "unlabelled test": (["train/a/1.png", "test/1.png"], "test set need the folders of their classes, too"),
    "two depths": (["a/1.png", "b/c/1.png"], "at one depth, 2 or 3, got 'a/1.png' and 'b/c/1.png'"),
    "too deep": (["a/b/c/1.png"], "at one depth, 2 or 3, got 'a/b/c/1.png' in"),
    "empty class": (["a/1.png", "b/"], "got none in 'b' of"),
    "class of notes": (["a/1.png", "b/x.txt"], "got none in 'b' of"),
    "empty test": (["train/a/1.png", "train/b/1.png", "test/"], "got none in 'test' of"),
    "empty class of test": (["train/a/1.png", "test/a/"], "got none in 'test/a' of"),
    "stray": (["a/1.png", "b/1.png", "b/x.npy"], "got 'b/x.npy' in"),
    "split and domain": (["train/a/1.png", "photo/a/1.png"], "test and val in '.*photos', got photo, train. Move 'photo'"),
    "no train": (["test/a/1.png", "val/a/1.png"], "got test, val. Name one folder train"),
    "two vals": (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "got train, val, valid. Name one"),
    "class of test only": (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"], "got class 'c'"),
    "one class": (["a/1.png", "a/2.png"], "at least 2 classes of photos, got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_folders_that_are_no_image_set(tmp_path, write, name):
    files, message = BAD[name]
    (tmp_path / "photos").mkdir()
    for file in files:
        path = tmp_path / "photos" / file
        if file.endswith(".png"):
            write(file, pixels(2, 2))
        elif file.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "photos")


@pytest.mark.parametrize("size", [0, -3, 2.5, "64", True])
def test_image_size_is_checked(photos, size):
    with pytest.raises(ValueError, match="image_size that is a whole number of at least 1"):
        load(photos[0], image_size=size)
