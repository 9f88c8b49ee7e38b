"""Labels in another form than integers [N]: what they are instead, and the line to write.

one-hot rows ──► argmax      several classes a row, nan ──► which rows      1, 1.0, Good, good ──► the pair that is one class
"""

import collections
import decimal
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

SHOWN = 10  # positions, or pairs, in a message
MISSING = frozenset(("", "nan", "<na>", "#n/a", "n/a"))
"""How tables write a label that is not there, in lower case. "none" and "NA" are classes in real sets."""
DOUBTFUL, RARE = frozenset(("na", "null", "none")), 0.5
"""These, where they are rarer than that share of the other labels' mean."""
SEVERAL = "Several classes a sample is not what this library does"


def trouble(labels: Any) -> tuple[str, str] | None:
    """(what is there, the line to write instead) of labels that are no integers [N] or [N, 1]; None of those that are.

    >>> trouble([2, 0, 1])
    >>> trouble([[0, 1], [1, 1], [1, 0]])[0]
    'shape [3, 2] with several classes in 1 row (1)'
    >>> trouble([0.0, float("nan"), 1.0])
    ('nan in 1 row (1) of float64', 'Drop it: keep = ~np.isnan(labels); labels[keep].astype(np.int32), and the same samples.')
    """
    try:
        array = np.asarray(labels)
    except ValueError:  # lists of different lengths
        return "lists of different lengths", f"{SEVERAL}: give each sample one."
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2:
        return _of_rows(array)
    if array.ndim != 1:
        return f"shape {list(array.shape)}", "Give one class for each sample, [N]."
    if np.issubdtype(array.dtype, np.integer):
        return None
    if array.dtype.kind == "O":
        return _of_objects(array)
    if array.dtype.kind in "UST":
        return _of_texts([_text(value) for value in array.tolist()], array.dtype)
    if array.dtype.kind == "f":
        return _of_floats(array)
    fix = "Write labels.astype(np.int32)" + ("." if array.dtype.kind == "b" else ", if these are whole numbers.")
    return f"dtype {array.dtype}", fix


def multi_hot(rows: np.ndarray) -> bool:
    """Whether rows [N, C] say of each class whether the sample has it, and some have several."""
    return bool(np.isin(rows, (0, 1)).all() and (rows.sum(1) > 1).any())


def positions(bad: np.ndarray) -> str:
    """Which rows of a mask [N]: "3 rows (0, 4, 7)", at most ten of them."""
    return numbered(np.flatnonzero(bad))


