"""Domain generalization as DomainBed does it: every domain is split in two, and a batch has the same share of every training domain.

Source: Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from perturbjax.data.dataset import Dataset, stratified


def pooled(dataset: Dataset) -> Dataset:
    """The data set with all its samples, those of the test set last, as training samples; domains without samples are dropped.

    Raises ValueError for less than two domains, a validation set (of unknown domains) or labels with noise.
    """
    d = dataset
    if d.train_domains is None or d.test_domains is None:
        raise ValueError(
            f"pooled needs domains of all samples of {d.name}, got none. Give a folder FOLDER/domain/class/image, or "
            "np.savez(path, images=..., labels=..., domains=..., domain_names=...)."
        )
    if d.validation_images is not None:
        raise ValueError(f"pooled needs {d.name} without a validation set, got one. Leave out leave_out and validation.")
    if d.flipped.any():
        raise ValueError(f"pooled needs the true labels of {d.name}, got {d.flipped.sum()} changed ones. Leave the noise out.")
    join = lambda train, test: np.concatenate([train, test])
    labels, domains = join(d.train_labels, d.test_labels), join(d.train_domains, d.test_domains)
    present, numbers = np.unique(domains, return_inverse=True)
    names = tuple(d.domain_names[n] for n in present)
    if len(names) < 2:
        raise ValueError(f"pooled needs at least 2 domains in {d.name}, got {len(names)} ({', '.join(names)}). Add another.")
    return dataclasses.replace(
        d, train_images=join(d.train_images, d.test_images), train_labels=labels, true_labels=labels,
        train_index=np.arange(len(labels), dtype=np.int32), source_size=len(labels), train_domains=numbers.astype(np.int32).reshape(-1),
        test_domains=np.searchsorted(present, d.test_domains).astype(np.int32), domain_names=names,
        train_texts=None if d.train_texts is None else join(d.train_texts, d.test_texts),
        train_names=None if d.train_names is None else join(d.train_names, d.test_names),
    )  # fmt: skip


class DomainSplit(NamedTuple):
    """Positions of samples, for one left-out domain."""

    train: tuple[np.ndarray, ...]  # of each training domain, in order: 80 %
    validation: tuple[np.ndarray, ...]  # of each training domain: 20 %
    test: np.ndarray  # of the left-out domain: 80 %, DomainBed's choice
    names: tuple[str, ...]  # of the training domains


def split_domains(dataset: Dataset, held_out: int, *, seed: int, share: float = 0.2) -> DomainSplit:
    """Splits every domain, by class; what is drawn depends on the seed only, not on the domain that is left out.

    Args:
      dataset: as `pooled` gives it. held_out: number of the left-out domain. share: of the smaller part of each domain.

    Raises ValueError where a class has no training sample without that domain, or a training domain no validation sample.
    """
    labels, domains = dataset.train_labels, dataset.train_domains
    out = stratified(share, labels, domains, np.random.default_rng([seed, *b"domains"]))
    others = [n for n in range(len(dataset.domain_names)) if n != held_out]
    rows = lambda mask, n: np.flatnonzero(mask & (domains == n))
    split = DomainSplit(
        tuple(rows(~out, n) for n in others), tuple(rows(out, n) for n in others), rows(~out, held_out),
        tuple(dataset.domain_names[n] for n in others),
    )  # fmt: skip
    left = dataset.domain_names[held_out]
    counts = np.bincount(labels[np.concatenate(split.train)], minlength=dataset.num_classes)
    if (counts == 0).any():
        name = dataset.class_names[int(np.argmin(counts))]
        raise ValueError(
            f"split_domains needs a training sample of every class without the domain {left!r}, got none of {name!r}. "
            f"Leave out other domains only, or drop the class."
        )
    for name, found in zip(split.names, split.validation, strict=True):
        if not len(found):
            raise ValueError(
                f"split_domains needs 2 samples of a class in every domain, got single ones only in {name!r}. Drop that domain."
            )
    return split


def missing_classes(dataset: Dataset) -> list[str]:
    """A sentence for every domain without samples of some classes."""
    found = []
    for n, domain in enumerate(dataset.domain_names):
        there = np.bincount(dataset.train_labels[dataset.train_domains == n], minlength=dataset.num_classes)
        absent = [dataset.class_names[c] for c in np.flatnonzero(there == 0)]
        if absent:
            found.append(f"The domain {domain!r} has no samples of {', '.join(map(repr, absent))}.")
    return found


def domain_batches(rows: Sequence[np.ndarray], per_domain: int, *, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Batches [D · per_domain] of positions for ever, from step `start` on: `per_domain` of each domain's `rows`, one after another.

    Each domain goes through its own samples in an order drawn anew when they are used up (the last partial batch is dropped), so that
    small domains come round more often. Raises ValueError if a domain has less than `per_domain` samples.
    """
    smallest = min(len(own) for own in rows)
    if not 1 <= per_domain <= smallest:
        raise ValueError(
            f"domain_batches needs a batch of 1 to {smallest} samples of each domain (the smallest has {smallest}), got {per_domain}. "
            f"Write --batch-size {min(32, smallest)}."
        )
    orders: dict[int, tuple[int, np.ndarray]] = {}

    def batch(step: int, d: int) -> np.ndarray:
        epoch, place = divmod(step, len(rows[d]) // per_domain)
        if orders.get(d, (-1,))[0] != epoch:
            orders[d] = epoch, np.random.default_rng([seed, d, epoch]).permutation(len(rows[d]))
        return rows[d][orders[d][1][place * per_domain : (place + 1) * per_domain]]

    step = start
    while True:
        yield np.concatenate([batch(step, d) for d in range(len(rows))]).astype(np.int32)
        step += 1
