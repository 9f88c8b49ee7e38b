"""What the parts of a data set should agree in: the range of their values, and the classes that are measured."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

SAMPLED = 1024  # images of a part that are looked at, at equal distances: a mapped set of any size takes a moment
UNTESTED = "not tested"  # how the note on classes without a test sample begins, after the set's name
SLACK = 0.1  # beyond [0, 1] are what resizing with a sharp filter leaves there, and rounding
APART = 8  # times as wide: from here on two ranges are told (the scales in use, 1, 16 and 255, are further apart)


def check_ranges(name: str, parts: Mapping[str, np.ndarray]) -> str | None:
    """A sentence about parts whose values, all in [0, 1] or all uint8, have ranges of very different widths; None if there are none.

    Args:
      parts: {"train_images": [N, ...], "test_images": [M, ...], ...}, uint8 or floats; others are not looked at.

    Raises:
      ValueError: where one part's range lies within [0, 1] and another's does not; the message has both.

    >>> x = np.linspace(0, 1, 50).reshape(2, 5, 5)
    >>> check_ranges("mine", {"train_images": x, "test_images": x / 255})
    'mine: value ranges differ: train_images 0 to 1, test_images 0 to 0.00392. If one part was divided twice, give it as the other.'
    """
    arrays = {key: np.asarray(images) for key, images in parts.items()}
    known = {key: x for key, x in arrays.items() if x.size and (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating))}
    ranges = {key: _range(images) for key, images in known.items()}
    whole = {key: images.dtype == np.uint8 for key, images in known.items()}
    # uint8 that was divided has zeros and ones and stands beside 0 to 255; zeros and ones beside 0 to 3 may be what they are
    inside = [key for key, (low, high) in ranges.items() if (high == 1 if whole[key] else 0 <= low <= high <= 1)]
    outside = [key for key, (low, high) in ranges.items() if low < 0 or high > (15 if whole[key] else 1)]
    if inside and outside:
        a, b = sorted((inside[0], outside[0]), key=list(ranges).index)
        told = lambda key: f"{_told(ranges[key])} ({known[key].dtype})"
        raise ValueError(
            f"check needs {a} and {b} of {name} in one range, got {told(a)} and {told(b)}. {_fix(inside[0], outside[0], whole, ranges)}"
        )
    widths = [high - low for low, high in ranges.values()]
    if len(set(whole.values())) != 1 or not max(widths) >= APART * min(widths) or max(widths) == min(widths):
        return None
    shown = ", ".join(f"{key} {_told(found)}" for key, found in ranges.items())
    return f"{name}: value ranges differ: {shown}. If one part was divided twice, give it as the other."


def untested(name: str, test_labels: np.ndarray, class_counts: np.ndarray, class_names: Sequence[str], kind: str) -> str | None:
    """A sentence that names the classes without a test sample; None if every class has one. class_counts: [C], of training."""
    missing = np.flatnonzero(np.bincount(test_labels, minlength=len(class_names)) == 0)
    if not missing.size:
        return None
    shown = ", ".join(f"{class_names[c]!r} ({class_counts[c]} in training)" for c in missing[:10])
    shown += f" and {missing.size - 10} more" if missing.size > 10 else ""
    single = (class_counts[missing] == 1).any()
    return (
        f"{name}: {UNTESTED}, for want of test {kind}: {missing.size} of {len(class_names)} classes: {shown}. No number "
        f"says how well they are learnt. {'A single sample can be trained on only: add some.' if single else 'Add some to test on.'}"
    )


def overshoots(low: float, high: float) -> bool:
    """Whether this is [0, 1] but for a little on either side."""
    return -SLACK <= low and 0.5 < high <= 1 + SLACK


def renewed(notes: Iterable[str], start: str, note: str | None) -> tuple[str, ...]:
    """The notes with this one in place of those that begin with `start`: a set may be checked again after it has changed."""
    others = tuple(one for one in notes if not one.startswith(start))
    return others if note is None else (*others, note)


def _range(images: np.ndarray) -> tuple[float, float]:
    some = images[:: -(-len(images) // SAMPLED)]
    return float(some.min()), float(some.max())


def _told(found: tuple[float, float]) -> str:
    exact = lambda value: f"{value:.9g}" if f"{value:.3g}" == "1" else f"{value:.3g}"  # 1.0000001 is not 1
    return " to ".join(map(exact, found))


def _fix(inside: str, outside: str, whole: Mapping[str, bool], ranges: Mapping[str, tuple[float, float]]) -> str:
    low, high = ranges[outside]
    if overshoots(low, high):
        return f"Write np.clip({outside}, 0, 1), if these are what resizing left there."
    if low < 0:
        return f"{outside} looks normalised: give the raw pixels of both, as normalisation belongs to the trainer."
    if whole[inside]:
        return f"{inside} looks divided by 255 before it became uint8: give its pixels as they were."
    divisor = 16 if high <= 16 else 255 if high <= 255 else high
    return f"Write {outside} / {divisor:g}."
