"""Labels from a file, in whatever of a few forms people keep them: .npz, .npy, or text with one label a line."""

import contextlib
import csv
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from perturbjax.checks import nearest

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
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise ValueError(
            f"labels needs integers or class names [N], got {values.dtype} {list(values.shape)} in {where}. "
            "Write labels.argmax(-1) for one row of scores a sample, labels.astype(int) for whole numbers."
        )
    return LabelFile(where, values, clean)


def as_numbers(labels: LabelFile, class_names: tuple[str, ...]) -> np.ndarray:
    """[N] int32 in 0..C-1. Text is taken as class names if every line is one, or else as integers."""
    values = labels.values
    if values.dtype.kind == "U":
        number = {name: n for n, name in enumerate(class_names)}
        unknown = [n for n, value in enumerate(values) if value not in number]
        if not unknown:
            return np.array([number[value] for value in values.tolist()], np.int32)
        try:
            values = np.array([int(value) for value in values.tolist()])
        except ValueError:
            n = next(n for n in unknown if not values[n].lstrip("-").isdecimal())
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
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"labels needs text in UTF-8, got {path.name!r} ({error}). Save it as UTF-8.") from error
    lines = text.rstrip().splitlines()
    if path.suffix == ".txt":
        return [line.strip() for line in lines]
    rows = list(csv.reader(lines))
    wide = next((n for n, row in enumerate(rows) if len(row) != 1), None)
    if wide is not None:
        raise ValueError(
            f"labels needs one label a line, got {len(rows[wide])} columns in line {wide + 1} of {path.name!r}. "
            "Keep the column of the labels only, in the order of the data."
        )
    return [row[0].strip() for row in rows]
