"""Texts and their labels from files: .csv, .tsv and .jsonl (packed or not), the arrays of an .npz, a folder with a file per class."""

import collections
import dataclasses
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from perturbjax.data import tfds, unspaced
from perturbjax.data.arrange import Part, from_parts
from perturbjax.data.dataset import Dataset, as_labels, check, name_classes
from perturbjax.data.encoding import encoding_of, foreign, is_western
from perturbjax.data.folder import BESIDE, IMAGES, SPLITS, in_order, listed
from perturbjax.data.rows import TABLES, Row, by_split, is_table, read_rows
from perturbjax.data.text import SIZE, Tokenizer, Words, build_words, objects, read_pieces, unpack
from perturbjax.label_form import SHOWN, doubtful, spellings

NO_CLASS = re.compile(r"^(readme|licen[sc]e|changelog|vocab)\b", re.IGNORECASE)  # text files that hold no samples
CUTS = ("spaces", "characters")
"""What may stand for a vocabulary: the words of the training texts, in scripts without spaces too, or there the characters."""
UNKNOWN_SHARE = 0.5
NOT_SEEN = "they are in no training text, or too rare there. Are there spaces between the words?"
NOT_PIECES = "the vocabulary has no pieces for them. Take one of the texts' language."
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
        if self.vocabulary is not None and self.vocabulary not in CUTS and (self.size or self.min_count):
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
        if self.vocabulary is not None and self.vocabulary not in CUTS:
            return read_pieces(self.vocabulary)
        characters = None if self.vocabulary is None else self.vocabulary == "characters"
        return build_words(texts, size=self.size or SIZE, min_count=self.min_count or 1, characters=characters)


def is_folder(folder: pathlib.Path) -> bool:
    """Whether a folder holds texts: train.csv or the like, a file per class, or train and test with a file per class in each."""
    files, folders = _entries(folder)
    if _tables(folder):  # beside images they tell something of these
        return not any(file.suffix.lower() in IMAGES for sub in folders for file in sub.rglob("*"))
    if (folder / tfds.INFO).is_file() or any(file.suffix.lower() in IMAGES for file in files):
        return False
    if folders:
        of_splits = all(sub.name.lower() in SPLITS for sub in folders)
        return of_splits and all(not _entries(sub)[1] and len(_class_files(sub)) > 1 for sub in folders)
    return len(_class_files(folder)) > 1


def read_table(path: pathlib.Path, form: TextForm) -> Dataset:
    """A .csv, .tsv or .jsonl; its column `split` says train, test or validation where there is one."""
    notes = list[str]()
    return _dataset(TABLES.sub("", path.name), by_split(path, read_rows(path, notes), SPLITS), form, notes)


def read_folder(folder: pathlib.Path, form: TextForm) -> Dataset:
    """A folder of texts. See `is_folder`."""
    name, notes = folder.resolve().name, list[str]()
    if tables := _tables(folder):
        return _dataset(name, {split: read_rows(path, notes) for split, path in tables.items()}, form, notes)
    folders = _entries(folder)[1]
    splits = {SPLITS[sub.name.lower()]: sub for sub in folders} if folders else {"train": folder}
    if len(splits) < len(folders) or "train" not in splits:
        raise ValueError(
            f"load needs the folders train, test and val in {str(folder)!r}, got {', '.join(sub.name for sub in folders)}. "
            "Name one folder train, and at most one test and one val."
        )
    latin = list[str]()
    parts = {split: list(_lines_by_class(sub, latin, notes)) for split, sub in splits.items()}
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


def _dataset(name: str, parts: Mapping[str, Sequence[Row]], form: TextForm, notes: list[str]) -> Dataset:
    """Rows by split, whose classes are the labels that the training rows have, in order."""
    if not parts.get("train"):
        raise ValueError(f"load needs training texts in {name}, got none. Give a row for each text, or name the part train.")
    parts = _one_class_each(name, parts, notes)
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


