"""From a name to a checked `Dataset`: scikit-learn's digits, or an .npz file."""

import difflib
import os
import pathlib
import zipfile
import zlib

import numpy as np

from perturbjax.data.dataset import Dataset, as_images, as_labels, check, name_classes, stratified

TEST_SHARE, SPLIT_SEED = 0.3, 0  # of a source without a test set; fixed, so that everybody tests on the same samples

SPLIT = ("train_images", "train_labels", "test_images", "test_labels")
KERAS = ("x_train", "y_train", "x_test", "y_test")
SINGLE = ("images", "labels")
FAMILIES = (SPLIT, KERAS, SINGLE)  # the first that an .npz file has in full is read
NAMES = ("class_names", "domain_names")
EXTRAS = (*NAMES, "train_domains", "test_domains", "train_index", "validation_images", "validation_labels")
OPTIONAL = {SPLIT: EXTRAS, KERAS: EXTRAS, SINGLE: (*NAMES, "domains")}


def load(name: str | os.PathLike) -> Dataset:
    """The data set of that name, checked.

    Args:
      name: "digits" (1,797 handwritten digits of 8x8x1 pixels, ships with scikit-learn) or the path of an .npz file
        with train_images, train_labels, test_images, test_labels (or x_train, y_train, x_test, y_test), or with
        images, labels. Optional keys are class_names, domain_names, train_domains, test_domains, train_index,
        validation_images and validation_labels (single sets: class_names, domains, domain_names); others are left
        alone. See `check` for forms and dtypes.

    A source without a test set (digits, single sets) gives 30 % of every class (of every class in every domain) as test
    set, drawn with a fixed seed: everybody tests on the same samples. `train_index` then counts in the whole source.

    Raises:
      ValueError: unknown name, damaged file, missing keys, unusable arrays. FileNotFoundError: no such file.

    >>> load("digits")
    digits: 1258 training and 539 test images of 8x8x1 float32, 10 classes of 122 to 128
    """
    text = os.fspath(name)
    if text in SOURCES:
        return SOURCES[text]()
    path = pathlib.Path(text).expanduser()
    if path.suffix == ".npz":
        return _npz(path)
    hint = _nearest(path) or 'Write load("digits") or load("folder/file.npz").'
    raise ValueError(f"load needs {' or '.join(map(repr, SOURCES))} or the path of an .npz file, got {text!r}. {hint}")


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('load("digits") needs scikit-learn, got no such module. pip install scikit-learn') from error
    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)  # 0..16 become multiples of 1/16, exact in any float type
    return check(_split("digits", images, bunch.target, class_names=tuple(map(str, range(10)))))


SOURCES = {"digits": _digits}


def _split(name, images, labels, *, domains=None, class_names=(), domain_names=()) -> Dataset:
    """A single set in two, by class and domain. Checks first, so that errors count positions in the whole source."""
    images = as_images(f"images of {name}", images)
    class_names = name_classes(class_names, np.asarray(labels))
    labels = as_labels(f"labels of {name}", labels, len(images), len(class_names))
    if domains is not None:
        domain_names = name_classes(domain_names, np.asarray(domains))
        domains = as_labels(f"domains of {name}", domains, len(images), len(domain_names))
    held = stratified(TEST_SHARE, labels, domains, np.random.default_rng(SPLIT_SEED))
    of = lambda values, mask: None if values is None else values[mask]
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
    )


def _npz(path: pathlib.Path) -> Dataset:
    if not path.is_file():
        hint = _nearest(path) or 'Check the path, or write load("digits").'
        raise FileNotFoundError(f"load needs a file, got {str(path)!r}, where there is none. {hint}")
    with open(path, "rb") as stream:
        start = stream.read(4)
        if start not in (b"PK\x03\x04", b"PK\x05\x06"):  # a zip file, an empty one
            what = f"which starts with {start!r}" if start else "which is empty"
            raise ValueError(
                f"load needs an .npz file (a zip of arrays), got {str(path)!r}, {what}. "
                "Write one: np.savez(path, train_images=..., train_labels=..., test_images=..., test_labels=...)."
            )
        stream.seek(0)  # numpy reads from our stream: a path of a damaged file it would leave open
        try:
            file = np.load(stream, allow_pickle=False)  # lazy: only the members named here are read
            found = set(file.files)
            family = next((keys for keys in FAMILIES if found.issuperset(keys)), None)
            values = {k: file[k] for k in (*(family or ()), *OPTIONAL.get(family, ())) if k in found}
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            if "Object arrays" in str(error):
                raise ValueError(
                    f"load needs plain arrays, got Python objects (dtype object) in {str(path)!r}, which can run code "
                    "when read. Save numbers and text: np.savez(path, class_names=np.array(names, dtype=str), ...)."
                ) from error
            raise ValueError(
                f"load needs a whole .npz file, got {str(path)!r}, which is damaged or cut short "
                f"({type(error).__name__}: {error}). Copy or write the file again."
            ) from error
    if family is None:
        raise ValueError(_missing(path, found))
    for key in NAMES:
        if key in values:
            values[key] = tuple(values[key].reshape(-1).tolist())
    if family == SINGLE:
        return check(_split(path.stem, **values))
    return check(Dataset(path.stem, *(values.pop(key) for key in family), **values))


def _missing(path: pathlib.Path, found: set[str]) -> str:
    """Why no family of keys fits: what is there, what is wanted."""
    shown = ", ".join(sorted(found)) or "no array at all"
    if any(key.endswith(("text", "texts")) for key in found):
        return (
            f"load needs images, got text in {str(path)!r} (keys {shown}). "
            'Text is not supported yet: give an .npz with train_images, or write load("digits").'
        )
    nearest = max(FAMILIES, key=lambda keys: len(found.intersection(keys)) / len(keys))
    lacking = [key for key in nearest if key not in found]
    hint = "Rename the arrays" if len(lacking) == len(nearest) else f"Add {' and '.join(lacking)}"
    return (
        f"load needs the keys {'; or '.join(', '.join(keys) for keys in FAMILIES)}, got {shown} in {str(path)!r}. "
        f"{hint}: np.savez(path, {', '.join(f'{key}=...' for key in nearest)})."
    )


def _nearest(path: pathlib.Path) -> str:
    """The source or the .npz file of the same folder whose name is nearest, as a question; empty where none is near."""
    files = sorted(path.parent.glob("*.npz")) if path.parent.is_dir() else []
    known = {name: name for name in SOURCES} | {file.name.lower(): str(file) for file in files}
    near = difflib.get_close_matches(path.name.lower(), known, n=1)
    return f"Did you mean load({known[near[0]]!r})?" if near else ""
