"""A folder of images: FOLDER/class/image, FOLDER/domain/class/image, or FOLDER/train, test, validation with class/image in each."""

import collections
import dataclasses
import functools
import os
import pathlib
import unicodedata
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from perturbjax.data.arrange import Part, from_parts
from perturbjax.data.dataset import Dataset, check
from perturbjax.data.decode import Damaged, Form, Wider, decode
from perturbjax.data.images import file_key, in_threads, is_large, keep, kept, stack
from perturbjax.label_form import spellings

IMAGES = frozenset(".png .jpg .jpeg .jfif .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .pnm".split())
BESIDE = frozenset(".txt .md .csv .tsv .json .xml .html .yaml .yml .ini .db .log".split())  # often lie beside images
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "validation")
DAMAGED = "-damaged"  # ends the name of the list of damaged files
LAYOUTS = "FOLDER/class/image, FOLDER/domain/class/image, or FOLDER/train/class/image and FOLDER/test/class/image"


class DamagedFiles(ValueError):
    """Files of a folder that can't be decoded; `files` are the names on their paths."""

    def __init__(self, message: str, files: set[tuple[str, ...]]):
        super().__init__(message)
        self.files = files


def read(
    folder: pathlib.Path, image_size: int | None = None, *, background: str = "white", skip_damaged: bool = False
) -> Dataset:
    """The images below a folder. See `load` for the layouts and settings."""
    name, form = folder.resolve().name, Form(image_size, background)
    files, ignored = _walk(folder, ())
    notes = [f"{name}: {listed(ignored)} ignored."] if ignored else []
    notes += [f"{name}: {one}" for one in _spellings(files)]
    found = _Found(folder, files, _depth(folder, files) == 3)
    try:
        return _dataset(found, form, notes)
    except DamagedFiles as damaged:
        if not skip_damaged or len(damaged.files) == len(files):
            raise
        left = sorted("/".join(file) for file in damaged.files)
        notes.append(f"{name}: {listed(left, 10)} left out, which can't be decoded.")
        return _dataset(found, form, notes, damaged.files)


class _Found(NamedTuple):
    """What lies in a folder, readable or not: it says which classes there are."""

    folder: pathlib.Path
    files: list[tuple[str, ...]]
    deep: bool  # a domain or split above the classes


def _dataset(found: _Found, form: Form, notes: list[str], without: Collection[tuple[str, ...]] = ()) -> Dataset:
    """The set of these files, but for some."""
    folder, name = found.folder, found.folder.resolve().name
    top_of, class_of = (lambda file: _name(file[0])), (lambda file: _name(file[-2]))
    tops = in_order({top_of(file) for file in found.files}) if found.deep else ()
    splits = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    if splits:
        _check_splits(folder, tops, splits)
    class_names = in_order({class_of(file) for file in found.files})
    label_of, domain_of = ({name: n for n, name in enumerate(names)} for names in (class_names, tops))
    files = [file for file in found.files if file not in without]
    files.sort(key=lambda file: (domain_of.get(top_of(file), 0), label_of[class_of(file)], file[-1]))
    labels = np.array([label_of[class_of(file)] for file in files], np.int32)
    items = np.arange(len(files))
    if splits:
        split = np.array([splits[top_of(file)] for file in files])
        parts = {part: Part(items, labels).take(split == part) for part in splits.values()}
        _check_classes(folder, parts, class_names)
    else:
        domains = np.array([domain_of[top_of(file)] for file in files], np.int32) if found.deep else None
        parts = {"train": Part(items, labels, domains)}
    told = list[str]()

    def pixels(chosen: list[Part]) -> list[np.ndarray]:
        order = np.concatenate([part.items for part in chosen])
        images, traits = _read([files[n] for n in order], folder, form)
        told.extend(f"{name}: {one}" for one in _sentences(traits, form))
        return np.split(images, np.cumsum([len(part.items) for part in chosen])[:-1])  # views, of a map too

    domain_names = () if splits else tops
    paths = np.array(["/".join(file) for file in files], dtype=object)
    made = from_parts(name, parts, pixels, class_names=class_names, domain_names=domain_names, notes=notes, files=paths)
    return check(dataclasses.replace(made, notes=(*made.notes, *told)))


