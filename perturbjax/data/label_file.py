"""Labels from a file, in whatever of a few forms people keep them: .npz, .npy, or text with one label a line."""

import contextlib
import csv
import pathlib
import unicodedata
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from perturbjax.checks import nearest
from perturbjax.data.encoding import DELIMITERS, read_text
from perturbjax.label_form import folded, is_missing, numbered, pairs, spellings, trouble

TEXT = (".txt", ".csv")
CLEAN = "clean_label"  # CIFAR-N's files hold the authors' labels under this key


class LabelFile(NamedTuple):
    """What a file says, before it is known which data it is about."""

    where: str  # for messages
    values: np.ndarray  # [N], integers or text
    clean: np.ndarray | None  # [N] integers, the labels of the data that the file was made for, if it says so


def read_labels(file: str | pathlib.Path, key: str | None = None) -> LabelFile:
    """The labels in a file: of an .npz the array `key`, of others all there is. ValueError if there are none."""
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"labels needs a file, got {str(path)!r}, where there is none. Check the path.")
    clean = None
    if path.suffix in (".npz", ".npy"):
        values, clean, key = _arrays(path, key)
    elif path.suffix in TEXT:
        values = np.array(_lines(path), dtype=str)
    else:
        raise ValueError(
            f"labels needs an .npz, .npy, .txt or .csv file, got {str(path)!r}. Write np.save('labels.npy', labels)."
        )
    if path.suffix != ".npz" and key is not None:
        raise ValueError(f"labels needs a key for .npz files only, got {key!r} for {path.name!r}. Leave it out.")
    where = repr(path.name) if key is None else f"{key!r} of {path.name!r}"
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if (values.ndim != 1 or values.dtype.kind != "U") and (wrong := trouble(values)):
        raise ValueError(f"labels needs integers or class names [N], got {wrong[0]} in {where}. {wrong[1]}")
    return LabelFile(where, values, clean)


def as_numbers(labels: LabelFile, class_names: tuple[str, ...]) -> np.ndarray:
    """[N] int32 in 0..C-1. Text is taken as class names if every line is one, or else as integers."""
    values = labels.values
    if values.dtype.kind == "U":
        composed = lambda name: unicodedata.normalize("NFC", name)  # as stored by one system or another, it looks the same
        values = np.array([composed(value) for value in values.tolist()])
        number = {composed(name): n for n, name in enumerate(class_names)}
        unknown = [n for n, value in enumerate(values) if value not in number]
        if not unknown:
            return np.array([number[value] for value in values.tolist()], np.int32)
        _check_texts(labels.where, values, unknown)
        try:
            values = np.array([int(value) for value in values.tolist()])
        except ValueError:
            n = next(n for n in unknown if not values[n].lstrip("-").isdecimal())
            meant = {folded(name): name for name in (*map(str, range(len(class_names))), *class_names)}.get(folded(values[n]))
            if meant is not None:
                count = (values == values[n]).sum()
                raise ValueError(
                    f"labels needs the classes as the data has them, got {str(values[n])!r} for sample {n} in {labels.where} ({count} such "
                    f"labels). Write {meant!r}."
                ) from None
            hint = "Remove the heading. " if n == 0 else ""
            raise ValueError(
                f"labels needs an integer or a class name for every sample, got {str(values[n])!r} for sample {n} in "
                f"{labels.where}. {hint}{nearest(str(values[n]), class_names)}"
            ) from None
    wrong = np.flatnonzero((values < 0) | (values >= len(class_names)))
    if wrong.size:
        raise ValueError(
            f"labels needs labels in 0..{len(class_names) - 1}, got {values[wrong[0]]} for sample {wrong[0]} in {labels.where} "
            f"({wrong.size} such labels). Renumber them: the first class of {len(class_names)} is 0."
        )
    return values.astype(np.int32)


def _check_texts(where: str, values: np.ndarray, unknown: list[int]) -> None:
    """Raises ValueError for lines without a label, and for labels that seem to be one class, differently written."""
    if missing := [n for n in unknown if is_missing(str(values[n]))]:
        raise ValueError(
            f"labels needs an integer or a class name for every sample, got none for {numbered(missing, 'sample')} in {where}. "
            "Write their labels: the file has one for every sample of the data, in its order."
        )
    strange = {str(values[n]) for n in unknown}
    if groups := [group for group in spellings(values.tolist()) if strange.intersection(group)]:
        raise ValueError(
            f"labels needs one way of writing each class, got {pairs(groups)} in {where}. Write one of them in all lines."
        )


def _arrays(path: pathlib.Path, key: str | None) -> tuple[np.ndarray, np.ndarray | None, str | None]:
    """The array of that key (or the only one), the array of clean labels, and the key it is."""
    with open(path, "rb") as stream:  # ours: a damaged file's numpy would leave open
        with _naming(path):
            loaded = np.load(stream, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None, key
        key = _chosen(path, loaded.files, key)
        with _naming(path):
            return loaded[key], loaded[CLEAN] if CLEAN in loaded.files else None, key


@contextlib.contextmanager
def _naming(path: pathlib.Path):
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        fix = "Save numbers or text" if "Object arrays" in str(error) else "Copy or write the file again"
        raise ValueError(
            f"labels needs a whole file of plain arrays, got {str(path)!r} ({type(error).__name__}: {error}). {fix}."
        ) from error


def _chosen(path: pathlib.Path, found: list[str], key: str | None) -> str:
    if key in found or (key is None and len(found) == 1):
        return key or found[0]
    if key is None:
        raise ValueError(
            f"labels needs a key of {path.name!r}, got none. Write labels({path.name}, {found[0] if found else 'KEY'}); "
            f"there are: {', '.join(sorted(found))}."
        )
    raise ValueError(f"labels needs a key of {path.name!r}, got {key!r}. {nearest(key, found)}")


def _lines(path: pathlib.Path) -> list[str]:
    """One label a line; empty lines at the end don't count."""
    lines = read_text("labels", path).rstrip().splitlines()
    if path.suffix == ".txt":
        return [line.strip() for line in lines]
    for mark, called in DELIMITERS.items():
        rows = list(csv.reader(lines, delimiter=mark))
        wide = next((n for n, row in enumerate(rows) if len(row) > 1), None)
        if wide is not None and (mark == "," or all(len(row) > 1 for row in rows)):  # the others may be in a class's name
            raise ValueError(
                f"labels needs one label a line, got {len(rows[wide])} columns in line {wide + 1} of {path.name!r}, separated by {called}. "
                "Keep the column of the labels only, in the order of the data."
            )
    return ["".join(row).strip() for row in rows]
