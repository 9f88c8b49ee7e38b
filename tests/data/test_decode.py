"""perturbjax.data.decode and opacity: transparent images lie on a background, 16 bits are read, damaged files are all named."""

import re
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from perturbjax.data import check, folder, images, load, on_background

RNG = np.random.default_rng(0)


def pixels(*shape, top=256, dtype=np.uint8):
    return RNG.integers(0, top, shape, dtype=dtype)


@pytest.fixture(params=[False, True], ids=["in memory", "mapped"])
def stored(request, tmp_path, monkeypatch):
    """Both places where images are kept."""
    monkeypatch.setenv("PERTURBJAX_DATA", str(tmp_path / "cache"))
    if request.param:
        monkeypatch.setattr(images, "LIMIT", 100)
    return request.param


def every(d):
    """All images, in the order of their names."""
    return np.concatenate([d.train_images, d.test_images])[np.argsort([*d.train_names, *d.test_names])]


def png(rows: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow can't write in colour. rows: [H, W, channels] uint16."""
    chunk = lambda kind, data: len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    height, width = rows.shape[:2]
    head = width.to_bytes(4) + height.to_bytes(4) + bytes([16, colour_type, 0, 0, 0])
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_black_ink_on_nothing_is_black_on_white_with_a_note(write, stored):
    opacity = pixels(20, 5, 4)
    opacity[0] = 255  # one without holes
    ink = np.zeros([5, 4, 4], np.uint8)
    for n in range(20):
        ink[..., 3] = opacity[n]
        root = write(f"{n // 10}/{n % 10}.png", ink)
    for _ in range(2):  # the second time from the map
        d = load(root)
        np.testing.assert_array_equal(every(d), (255 - opacity)[..., None].repeat(3, -1))
        assert d.notes == (
            "photos: 19 files (0/1.png, 0/2.png, 0/3.png, ...) with transparent pixels, laid on white "
            "(--background for another colour).",
        )
        assert isinstance(d.train_images, np.memmap) == stored


def test_every_kind_of_transparency_lies_on_the_background(write):
    colour, opacity = pixels(6, 6, 3), pixels(6, 6)
    mixed = lambda behind: np.rint(
        (colour * (opacity / 255.0)[..., None]) + np.array(behind) * (1 - opacity / 255.0)[..., None]
    )
    both = np.concatenate([colour, opacity[..., None]], -1)
    write("a/rgba.png", both), write("a/x.webp", Image.fromarray(both), lossless=True, exact=True)
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P").resize((6, 6), Image.Resampling.NEAREST)
    palette.putpalette([9, 8, 7, 200, 100, 50])
    write("b/one.png", palette, transparency=0), write("b/bytes.png", palette, transparency=bytes([0, 51]))
    root = write("b/whole.png", np.full([6, 6, 3], 77, np.uint8))
    for background, behind in (("white", (255, 255, 255)), ("#0a141e", (10, 20, 30))):
        d = load(root, background=background)
        rgba, webp, by_bytes, by_one, whole = every(d)
        np.testing.assert_array_equal(rgba, mixed(behind))
        np.testing.assert_array_equal(webp, rgba)
        np.testing.assert_array_equal(by_one[[0, 5, 0, 5], [0, 5, 5, 0]], [behind] * 2 + [(200, 100, 50)] * 2)
        np.testing.assert_array_equal(
            by_bytes[0, [0, 5]], [behind, np.rint(0.2 * np.array([200, 100, 50]) + 0.8 * np.array(behind))]
        )
        assert (whole == 77).all() and d.notes[0].startswith("photos: 4 files") and f"laid on {background} " in d.notes[0]
    bare = load(root, background="none")
    np.testing.assert_array_equal(every(bare)[0], colour)
    assert bare.notes == ()
    with pytest.raises(ValueError, match="a background that is a colour, or none, got 'whit'. Write background='white'"):
        load(root, background="whit")


def test_grey_images_with_holes_stay_grey_on_grey_and_become_colour_on_colour(write):
    grey, opacity = pixels(4, 4), pixels(4, 4)
    for name in "ab":
        for n in range(2):
            root = write(f"{name}/{n}.png", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opacity)]))
    on = lambda behind: np.rint(grey * (opacity / 255.0) + behind * (1 - opacity / 255.0))
    assert load(root).image_shape == (4, 4, 1)
    for image in every(load(root, background="gray")):
        np.testing.assert_array_equal(image[..., 0], on(128))
    for image in every(load(root, background="red")):
        np.testing.assert_array_equal(image, np.stack([on(255), on(0), on(0)], -1))
    np.testing.assert_array_equal(every(load(root, background="none"))[0, ..., 0], grey)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_of_four_channels_are_rgba_with_a_note(tmp_path, dtype):
    images, labels = pixels(40, 6, 6, 4), np.arange(40) % 2
    images[:10, ..., 3] = 255
    given = images if dtype == np.uint8 else (images / np.float32(255))
    np.savez(tmp_path / "x.npz", images=given, labels=labels)
    d = load(tmp_path / "x.npz")
    rgb, a = images[..., :3].astype(float), images[..., 3:] / 255.0
    want = a * rgb + (1 - a) * 255
    want = np.rint(want) if dtype == np.uint8 else want / 255
    np.testing.assert_allclose(d.train_images, want[d.train_index], atol=0 if dtype == np.uint8 else 1e-6)
    assert d.train_images.dtype == d.test_images.dtype == dtype and len(d.notes) == 1
    assert d.notes[0].startswith(
        "x: four channels are taken as RGBA: 30 of 40 images are transparent somewhere, and laid on white."
    )
    assert check(d).notes == d.notes
    four = load(tmp_path / "x.npz", background="none")
    np.testing.assert_array_equal(four.train_images, given[four.train_index])
    assert "the images have 4 channels, and all of them are trained on" in four.notes[0]
    with pytest.raises(ValueError, match=re.escape("got shape [40, 6, 6, 3]. Leave it out")):
        on_background(given[..., :3])
    np.savez(tmp_path / "x.npz", images=given * np.array([1, 1, 1, 0], dtype), labels=labels)  # padded to four
    with pytest.raises(ValueError, match=r"fourth channel of x, got 0 everywhere.* Write images\[..., :3\]"):
        load(tmp_path / "x.npz")


