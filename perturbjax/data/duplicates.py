"""Images, or texts as they stand in the source, that are in the training set and in the test set, bit for bit."""

import dataclasses
import hashlib

import numpy as np

from perturbjax.data.dataset import Dataset

SHARE = 0.01  # of the test images: from here on a test result says more about memory than about new images


def check_duplicates(dataset: Dataset) -> Dataset:
    """The data set with a note on test images that are training images too, if there are any; 60,000 images take 0.3 s.

    Call it after the views: `drop_duplicates` removes what this finds. (CIFAR-100 has such pairs, CIFAR-10 and the digits
    have none.)

    Raises:
      ValueError: if 1 % of the test images, or more, are training images.
    """
    first = _positions(_samples(dataset, "train"))
    seen = [(first[key], n) for n, key in enumerate(_digests(_samples(dataset, "test"))) if key in first]
    if not seen:
        return dataset
    train, test = seen[0]
    count, size, names, kind = len(seen), len(dataset.test_labels), dataset.class_names, dataset.kind
    found = (
        f"{count} of {size} test {kind}, which are training {kind} bit for bit (first: training {kind[:-1]} {train}, "
        f"{names[dataset.train_labels[train]]!r}, is test {kind[:-1]} {test}, {names[dataset.test_labels[test]]!r})"
    )
    if count >= SHARE * size:
        raise ValueError(
            f"check_duplicates needs a test set of new {kind} (under {SHARE:.0%} known from training), got {found}. Add "
            "drop_duplicates to the views (--view drop_duplicates+...), which drops them from training, or give another test set."
        )
    return dataclasses.replace(dataset, notes=(*dataset.notes, f"{dataset.name}: {found[0].upper()}{found[1:]}."))


def repeated(dataset: Dataset) -> np.ndarray:
    """[N] bool, true for training images that are in the test or the validation set, bit for bit."""
    held = [_samples(dataset, part) for part in ("test", "validation")]
    known = {key for samples in held if samples is not None for key in _digests(samples)}
    return np.array([key in known for key in _digests(_samples(dataset, "train"))])


def _samples(dataset: Dataset, part: str) -> np.ndarray | None:
    """The images; of texts the whole ones, since rows of tokens may be cut, and have one number for all unknown words."""
    texts = getattr(dataset, f"{part}_texts")
    return getattr(dataset, f"{part}_images") if texts is None else texts


def _positions(images: np.ndarray) -> dict[bytes, int]:
    """Of every different image, the first position."""
    first = dict[bytes, int]()
    for n, key in enumerate(_digests(images)):
        first.setdefault(key, n)
    return first


def _digests(images: np.ndarray):
    """16 bytes for each image, one image in memory at a time. Images of one set have one shape and dtype."""
    raw = (image.encode() if isinstance(image, str) else np.ascontiguousarray(image) for image in images)
    return (hashlib.blake2b(data, digest_size=16).digest() for data in raw)
