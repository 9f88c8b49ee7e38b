"""From a source's parts to a `Dataset`: which of them is the test set, and a fixed split where there is none."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from perturbjax.data.dataset import PARTS, Dataset, as_images, as_labels, name_classes, stratified

TEST_SHARE, SPLIT_SEED = 0.3, 0  # of a source without a test set; fixed, so that everybody tests on the same samples


class Part(NamedTuple):
    """Samples of a split that are not read yet."""

    items: np.ndarray  # [N] or [N, ...], whatever names a sample to its reader
    labels: np.ndarray  # [N] int32
    domains: np.ndarray | None = None  # [N] int32

    def take(self, which: np.ndarray) -> "Part":
        """The samples at these positions, or where a mask is true."""
        return Part(*(None if values is None else values[which] for values in self))


def held_out(labels: np.ndarray, domains: np.ndarray | None) -> np.ndarray:
    """[N] bool, true for the test set of a source without one: 30 % of every class in every domain."""
    return stratified(TEST_SHARE, labels, domains, np.random.default_rng(SPLIT_SEED))


def single(name, images, labels, *, domains=None, class_names=(), domain_names=(), called=None) -> Dataset:
    """A single set in two, by class and domain. Checks first, so that errors count positions in the whole source.

    called: what the array is called in its source; its samples are then named by their place there: "images[7]".
    """
    images = as_images(f"images of {name}", images)
    class_names = name_classes(class_names, np.asarray(labels))
    labels = as_labels(f"labels of {name}", labels, len(images), len(class_names))
    if domains is not None:
        domain_names = name_classes(domain_names, np.asarray(domains))
        domains = as_labels(f"domains of {name}", domains, len(images), len(domain_names))
    held = held_out(labels, domains)
    of = lambda values, mask: None if values is None else values[mask]
    names = None if called is None else np.array([f"{called}[{n}]" for n in range(len(images))], dtype=object)
    return Dataset(
        name=name,
        train_images=images[~held],
        train_labels=labels[~held],
        test_images=images[held],
        test_labels=labels[held],
        class_names=class_names,
        train_index=np.flatnonzero(~held),
        train_domains=of(domains, ~held),
        test_domains=of(domains, held),
        domain_names=domain_names,
        source_size=len(images),
        train_names=of(names, ~held),
        test_names=of(names, held),
    )


def from_parts(
    name: str,
    parts: Mapping[str, Part],
    read: Callable[[list[Part]], Sequence[np.ndarray]],
    *,
    class_names: Sequence[str],
    domain_names: Sequence[str] = (),
    notes: Sequence[str] = (),
    files: np.ndarray | None = None,
) -> Dataset:
    """The parts "train", and "test" and "validation" where there are any, read and put together.

    Without a test part the validation part is the test set; without either, 30 % of every class (in every domain) of the
    training part are, and train_index counts in the whole of it. The split is made before anything is read, so that a
    large set is read once, in the order in which it is used.

    Args:
      read: parts -> the images [N, H, W, channels] of each.
      files: [K] str, the name of each item, where items are positions in it.
    """
    train, notes = parts["train"], list(notes)
    test, validation = parts.get("test"), parts.get("validation")
    index, size = None, len(train.labels)
    if test is None and validation is not None:
        test, validation = validation, None
        notes.append(f"{name} has no test set: its validation set ({len(test.labels)} images) is used as the test set.")
    elif test is None:
        held = held_out(train.labels, train.domains)
        index = np.flatnonzero(~held)
        train, test = train.take(~held), train.take(held)
    chosen = [train, test] if validation is None else [train, test, validation]
    images = read(chosen)
    return Dataset(
        name=name,
        train_images=images[0],
        train_labels=train.labels,
        test_images=images[1],
        test_labels=test.labels,
        class_names=tuple(class_names),
        train_index=index,
        train_domains=train.domains,
        test_domains=test.domains,
        domain_names=tuple(domain_names),
        validation_images=None if validation is None else images[2],
        validation_labels=None if validation is None else validation.labels,
        notes=tuple(notes),
        source_size=size,
        **({} if files is None else {f"{key}_names": files[part.items] for key, part in zip(PARTS, chosen)}),
    )