@pytest.mark.parametrize("form", ["png", "tiff", "pgm"])
def test_sixteen_bits_become_floats_in_0_to_1(write, stored, form):
    values = pixels(12, 5, 4, top=2**16, dtype=np.uint16)
    for n in range(12):
        root = write(f"{n // 6}/{n:02}.{form}", values[n])
    for _ in range(2):
        d = load(root)
        assert d.train_images.dtype == np.float32 and d.image_shape == (5, 4, 1)
        np.testing.assert_allclose(every(d)[..., 0], values / 65535, rtol=1e-6)
        assert d.notes == (
            f"photos: 12 files (0/00.{form}, 0/01.{form}, 0/02.{form}, ...) of 16 bits a pixel: 0..65535 are scaled to [0, 1], "
            "and all images are float32.",
        )


def test_one_image_of_sixteen_bits_among_colour_and_transparent_ones(write):
    deep, colour, ink = pixels(8, 8, top=2**16, dtype=np.uint16), pixels(8, 8, 3), np.zeros([8, 8, 4], np.uint8)
    for name in "ab":
        write(f"{name}/0.png", colour), write(f"{name}/1.png", ink)
        root = write(f"{name}/2.png", deep)
    a = every(load(root))
    np.testing.assert_allclose(a[0], colour / 255, atol=1e-7)
    assert (a[1] == 1).all()
    np.testing.assert_allclose(a[2], (deep / 65535)[..., None].repeat(3, -1), rtol=1e-6)
    small = every(load(root, image_size=4))
    assert small.shape == (6, 4, 4, 3) and 0 <= small.min() and small.max() <= 1
    assert (
        np.abs(small[2, ..., 0] - deep.reshape(4, 2, 4, 2).mean((1, 3)) / 65535).max() < 0.25
    )  # antialiased: near block means


def test_a_hole_in_sixteen_bits_and_colour_of_sixteen_bits(write):
    deep = pixels(4, 4, top=2**16, dtype=np.uint16)
    deep[0] = 7
    rgb = pixels(4, 4, 3, top=2**16, dtype=np.uint16)
    for name in "ab":
        write(f"{name}/0.png", deep, transparency=7), write(f"{name}/1.png", deep)
        root = write(f"{name}/2.png", np.zeros([4, 4], np.uint8))
        (root / name / "2.png").write_bytes(png(rgb, 2))
    d = load(root)
    a = every(d)
    holes, whole = a[0][..., 0], a[1][..., 0]
    assert (holes[0] == 1).all() and (whole[0] == np.float32(7 / 65535)).all()
    np.testing.assert_array_equal(holes[1:], whole[1:])
    np.testing.assert_allclose(a[2], (rgb >> 8) / 255, atol=1e-7)
    assert any("2 files (a/2.png, b/2.png) of 16 bits a channel" in note and "the upper 8 are read" in note for note in d.notes)
    assert any("2 files (a/0.png, b/0.png) with transparent pixels, laid on white" in note for note in d.notes)