def _one_class_each(name: str, parts: Mapping[str, Sequence[Row]], notes: list[str]) -> dict[str, list[Row]]:
    """The rows with labels in Unicode's composed form. Raises ValueError for labels that seem to be one class, differently written."""
    written = collections.Counter(row.label for rows in parts.values() for row in rows)
    composed = {label: unicodedata.normalize("NFC", label) for label in written}
    twice = [label for label in written if composed[label] != label and composed[label] in written]
    if twice:
        shown = ", ".join(composed[label] for label in twice[:SHOWN])
        notes.append(f"{name}: labels that only differ in how their accents are stored are one class ({shown}).")
    if rare := doubtful(written):
        shown = " and ".join(f"{label!r} ({written[label]} text{'s' * (written[label] != 1)})" for label in rare)
        notes.append(f"{name}: {shown} stand as classes. Drop those rows if they say that there is no label.")
    if groups := spellings(composed.values()):
        first = {row.label: row.number for rows in reversed(list(parts.values())) for row in reversed(rows)}
        place = lambda label: "" if first[label] is None else f", the first in row {first[label]}"
        texts = lambda label: f"{label!r} ({written[label]} text{'s' * (written[label] != 1)}{place(label)})"
        shown = "; ".join(
            " and ".join(texts(label) for label in written if composed[label] in group) for group in groups[:SHOWN]
        )
        raise ValueError(
            f"load needs one way of writing each class of {name}, got {shown}{'; ...' * (len(groups) > SHOWN)}. Write one of them in all "
            "rows; for two classes, names that differ in more than case, spaces or a number's form."
        )
    return {split: [row._replace(label=composed[row.label]) for row in rows] for split, rows in parts.items()}


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
    said: list[str] = []

    def rows(of: list[Part]) -> list[np.ndarray]:
        chosen.extend(of)
        tokenizer.append(form.tokenizer(of[0].items))
        found = [[tokenizer[0].numbers(text) for text in part.items] for part in of]
        train = tokenizer[0].stack(found[0], form.length)
        said.extend(_notes(form, tokenizer[0], of[0].items, found, train.shape[1]))
        return [train, *(tokenizer[0].stack(numbers, train.shape[1]) for numbers in found[1:])]

    made = from_parts(name, parts, rows, class_names=class_names, notes=notes)
    texts = dict(zip(("train_texts", "test_texts", "validation_texts"), (part.items for part in chosen)))
    empty = sum(not text.strip() for part in chosen for text in part.items)
    said += [f"{empty} text{'s have' if empty > 1 else ' has'} no word."] if empty else []
    notes = (*made.notes, *(f"{name}: {note}" for note in said))
    index = {} if train_index is None else {"train_index": train_index, "source_size": None}
    return check(dataclasses.replace(made, tokenizer=tokenizer[0], notes=notes, **texts, **index))


def _notes(
    form: TextForm, tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[list[list[int]]], length: int
) -> Iterator[str]:
    """What people should know of how the texts (of training) became the numbers `found` (of all parts) and rows of that length."""
    if isinstance(tokenizer, Words) and (count := unspaced.count(texts)):
        have = f"{count} of {len(texts)} training texts {'has' if count == 1 else 'have'} letters of a script that puts no spaces between words"
        yield (
            f"{have}; each of its characters is a word. For longer words put spaces between them, or give a BERT's vocab.txt (--vocabulary)."
            if tokenizer.characters
            else f"{have}; what stands between the spaces that are there is a word. --vocabulary characters makes each character one."
        )
    unknown = np.mean([number == tokenizer.unknown for numbers in found[1] for number in numbers] or [False])
    if unknown > UNKNOWN_SHARE:
        yield f"{unknown:.0%} of the test texts' words are unknown: {NOT_SEEN if isinstance(tokenizer, Words) else NOT_PIECES}"
    cut = sum(len(tokenizer.row(numbers, 2**31)) > length for numbers in found[0])
    if cut and form.length is None:
        yield f"{cut} of {len(texts)} training texts are longer than {length} words, and cut there. --text-length reads more of them."


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


def _lines_by_class(folder: pathlib.Path, latin: list[str], notes: list[str]) -> Iterator[Row]:
    """The lines of each class; adds the names of files that are read as Latin-1 to `latin`."""
    for label, file in _class_files(folder).items():
        data = file.read_bytes()
        encoding = encoding_of(data)
        try:
            text = data.decode(encoding)
            if not encoding.startswith("utf-8"):
                notes.append(f"{file.name}: read as {encoding.upper()}.")
        except UnicodeError as error:
            if not is_western(data):
                raise ValueError(f"load needs text in UTF-8, got {str(file)!r}. {foreign(data, file)}") from error
            text = data.decode("latin-1")
            latin.append(file.name)
        lines = [line.strip() for line in text.replace("\r\n", "\n").split("\n")]
        if not any(lines):
            raise ValueError(f"load needs a text in every class, got an empty file {str(file)!r}. Use {ONE_EACH}.")
        yield from (Row(line, label) for line in lines if line)