def _name(folder: str) -> str:
    """The name of a folder in one spelling (NFC): macOS writes é as two characters where others write one."""
    return unicodedata.normalize("NFC", folder)


def _spellings(files: list[tuple[str, ...]]) -> list[str]:
    """A sentence for every name that folders have in several spellings, which look the same."""
    written = collections.defaultdict[str, set[str]](set)
    for folder in {part for file in files for part in file[:-1]}:
        written[_name(folder)].add(folder)
    several = sorted(name for name, found in written.items() if len(found) > 1)
    classes = in_order({_name(file[-2]) for file in files if len(file) > 1})
    return [
        *(
            f"the folders named {name!r} are spelt in {len(written[name])} ways in Unicode, and taken as one."
            for name in several
        ),
        *(
            f"{' and '.join(map(repr, group))} are different classes. Rename the folders if they are one."
            for group in spellings(classes)
        ),
    ]


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


def listed(names: list[str], most: int = 3) -> str:
    """How many files, and the first of them."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} file{'s' * (len(names) > 1)} ({shown})"


def _read(files: list[tuple[str, ...]], folder: pathlib.Path, form: Form) -> tuple[np.ndarray, dict[str, list[str]]]:
    """[N, H, W, channels] in the narrowest form that holds all images, grey and uint8 first; and the files by their traits."""
    while True:
        try:
            return _stacked(files, folder, form)
        except Wider as needed:
            form = needed.form


def _stacked(files: list[tuple[str, ...]], folder: pathlib.Path, form: Form) -> tuple[np.ndarray, dict[str, list[str]]]:
    """The same in this form; Wider if there is none in it. What reading has found of a large set is kept beside its pixels."""
    paths, traits, damaged = [folder.joinpath(*file) for file in files], dict[str, list[str]](), dict[str, str]()
    key = functools.cache(lambda: file_key(folder, paths, form.image_size, form.background))

    def images() -> Iterator[np.ndarray]:
        large: bool | None = None
        for n, found in enumerate(in_threads(functools.partial(decode, form=form), paths)):
            if isinstance(found, Damaged):
                damaged["/".join(files[n])] = found.reason
                continue
            for trait in found.traits:
                traits.setdefault(trait, []).append("/".join(files[n]))
            if large is None:
                large = is_large(len(paths) * found.pixels.nbytes)
                if large and (known := kept(key() + DAMAGED)):
                    raise _damaged(folder, known, len(files))
            if not damaged:  # or else only to find the others
                yield found.pixels
        if large and (damaged or traits):
            keep(key() + DAMAGED * bool(damaged), damaged or traits)
        if damaged:
            raise _damaged(folder, damaged, len(files))

    stacked = stack(images(), len(paths), key=key, describe=lambda n: repr("/".join(files[n])))
    return stacked, (kept(key()) or {}) if isinstance(stacked, np.memmap) else traits  # of a map that was there few were read


def _damaged(folder: pathlib.Path, damaged: dict[str, str], total: int) -> DamagedFiles:
    """The error. damaged: {file: why}."""
    [(first, reason), *others] = listing = sorted(damaged.items())
    told = f"{str(folder / first)!r}, which can't be decoded ({reason}). Replace or remove that file"
    if others:
        shown = "; ".join(f"{file!r} ({why})" for file, why in listing[:10])
        more = f"; and {len(damaged) - 10} more" if len(damaged) > 10 else ""
        told = f"{len(damaged)} of {total} in {str(folder)!r} that can't be decoded: {shown}{more}. Replace or remove them"
    leave = f"leave {'them' if others else 'it'} out: --skip-damaged (load(..., skip_damaged=True))"
    return DamagedFiles(f"load needs whole images, got {told}, or {leave}.", {tuple(file.split("/")) for file in damaged})


def _sentences(traits: dict[str, list[str]], form: Form) -> list[str]:
    """What to say of images with these traits."""
    found = {name: listed(sorted(files)) for name, files in sorted(traits.items())}
    told = {
        "transparent": "{} with transparent pixels, laid on " + form.background + " (--background for another colour).",
        "deep": "{} of 16 bits a pixel: 0..65535 are scaled to [0, 1], and all images are float32.",
        "cut": "{} of 16 bits a channel, in colour or with opacity, of which the upper 8 are read.",
    }
    return [told[name].format(files) for name, files in found.items()]
