"""A folder of images: FOLDER/class/image, FOLDER/domain/class/image, or FOLDER/train, test, validation with class/image in each."""

import functools
import os
import pathlib

import numpy as np
from PIL import Image, ImageOps

from perturbjax.data.arrange import Part, from_parts
from perturbjax.data.dataset import Dataset, check
from perturbjax.data.images import file_key, in_threads, resize, stack

IMAGES = frozenset(".png .jpg .jpeg .jfif .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .pnm".split())
BESIDE = frozenset(".txt .md .csv .tsv .json .xml .html .yaml .yml .ini .db .log".split())  # often lie beside images
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "validation")
GREY = ("1", "L", "LA", "La")  # Pillow's modes
LAYOUTS = "FOLDER/class/image, FOLDER/domain/class/image, or FOLDER/train/class/image and FOLDER/test/class/image"


class _Colour(Exception):
    """A colour image among grey ones."""


def read(folder: pathlib.Path, image_size: int | None) -> Dataset:
    """The images below a folder. See `load` for the layouts."""
    name = folder.resolve().name
    files, ignored = _walk(folder, ())
    deep = _depth(folder, files) == 3
    tops = in_order({file[0] for file in files}) if deep else ()
    splits = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    if splits:
        _check_splits(folder, tops, splits)
    class_names = in_order({file[-2] for file in files})
    label_of, domain_of = ({name: n for n, name in enumerate(names)} for names in (class_names, tops))
    files.sort(key=lambda file: (domain_of.get(file[0], 0), label_of[file[-2]], file[-1]))
    labels = np.array([label_of[file[-2]] for file in files], np.int32)
    items = np.arange(len(files))
    if splits:
        split = np.array([splits[file[0]] for file in files])
        parts = {part: Part(items, labels).take(split == part) for part in splits.values()}
        _check_classes(folder, parts, class_names)
    else:
        parts = {"train": Part(items, labels, np.array([domain_of[file[0]] for file in files], np.int32) if deep else None)}

    def pixels(chosen: list[Part]) -> list[np.ndarray]:
        order = np.concatenate([part.items for part in chosen])
        images = _read([folder.joinpath(*files[n]) for n in order], folder, image_size)
        return np.split(images, np.cumsum([len(part.items) for part in chosen])[:-1])  # views, of a map too

    notes = [f"{name}: {listed(ignored)} ignored."] if ignored else []
    domain_names = () if splits else tops
    return check(from_parts(name, parts, pixels, class_names=class_names, domain_names=domain_names, notes=notes))


def _walk(folder: pathlib.Path, above: tuple[str, ...]) -> tuple[list[tuple[str, ...]], list[str]]:
    """The images (each as the names on its path) and what was ignored, below folder/above."""
    found, ignored = list[tuple[str, ...]](), list[str]()
    for entry in sorted(os.scandir(folder.joinpath(*above)), key=lambda entry: entry.name):
        parts, suffix = (*above, entry.name), pathlib.PurePath(entry.name).suffix.lower()
        if entry.name.startswith(".") or entry.name == "__MACOSX":  # .DS_Store, ._1.png, .ipynb_checkpoints
            ignored.append("/".join(parts))
        elif entry.is_dir():
            inside, other = _walk(folder, parts)
            found += inside
            ignored += other
        elif suffix in IMAGES:
            found.append(parts)
        elif suffix in BESIDE or not above:  # beside the class folders there may be anything
            ignored.append("/".join(parts))
        else:
            raise ValueError(
                f"load needs images ({' '.join(sorted(IMAGES))}) in the class folders, got {'/'.join(parts)!r} in "
                f"{str(folder)!r}. Remove that file, or save it as an image."
            )
    if not found and above:
        raise ValueError(
            f"load needs an image in every class folder, got none in {'/'.join(above)!r} of {str(folder)!r}. "
            "Add images, or remove that folder."
        )
    return found, ignored