@pytest.fixture
def damaged(write):
    """(folder, {name: image}, the 13 damaged ones' names) of two classes of 20."""
    made = {f"{name}/{n:02}.png": pixels(4, 4, 3) for name in ("cat", "dog") for n in range(20)}
    for name, image in made.items():
        root = write(name, image)
    broken = [f"cat/{n:02}.png" for n in range(3)] + [f"dog/{n:02}.png" for n in range(10, 20)]
    for n, name in enumerate(broken):
        whole = (root / name).read_bytes()
        (root / name).write_bytes((b"", b"no image", whole[:50], whole[:-30])[n % 4])
    return root, made, broken


def test_all_damaged_files_are_named_up_to_ten(damaged, stored):
    root, made, broken = damaged
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            load(root)
        text = str(error.value)
        assert text.startswith(f"load needs whole images, got 13 of 40 in {str(root)!r} that can't be decoded: 'cat/")
        assert (
            text.count(".png' (") == 10 and "; and 3 more. Replace or remove them, or leave them out: --skip-damaged (" in text
        )
    for name in broken[1:]:
        Image.fromarray(made[name]).save(root / name)
    with pytest.raises(
        ValueError, match=r"got '.*cat.00.png', which can't be decoded \(.*\). Replace or remove that file, or leave it"
    ):
        load(root)


def test_damaged_files_are_left_out_with_a_note(damaged, stored, monkeypatch):
    root, made, broken = damaged
    want = {name: image for name, image in made.items() if name not in broken}
    for _ in range(2):
        d = load(root, skip_damaged=True)
        found = dict(zip([*d.train_names, *d.test_names], [*d.train_images, *d.test_images], strict=True))
        assert found.keys() == want.keys() and all((found[name] == want[name]).all() for name in want)
        assert d.notes == (f"photos: 13 files ({', '.join(sorted(broken)[:10])}, ...) left out, which can't be decoded.",)
        np.testing.assert_array_equal(d.train_labels, [name.startswith("dog") for name in d.train_names])
        reads = []
        decode = folder.decode
        monkeypatch.setattr(folder, "decode", lambda path, form, decode=decode: reads.append(path) or decode(path, form))
    assert len(load(root, skip_damaged=True).train_labels) == len(d.train_labels)
    for name in broken:
        Image.fromarray(made[name]).save(root / name)
    assert load(root, skip_damaged=True).notes == ()
    assert len(load(root).train_labels) == 28


def test_a_class_or_a_set_of_damaged_files_only_is_an_error(damaged):
    root, _, broken = damaged
    for n in range(10):
        (root / "dog" / f"{n:02}.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=re.escape("a training sample of photos for every class, got none of class 1 ('dog'; 1 such")
    ):
        load(root, skip_damaged=True)
    for n in range(20):
        (root / "cat" / f"{n:02}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="got 40 of 40 in"):
        load(root, skip_damaged=True)


@pytest.mark.parametrize("source", ["digits", "x.npz"])
def test_only_folders_of_images_can_have_files_left_out(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", images=pixels(8, 4, 4), labels=np.arange(8) % 2)
    with pytest.raises(ValueError, match=f"a folder of images for skip_damaged, got '{source}'. Leave skip_damaged out"):
        load(source, skip_damaged=True)


def test_folders_whose_names_look_the_same_are_one_class(write):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    made = {}
    for split in ("train", "test"):
        for name in (composed if split == "train" else decomposed, "tee"):
            for n in range(3):
                made[f"{split}/{name}/{n}.png"] = pixels(4, 4, 3)
    for name, image in made.items():
        root = write(name, image)
    d = load(root)
    assert d.class_names == (composed, "tee") and d.test_labels.tolist() == d.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert d.notes == ("photos: the folders named 'café' are spelt in 2 ways in Unicode, and taken as one.",)
    for name, image in zip(d.test_names, d.test_images, strict=True):
        np.testing.assert_array_equal(image, made[name])


def test_both_spellings_side_by_side_are_one_class_and_one_domain(write):
    composed, decomposed = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    for domain in (composed, decomposed, "hiver"):
        for name in (composed, decomposed, "x"):
            for n in range(4):
                root = write(f"{domain}/{name}/{n}.png", pixels(4, 4, 3))
    d = load(root)
    assert d.class_names == ("x", composed) and d.domain_names == ("hiver", composed)
    counts = lambda labels: np.bincount(labels).tolist()
    assert counts([*d.train_labels, *d.test_labels]) == [12, 24] and counts([*d.train_domains, *d.test_domains]) == [12, 24]
    one = load(write(f"hiver/{decomposed}/0.png", pixels(4, 4, 3)))  # still the same set
    assert one.subset_hash == d.subset_hash


def test_one_spelling_throughout_needs_no_note(write):
    name = unicodedata.normalize("NFD", "café")
    for c in (name, "tee"):
        for n in range(2):
            root = write(f"{c}/{n}.png", pixels(4, 4))
    d = load(root)
    assert d.class_names == ("café", "tee") and d.notes == ()
