"""From a name to a checked `Dataset`: scikit-learn's digits, CIFAR, a folder of images, a prepared TFDS set, an .npz file, texts."""

import difflib
import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np

from perturbjax.data import cifar, folder, npz, text_files, tfds
from perturbjax.data.arrange import single
from perturbjax.data.dataset import Dataset, check
from perturbjax.data.images import check_image_size
from perturbjax.data.opacity import UNTOUCHED, colour, laid
from perturbjax.data.text import Tokenizer


def load(
    name: str | os.PathLike,
    *,
    image_size: int | None = None,
    background: str = "white",
    skip_damaged: bool = False,
    text_length: int | None = None,
    vocabulary: str | os.PathLike | Tokenizer | None = None,
    vocabulary_size: int | None = None,
    min_count: int | None = None,
) -> Dataset:
    """The data set of that name, checked.

    Args:
      name: one of

        - "digits": 1,797 handwritten digits of 8x8x1 pixels, which ship with scikit-learn.
        - The path of an .npz file with train_images, train_labels, test_images, test_labels (or x_train, y_train, x_test,
          y_test), or with images, labels. Optional keys are class_names, domain_names, train_domains, test_domains,
          train_index, validation_images and validation_labels (single sets: class_names, domains, domain_names); others
          are left alone. See `check` for forms and dtypes.
        - A folder of images: FOLDER/class/image, FOLDER/domain/class/image, or FOLDER/train/class/image with test and
          val (or validation) beside train. Classes and domains are numbered in the order of their names (whole numbers
          by value, others by their characters), and train_index counts images by domain, class and file name. RGB, or
          grey if all images are; float32 in [0, 1] if there are grey ones of 16 bits. EXIF orientation is followed, the first
          frame is read. Names of classes and domains are taken in one spelling (NFC).
        - "cifar10" or "cifar100" (fine labels): the authors' binary archive, cifar-10-binary.tar.gz or
          cifar-100-binary.tar.gz, or the folder extracted from it, in the current folder, in $PERTURBJAX_DATA or in
          ~/.cache/perturbjax/data. Or the path of that archive or folder.
        - "tfds:NAME", "tfds:NAME/CONFIG", "tfds:NAME:VERSION": a set that tensorflow_datasets has prepared as array_record
          in $TFDS_DATA_DIR or ~/tensorflow_datasets; or "tfds:FOLDER", the prepared folder itself.
        - Texts: a .csv, .tsv or .jsonl (or .csv.xz, .jsonl.gz, ...) with a text and a label in every row, named so (or sentence,
          review, content; class, category, sentiment, target), and a split (train, test, validation) if there is one; columns
          between commas, semicolons, tabs or bars, in UTF-8 or UTF-16, each class written in one way; a folder with
          train.csv and test.csv, or the like; a folder with a file per class, one text a line, FOLDER/class.txt or
          FOLDER/train/class.txt; an .npz with train_text, train_labels, test_text, test_labels, or text and labels, the texts as
          strings or as UTF-8 bytes beside ..._offsets. Labels in files are class names, numbered in their order.
      image_size: of folders and tfds sets: images are resized so that their shorter side has this many pixels, and the
        square in the middle is kept. None: they must all have one size.
      background: the colour on which transparent images lie (a name or "#rrggbb"), a note tells of how many: of files, and of
        arrays with four channels, which are taken as RGBA. "none": files lose their alpha channel, whatever colours it hid;
        arrays keep four channels.
      skip_damaged: of folders: images that can't be decoded are left out, and a note names them. False: they are an error.
      text_length: of texts: words that are read of each. None: as many as the longest training text has, but at most 200.
      vocabulary: of texts: a BERT's vocab.txt, whose word pieces the texts are cut into; or the `tokenizer` of another Dataset.
        None: what stands between white space in the training texts, in lower case; in scripts without spaces between words
        (Chinese, Japanese, Thai ...) each character, unless the texts have spaces between words all the same. "spaces" and
        "characters" decide that.
      vocabulary_size, min_count: of that: its words at most (25,000 if not given), and how often a word must occur (once).

    A validation set is the test set where there is no other (a note says so). A source with neither (digits, single sets)
    gives 30 % of every class (of every class in every domain) as test set, drawn with a fixed seed: everybody tests on the
    same samples. `train_index` then counts in the whole source. Images that take more than 4 GiB are decoded once, to a file
    in $PERTURBJAX_DATA or ~/.cache/perturbjax/data, and mapped (np.memmap) from there, next time too.

    Raises:
      ValueError: unknown name, damaged file, missing keys, unusable arrays or images. FileNotFoundError: no such file, or
      not prepared.

    >>> load("digits")
    digits: 1258 training and 539 test images of 8x8x1 float32, 10 classes of 122 to 128
    """
    text = os.fspath(name)
    check_image_size(image_size)
    if background != UNTOUCHED:
        colour(background)
    form = text_files.TextForm(text_length, vocabulary, vocabulary_size, min_count)
    path = pathlib.Path(text).expanduser()
    if skip_damaged and not _of_image_files(text, path):
        raise ValueError(f"load needs a folder of images for skip_damaged, got {text!r}. Leave skip_damaged out.")
    if text not in SOURCES and (path.is_file() and text_files.is_table(path) or path.is_dir() and text_files.is_folder(path)):
        if image_size is not None:
            raise ValueError(f"load needs images for image_size, got texts in {text!r}. Leave image_size out.")
        return text_files.read_table(path, form) if path.is_file() else text_files.read_folder(path, form)
    if text not in SOURCES and text_files.is_table(path) and not path.exists():
        raise FileNotFoundError(f"load needs a file, got {text!r}, where there is none. {_nearest(path) or 'Check the path.'}")
    if path.suffix != ".npz" and not form.default:
        raise ValueError(f"load needs texts for text_length and vocabulary, got {text!r}. Leave these out.")
    if text.startswith(tfds.PREFIX):
        return laid(tfds.read(text, image_size), background)
    kind = None if text in SOURCES or path.suffix == ".npz" else cifar.layout_of(path)
    if path.is_dir() and not kind and text not in SOURCES:
        if (path / tfds.INFO).is_file():
            return laid(tfds.read(f"{tfds.PREFIX}{path.absolute()}", image_size), background)
        return folder.read(path, image_size, background=background, skip_damaged=skip_damaged)
    if image_size is not None and (path.exists() or text in SOURCES):
        raise ValueError(
            f"load needs a folder of images or a tfds set for image_size, got {text!r}. Leave image_size out: the view "
            "shrink(16) averages images of other sources down."
        )
    if text in SOURCES:
        return SOURCES[text]()
    if kind:
        return cifar.read(path)
    if path.suffix == ".npz":
        if not path.is_file():
            hint = _nearest(path) or 'Check the path, or write load("digits").'
            raise FileNotFoundError(f"load needs a file, got {str(path)!r}, where there is none. {hint}")
        return laid(npz.read(path, form), background)
    hint = (
        _nearest(path)
        or 'Write load("digits"), load("folder/file.npz") or load("folder") for a folder of images, load("texts.csv") for texts.'
    )
    raise ValueError(
        f"load needs {', '.join(map(repr, SOURCES))}, 'tfds:NAME' or the path of an .npz file, a folder of images or a CIFAR "
        f"archive, got {text!r}. {hint}"
    )


