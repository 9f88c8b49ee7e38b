"""Images one by one to one array: brought to one size, and in memory or, where too large for it, in a file that is mapped."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image

LIMIT = 4 * 2**30  # bytes of an array in memory; a larger one is written to a file and mapped
Made = TypeVar("Made")
BLOCK = 256  # images decoded ahead of the one that is written


def data_folder() -> pathlib.Path:
    """Where decoded images are kept and archives are looked for: $PERTURBJAX_DATA, or else a folder of the user's cache."""
    chosen = os.environ.get("PERTURBJAX_DATA")
    return pathlib.Path(chosen or pathlib.Path("~", ".cache", "perturbjax", "data")).expanduser()


def resize(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` (bilinear with antialiasing), then the square in the middle, as torchvision's Resize and
    CenterCrop do. Smaller images are enlarged."""
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def in_threads(decode: Callable[[Any], Made], items: Iterable) -> Iterator[Made]:
    """decode(item) of each item, in order; decoders free the interpreter lock, so threads are enough."""
    items = iter(items)
    with ThreadPoolExecutor() as pool:
        while block := list(itertools.islice(items, BLOCK)):  # bounded: a pool's own map decodes as far ahead as it can
            yield from pool.map(decode, block)


def stack(images: Iterator[np.ndarray], count: int, *, key: Callable[[], str], describe: Callable[[int], str]) -> np.ndarray:
    """[count, ...]: the images in one array, which is a read-only np.memmap if it takes more than LIMIT bytes.

    Args:
      images: count arrays of one shape and dtype. They are not read to the end where a file with this key is there.
      key: () -> name of the file, which must change whenever the images do; called for large arrays only.
      describe: position -> name of that image, for errors.
    """
    first = next(images)
    nbytes = count * first.nbytes
    file = data_folder() / f"{key()}.npy" if is_large(nbytes) else None
    if file is not None and (kept := _mapped(file)) is not None:
        return kept
    same = _of_one_size(itertools.chain([first], images), first, describe)
    if file is None:
        out = np.empty((count, *first.shape), first.dtype)
        for n, image in enumerate(same):
            out[n] = image
        return out
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": (count, *first.shape)}
    part = file.with_name(f"{file.name}.{os.getpid()}.part")  # renamed when whole: a file with the name is never half of it
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _check_space(file.parent, nbytes)
        with open(part, "wb") as stream:  # not through a map: that would meet a full disk with a crash, not an error
            np.lib.format.write_array_header_1_0(stream, header)
            for image in same:
                stream.write(np.ascontiguousarray(image).data)
        os.replace(part, file)
    except OSError as error:
        raise ValueError(
            f"load needs a folder for {nbytes / 2**30:.1f} GiB of decoded images, got {str(file.parent)!r} "
            f"({error.strerror or error}). Set PERTURBJAX_DATA to a folder on a larger disk, or give a smaller image_size."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return _mapped(file)


def file_key(folder: pathlib.Path, files: Iterable[pathlib.Path], *settings: object) -> str:
    """A name that changes with the folder, the order, names, sizes and times of its files, and the settings."""
    digest = hashlib.sha256(repr((2, str(folder.resolve()), settings)).encode())  # 2: the form of what is kept
    for file in files:
        stat = file.stat()
        digest.update(
            f"{file.relative_to(folder).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    return f"{folder.resolve().name}-{digest.hexdigest()[:16]}"


def is_large(nbytes: int) -> bool:
    """Whether an array of that size is mapped from a file instead of held in memory."""
    return nbytes > LIMIT


def keep(key: str, found: Any) -> None:
    """Writes what reading a large set has found (JSON) beside its images, for those who will map them without reading."""
    file = data_folder() / f"{key}.json"
    with contextlib.suppress(OSError):  # found again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_text(json.dumps(found))
        os.replace(part, file)


def kept(key: str) -> Any:
    """What `keep` wrote; None if there is nothing."""
    try:
        return json.loads((data_folder() / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None


def check_image_size(image_size: int | None) -> None:
    """Raises ValueError unless it is None or a whole number of at least 1."""
    whole = isinstance(image_size, int | np.integer) and not isinstance(image_size, bool)
    if image_size is not None and not (whole and image_size >= 1):
        raise ValueError(
            f"load needs an image_size that is a whole number of at least 1, got {image_size!r}. Write image_size=64."
        )


def _of_one_size(images, first, describe):
    for n, image in enumerate(images):
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            size = lambda x: f"{x.shape[1]}x{x.shape[0]}" + ("" if x.shape[2:] == first.shape[2:] else f" with {x.shape[2:]}")
            raise ValueError(
                f"load needs images of one size, got {describe(0)} of {size(first)} and {describe(n)} of {size(image)} pixels "
                "(width x height). Write load(..., image_size=64), on the command line --image-size 64: shorter sides "
                "become 64 and the middle is cut out."
            )
        yield image


def _mapped(file: pathlib.Path) -> np.ndarray | None:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):  # not there, or damaged: written again
        return None


def _check_space(folder: pathlib.Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(f"{free / 2**30:.1f} GiB free")
