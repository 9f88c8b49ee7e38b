"""Texts and their labels from files: .csv and .jsonl (packed or not), the arrays of an .npz, a folder with a file per class."""

import collections
import csv
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from perturbjax.data.arrange import Part, from_parts
from perturbjax.data.dataset import Dataset, as_labels, check, name_classes
from perturbjax.data.folder import BESIDE, IMAGES, SPLITS, in_order, listed
from perturbjax.data.text import SIZE, Tokenizer, build_words, objects, open_text, read_pieces, reading, unpack

KEYS = {  # columns of a .csv, keys of a .jsonl: the first that there is
    "text": ("text", "sentence", "review", "content"),
    "label": ("label", "class", "category", "sentiment", "target"),
    "split": ("split",),
}
TABLES = re.compile(r"\.(csv|jsonl)(\.xz|\.gz)?$", re.IGNORECASE)
NO_CLASS = re.compile(r"^(readme|licen[sc]e|changelog|vocab)\b", re.IGNORECASE)  # text files that hold no samples
ONE_EACH = "FOLDER/class.txt with one text a line, or FOLDER/train/class.txt and FOLDER/test/class.txt"


@dataclasses.dataclass(frozen=True)
class TextForm:
    """How texts become rows of integers. See `load`."""

    length: int | None = None
    vocabulary: str | os.PathLike | Tokenizer | None = None
    size: int | None = None
    min_count: int | None = None

    def __post_init__(self):
        for name, low in (("length", 1), ("size", 3), ("min_count", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                flag = {"length": "text_length", "size": "vocabulary_size", "min_count": "min_count"}[name]
                raise ValueError(f"load needs {flag} as a whole number of at least {low}, got {value!r}. Leave it out.")
        if self.vocabulary is not None and (self.size or self.min_count):
            raise ValueError(
                "load needs vocabulary_size and min_count only where the training texts make the vocabulary, got them beside "
                f"{self.vocabulary!r}. Leave them out."
            )

    @property
    def default(self) -> bool:
        """Whether nothing is asked for."""
        return self == TextForm()

    def tokenizer(self, texts: Sequence[str]) -> Tokenizer:
        """The vocabulary of these training texts, or the one that is given."""
        if isinstance(self.vocabulary, Tokenizer):
            return self.vocabulary
        if self.vocabulary is not None:
            return read_pieces(self.vocabulary)
        return build_words(texts, size=self.size or SIZE, min_count=self.min_count or 1)


def is_table(path: pathlib.Path) -> bool:
    """Whether the name is that of a .csv or .jsonl, packed or not."""
    return TABLES.search(path.name) is not None


def is_folder(folder: pathlib.Path) -> bool:
    """Whether a folder holds texts: train.csv or the like, a file per class, or train and test with a file per class in each."""
    if _tables(folder):
        return True
    files, folders = _entries(folder)
    if (folder / "dataset_info.json").is_file() or any(file.suffix.lower() in IMAGES for file in files):
        return False
    if folders:
        of_splits = all(sub.name.lower() in SPLITS for sub in folders)
        return of_splits and all(not _entries(sub)[1] and len(_class_files(sub)) > 1 for sub in folders)
    return len(_class_files(folder)) > 1


def read_table(path: pathlib.Path, form: TextForm) -> Dataset:
    """A .csv or .jsonl; its column `split` says train, test or validation where there is one."""
    return _dataset(TABLES.sub("", path.name), _by_split(path, _rows(path)), form, ())


def read_folder(folder: pathlib.Path, form: TextForm) -> Dataset:
    """A folder of texts. See `is_folder`."""
    name, notes = folder.resolve().name, list[str]()
    if tables := _tables(folder):
        return _dataset(name, {split: list(_rows(path)) for split, path in tables.items()}, form, notes)
    folders = _entries(folder)[1]
    splits = {SPLITS[sub.name.lower()]: sub for sub in folders} if folders else {"train": folder}
    if len(splits) < len(folders) or "train" not in splits:
        raise ValueError(
            f"load needs the folders train, test and val in {str(folder)!r}, got {', '.join(sub.name for sub in folders)}. "
            "Name one folder train, and at most one test and one val."
        )
    latin = list[str]()
    parts = {split: list(_lines_by_class(sub, latin)) for split, sub in splits.items()}
    if latin:
        notes.append(f"{name}: {listed(latin)} read as Latin-1, not being UTF-8.")
    if ignored := [file.name for file in _entries(folder)[0] if folders or file not in _class_files(folder).values()]:
        notes.append(f"{name}: {listed(ignored)} ignored.")
    return _dataset(name, parts, form, notes)


def read_arrays(name: str, values: Mapping[str, np.ndarray], form: TextForm) -> Dataset:
    """The arrays of an .npz: text, or train_text and test_text; strings, or bytes with ..._offsets; and their labels."""
    values = dict(values)
    splits = (
        {"train": "", "test": None} if "text" in values else {"train": "train_", "test": "test_", "validation": "validation_"}
    )
    parts, labels = {}, {}
    for split, prefix in splits.items():
        if prefix is not None and prefix + "text" in values:
            key = prefix + "text"
            texts = unpack(key, values[key], values.get(key + "_offsets"))
            parts[split], labels[split] = texts, np.asarray(values[prefix + "labels"])
    names = name_classes(values.get("class_names", ()), *labels.values())
    checked = {
        split: Part(texts, as_labels(f"{splits[split]}labels of {name}", labels[split], len(texts), len(names)))
        for split, texts in parts.items()
    }
    return _encoded(name, checked, names, form, (), values.get("train_index"))


class _Row(NamedTuple):
    text: str
    label: str
    split: str | None = None


def _dataset(name: str, parts: Mapping[str, Sequence[_Row]], form: TextForm, notes: Sequence[str]) -> Dataset:
    """Rows by split, whose classes are the labels that the training rows have, in order."""
    if not parts.get("train"):
        raise ValueError(f"load needs training texts in {name}, got none. Give a row for each text, or name the part train.")
    class_names = in_order({row.label for row in parts["train"]})
    number = {label: n for n, label in enumerate(class_names)}
    made = {}
    for split, rows in parts.items():
        strange = next((row.label for row in rows if row.label not in number), None)
        if strange is not None:
            raise ValueError(
                f"load needs the {split} texts of {name} in the training texts' classes ({', '.join(class_names[:10])}), got "
                f"{strange!r}, of which there is no training text. Rename that label as in training, or drop those texts."
            )
        made[split] = Part(objects([row.text for row in rows]), np.array([number[row.label] for row in rows], np.int32))
    return _encoded(name, made, class_names, form, notes)


def _encoded(
    name: str,
    parts: Mapping[str, Part],
    class_names: Sequence[str],
    form: TextForm,
    notes: Sequence[str],
    train_index: np.ndarray | None = None,
) -> Dataset:
    """The parts as tokens. The vocabulary is made of what is trained on, once a test set is split off."""
    chosen: list[Part] = []
    tokenizer: list[Tokenizer] = []

    def rows(of: list[Part]) -> list[np.ndarray]:
        chosen.extend(of)
        tokenizer.append(form.tokenizer(of[0].items))
        train = tokenizer[0].rows(of[0].items, form.length)
        return [train, *(tokenizer[0].rows(part.items, train.shape[1]) for part in of[1:])]

    made = from_parts(name, parts, rows, class_names=class_names, notes=notes)
    texts = dict(zip(("train_texts", "test_texts", "validation_texts"), (part.items for part in chosen)))
    empty = sum(not text.strip() for part in chosen for text in part.items)
    notes = (*made.notes, f"{name}: {empty} texts have no word.") if empty else made.notes
    index = {} if train_index is None else {"train_index": train_index, "source_size": None}
    return check(dataclasses.replace(made, tokenizer=tokenizer[0], notes=notes, **texts, **index))


def _by_split(path: pathlib.Path, rows: Iterator[_Row]) -> dict[str, list[_Row]]:
    parts = collections.defaultdict[str, list[_Row]](list)
    for number, row in enumerate(rows, start=1):
        split = "train" if row.split is None else SPLITS.get(row.split.strip().lower())
        if split is None:
            raise ValueError(
                f"load needs a split of train, test or validation in every row of {str(path)!r}, got {row.split!r} in row {number}. "
                "Rename it, or drop the column."
            )
        parts[split].append(row)
    return parts


def _rows(path: pathlib.Path) -> Iterator[_Row]:
    """The rows of a .csv or .jsonl."""
    read = _csv_rows if TABLES.search(path.name)[1].lower() == "csv" else _json_rows
    with open_text(path) as stream:
        yield from read(path, reading(path, stream))


def _csv_rows(path: pathlib.Path, lines: Iterator[str]) -> Iterator[_Row]:
    reader = csv.reader(lines)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        got = f"the columns {', '.join(header)}" if header else "an empty file"
        text, label, split = (_key(path, what, header, got) for what in KEYS)
        for number, values in enumerate(reader, start=1):
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"load needs {len(header)} columns in every row of {str(path)!r}, got {len(values)} in row {number}. "
                    "Put texts with commas, quotes or line breaks into quotes: csv.writer(file).writerow([text, label])."
                )
            row = dict(zip(header, values))
            yield _row(path, number, row[text], row[label], row.get(split))
    except csv.Error as error:
        raise ValueError(f"load needs a .csv, got {str(path)!r} ({error}). Write it with csv.writer.") from error


def _json_rows(path: pathlib.Path, lines: Iterator[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"load needs one JSON object a line in {str(path)!r}, got {line.strip()[:60]!r} in line {number}. "
                "Write json.dumps(dict(text=..., label=...)) and a line break for each text."
            )
        got = f"the keys {', '.join(row) or '(none)'} in line {number}"
        text, label, split = (_key(path, what, row, got) for what in KEYS)
        yield _row(path, number, row[text], row[label], row.get(split))


def _key(path: pathlib.Path, what: str, names: Collection[str], got: str) -> str | None:
    """The name under which the text, the label or the split stands; the split may have none."""
    name = next((name for name in KEYS[what] if name in names), None)
    if name is None and what != "split":
        raise ValueError(
            f"load needs a {what} in every row of {str(path)!r} (named {' or '.join(KEYS[what])}), got {got}. "
            f"Rename the one that holds it to {what!r}; a .csv begins with the line text,label."
        )
    return name


def _row(path: pathlib.Path, number: int, text, label, split) -> _Row:
    if not isinstance(text, str):
        raise ValueError(
            f"load needs text in every row of {str(path)!r}, got {text!r} in row {number}. Drop that row, or write its text."
        )
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # pandas writes whole numbers so where some are missing
    label = label.strip() if isinstance(label, str) else str(label) if isinstance(label, int) else ""
    if not label:
        raise ValueError(
            f"load needs a label (a name or a whole number) in every row of {str(path)!r}, got none in row {number}. "
            "Drop the rows without one."
        )
    return _Row(text, label, None if split is None else str(split))


def _tables(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Split -> the table of that name, if there is one of training texts."""
    found = {}
    for file in _entries(folder)[0]:
        split = SPLITS.get(TABLES.sub("", file.name).lower()) if is_table(file) else None
        if split in found:
            raise ValueError(
                f"load needs one file for each part in {str(folder)!r}, got {found[split].name} and {file.name}. Remove one of them."
            )
        if split is not None:
            found[split] = file
    return found if "train" in found else {}


def _entries(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Files and folders in there, in the order of their names, without hidden ones."""
    shown = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.name != "__MACOSX"]
    return [path for path in shown if path.is_file()], [path for path in shown if path.is_dir()]


def _class_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Class -> its file: class.txt, or name.class (rt-polarity.neg, rt-polarity.pos); nothing if the files are none of these."""
    files = [file for file in _entries(folder)[0] if not NO_CLASS.match(file.name)]
    plain = [file for file in files if file.suffix.lower() == ".txt"]
    if plain:
        return {file.stem: file for file in plain}
    named = [file for file in files if file.suffix and file.suffix.lower() not in BESIDE]
    same = len(named) == len(files) and len({file.stem for file in named}) == 1
    return {file.suffix[1:]: file for file in named} if same else {}


def _lines_by_class(folder: pathlib.Path, latin: list[str]) -> Iterator[_Row]:
    """The lines of each class; adds the names of files that are not UTF-8 to `latin`."""
    for label, file in _class_files(folder).items():
        data = file.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
            latin.append(file.name)
        lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
        if not any(lines):
            raise ValueError(f"load needs a text in every class, got an empty file {str(file)!r}. Use {ONE_EACH}.")
        yield from (_Row(line, label) for line in lines if line)