def _of_image_files(text: str, path: pathlib.Path) -> bool:
    """Whether this is a folder of images, or nothing at all, which has an error of its own."""
    if text in SOURCES or text.startswith(tfds.PREFIX) or not path.is_dir():
        return not (text in SOURCES or text.startswith(tfds.PREFIX) or path.exists())
    return not (text_files.is_folder(path) or (path / tfds.INFO).is_file() or cifar.layout_of(path))


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('load("digits") needs scikit-learn, got no such module. pip install scikit-learn') from error
    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)  # 0..16 become multiples of 1/16, exact in any float type
    return check(single("digits", images, bunch.target, class_names=tuple(map(str, range(10)))))


SOURCES: dict[str, Callable[[], Dataset]] = {
    "digits": _digits,
    **{name: functools.partial(cifar.load_cifar, name) for name in cifar.CIFAR},
}


def _nearest(path: pathlib.Path) -> str:
    """The source or the .npz file or folder beside it whose name is nearest, as a question; empty where none is near."""
    known = lambda p: p.suffix == ".npz" or p.is_dir() or text_files.is_table(p)
    beside = [p for p in sorted(path.parent.iterdir()) if known(p)] if path.parent.is_dir() else []
    names = {name: name for name in SOURCES} | {file.name.lower(): str(file) for file in beside}
    near = difflib.get_close_matches(path.name.lower(), names, n=1)
    return f"Did you mean load({names[near[0]]!r})?" if near else ""
