"""Views: seeded, pure changes of a data set, `view(dataset, seed) -> dataset`, each recorded in `dataset.views`.

A factory takes the numbers and checks them; the view it returns draws. A seed is an integer >= 0 or a tuple of them.
The same (view, seed) on the same data gives the same samples; every view draws from a stream of its own, so that noise
and validation with one seed are independent. `apply_views` runs a chain and derives a seed for each place in it.

Order matters, left to right. `validation` before `noise` or `labels` keeps the validation labels clean, before `longtail`
balanced; after them the validation set is as noisy and as skewed as the training set, which is what one has in practice.
`drop_duplicates` and `leave_out` come before all others.
"""

import bisect
import dataclasses
import math
import numbers
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from perturbjax.checks import nearest
from perturbjax.data.dataset import Dataset, draw, in_blocks, stratified, take
from perturbjax.data.duplicates import find_copies
from perturbjax.data.label_file import as_numbers, read_labels

Seed = int | Sequence[int]
View = Callable[[Dataset, Seed], Dataset]

CIFAR10_CONFUSIONS = {  # Patrini et al., CVPR 2017
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}
CIFAR10_NAMES = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


def longtail(ratio: float, kind: str = "exponential") -> View:
    """Fewer samples of the later classes (label order), drawn without replacement, kept in the order of the source.

    `longtail_counts` has the rule. Test and validation sets stay whole. With one seed, a larger ratio keeps a subset of
    what a smaller one keeps (as long as n_max is the same).

    Args:
      ratio: samples of the largest class over those of the smallest, >= 1; 1 balances the classes.
      kind: "exponential" (long tail) or "step" (half the classes are rare).
    """
    _longtail_settings("longtail", ratio, kind)

    def transform(dataset, rng):
        return take(dataset, draw(dataset.train_labels, longtail_counts(dataset.class_counts, ratio, kind), rng))

    return _view("longtail", transform, ratio=ratio, kind=kind)


