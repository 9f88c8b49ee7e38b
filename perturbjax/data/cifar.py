"""CIFAR-10 and CIFAR-100 from their authors' binary archives, packed or extracted. Nothing is unpickled.

A record is the label (CIFAR-100: the coarse, then the fine label), one byte each, and 3072 bytes: red, green, blue planes of
32x32 pixels. Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import hashlib
import pathlib
import tarfile
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from perturbjax.data.dataset import Dataset, check
from perturbjax.data.images import data_folder

PAGE = "the authors' page, www.cs.toronto.edu/~kriz/cifar.html"
PIXELS = 3 * 32 * 32


class Layout(NamedTuple):
    """What an archive holds."""

    archive: str
    sha256: str  # of the archive, as published with tensorflow_datasets (url_checksums)
    folder: str  # in the archive, and after extracting it
    names: str  # the file of class names, one a line
    num_classes: int
    records: Mapping[str, int]  # records in each file; the last file is the test set
    label_bytes: int  # before the pixels; the last of them is the label
    python: tuple[str, str]  # archive and folder of the Python version, which are pickles


CIFAR = {
    "cifar10": Layout(
        archive="cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        names="batches.meta.txt",
        num_classes=10,
        records={**{f"data_batch_{k}.bin": 10000 for k in range(1, 6)}, "test_batch.bin": 10000},
        label_bytes=1,
        python=("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    ),
    "cifar100": Layout(
        archive="cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        names="fine_label_names.txt",
        num_classes=100,
        records={"train.bin": 50000, "test.bin": 10000},
        label_bytes=2,
        python=("cifar-100-python.tar.gz", "cifar-100-python"),
    ),
}


def load_cifar(name: str) -> Dataset:
    """The set "cifar10" or "cifar100", from the first of the documented places that has its archive or folder."""
    layout = CIFAR[name]
    places = list(dict.fromkeys((pathlib.Path(), data_folder(), pathlib.Path("~/.cache/perturbjax/data").expanduser())))
    for path in (place / kind for place in places for kind in (layout.folder, layout.archive)):
        if path.exists():
            return read(path)
    looked = ", ".join(repr(str(place.absolute())) for place in places)
    pickled = next((p for place in places for kind in layout.python if (p := place / kind).exists()), None)
    found = f"only {pickled.name!r}, the Python version, whose pickles can run code when read" if pickled else "none"
    raise FileNotFoundError(
        f"load({name!r}) needs {layout.archive!r} (or {layout.folder!r}, extracted from it) in one of {looked}, got {found}. "
        f"Fetch it from {PAGE}, and put it there; $PERTURBJAX_DATA may name another folder."
    )


def layout_of(path: pathlib.Path) -> str | None:
    """ "cifar10" or "cifar100" if the path looks like one of its archives or folders, of any version."""
    for name, layout in CIFAR.items():
        stem = layout.archive.removesuffix("binary.tar.gz")  # browsers write "cifar-10-binary (1).tar.gz", too
        packed = path.name.startswith(stem) and path.suffix in (".gz", ".tgz", ".tar")
        if packed or path.name in (layout.folder, *layout.python) or (path / layout.names).is_file():
            return name
    return None


def read(path: pathlib.Path) -> Dataset:
    """The set in an archive or a folder that looks like CIFAR's."""
    name = layout_of(path)
    layout = CIFAR[name]
    if path.name in layout.python or "python" in path.name:
        raise ValueError(
            f"load needs {layout.archive!r}, the binary version, got {str(path)!r}, the Python version, whose pickles can run "
            f"code when read. Fetch {layout.archive!r} from {PAGE}."
        )
    if not path.exists():
        raise FileNotFoundError(f"load needs an archive or a folder, got {str(path)!r}, where there is none. Check the path.")
    files = _extracted(path, layout) if path.is_dir() else _packed(path, layout)
    class_names = files.pop(layout.names).decode("ascii", "replace").split()
    if len(class_names) != layout.num_classes:
        raise ValueError(
            f"load needs {layout.num_classes} class names in {layout.names!r} of {str(path)!r}, got {len(class_names)}. "
            f"Extract {layout.archive!r} again."
        )
    parts = [_records(path, layout, file, data) for file, data in files.items()]
    images, labels = (np.concatenate(values) for values in zip(*parts[:-1]))
    return check(Dataset(name, images, labels, *parts[-1], class_names=class_names))


def _records(path: pathlib.Path, layout: Layout, file: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] of one file."""
    rows = np.frombuffer(data, np.uint8).reshape(-1, layout.label_bytes + PIXELS)
    labels = rows[:, layout.label_bytes - 1].astype(np.int32)
    if labels.max() >= layout.num_classes:
        n = int(np.argmax(labels >= layout.num_classes))
        raise ValueError(
            f"load needs labels in 0..{layout.num_classes - 1} in {file!r} of {str(path)!r}, got {labels[n]} in record {n}: "
            f"the file is damaged, or something else. Extract {layout.archive!r} again."
        )
    planes = rows[:, layout.label_bytes :].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _extracted(folder: pathlib.Path, layout: Layout) -> dict[str, bytes]:
    """The contents of the files that are needed; the file of names first."""
    missing = [file for file in (layout.names, *layout.records) if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"load needs the files of {layout.archive!r} in {str(folder)!r}, got none named {', '.join(missing)}. "
            "Extract the archive again, whole."
        )
    _check_sizes(folder, layout, {file: (folder / file).stat().st_size for file in layout.records})
    return {file: (folder / file).read_bytes() for file in (layout.names, *layout.records)}


def _packed(path: pathlib.Path, layout: Layout) -> dict[str, bytes]:
    """The same from the archive, once its checksum is right."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != layout.sha256:
        raise ValueError(
            f"load needs the authors' {layout.archive!r} (SHA-256 {layout.sha256[:12]}...), got {str(path)!r} of "
            f"{path.stat().st_size} bytes with {digest[:12]}...: it is damaged, cut short or another file. "
            f"Fetch it again from {PAGE}; or give the folder {layout.folder!r} if you have extracted it yourself."
        )
    found = dict[str, bytes]()
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:  # in the archive's order: a step back would unpack it from the start again
                file = pathlib.PurePosixPath(member.name).name
                if member.isfile() and file in (layout.names, *layout.records):
                    found[file] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"load needs a whole archive, got {str(path)!r} ({error}). Fetch it again from {PAGE}.") from error
    _check_sizes(path, layout, {file: len(found.get(file, b"")) for file in layout.records})
    return {file: found.get(file, b"") for file in (layout.names, *layout.records)}


def _check_sizes(path: pathlib.Path, layout: Layout, sizes: Mapping[str, int]) -> None:
    for file, count in layout.records.items():
        size = count * (layout.label_bytes + PIXELS)
        if sizes[file] != size:
            raise ValueError(
                f"load needs {file!r} of {size} bytes ({count} records) in {str(path)!r}, got {sizes[file]} bytes. "
                f"It is damaged or cut short: extract {layout.archive!r} again."
            )