def _depth(folder: pathlib.Path, files: list[tuple[str, ...]]) -> int:
    """2 for class/image, 3 for a domain or split above."""
    if not files:
        arrays = sorted(folder.glob("*.npz"))
        hint = f"Write load({str(arrays[0])!r})." if arrays else f"Put them in {LAYOUTS}."
        raise ValueError(f"load needs a folder of images, got {str(folder)!r}, which has no image below it. {hint}")
    shallow, deep = min(files, key=len), max(files, key=len)
    unlabelled = len(shallow) == 1 or (len(deep) == 2 and all(file[0].lower() in SPLITS for file in files))
    if unlabelled:
        where = "/".join((str(folder), *shallow[:-1]))
        raise ValueError(
            f"load needs every image in the folder of its class, got {shallow[-1]!r} directly in {where!r}. Use {LAYOUTS}."
        )
    if len(shallow) != len(deep) or len(deep) > 3:
        hint = (
            "Images of a test set need the folders of their classes, too" if shallow[0].lower() in SPLITS else "Use one layout"
        )
        both = " and ".join(dict.fromkeys((repr("/".join(shallow)), repr("/".join(deep)))))
        raise ValueError(f"load needs images at one depth, 2 or 3, got {both} in {str(folder)!r}. {hint}: {LAYOUTS}.")
    return len(deep)


def _check_splits(folder: pathlib.Path, tops: tuple[str, ...], splits: dict[str, str]) -> None:
    others = [top for top in tops if top not in splits]
    if others or "train" not in splits.values() or len(set(splits.values())) < len(splits):
        if others:
            fix = f"Move {others[0]!r} elsewhere, or rename {next(iter(splits))!r} if these are domains"
        else:
            fix = "Name one folder train, and at most one test and one val"
        raise ValueError(f"load needs the folders train, test and val in {str(folder)!r}, got {', '.join(tops)}. {fix}.")


def _check_classes(folder: pathlib.Path, parts: dict[str, Part], class_names: tuple[str, ...]) -> None:
    for part, (_, labels, _) in parts.items():
        extra = np.setdiff1d(labels, parts["train"].labels)
        if extra.size:
            raise ValueError(
                f"load needs the {part} images of {str(folder)!r} in the training images' classes, got class "
                f"{class_names[extra[0]]!r} ({extra.size} such classes), of which there is no training image. "
                "Rename that folder as in train, or remove it."
            )


def in_order(names: set[str]) -> tuple[str, ...]:
    """Whole numbers by value (2 before 10), anything else by its characters, as torchvision does."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def listed(names: list[str]) -> str:
    """How many files, and the first of them."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} file{'s' * (len(names) > 1)} ({shown})"


def _read(paths: list[pathlib.Path], folder: pathlib.Path, image_size: int | None) -> np.ndarray:
    """[N, H, W, channels] uint8, one channel if all images are grey."""
    names = lambda n: repr(paths[n].relative_to(folder).as_posix())
    stacked = lambda grey: stack(
        in_threads(functools.partial(_decode, grey=grey, image_size=image_size), paths),
        len(paths),
        key=lambda: file_key(folder, paths, image_size),
        describe=names,
    )
    try:
        return stacked(grey=True)
    except _Colour:
        return stacked(grey=False)


def _decode(path: pathlib.Path, *, grey: bool, image_size: int | None) -> np.ndarray:
    """[H, W, 1] or [H, W, 3] uint8, upright; the first frame of several, without the alpha channel."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            out = None if mode[0] in "IF" or (grey and mode not in GREY) else _pixels(image, grey, image_size)
    except Exception as error:  # a damaged file: Pillow's decoders raise whatever they stumble over
        raise ValueError(
            f"load needs whole images, got {str(path)!r}, which can't be decoded ({type(error).__name__}: {error}). "
            "Replace or remove that file."
        ) from error
    if out is not None:
        return out
    if mode[0] in "IF":
        raise ValueError(
            f"load needs 8-bit images, got {str(path)!r} of Pillow's mode {mode}, with more bits a pixel. "
            "Scale its values to 0..255 and save it again, as mode L."
        )
    raise _Colour


def _pixels(image: Image.Image, grey: bool, image_size: int | None) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # or else Pillow warns
    image = image.convert("L" if grey else "RGB")
    pixels = np.asarray(image if image_size is None else resize(image, image_size))
    return pixels.reshape(*pixels.shape[:2], -1)