def longtail_counts(class_counts: np.ndarray, ratio: float, kind: str = "exponential") -> np.ndarray:
    """[C] integers: samples each class keeps, of class_counts [C] (all >= 1).

        exponential   n_c = max(1, ⌊n_max · ratio^(−c/(C−1))⌋)
        step          n_c = n_max for c < ⌊C/2⌋, else max(1, ⌊n_max / ratio⌋)

    n_max is the largest number for which every class has its n_c: the class count of a balanced set (then these are the
    literature's counts), and on any other set the profile is met too, rather than cut off where a class runs short;
    CIFAR-100 cut to ratio 10 thus still gives exactly CIFAR-100-LT at ratio 100. A class never becomes empty: it keeps
    1 sample, and the ratio reached is then smaller than asked for.
    Source: Cui et al., CVPR 2019 (exponential); Cao et al. (LDAM), NeurIPS 2019 (step).

    >>> longtail_counts(np.full(10, 5000), 100)
    array([5000, 2997, 1796, 1077,  645,  387,  232,  139,   83,   50])
    """
    _longtail_settings("longtail_counts", ratio, kind)
    available, num_classes = np.asarray(class_counts), len(class_counts)
    if kind == "exponential":
        weights = float(ratio) ** (-np.arange(num_classes) / max(num_classes - 1, 1))
    else:
        weights = np.where(np.arange(num_classes) < num_classes // 2, 1.0, 1.0 / ratio)
    # the guard: 98 · (1/49) is below 2 in floats
    counts = lambda n_max: np.maximum(1, np.floor(n_max * weights + 1e-9)).astype(int)
    short = lambda n_max: bool((counts(n_max) > available).any())  # monotone in n_max
    return counts(bisect.bisect_left(range(1, int(available.max()) + 1), True, key=short))


def _longtail_settings(function, ratio, kind):
    _one_of(function, "kind", kind, ("exponential", "step"))
    instead = 1 / ratio if isinstance(ratio, numbers.Real) and 0 < float(ratio) < 1 else 100
    fix = f"Write ratio={instead:g}: the largest class count over the smallest."
    _number(function, "ratio", ratio, "of at least 1", lambda x: x >= 1, fix)


def noise(kind: str, rate: float, *, true_class: bool = False, first: bool = False) -> View:
    """Wrong training labels; `true_labels` keeps the right ones, test and validation labels are left alone.

    Exactly round(rate·n) labels are drawn and changed, n being the training samples that can change: all of them, or
    those of the five classes that "asymmetric" confuses (as in the literature, where 0.4 makes 20 % of CIFAR-10 wrong), or
    those of the class that "onesided" takes from (there 0.2 makes 10 % of a balanced set wrong).
    The draw is over the whole set, not class by class, so a class's own rate varies a little. With one seed, the labels
    changed at a lower rate are among those changed at a higher one, to the same wrong class.

    Args:
      kind: "symmetric" (a uniformly drawn other class), "pair" (the next class; the last one's is class 0), "asymmetric"
        (CIFAR-10's look-alikes, by class name: truck→automobile, bird→airplane, deer→horse, cat↔dog) or "onesided" (of two
        classes the second one's to the first: positive→negative).
      rate: share of the labels, in [0, 1).
      true_class: symmetric only: draw from all classes, the true one included, as Meta-Weight-Net, ProSelfLC and the
        taxonomy paper do; of round(rate·n) labels drawn, about 1/C then stay right.
      first: the first round(rate·n) samples that can change, in the training set's order, instead of drawn ones, as in the
        taxonomy paper's text experiments: there a block of one class, where the set is sorted by class.

    Raises:
      ValueError: wrong settings; or, when applied, if a class is left without any training label.
    """
    _one_of("noise", "kind", kind, ("symmetric", "pair", "asymmetric", "onesided"))
    _number("noise", "rate", rate, "in [0, 1)", lambda x: 0 <= x < 1, "Write rate=0.4 for 40 % of the labels.")
    if true_class and kind != "symmetric":
        raise ValueError(f"noise needs kind 'symmetric' with true_class, got {kind!r}. Leave true_class out.")

    def transform(dataset, rng):
        labels, num_classes = dataset.train_labels, dataset.num_classes
        order = rng.permutation(len(labels))
        if kind == "symmetric":  # drawn for every sample, used for some: this nests the rates
            shift = rng.integers(0 if true_class else 1, num_classes, size=len(labels))
            wrong = (labels + shift) % num_classes
        elif kind == "pair":
            wrong = (labels + 1) % num_classes
        else:
            wrong = (_confusions(dataset) if kind == "asymmetric" else _onesided(dataset))[labels]
            order = order[wrong[order] != labels[order]]
        if first:
            order = np.sort(order)
        chosen = order[: round(rate * len(order))]
        noisy = labels.copy()
        noisy[chosen] = wrong[chosen]
        empty = np.bincount(noisy, minlength=num_classes) == 0
        if empty.any():
            c = int(np.argmax(empty))
            raise ValueError(
                f"noise needs to leave every class a training label, got rate {rate:g}, after which class {c} "
                f"({dataset.class_names[c]!r}, {dataset.class_counts[c]} before) has none. "
                "Lower the rate, or take another seed."
            )
        return dataclasses.replace(dataset, train_labels=noisy)

    switches = {name: True for name, on in {"true_class": true_class, "first": first}.items() if on}
    return _view("noise", transform, kind=kind, rate=rate, **switches)


def _confusions(dataset: Dataset) -> np.ndarray:
    """[C] int32, the class each class of CIFAR-10 is mistaken for (itself where it is not)."""
    names = dataset.class_names
    if set(names) != CIFAR10_NAMES:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(
            f"noise needs CIFAR-10's class names for kind 'asymmetric', got {shown}. "
            "Write noise('pair', rate): each class is mistaken for the next."
        )
    return np.array([names.index(CIFAR10_CONFUSIONS.get(name, name)) for name in names], np.int32)


def _onesided(dataset: Dataset) -> np.ndarray:
    """[2] int32, the class each of two classes is mistaken for: the first one is not."""
    if dataset.num_classes != 2:
        raise ValueError(
            f"noise needs two classes for kind 'onesided', got {dataset.num_classes} in {dataset.name}. Write noise('pair', rate)."
        )
    return np.zeros(2, np.int32)


def validation(fraction: float) -> View:
    """Splits a share of the training set off as validation set: of every class (in every domain, where there are any),
    round(fraction·n) samples, at least 1, while the last one stays in training.

    Args:
      fraction: in (0, 1).
    """
    _number("validation", "fraction", fraction, "between 0 and 1", lambda x: 0 < x < 1, "Write fraction=0.1.")

    def transform(dataset, rng):
        if dataset.validation_images is not None:
            raise ValueError(
                f"validation needs a data set without a validation set, got {len(dataset.validation_labels)} samples "
                "in one. Leave this view out, or split once with a larger fraction."
            )
        held = stratified(fraction, dataset.train_labels, dataset.train_domains, rng)
        if not held.any():
            raise ValueError(
                f"validation needs a class with 2 training samples, got at most {dataset.class_counts.max()}. "
                "Split before thinning the set."
            )
        out = take(dataset, np.flatnonzero(held))
        rest = take(dataset, np.flatnonzero(~held))
        return dataclasses.replace(
            rest, validation_images=out.train_images, validation_labels=out.train_labels, validation_texts=out.train_texts,
            validation_names=out.train_names,
        )  # fmt: skip

    return _view("validation", transform, fraction=fraction)


def thin(per_class: int) -> View:
    """At most `per_class` training samples of each class, drawn without replacement, in the order of the source."""
    _whole("thin", "per_class", per_class, "Write per_class=1000.")

    def transform(dataset, rng):
        return take(dataset, draw(dataset.train_labels, np.full(dataset.num_classes, per_class), rng))

    return _view("thin", transform, per_class=per_class)


def shrink(size: int) -> View:
    """All images averaged down to size x size over equal blocks; uint8 is rounded back, halves to even (no bias)."""
    _whole("shrink", "size", size, "Write size=16.")

    def transform(dataset, rng):
        del rng  # nothing is drawn
        if dataset.tokenizer is not None:
            raise ValueError(f"shrink needs images, got {dataset.name}, which has texts. Load fewer words: text_length=100.")
        height, width = dataset.image_shape[:2]
        if height % size or width % size:
            fits = [s for s in range(1, min(height, width) + 1) if height % s == 0 and width % s == 0]
            raise ValueError(
                f"shrink needs a size that divides the images' {height}x{width} pixels, got {size}. "
                f"Write size={fits[-2] if len(fits) > 1 else fits[-1]}; {', '.join(map(str, fits))} fit."
            )
        keys = ("train_images", "test_images", "validation_images")
        images = {key: getattr(dataset, key) for key in keys}
        return dataclasses.replace(dataset, **{k: _pool(v, size) for k, v in images.items() if v is not None})

    return _view("shrink", transform, seeded=False, size=size)


def _pool(images: np.ndarray, size: int) -> np.ndarray:
    """[N, size, size, channels] block means in the dtype of images."""
    rows, cols = images.shape[1] // size, images.shape[2] // size
    exact = np.uint32 if images.dtype == np.uint8 else np.float64
    out = np.empty((len(images), size, size, images.shape[3]), images.dtype)
    for block in in_blocks(images):
        total = sum(images[block, i::rows, j::cols].astype(exact) for i in range(rows) for j in range(cols))
        mean = total / (rows * cols)
        out[block] = np.rint(mean) if images.dtype == np.uint8 else mean
    return out


def labels(file: str | os.PathLike, key: str | None = None) -> View:
    """Training labels from a file, such as people's mistaken ones; `true_labels` keeps the labels from before.

    The file has a label for every sample of the source, in its order; `dataset.train_index` picks those that are trained on,
    so that this may come before or after views that thin the set. A file with a label for every training sample as loaded,
    where that is another number (sources that are split by `load`, or carry a train_index), has to come first in the chain.
    A note tells how many labels changed. Test and validation labels are left alone.

    Args:
      file: .npz, .npy (integers or class names [N]), or .txt, .csv (an integer or a class name a line, no heading).
      key: the array of an .npz file; not needed if it has one only.

    Raises:
      ValueError: wrong key, form or file; when applied, labels out of range, too many or too few of them, or a file whose
      array clean_label (CIFAR-N has it) are not the labels of this data: then it is in another order. FileNotFoundError.
    """
    given = read_labels(file, key)

    def transform(dataset, rng):
        del rng  # nothing is drawn
        values = as_numbers(given, dataset.class_names)
        order = _source_order(dataset, len(values), given.where)
        values = values[order]
        if given.clean is not None and given.clean.shape == given.values.shape:
            other = np.flatnonzero(given.clean[order] != dataset.true_labels)
            if other.size:
                raise ValueError(
                    f"labels needs a file in the order of {dataset.name}, got {given.where}, whose clean_label is not the data's "
                    f"label for {other.size} of {len(order)} samples (the first: training sample {other[0]}). "
                    "Take the authors' version of the data: others, such as tensorflow_datasets', are shuffled."
                )
        changed = np.count_nonzero(values != dataset.true_labels)
        note = f"Of the labels in {given.where}, {changed} of {len(values)} ({changed / len(values):.2%}) are not the source's."
        return dataclasses.replace(dataset, train_labels=values, notes=(*dataset.notes, note))

    settings = {"file": pathlib.Path(file).name, **({} if key is None else {"key": key})}  # names: not this machine's folders
    return _view("labels", transform, seeded=False, **settings)


def _source_order(dataset: Dataset, count: int, where: str) -> np.ndarray:
    """[N] integers, the position of each training sample in a file of `count` labels."""
    size, last = dataset.source_size, int(dataset.train_index.max())
    if count == size or (size is None and count > last):
        return dataset.train_index
    if count == len(dataset.train_labels) and not dataset.views:
        return np.arange(count)
    wanted = f"{size}" if size is not None else f"at least {last + 1}"
    loaded = "" if dataset.views else f", or {len(dataset.train_labels)}, one for each training sample"
    raise ValueError(
        f"labels needs a label for each sample of {dataset.name} ({wanted}{loaded}), got {count} in {where}. Give the labels "
        "of the whole set, in its order; labels of the training samples as loaded have to be the first view."
    )


def leave_out(domain: str | int) -> View:
    """Leave-one-domain-out: trains on all other domains, tests on all samples of this one.

    The domain's training and test samples, with their true labels, are the test set. Of the other domains the training
    samples stay the training set; their test samples are the validation set, as in DomainBed (so that nothing is chosen by
    looking at the left-out domain). Needs domains of training and test samples: a folder FOLDER/domain/class/image, or an
    .npz with images, labels and domains. Comes before views that thin the set, or else they thin the test set, too.

    Args:
      domain: its name, or its position in domain_names (a name that is a number goes first).
    """
    whole = isinstance(domain, numbers.Integral) and not isinstance(domain, bool)
    if not whole and not isinstance(domain, str):
        raise ValueError(f"leave_out needs a domain's name or number, got {domain!r}. Write leave_out(0).")

    def transform(dataset, rng):
        del rng  # nothing is drawn
        held = _domain(dataset, domain)
        train_out, test_out = dataset.train_domains == held, dataset.test_domains == held
        others = [n for n in np.unique(dataset.test_domains[~test_out]) if not (dataset.train_domains == n).any()]
        if others:
            name = dataset.domain_names[others[0]]
            raise ValueError(
                f"leave_out needs training samples of all other domains of {dataset.name}, got test samples only of {name!r}. "
                f"Write leave_out({name!r}), or give the whole set unsplit: np.savez(path, images=..., labels=..., domains=...)."
            )
        if train_out.all() or not (train_out.any() or test_out.any()):
            raise ValueError(
                f"leave_out needs samples in {dataset.domain_names[held]!r} and in another domain of {dataset.name}, got "
                f"{train_out.sum() + test_out.sum()} in it and {(~train_out).sum()} in others. Name another domain."
            )
        join = lambda train, test: np.concatenate([train[train_out], test[test_out]])
        rest = (dataset.test_images, dataset.test_labels, dataset.test_texts, dataset.test_names)
        validation = [None if values is None or test_out.all() else values[~test_out] for values in rest]
        return dataclasses.replace(
            take(dataset, np.flatnonzero(~train_out)),
            test_images=join(dataset.train_images, dataset.test_images),
            test_labels=join(dataset.true_labels, dataset.test_labels),
            test_domains=join(dataset.train_domains, dataset.test_domains),
            validation_images=validation[0],
            validation_labels=validation[1],
            validation_texts=validation[2],
            validation_names=validation[3],
            test_texts=None if dataset.test_texts is None else join(dataset.train_texts, dataset.test_texts),
            test_names=None if dataset.test_names is None else join(dataset.train_names, dataset.test_names),
        )

    return _view("leave_out", transform, seeded=False, domain=domain)


def _domain(dataset: Dataset, domain: str | int) -> int:
    """The number of a domain, once it is sure that there are domains to leave out."""
    names = dataset.domain_names
    if dataset.train_domains is None or dataset.test_domains is None:
        got = "none" if dataset.train_domains is None and dataset.test_domains is None else "those of one part only"
        raise ValueError(
            f"leave_out needs domains of the training and the test samples of {dataset.name}, got {got}. Give a folder "
            "FOLDER/domain/class/image, or np.savez(path, images=..., labels=..., domains=..., domain_names=...)."
        )
    if dataset.validation_images is not None:
        raise ValueError(
            f"leave_out needs a data set without a validation set, got {len(dataset.validation_labels)} samples in one, of "
            "unknown domains. Put leave_out before validation, which is then not needed."
        )
    if str(domain) in names:
        return names.index(str(domain))
    if not isinstance(domain, str) and 0 <= domain < len(names):
        return int(domain)
    raise ValueError(f"leave_out needs a domain of {dataset.name}, got {domain!r}. {nearest(str(domain), names)}")


def drop_duplicates(within: bool = False) -> View:
    """Drops training samples whose image is in the test or the validation set, bit for bit. Put it first: see
    `check_duplicates`. Of a class that would have no training sample left, the copies in the test and validation set go instead.

    Args:
      within: of images that are repeated within the training set, drop all but the first one of each label, too. False: they stay.

    Raises:
      ValueError: when applied, if that leaves no test sample.
    """

    def transform(dataset, rng):
        del rng  # nothing is drawn
        copies = find_copies(dataset)
        first, held = copies.first[copies.of("train")], copies.first[copies.of("train").stop :]
        labels, known = dataset.train_labels, np.isin(first, held)
        left = lambda gone: np.bincount(labels[~gone], minlength=dataset.num_classes)
        alone = left(known) == 0
        gone = known & ~alone[labels]
        out = np.isin(held, first[known & alone[labels]])
        of_test = len(dataset.test_labels)
        if out[:of_test].all():
            c = int(np.argmax(alone))
            raise ValueError(
                f"drop_duplicates needs to leave every class a training sample, got {known.sum()} duplicates among "
                f"{len(known)}, without which class {c} ({dataset.class_names[c]!r}) has none. Give another test set: "
                "np.savez(path, images=..., labels=...) lets load split one off."
            )
        note = f"{gone.sum()} training {dataset.kind} that are in the test or validation set were dropped."
        if out.any():
            names = ", ".join(repr(dataset.class_names[c]) for c in np.flatnonzero(alone))
            note += f" {out.sum()} there were, instead, that are the only training {dataset.kind} of {names}."
        if within:
            again = np.ones(len(labels), bool)
            again[np.unique(np.stack([first, labels]), axis=1, return_index=True)[1]] = False
            note += f" {(again & ~gone).sum()} copies within the training set were dropped."
            gone |= again
        kept = take(dataset, np.flatnonzero(~gone)) if gone.any() else dataset
        for part, lost in (("test", out[:of_test]), ("validation", out[of_test:])):
            kept = _without(kept, part, lost) if lost.any() else kept
        return dataclasses.replace(kept, notes=(*kept.notes, f"{dataset.name}: {note}"))

    return _view("drop_duplicates", transform, seeded=False, **({"within": True} if within else {}))


def _without(dataset: Dataset, part: str, lost: np.ndarray) -> Dataset:
    """The data set without these samples of its test or validation set. lost: bool, one for each."""
    fields = {f"{part}_{what}" for what in ("images", "labels", "domains", "texts", "names")}
    values = {key: value for key in fields if (value := getattr(dataset, key, None)) is not None}
    return dataclasses.replace(dataset, **{key: None if lost.all() else value[~lost] for key, value in values.items()})


VIEWS: dict[str, Callable[..., View]] = {
    "longtail": longtail,
    "noise": noise,
    "validation": validation,
    "thin": thin,
    "shrink": shrink,
    "labels": labels,
    "leave_out": leave_out,
    "drop_duplicates": drop_duplicates,
}


def apply_views(dataset: Dataset, views: Sequence[View], seed: int) -> Dataset:
    """The views one after the other, the one at position k with seed (seed, k).

    >>> from perturbjax.data import load
    >>> apply_views(load("digits"), [longtail(10), noise("pair", 0.2)], seed=0).views
    ('longtail(ratio=10, kind=exponential) seed=(0, 0)', 'noise(kind=pair, rate=0.2) seed=(0, 1)')
    """
    for position, view in enumerate(views):
        if not callable(view):
            raise TypeError(
                f"apply_views needs views, got {view!r} at position {position}. "
                f"Write e.g. longtail(100); there are {', '.join(VIEWS)}."
            )
        dataset = view(dataset, (*_words(seed), position))
    return dataset


def _view(name: str, transform: Callable, *, seeded: bool = True, **settings) -> View:
    """transform(dataset, rng) -> dataset as a view that seeds itself and records what it did."""
    text = f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"

    def view(dataset: Dataset, seed: Seed) -> Dataset:
        words = _words(seed)
        rng = np.random.default_rng([*words, *name.encode()])  # a stream of its own: see the module's docstring
        shown = f" seed={words[0] if len(words) == 1 else words}" if seeded else ""
        return dataclasses.replace(transform(dataset, rng), views=(*dataset.views, text + shown))

    view.__name__ = view.__qualname__ = text
    return view


def _words(seed: Seed) -> tuple[int, ...]:
    words = tuple(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else (seed,)
    if not words or not all(isinstance(w, numbers.Integral) and int(w) >= 0 for w in words):
        raise ValueError(f"A view needs a seed of integers >= 0, got {seed!r}. Write seed=0.")
    return tuple(map(int, words))


def _number(function, name, value, wanted, accepts, fix):
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and accepts(value)):
        raise ValueError(f"{function} needs a {name} {wanted}, got {value!r}. {fix}")


def _whole(function, name, value, fix):
    whole = lambda x: isinstance(x, numbers.Integral) and int(x) >= 1
    _number(function, name, value, "that is a whole number of at least 1", whole, fix)


def _one_of(function, name, value, known):
    if value not in known:
        raise ValueError(f"{function} needs {name} to be one of {', '.join(known)}, got {value!r}. Write {name}={known[0]!r}.")
