"""An .npz file: a split set under this library's or Keras' names, or a single set; of images or of texts."""

import pathlib
import zipfile
import zlib

import numpy as np

from perturbjax.data import text_files
from perturbjax.data.arrange import single
from perturbjax.data.dataset import Dataset, check

SPLIT = ("train_images", "train_labels", "test_images", "test_labels")
KERAS = ("x_train", "y_train", "x_test", "y_test")
SINGLE = ("images", "labels")
SPLIT_TEXTS = ("train_text", "train_labels", "test_text", "test_labels")
SINGLE_TEXTS = ("text", "labels")
IMAGES, TEXTS = (SPLIT, KERAS, SINGLE), (SPLIT_TEXTS, SINGLE_TEXTS)
FAMILIES = IMAGES + TEXTS  # the first that an .npz file has in full is read
NAMES = ("class_names", "domain_names")
EXTRAS = (*NAMES, "train_domains", "test_domains", "train_index", "validation_images", "validation_labels")
OF_TEXTS = ("class_names", "train_index", "train_text_offsets", "test_text_offsets", "text_offsets")
WHOLE = ("labels", "domains")  # of a split set's source, beside its parts
OPTIONAL = {SPLIT: (*EXTRAS, *WHOLE), KERAS: EXTRAS, SINGLE: (*NAMES, "domains")}
OPTIONAL |= {
    SPLIT_TEXTS: (*OF_TEXTS, "validation_text", "validation_text_offsets", "validation_labels"),
    SINGLE_TEXTS: OF_TEXTS,
}


def read(path: pathlib.Path, form: text_files.TextForm = text_files.TextForm()) -> Dataset:
    """The set in an .npz file that is there. See `load` for the keys."""
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
    if family in TEXTS:
        return text_files.read_arrays(path.stem, values, form)
    if not form.default:
        raise ValueError(f"load needs texts for text_length and vocabulary, got images in {str(path)!r}. Leave these out.")
    if family == SINGLE:
        return check(single(path.stem, **values, called="images"))
    labels, domains = (values.pop(key, None) for key in WHOLE)
    values = _left_out(labels, domains, values) | values
    return check(Dataset(path.stem, *(values.pop(key) for key in family), **values))


def _left_out(labels: np.ndarray | None, domains: np.ndarray | None, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"test_domains": [M]} of a set whose test part is what the training domains leave of the whole; {} if it is something else."""
    if labels is None or domains is None or "train_domains" not in values or labels.shape != domains.shape:
        return {}
    train = np.isin(domains, values["train_domains"])
    parts = ((labels[train], "train_labels"), (labels[~train], "test_labels"), (domains[train], "train_domains"))
    return {"test_domains": domains[~train]} if all(np.array_equal(x, values[key]) for x, key in parts) else {}


def _missing(path: pathlib.Path, found: set[str]) -> str:
    """Why no family of keys fits: what is there, what is wanted."""
    shown = ", ".join(sorted(found)) or "no array at all"
    families = TEXTS if any(key.endswith(("text", "texts")) for key in found) else IMAGES
    nearest = max(families, key=lambda keys: len(found.intersection(keys)) / len(keys))
    lacking = [key for key in nearest if key not in found]
    hint = "Rename the arrays" if len(lacking) == len(nearest) else f"Add {' and '.join(lacking)}"
    return (
        f"load needs the keys {'; or '.join(', '.join(keys) for keys in families)}, got {shown} in {str(path)!r}. "
        f"{hint}: np.savez(path, {', '.join(f'{key}=...' for key in nearest)})."
    )
