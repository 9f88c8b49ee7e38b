"""Rows of a table of texts, .csv, .tsv or .jsonl: which columns hold what, what separates them, and rows without a label."""

import csv
import itertools
import json
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, TextIO

from perturbjax.data.encoding import DELIMITERS, open_text, reading
from perturbjax.label_form import SEVERAL, is_missing, numbered

KEYS = {  # columns of a .csv, keys of a .jsonl: the first that there is
    "text": ("text", "sentence", "review", "content"),
    "label": ("label", "class", "category", "sentiment", "target"),
    "split": ("split",),
}
TABLES = re.compile(r"\.(csv|tsv|jsonl)(\.xz|\.gz)?$", re.IGNORECASE)
SEP = re.compile(r"sep=(.)\s*$", re.IGNORECASE)  # a spreadsheet's first line


class Row(NamedTuple):
    """A text and its label, as they stand in a file."""

    text: str
    label: str
    split: str | None = None
    number: int | None = None  # of the row in its table, counted from 1 after the heading


def is_table(path: pathlib.Path) -> bool:
    """Whether the name is that of a .csv, .tsv or .jsonl, packed or not."""
    return TABLES.search(path.name) is not None


def read_rows(path: pathlib.Path, notes: list[str]) -> list[Row]:
    """The rows of a table. Adds to the notes what is unusual about the file. Raises ValueError for rows without a label."""
    read = _json_rows if TABLES.search(path.name)[1].lower() == "jsonl" else _csv_rows
    with open_text(path) as stream:
        rows = list(read(path, stream, notes))
        if _shown(stream) != "UTF-8":
            notes.append(f"{path.name}: read as {_shown(stream)}.")
    if missing := [row for row in rows if is_missing(row.label)]:
        numbers = numbered([row.number for row in missing])
        written = ", ".join(sorted({repr(row.label) for row in missing}))
        raise ValueError(
            f"load needs a label (a name or a whole number) in every row of {str(path)!r}, got none in {numbers} ({written}). "
            "Drop the rows without one (row 1 has the first text)."
        )
    return rows


def _shown(stream: TextIO) -> str:
    return stream.encoding.upper().removesuffix("-SIG")


def _csv_rows(path: pathlib.Path, stream: TextIO, notes: list[str]) -> Iterator[Row]:
    lines = iter(reading(path, stream))
    mark, lines = _delimiter(lines)
    lines = list(lines) if mark == "\t" else lines
    reader = csv.reader(lines, delimiter=mark, quoting=csv.QUOTE_NONE if _plain(mark, lines) else csv.QUOTE_MINIMAL)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        found = f"(separated by {DELIMITERS.get(mark, repr(mark))}, in {_shown(stream)})"
        got = f"the columns {', '.join(header)[:200]} {found}" if header else "an empty file"
        text, label, split = (_key(path, what, header, got) for what in KEYS)
        if mark != ("\t" if TABLES.search(path.name)[1].lower() == "tsv" else ","):
            notes.append(f"{path.name}: columns are separated by {DELIMITERS.get(mark, repr(mark))}.")
        for number, values in enumerate(reader, start=1):
            if not values:
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"load needs {len(header)} columns in every row of {str(path)!r}, got {len(values)} in row {number}. "
                    f"Put texts with {DELIMITERS.get(mark, repr(mark))}, quotes or line breaks into quotes: "
                    "csv.writer(file).writerow([text, label])."
                )
            row = dict(zip(header, values))
            yield _row(path, number, row[text], row[label], row.get(split))
    except csv.Error as error:
        raise ValueError(f"load needs a .csv, got {str(path)!r} ({error}). Write it with csv.writer.") from error


def _delimiter(lines: Iterator[str]) -> tuple[str, Iterator[str]]:
    """(what separates the columns, the lines from the heading on): what gives the heading a text and a label, or else what the csv
    module's Sniffer makes of the first lines."""
    first = list(itertools.islice(lines, 20))
    if first and (said := SEP.match(first[0])):
        return said[1], itertools.chain(first[1:], lines)
    for mark in DELIMITERS:
        names = {name.strip().lower() for row in csv.reader(first[:1], delimiter=mark) for name in row}
        if names.intersection(KEYS["text"]) and names.intersection(KEYS["label"]):
            return mark, itertools.chain(first, lines)
    try:
        mark = csv.Sniffer().sniff("".join(first), "".join(DELIMITERS)).delimiter
    except csv.Error:
        mark = ","
    return mark, itertools.chain(first, lines)


def _plain(mark: str, lines: Iterable[str]) -> bool:
    """Whether quotes are nothing but characters: in many files with tabs, where a text that opens with one would swallow lines."""
    if mark != "\t":
        return False
    rows = [line.rstrip("\r\n").split(mark) for line in lines if line.strip()]
    torn = any(field.startswith('"') and not field[1:].endswith('"') for row in rows for field in row)
    return torn and len({len(row) for row in rows}) == 1


def _json_rows(path: pathlib.Path, stream: TextIO, notes: list[str]) -> Iterator[Row]:
    for number, line in enumerate(reading(path, stream), start=1):
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


def _row(path: pathlib.Path, number: int, text: Any, label: Any, split: Any) -> Row:
    if not isinstance(text, str):
        raise ValueError(
            f"load needs text in every row of {str(path)!r}, got {text!r} in row {number}. Drop that row, or write its text."
        )
    if isinstance(label, list | dict):
        fix = f"{SEVERAL}: give each text one" if isinstance(label, list) and len(label) > 1 else "Write its name"
        raise ValueError(f"load needs one label in every row of {str(path)!r}, got {label!r} in row {number}. {fix}.")
    if isinstance(label, float) and not math.isnan(label):
        if not label.is_integer():
            raise ValueError(
                f"load needs a label (a name or a whole number) in every row of {str(path)!r}, got {label} in row {number}. "
                "Cut numbers into classes, or write them as names."
            )
        label = int(label)  # pandas writes whole numbers so where some are missing
    return Row(text, "" if label is None else str(label).strip(), None if split is None else str(split), number)


def by_split(path: pathlib.Path, rows: Iterable[Row], known: dict[str, str]) -> dict[str, list[Row]]:
    """The rows of each part, by their column `split`, whose values are `known`; without one, all are for training."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        split = "train" if row.split is None else known.get(row.split.strip().lower())
        if split is None:
            raise ValueError(
                f"load needs a split of train, test or validation in every row of {str(path)!r}, got {row.split!r} in row "
                f"{row.number}. Rename it, or drop the column."
            )
        parts.setdefault(split, []).append(row)
    return parts
