"""Images that are in the training set and in the test set, bit for bit."""

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
    first = _positions(dataset.train_images)
    seen = [(first[key], n) for n, key in enumerate(_digests(dataset.test_images)) if key in first]
    if not seen:
        return dataset
    train, test = seen[0]
    count, size, names = len(seen), len(dataset.test_labels), dataset.class_names
    found = (
        f"{count} of {size} test images, which are training images bit for bit (first: training image {train}, "
        f"{names[dataset.train_labels[train]]!r}, is test image {test}, {names[dataset.test_labels[test]]!r})"
    )
    if count >= SHARE * size:
        raise ValueError(
            f"check_duplicates needs a test set of new images (under {SHARE:.0%} known from training), got {found}. Add "
            "drop_duplicates to the views (--view drop_duplicates+...), which drops them from training, or give another test set."
        )
    return dataclasses.replace(dataset, notes=(*dataset.notes, f"{dataset.name}: {found[0].upper()}{found[1:]}."))


def repeated(dataset: Dataset) -> np.ndarray:
    """[N] bool, true for training images that are in the test or the validation set, bit for bit."""
    held = [images for images in (dataset.test_images, dataset.validation_images) if images is not None]
    known = {key for images in held for key in _digests(images)}
    return np.array([key in known for key in _digests(dataset.train_images)])


def _positions(images: np.ndarray) -> dict[bytes, int]:
    """Of every different image, the first position."""
    first = dict[bytes, int]()
    for n, key in enumerate(_digests(images)):
        first.setdefault(key, n)
    return first


def _digests(images: np.ndarray):
    """16 bytes for each image, one image in memory at a time. Images of one set have one shape and dtype."""
    return (hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() for image in images)