def numbered(found: Sequence[int] | np.ndarray, one: str = "row") -> str:
    """How many rows, and which: "3 rows (0, 4, 7)", at most ten of them."""
    shown = ", ".join(map(str, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
    return f"{len(found)} {one}{'s' * (len(found) != 1)} ({shown})"


def is_missing(label: str) -> bool:
    """Whether a label in a table says that there is none."""
    return label.strip().lower() in MISSING


def doubtful(counts: Mapping[str, int]) -> list[str]:
    """The labels in a table that are rare, and may say that there is none. counts: {label: its rows}.

    >>> doubtful({"good": 20, "bad": 30, "NA": 2}), doubtful({"good": 20, "bad": 30, "none": 25})
    (['NA'], [])
    """
    found = [label for label in counts if label.lower() in DOUBTFUL]
    others = [count for label, count in counts.items() if label not in found]
    return [label for label in found if others and counts[label] < RARE * np.mean(others)]


def spellings(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The names that seem to be one class, as tuples: they differ in case, in spaces, or are one number (1, 1.0, 01).

    >>> spellings(["good", "1", "Good", "bad", "1.0", "very bad", "very  bad "])
    [('Good', 'good'), ('1', '1.0'), ('very  bad ', 'very bad')]
    """
    groups = collections.defaultdict[str, list[str]](list)
    for name in dict.fromkeys(names):
        groups[folded(name)].append(name)
    return [tuple(sorted(group)) for group in groups.values() if len(group) > 1]


def folded(name: str) -> str:
    """The name without what people write now one way, now another: composed, without case, single spaces; numbers by value."""
    plain = " ".join(unicodedata.normalize("NFC", name).casefold().split())
    return _number(plain) or plain


def _number(text: str) -> str | None:
    """The value of a text that is a number, exactly; None of others."""
    try:
        value = decimal.Decimal(text)
    except decimal.InvalidOperation:
        return None
    usual = value.is_finite() and abs(value.adjusted()) < 100 and "_" not in text
    return "{}/{}".format(*value.as_integer_ratio()) if usual else None


def pairs(groups: Sequence[tuple[str, ...]]) -> str:
    """The groups of `spellings` as a phrase: "'Good' and 'good'", "'a' and 'A'; 'b' and 'B'"."""
    shown = "; ".join(" and ".join(map(repr, group)) for group in groups[:SHOWN])
    return shown + (f"; {len(groups) - SHOWN} more" if len(groups) > SHOWN else "")


def _of_rows(array: np.ndarray) -> tuple[str, str]:
    shape = f"shape {list(array.shape)}"
    try:
        values = array.astype(np.float64)
    except (TypeError, ValueError):
        return shape, f"{SEVERAL}: give one name for each sample, [N]."
    nan, total = np.isnan(values).any(1), values.sum(1)
    if nan.any():
        return f"{shape} with nan in {positions(nan)}", "Drop these rows: keep = ~np.isnan(labels).any(1)."
    if np.isin(values, (0, 1)).all():
        several, none = total > 1, total == 0
        keep = "keep the samples of one, keep = labels.sum(1) == 1, and labels[keep].argmax(-1)"
        if several.any():
            return (
                f"{shape} with several classes in {positions(several)}",
                f"{SEVERAL} (argmax would take the first of them): train on one column at a time, or {keep}.",
            )
        if none.any():
            return f"{shape} with no class in {positions(none)}", f"{keep[0].upper()}{keep[1:]}."
        return shape, "Write labels.argmax(-1) for one-hot rows."
    if (values >= 0).all() and np.allclose(total, 1, atol=1e-3):
        return f"{shape} of probabilities", "Write labels.argmax(-1) for the likeliest class of each sample."
    return (
        f"{shape} with several numbers a sample",
        f"Write labels.argmax(-1) if these are scores of the classes, or take one column, labels[:, 0]. {SEVERAL}.",
    )


def _of_floats(array: np.ndarray) -> tuple[str, str]:
    nan, infinite = np.isnan(array), np.isinf(array)
    part = np.nan_to_num(array, posinf=0, neginf=0) % 1 != 0
    if nan.any():
        them = "it" if nan.sum() == 1 else "them"
        return (
            f"nan in {positions(nan)} of {array.dtype}",
            f"Drop {them}: keep = ~np.isnan(labels); labels[keep].astype(np.int32), and the same samples.",
        )
    if infinite.any():
        return f"infinity in {positions(infinite)} of {array.dtype}", "Drop these rows."
    if part.any():
        return (
            f"numbers with a fraction in {positions(part)}, the first {array[np.argmax(part)]:g}",
            "Classes are whole numbers: cut these into some, np.digitize(labels, edges).",
        )
    return f"dtype {array.dtype}", "Write labels.astype(np.int32)."


def _of_objects(array: np.ndarray) -> tuple[str, str]:
    values = array.tolist()
    lists = np.array([isinstance(value, list | tuple | set | np.ndarray) for value in values], bool)
    if lists.any():
        return f"lists in {positions(lists)}", f"{SEVERAL}: give each sample one."
    texts = ["" if value is None else _text(value) for value in values]
    if all(isinstance(value, int | np.integer) for value in values):
        return f"dtype {array.dtype}", "Write labels.astype(np.int32)."
    lacks = [is_missing(text) and not isinstance(value, str | bytes) for value, text in zip(values, texts)]
    if all(lack or isinstance(value, int | float | np.number) for value, lack in zip(values, lacks)) and not all(lacks):
        got, fix = _of_floats(np.array([math.nan if lack else value for value, lack in zip(values, lacks)], np.float64))
        return got, fix.replace("isnan(labels)", "isnan(labels.astype(float))")  # isnan takes no objects
    return _of_texts(texts, array.dtype)


def _of_texts(texts: list[str], dtype: np.dtype) -> tuple[str, str]:
    missing = np.array([is_missing(text) for text in texts], bool)
    if missing.any():
        return f"no label in {positions(missing)}", "Drop these rows, and the same samples."
    if groups := spellings(texts):
        return f"{pairs(groups)} as different classes", "Write one of each: " + _one_way(groups[0])
    names = "labels" if dtype.kind != "O" else "labels.astype(str)"
    return f"dtype {dtype}", f"Write np.unique({names}, return_inverse=True)[1] for names."


def _one_way(group: tuple[str, ...]) -> str:
    number = all(_number(text.strip()) for text in group)
    return "labels.astype(float).astype(int)." if number else "[label.strip().lower() for label in labels]."


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
