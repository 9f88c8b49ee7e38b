"""perturbjax.data.cifar: tiny archives in exactly the authors' binary form, and every file that is not one."""

import hashlib
import importlib.util
import pathlib
import re
import tarfile

import numpy as np
import pytest

from perturbjax.data import cifar, load

RNG = np.random.default_rng(0)
NAMES = {"cifar10": [f"class{n}" for n in range(10)], "cifar100": [f"fine_{n:02d}" for n in range(100)]}


def records(images, *labels):
    """[N, 32, 32, 3] and bytes of labels as the authors' records."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([*(np.asarray(x, np.uint8)[:, None] for x in labels), planes], 1).tobytes()


@pytest.fixture(params=["cifar10", "cifar100"])
def tiny(request, tmp_path, monkeypatch):
    """name, folder, archive, images and labels [train, test] of a set with few records in each file."""
    name, classes = request.param, len(NAMES[request.param])
    layout = cifar.CIFAR[name]
    count = classes  # of every class one in each file
    layout = layout._replace(records=dict.fromkeys(layout.records, count))
    folder = tmp_path / "made" / layout.folder
    folder.mkdir(parents=True)
    images, labels = [], []
    for k, file in enumerate(layout.records):
        x = RNG.integers(0, 256, [count, 32, 32, 3], dtype=np.uint8)
        y = (np.arange(count) + k * count) % classes
        coarse = [] if name == "cifar10" else [np.full(count, 19)]
        (folder / file).write_bytes(records(x, *coarse, y))
        images.append(x), labels.append(y)
    (folder / layout.names).write_text("\n".join(NAMES[name]) + "\n\n")  # the authors' file ends like this
    (folder / "readme.html").write_text("x")
    archive = tmp_path / "made" / layout.archive
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, layout.folder)
    monkeypatch.setitem(cifar.CIFAR, name, layout._replace(sha256=hashlib.sha256(archive.read_bytes()).hexdigest()))
    monkeypatch.setenv("PERTURBJAX_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.chdir(tmp_path)
    both = lambda parts: [np.concatenate(parts[:-1]), parts[-1]]
    return name, folder, archive, both(images), both(labels)


def is_tiny(d, tiny):
    name, _, _, images, labels = tiny
    assert (d.name, d.class_names, d.notes) == (name, tuple(NAMES[name]), ())
    np.testing.assert_array_equal(d.train_images, images[0])
    np.testing.assert_array_equal(d.test_images, images[1])
    np.testing.assert_array_equal(d.train_labels, labels[0])
    np.testing.assert_array_equal(d.test_labels, labels[1])
    assert d.source_size == len(labels[0]) and d.train_images.flags.c_contiguous


def test_archives_and_folders_by_their_path(tiny):
    _, folder, archive, _, _ = tiny
    is_tiny(load(folder), tiny)
    is_tiny(load(str(archive)), tiny)
    second = archive.with_name(archive.name.replace(".tar", " (1).tar"))  # as a browser names a second download
    archive.rename(second)
    is_tiny(load(second), tiny)
    folder.rename(folder.with_name("renamed"))
    is_tiny(load(folder.with_name("renamed")), tiny)


@pytest.mark.parametrize("place", ["current", "variable", "home"])
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_names_look_in_the_documented_places(tiny, tmp_path, monkeypatch, place, kind):
    name, folder, archive, _, _ = tiny
    root = {"current": tmp_path, "variable": tmp_path / "nothing", "home": tmp_path / "nobody/.cache/perturbjax/data"}[place]
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    for wanted in (archive.name, folder.name, str(root), "got none. Fetch it from the authors' page", "$PERTURBJAX_DATA"):
        assert wanted in str(error.value)
    root.mkdir(parents=True, exist_ok=True)
    (folder if kind == "folder" else archive).rename(root / (folder if kind == "folder" else archive).name)
    is_tiny(load(name), tiny)


def test_the_python_version_is_refused_and_said_why(tiny, tmp_path):
    name, folder, archive, _, _ = tiny
    packed, unpacked = cifar.CIFAR[name].python
    (tmp_path / packed).write_bytes(b"x")
    for path in (packed, unpacked, tmp_path / unpacked):
        message = f"load needs {archive.name!r}, the binary version, got {str(path)!r}, the Python version, whose pickles can run code"
        with pytest.raises(ValueError, match=re.escape(message)):
            load(path)
        (tmp_path / unpacked).mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match=f"got only {unpacked!r}, the Python version|got only {packed!r}, the Python"):
        load(name)


def test_damaged_archives(tiny):
    name, _, archive, _, _ = tiny
    whole = archive.read_bytes()
    for content in (whole[:-10], whole[:-1] + b"?", b"", b"<html>not found</html>"):
        archive.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load(archive)
        assert f"got {str(archive)!r} of {len(content)} bytes with {hashlib.sha256(content).hexdigest()[:12]}..." in str(
            error.value
        )
        assert cifar.CIFAR[name].sha256[:12] in str(error.value) and "Fetch it again" in str(error.value)
    archive.unlink()
    with pytest.raises(FileNotFoundError, match="where there is none"):
        load(archive)


def test_an_archive_of_other_contents(tiny, monkeypatch):
    name, folder, archive, _, _ = tiny
    last = list(cifar.CIFAR[name].records)[-1]
    accept = lambda: monkeypatch.setitem(
        cifar.CIFAR, name, cifar.CIFAR[name]._replace(sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    )
    with tarfile.open(archive, "w:gz") as tar:
        for file in folder.iterdir():
            if file.name != last:
                tar.add(file, f"{folder.name}/{file.name}")
        link = tarfile.TarInfo(f"{folder.name}/{last}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    accept()
    with pytest.raises(ValueError, match=f"needs '{last}' of .* got 0 bytes"):
        load(archive)
    archive.write_bytes(b"no archive")
    accept()
    with pytest.raises(ValueError, match="needs a whole archive, got"):
        load(archive)


def test_extracted_files_have_their_exact_size_labels_and_names(tiny):
    name, folder, _, _, _ = tiny
    layout = cifar.CIFAR[name]
    last, size = list(layout.records)[-1], layout.label_bytes + 3072
    whole = (folder / last).read_bytes()
    for content in (whole[:-1], whole + whole[:size], b""):
        (folder / last).write_bytes(content)
        with pytest.raises(ValueError, match=f"needs '{last}' of {len(whole)} bytes .* got {len(content)} bytes"):
            load(folder)
    n, at = 2, 2 * size + layout.label_bytes - 1
    (folder / last).write_bytes(whole[:at] + bytes([layout.num_classes]) + whole[at + 1 :])
    with pytest.raises(
        ValueError, match=f"in 0..{layout.num_classes - 1} in '{last}' .* got {layout.num_classes} in record {n}"
    ):
        load(folder)
    (folder / last).write_bytes(whole)
    (folder / layout.names).write_text("a\nb\n")
    with pytest.raises(ValueError, match=f"needs {layout.num_classes} class names in '{layout.names}' of .* got 2"):
        load(folder)
    (folder / layout.names).unlink()
    (folder / last).unlink()
    with pytest.raises(ValueError, match=f"got none named {layout.names}, {last}. Extract"):
        load(folder)


def test_published_sizes_and_checksums():
    """Those of the authors' page and of tensorflow_datasets."""
    for name, size, digest in (("cifar10", 30_730_000, "c4a38c50"), ("cifar100", 30_740_000, "58a81ae1")):
        layout = cifar.CIFAR[name]
        assert list(layout.records.values())[-1] * (layout.label_bytes + cifar.PIXELS) == size
        assert layout.sha256.startswith(digest) and len(layout.sha256) == 64 and sum(layout.records.values()) == 60000


def test_image_size_is_for_folders_only(tiny):
    for path in (tiny[0], tiny[1], tiny[2], "digits"):
        with pytest.raises(ValueError, match="a folder of images or a tfds set for image_size, got .* shrink"):
            load(path, image_size=16)


@pytest.mark.slow
def test_the_real_cifar10_written_in_the_authors_form_comes_back(tmp_path):
    pack = pathlib.Path(__file__).parents[3] / "shared" / "data" / "load.py"
    if not pack.is_file():
        pytest.skip("no data pack beside the repository")
    pytest.importorskip("imagecodecs")
    spec = importlib.util.spec_from_file_location("pack", pack)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    whole = module.load("cifar10")
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for k, file in enumerate(cifar.CIFAR["cifar10"].records):
        x, y = (values[10000 * k :][:10000] for values in whole["train"]) if k < 5 else whole["test"]
        (folder / file).write_bytes(records(x, y))
    (folder / "batches.meta.txt").write_text("\n".join(whole["class_names"]) + "\n\n")
    d = load(folder)
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(d, f"{part}_images"), whole[part][0])
        np.testing.assert_array_equal(getattr(d, f"{part}_labels"), whole[part][1])
    assert d.class_names == tuple(whole["class_names"])
