"""A data set as arrays on the host, and the checks that it passes before anything is trained on it."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator

import numpy as np

from perturbjax.data.agreement import UNTESTED, check_ranges, overshoots, renewed, untested
from perturbjax.data.text import Tokenizer
from perturbjax.label_form import trouble

PARTS = ("train", "test", "validation")
FOUR = "the images have 4 channels"  # how the note on them begins, after the set's name
BLOCK, BLOCK_VALUES = 1024, 2**22  # images, and pixel values, worked on at a time: nothing needs a copy of a large set


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images or texts, labels and what is known about them. Views return changed copies; nothing is changed in place.

    Texts stand where images do, as tokens [N, L] int32: the numbers of their words in `tokenizer`, 0 where there is none.

    `check` turns arrays of the usual forms into the ones described here; `load` does so for you.

    >>> images, labels = np.zeros([6, 4, 4], np.uint8), np.array([0, 0, 1, 1, 0, 0])
    >>> check(Dataset("mine", images, labels, images[:2], labels[1:3]))
    mine: 6 training and 2 test images of 4x4x1 uint8, 2 classes of 2 to 4
    """

    name: str
    train_images: np.ndarray  # [N, H, W, channels], uint8, or float32 in [0, 1] where the source is float; or tokens [N, L]
    train_labels: np.ndarray  # [N] int32 in 0..C-1, what is trained on
    test_images: np.ndarray  # [M, H, W, channels], dtype of train_images
    test_labels: np.ndarray  # [M] int32
    class_names: tuple[str, ...] = ()  # C names; () numbers the classes
    true_labels: np.ndarray | None = None  # [N] int32, the labels before any noise; None: train_labels
    train_index: np.ndarray | None = None  # [N] int32, position of each sample in its source; None: 0..N-1
    train_domains: np.ndarray | None = None  # [N] int32, position in domain_names
    test_domains: np.ndarray | None = None  # [M] int32
    domain_names: tuple[str, ...] = ()
    validation_images: np.ndarray | None = None  # [V, H, W, channels]
    validation_labels: np.ndarray | None = None  # [V] int32
    views: tuple[str, ...] = ()  # what was applied to the source, in order, with seeds
    notes: tuple[str, ...] = ()  # what a reader of the results should know: one sentence each
    source_size: int | None = None  # how many samples train_index counts, itself in 0..source_size-1; None: not known
    tokenizer: Tokenizer | None = None  # of texts; None: these are images
    train_texts: np.ndarray | None = None  # [N] str (dtype object), as in the source, whole
    test_texts: np.ndarray | None = None  # [M] str
    validation_texts: np.ndarray | None = None  # [V] str
    train_names: np.ndarray | None = None  # [N] str (dtype object), where each sample is found: "cat/1.png" in a folder
    test_names: np.ndarray | None = None  # [M] str
    validation_names: np.ndarray | None = None  # [V] str

    def __post_init__(self):
        if self.true_labels is None:
            object.__setattr__(self, "true_labels", self.train_labels)
        if self.train_index is None:
            object.__setattr__(self, "train_index", np.arange(len(self.train_labels), dtype=np.int32))
            if self.source_size is None:
                object.__setattr__(self, "source_size", len(self.train_labels))

    def __repr__(self):
        counts, shape = self.class_counts, "x".join(map(str, self.image_shape))
        held = "" if self.validation_labels is None else f", {len(self.validation_labels)} validation"
        return (
            f"{self.name}: {len(self.train_labels)} training{held} and {len(self.test_labels)} test {self.kind} of {shape} "
            f"{self.train_images.dtype if self.tokenizer is None else 'words'}, {self.num_classes} classes of {counts.min()} to {counts.max()}"
            + "".join(f"; {view}" for view in self.views)
        )

    @property
    def kind(self) -> str:
        """ "images" or "texts"."""
        return "images" if self.tokenizer is None else "texts"

    @property
    def images(self) -> dict[str, np.ndarray]:
        """{"train_images": [N, ...], "test_images": [M, ...]}, and "validation_images" where there are any."""
        keys = [f"{part}_images" for part in PARTS]
        return {key: images for key in keys if (images := getattr(self, key)) is not None}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_counts(self) -> np.ndarray:
        """[C] integers, training samples by (possibly noisy) label."""
        return np.bincount(self.train_labels, minlength=self.num_classes)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, channels), or (L,) of texts."""
        return self.train_images.shape[1:]

    @property
    def flipped(self) -> np.ndarray:
        """[N] bool, where the training label is not the true one."""
        return self.train_labels != self.true_labels

    @property
    def subset_hash(self) -> str:
        """12 hex digits for which source samples are trained on, with which labels, and the labels tested on."""
        digest = hashlib.sha256()
        for array in (self.train_index, self.train_labels, self.test_labels):
            digest.update(f"{len(array)},".encode())  # so that a sample cannot move from one array to the next unseen
            digest.update(array.astype("<i4").tobytes())
        return digest.hexdigest()[:12]

    def channel_stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over the training pixels, in units where pixels lie in [0, 1].

        A constant channel has standard deviation 0: guard the division when normalising.
        """
        if self.tokenizer is not None:
            raise ValueError(f"channel_stats needs images, got {self.name}, which has texts. They are not normalised.")
        scale = 255.0 if self.train_images.dtype == np.uint8 else 1.0
        rows, channels = self.train_images.reshape(len(self.train_images), -1), self.image_shape[-1]
        blocks = lambda: (rows[block].astype(np.float64) for block in in_blocks(rows))
        average = lambda parts: sum(part.sum(0) for part in parts).reshape(-1, channels).sum(0) * (channels / rows.size)
        mean = average(blocks())
        centre = np.tile(mean, rows.shape[1] // channels)
        variance = average(np.square(block - centre) for block in blocks())
        return tuple((mean / scale).tolist()), tuple((np.sqrt(variance) / scale).tolist())


def check(dataset: Dataset) -> Dataset:
    """The data set in its normal form (dtypes, channel axis, names), or a ValueError that says what to change.

    Accepts images [N, H, W] (a channel axis is added) or [N, H, W, channels], uint8 or any float in [0, 1]; labels of
    any integer type, [N] or [N, 1]; class names of any kind, or none. Every class needs a training sample. With a tokenizer,
    texts: integers [N, L] in 0..V-1, none of them all padding.
    """
    d, of = dataset, f" of {dataset.name}"
    as_inputs = as_images if d.tokenizer is None else functools.partial(as_tokens, size=len(d.tokenizer.words))
    notes = d.notes
    if d.tokenizer is None:
        notes = renewed(notes, f"{d.name}: value ranges differ", check_ranges(d.name, d.images))
    train_images = as_inputs("train_images" + of, d.train_images)
    test_images = as_inputs("test_images" + of, d.test_images)
    same_images("test_images" + of, test_images, train_images)
    for part in ("train_labels", "test_labels"):
        check_form(part + of, getattr(d, part))
    names = name_classes(d.class_names, np.asarray(d.train_labels), np.asarray(d.test_labels))
    labels = lambda key, values, length: as_labels(key + of, values, length, len(names))
    train_labels = labels("train_labels", d.train_labels, len(train_images))
    counts = np.bincount(train_labels, minlength=len(names))
    if len(names) < 2:
        raise ValueError(
            f"check needs at least 2 classes{of}, got {len(names)} (labels {np.unique(train_labels).tolist()}). "
            "A classifier has nothing to learn from one class: add samples of another."
        )
    if (counts == 0).any():
        c = int(np.argmin(counts))
        raise ValueError(
            f"check needs a training sample{of} for every class, got none of class {c} ({names[c]!r}; "
            f"{(counts == 0).sum()} such classes). Add samples, or drop the class from names and labels "
            "(labels that start at 1: labels - 1; any others: np.unique(labels, return_inverse=True)[1])."
        )
    if (d.validation_images is None) != (d.validation_labels is None):
        given, missing = ("images", "labels") if d.validation_labels is None else ("labels", "images")
        raise ValueError(
            f"check needs validation_images and validation_labels{of} together, got validation_{given} only. "
            f"Give validation_{missing} too, or neither: validation(0.1) splits them off the training set."
        )
    extra = {}
    if d.validation_images is not None:
        extra["validation_images"] = as_inputs("validation_images" + of, d.validation_images)
        same_images("validation_images" + of, extra["validation_images"], train_images)
        extra["validation_labels"] = labels("validation_labels", d.validation_labels, len(extra["validation_images"]))
    for part, count in (("train", len(train_images)), ("test", len(test_images))):
        texts = getattr(d, part + "_texts")
        if texts is not None and len(texts) != count:
            raise ValueError(
                f"check needs {part}_texts{of} for each of the {count} rows of tokens, got {len(texts)}. Give both of the same samples."
            )
    for key in PARTS:
        files, labelled = getattr(d, key + "_names"), getattr(d, key + "_labels")
        if files is not None and (labelled is None or len(files) != len(labelled)):
            raise ValueError(
                f"check needs {key}_names{of}, one for each of the {0 if labelled is None else len(labelled)} samples, got {len(files)}. "
                "Give both of the same samples, or leave the names out."
            )
    given = [np.asarray(v) for v in (d.train_domains, d.test_domains) if v is not None]
    if given:
        extra["domain_names"] = domains = name_classes(d.domain_names, *given)
        for key, length in (("train_domains", len(train_images)), ("test_domains", len(test_images))):
            if getattr(d, key) is not None:
                extra[key] = as_labels(key + of, getattr(d, key), length, len(domains))
    if d.tokenizer is None:
        notes = renewed(notes, f"{d.name}: {FOUR}", four_channels(d.name, train_images))
    test_labels = labels("test_labels", d.test_labels, len(test_images))
    notes = renewed(notes, f"{d.name}: {UNTESTED}", untested(d.name, test_labels, counts, names, d.kind))
    train_index = np.asarray(d.train_index)
    if train_index.shape != train_labels.shape or not np.issubdtype(train_index.dtype, np.integer):
        raise ValueError(
            f"check needs train_index{of} as {len(train_labels)} integers, got {train_index.dtype} "
            f"{list(train_index.shape)}. Leave it out to number the training samples in order."
        )
    size = d.source_size
    if size is not None and (train_index.min() < 0 or train_index.max() >= size):
        raise ValueError(
            f"check needs train_index{of} in 0..{size - 1} for source_size {size}, got {train_index.min()} to "
            f"{train_index.max()}. Give the size of the set that it counts in, or leave source_size out."
        )
    return dataclasses.replace(
        dataset,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=names,
        true_labels=labels("true_labels", d.true_labels, len(train_images)),
        train_index=train_index.astype(np.int32),
        notes=notes,
        **extra,
    )


def as_images(what: str, images: np.ndarray) -> np.ndarray:
    """[N, H, W, channels], uint8 as it is and floats as float32 in [0, 1]; `what` names the array in errors.

    An np.memmap stays one, so that whoever trains on it can see that it lies in a file.
    """
    images = images if isinstance(images, np.memmap) else np.asarray(images)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        pixels = "" if images.dtype == bool else "images.astype(np.uint8) for pixels 0..255, "  # uint8 takes 1 for nearly black
        raise ValueError(
            f"check needs {what} as uint8 or as floats in [0, 1], got dtype {images.dtype}. "
            f"Write {pixels}images.astype(np.float32) for values in [0, 1]."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"check needs {what} as [N, H, W, channels] or [N, H, W], got shape {list(images.shape)}. "
            "Write images.reshape(-1, H, W, channels) for flat ones."
        )
    if len(images) == 0:
        raise ValueError(f"check needs {what} with at least one image, got none. Split some off, or give the whole set.")
    _, rows, columns, last = images.shape
    # or else 32x32 colour would silently be read as 3x32 in 32 colours
    if rows <= 4 < min(columns, last) or rows < columns == last > 4:
        raise ValueError(
            f"check needs {what} with channels last, got shape {list(images.shape)}, which has them first. "
            f"Write images.transpose(0, 2, 3, 1); if these are {rows}x{columns} pixels of {last} channels, images.transpose(0, 2, 1, 3)."
        )
    if images.dtype == np.uint8:
        return images
    finite = np.isfinite(images)
    if not finite.all():
        n = int(np.argmin(finite.all((1, 2, 3))))
        raise ValueError(
            f"check needs finite {what}, got {(~finite).sum()} pixels that are not, the first in image {n}. "
            "Drop such images, or write np.nan_to_num(images)."
        )
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        if overshoots(low, high):
            fix = "Write np.clip(images, 0, 1), if these are what resizing left there."
        elif low < 0:
            fix = "They look normalised already: give the raw pixels, as normalisation belongs to the trainer"
            fix += " (or write (images - images.min()) / np.ptp(images))."
        elif high <= 16:
            fix = "They look like 0..16 (scikit-learn's digits): write images / 16."
        elif high <= 255:
            fix = "They look like 0..255: write images / 255, or images.astype(np.uint8)."
        else:
            fix = f"Write images / {high:g}."
        digits = ".9" if high <= 1.001 else ""  # 1.0000001 is not 1
        raise ValueError(f"check needs float {what} in [0, 1], got {low:g} to {high:{digits}g}. {fix}")
    return images.astype(np.float32, copy=False)


def four_channels(name: str, images: np.ndarray) -> str | None:
    """What to say of images [N, H, W, 4]: whether the fourth is opacity or a measurement, nobody but their owner knows."""
    if images.shape[-1] != 4:
        return None
    return (
        f"{name}: {FOUR}, and all of them are trained on. If the fourth is opacity (RGBA), write "
        "perturbjax.data.on_background(images, 'white') for each part."
    )


def as_tokens(what: str, tokens: np.ndarray, *, size: int) -> np.ndarray:
    """[N, L] int32 in 0..size-1, with a word in every row; `what` names the array in errors."""
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"check needs {what} as integers [N, L], since there is a tokenizer, got {tokens.dtype} {list(tokens.shape)}. "
            "Write tokenizer.rows(texts)."
        )
    if tokens.min() < 0 or tokens.max() >= size:
        raise ValueError(
            f"check needs {what} in 0..{size - 1}, the tokenizer's words, got {tokens.min()} to {tokens.max()}. "
            "Take the tokenizer that made them."
        )
    empty = ~(tokens != 0).any(1)
    if empty.any():
        raise ValueError(
            f"check needs a word in every row of {what}, got none in row {np.argmax(empty)} ({empty.sum()} such rows). "
            "Drop these samples; tokenizer.rows writes an unknown word for an empty text."
        )
    return tokens.astype(np.int32, copy=False)


