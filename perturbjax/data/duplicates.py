"""Images, or texts as they stand in the source, that are there several times, bit for bit: in two parts, in one, under two labels."""

import csv
import dataclasses
import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from perturbjax.data.dataset import PARTS, Dataset

SHARE = 0.01  # of the test images: from here on a test result says more about memory than about new images
MARK = "bit for bit"  # in every note on copies


class Copies(NamedTuple):
    """The samples of the training, test and validation set, one after another, and where each has been before.

    labels are those that are trained on: where they differ between copies, one of them at least is wrong.
    """

    first: np.ndarray  # [T] position of the first sample that is the same; its own where there is none before
    labels: np.ndarray  # [T]
    starts: tuple[int, ...]  # of the parts: 0, N, N + M and, at the end, T

    def of(self, part: str) -> slice:
        """The positions of a part."""
        n = PARTS.index(part)
        return slice(self.starts[n], self.starts[n + 1])

    @property
    def pairs(self) -> np.ndarray:
        """[K, 2]: every copy beside the first of its kind, (first, copy); k samples that are the same are k - 1 pairs."""
        copy = np.flatnonzero(self.first != np.arange(len(self.first)))
        return np.stack([self.first[copy], copy], 1)[np.lexsort((copy, self.first[copy]))]

    @property
    def disputed(self) -> np.ndarray:
        """[T] bool, whether the sample is there under another label too."""
        low, high = np.full(len(self.first), np.iinfo(np.int32).max), np.full(len(self.first), -1)
        np.minimum.at(low, self.first, self.labels)
        np.maximum.at(high, self.first, self.labels)
        return (low != high)[self.first]


def find_copies(dataset: Dataset) -> Copies:
    """Which samples are the same, bit for bit, whatever their labels; 60,000 images take 0.3 s."""
    seen, first, labels, starts = dict[bytes, int](), list[int](), [], [0]
    for part in PARTS:
        samples = _samples(dataset, part)
        if samples is not None:
            first += [seen.setdefault(key, n) for n, key in enumerate(_digests(samples), start=len(first))]
            labels.append(getattr(dataset, f"{part}_labels"))
        starts.append(len(first))
    return Copies(np.array(first, np.int64), np.concatenate(labels), tuple(starts))


def check_duplicates(dataset: Dataset, *, refuse: bool = True) -> Dataset:
    """The data set with notes on samples that are there several times, if there are any: in training and test, in one of the parts,
    and under several labels.

    Call it after the views: `drop_duplicates` removes what this finds, and `write_copies` lists it. (CIFAR-100 has images that are in
    training and test, CIFAR-10 and the digits have none.)

    Args:
      refuse: raise the error below; False: a note tells of that share too.

    Raises:
      ValueError: if 1 % of the test images, or more, are training images.
    """
    copies, kind = find_copies(dataset), dataset.kind
    pairs, notes = copies.pairs, list[str]()
    if not len(pairs):
        return dataset
    part_of = lambda column: np.searchsorted(copies.starts[1:3], pairs[:, column], side="right")
    between = lambda a, b: (part_of(0) == a) & (part_of(1) == b)
    size = len(dataset.test_labels)
    known = pairs[between(0, 1)]
    if len(known):
        first = known[np.argmin(known[:, 1])]
        found = (
            f"{len(known)} of {size} test {kind} that are training {kind}, {MARK} (first: {_told(dataset, copies, first[0])}, is "
            f"{_told(dataset, copies, first[1])})"
        )
        if refuse and len(known) >= SHARE * size:
            raise ValueError(
                f"check_duplicates needs a test set of new {kind} (under {SHARE:.0%} known from training), got {found}. Add "
                "drop_duplicates to the views (--view drop_duplicates+...), which drops them from training, or give another test set."
            )
        notes.append(f"{found.replace(' that are ', ' are ', 1)}.")
    for n, part in enumerate(("training", "test")):
        if count := int(between(n, n).sum()):
            notes.append(
                f"{count} of {copies.starts[n + 1] - copies.starts[n]} {part} {kind} are copies of others there, {MARK}."
            )
    if count := int((part_of(1) == 2).sum()):
        notes.append(f"{count} of {copies.starts[3] - copies.starts[2]} validation {kind} are there elsewhere too, {MARK}.")
    if disputed := int(copies.disputed.sum()):
        a, b = next(pair for pair in pairs if copies.labels[pair[0]] != copies.labels[pair[1]])
        notes.append(
            f"{disputed} {kind} are the same as one under another label, {MARK}, so that not both labels are right (first: "
            f"{_told(dataset, copies, a)}, is {_told(dataset, copies, b)})."
        )
    return dataclasses.replace(dataset, notes=(*dataset.notes, *(f"{dataset.name}: {note}" for note in notes)))


def has_copies(dataset: Dataset) -> bool:
    """Whether `check_duplicates` has found any."""
    return any(MARK in note for note in dataset.notes)


COLUMNS = ("part", "position", "name", "label")
"""Of write_copies, for the first sample of its kind, and again, as copy_part …, for the copy."""


def write_copies(path: pathlib.Path, dataset: Dataset, copies: Copies | None = None) -> None:
    """A .csv with a row for every copy beside the first of its kind, those under different labels first.

    The position is the one in the part that is trained or tested on; the name is the file, where samples are files, or else the
    array with the sample's place in it.
    """
    copies = find_copies(dataset) if copies is None else copies
    pairs = copies.pairs
    differ = copies.labels[pairs[:, 0]] != copies.labels[pairs[:, 1]]
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([*COLUMNS, *(f"copy_{name}" for name in COLUMNS), "labels"])
        for n in np.argsort(~differ, kind="stable"):
            both = [value for place in pairs[n] for value in described(dataset, copies, place)]
            rows.writerow([*both, "different" if differ[n] else "same"])


def described(dataset: Dataset, copies: Copies, place: int) -> tuple[str, int, str, str]:
    """(part, position in it, name, label) of the sample at a place."""
    n = int(np.searchsorted(copies.starts[1:3], place, side="right"))
    part, position = PARTS[n], int(place) - copies.starts[n]
    names, source = getattr(dataset, f"{part}_names"), dataset.train_index[position] if part == "train" else position
    name = f"{part}_{'images' if dataset.tokenizer is None else 'text'}[{source}]" if names is None else names[position]
    return part, position, str(name), dataset.class_names[copies.labels[place]]


def _told(dataset: Dataset, copies: Copies, place: int) -> str:
    part, position, name, label = described(dataset, copies, place)
    named = "" if getattr(dataset, f"{part}_names") is None else f" ({name})"
    return f"{part.replace('train', 'training')} {dataset.kind[:-1]} {position}{named}, {label!r}"


def _samples(dataset: Dataset, part: str) -> np.ndarray | None:
    """The images; of texts the whole ones, since rows of tokens may be cut, and have one number for all unknown words."""
    texts = getattr(dataset, f"{part}_texts")
    return getattr(dataset, f"{part}_images") if texts is None else texts


def _digests(images: np.ndarray):
    """16 bytes for each image, one image in memory at a time. Images of one set have one shape and dtype."""
    raw = (image.encode() if isinstance(image, str) else np.ascontiguousarray(image) for image in images)
    return (hashlib.blake2b(data, digest_size=16).digest() for data in raw)