def same_images(what: str, images: np.ndarray, train_images: np.ndarray) -> None:
    """Raises unless the images have the training images' size, channels and dtype."""
    if images.shape[1:] != train_images.shape[1:] or images.dtype != train_images.dtype:
        raise ValueError(
            f"check needs {what} like the training images, {list(train_images.shape[1:])} {train_images.dtype}, "
            f"got {list(images.shape[1:])} {images.dtype}. Bring both to one size and dtype."
        )


def as_labels(what: str, labels: np.ndarray, length: int, num_classes: int) -> np.ndarray:
    """[length] int32 in 0..num_classes-1, from integers [length] or [length, 1]; `what` names the array in errors."""
    check_form(what, labels)
    labels = np.asarray(labels)
    if labels.ndim == 2:  # Keras writes CIFAR's labels as [N, 1]
        labels = labels[:, 0]
    if len(labels) != length:
        raise ValueError(
            f"check needs {what}, one for each of the {length} images, got {len(labels)}. "
            "Give images and labels of the same samples, in the same order."
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        n = int(np.argmax(wrong))
        raise ValueError(
            f"check needs {what} in 0..{num_classes - 1}, got {labels[n]} at position {n} ({wrong.sum()} such labels). "
            "Drop these samples, name every class, or renumber: np.unique(labels, return_inverse=True)[1]."
        )
    return labels.astype(np.int32, copy=False)  # the same array for all seeds: it lies on the device once


def check_form(what: str, labels) -> None:
    """Raises ValueError for labels that are no integers [N] or [N, 1]: says what they are, which rows, and what to write."""
    if wrong := trouble(labels):
        raise ValueError(f"check needs {what} as integers, got {wrong[0]}. {wrong[1]}")


def name_classes(names, *labels: np.ndarray) -> tuple[str, ...]:
    """The names as a tuple of str; without any, numbers that cover the labels (at most one for each sample)."""
    if len(names):
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    integers = [x for x in labels if x.size and np.issubdtype(x.dtype, np.integer)]
    # more classes than samples cannot all have one: stop there, so that a label 10**9 is reported instead of counted
    count = min(max((int(x.max()) + 1 for x in integers), default=0), sum(x.size for x in integers))
    return tuple(map(str, range(max(count, 0))))


def in_blocks(images: np.ndarray) -> Iterator[slice]:
    """Slices that cover axis 0, each of at most BLOCK images and BLOCK_VALUES values (one image where that is larger)."""
    step = min(BLOCK, max(1, BLOCK_VALUES // max(1, math.prod(images.shape[1:]))))
    return (slice(start, start + step) for start in range(0, len(images), step))


def take(dataset: Dataset, positions: np.ndarray) -> Dataset:
    """The data set with only these training samples, in this order. positions: [K] integers in 0..N-1."""
    keys = ("train_images", "train_labels", "true_labels", "train_index", "train_domains", "train_texts", "train_names")
    values = {key: getattr(dataset, key) for key in keys}
    return dataclasses.replace(dataset, **{k: v[positions] for k, v in values.items() if v is not None})


def draw(groups: np.ndarray, quota: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions, sorted, of quota[g] members of each group g (all of a smaller group), drawn without replacement.

    One permutation ranks the samples, so a smaller quota draws a subset of what a larger one draws from the same rng.
    groups: [N] integers in 0..G-1. quota: [G].
    """
    order = rng.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    starts = np.cumsum(np.bincount(groups, minlength=len(quota))) - np.bincount(groups, minlength=len(quota))
    rank = np.arange(len(groups)) - starts[groups[order]]
    return np.sort(order[rank < quota[groups[order]]])


def stratified(share: float, labels: np.ndarray, domains: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """[N] bool, true for a drawn share of every class (of every class in every domain, where there are domains).

    Each stratum of n gives round(share·n), but at least 1 and at most n - 1: a single sample is never drawn.
    """
    strata = labels if domains is None else labels.astype(np.int64) * (int(domains.max()) + 1) + domains
    groups = np.unique(strata, return_inverse=True)[1].reshape(-1)
    size = np.bincount(groups)
    quota = np.clip(np.rint(share * size).astype(int), np.minimum(1, size - 1), size - 1)
    drawn = np.zeros(len(labels), bool)
    drawn[draw(groups, quota, rng)] = True
    return drawn
