"""Prepared sets of tensorflow_datasets, read from array_record files without TensorFlow (only preparing needs that)."""

import difflib
import json
import os
import pathlib
import zlib
from typing import Any

import numpy as np
from PIL import Image

from perturbjax.data.arrange import Part, from_parts
from perturbjax.data.dataset import Dataset, check
from perturbjax.data.images import file_key, in_threads, resize, stack

PREFIX = "tfds:"
INFO = "dataset_info.json"  # which every prepared set has
SPLITS = ("train", "test", "validation")


def read(name: str, image_size: int | None) -> Dataset:
    """The set "tfds:NAME", "tfds:NAME/CONFIG", "tfds:NAME:VERSION" or "tfds:FOLDER". Never looks into the network."""
    folder = _prepared(name.removeprefix(PREFIX))
    _check_format(folder)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(f"load({name!r}) needs tensorflow_datasets, got {error}. pip install perturbjax") from error
    builder = tfds.builder_from_directory(str(folder))
    info = builder.info
    image_key, label_key = _features(info, tfds.features)
    if "train" not in info.splits:
        raise ValueError(
            f"load needs a split named train in {info.full_name!r}, got {', '.join(info.splits) or 'none'}. "
            "Prepare the set with one."
        )
    skipped = {
        key: tfds.decode.SkipDecoding() for key, feature in info.features.items() if isinstance(feature, tfds.features.Image)
    }
    splits = [split for split in SPLITS if split in info.splits and info.splits[split].num_examples]
    try:
        sources = [builder.as_data_source(split, decoders=skipped) for split in splits]
        labels = [np.array([source[n][label_key] for n in range(len(source))], np.int64) for source in sources]
    except Exception as error:  # whatever array_record and protobuf raise on missing or damaged files
        raise ValueError(
            f"load needs a whole prepared set, got {str(folder)!r}, which can't be read ({type(error).__name__}: {error}). "
            "Delete that folder and prepare the set again."
        ) from error

    def pixels(chosen: list[Part]) -> list[np.ndarray]:
        return [_images(part.items) for part in chosen]

    def _images(items: np.ndarray) -> np.ndarray:
        feature = info.features[image_key]
        decode = lambda data: _sized(feature.decode_example_np(data), image_size)
        return stack(
            in_threads(decode, (sources[split][n][image_key] for split, n in items.tolist())),
            len(items),
            key=lambda: file_key(folder, sorted(folder.iterdir()), image_size, image_key, zlib.crc32(items.tobytes())),
            describe=lambda n: f"image {items[n][1]} of split {splits[items[n][0]]}",
        )

    number = lambda k: np.stack([np.full(len(labels[k]), k), np.arange(len(labels[k]))], 1)
    parts = {split: Part(number(k), labels[k]) for k, split in enumerate(splits)}
    unread = [split for split in info.splits if split not in splits]
    notes = [f"{info.full_name}: split {split} is not read." for split in unread]
    return check(from_parts(info.full_name, parts, pixels, class_names=info.features[label_key].names or (), notes=notes))


def _prepared(text: str) -> pathlib.Path:
    """The folder of that name with dataset_info.json in it, the highest version where there are several."""
    as_path = pathlib.Path(text).expanduser()
    if text[:1] in ("~", ".") or as_path.is_absolute() or (as_path / INFO).is_file():
        where, version, command = as_path, "", ""
    else:
        data = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
        base, _, version = text.partition(":")
        where, command = data / base, _command(text)
    if version and (where / version / INFO).is_file():
        return where / version
    found = [] if version else _versions(where)
    if found:
        return found[-1]
    configs = {} if version or not where.is_dir() else {sub.name: v for sub in sorted(where.iterdir()) if (v := _versions(sub))}
    if configs:
        if len(configs) == 1:
            return next(iter(configs.values()))[-1]
        first = f"{PREFIX}{text}/{next(iter(configs))}"
        raise ValueError(f"load needs one config of {text!r}, got {len(configs)}: {', '.join(configs)}. Write load({first!r}).")
    if not command:
        raise FileNotFoundError(
            f"load needs a folder with dataset_info.json, got {text!r}, where there is none. "
            "Give the folder that download_and_prepare wrote, which is named after the version."
        )
    there = [path.name for path in _versions(where)]
    others = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    near = difflib.get_close_matches(base, others, n=1)
    got = f"versions {', '.join(there)} only" if there else f"only {near[0]!r}" if near and near[0] != base else "none"
    raise FileNotFoundError(
        f"load needs {text!r} prepared in {str(data)!r} ($TFDS_DATA_DIR, or ~/tensorflow_datasets), got {got}. "
        f"Preparing needs TensorFlow once, training does not: {command}"
    )


def _command(name: str) -> str:
    prepare = f"tfds.builder('{name}').download_and_prepare(file_format='array_record')"
    return f'pip install tensorflow-cpu && python -c "import tensorflow_datasets as tfds; {prepare}"'


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
    """The prepared versions in a folder, or the folder itself if it is one, the highest last."""
    if (folder / INFO).is_file():
        return [folder]
    found = folder.glob(f"*.*.*/{INFO}") if folder.is_dir() else ()
    number = lambda path: tuple((part.isdecimal(), int(part) if part.isdecimal() else 0) for part in path.name.split("."))
    return sorted((file.parent for file in found), key=number)


def _check_format(folder: pathlib.Path) -> None:
    try:
        info = json.loads((folder / INFO).read_text())
    except ValueError as error:
        raise ValueError(
            f"load needs a prepared set, got {str(folder)!r}, whose dataset_info.json is damaged ({error}). Prepare it again."
        ) from error
    form = info.get("fileFormat", "tfrecord")  # which older versions leave out
    if form != "array_record":
        name = "/".join(filter(None, (info.get("name", "NAME"), info.get("configName"))))
        raise ValueError(
            f"load needs array_record files, got {form} in {str(folder)!r}, which can't be read sample by sample. tensorflow_"
            "datasets would take them for prepared: delete that folder or set TFDS_DATA_DIR to another, and ask for "
            f"array_record: {_command(name)}"
        )


def _features(info: Any, features: Any) -> tuple[str, str]:
    """The keys of the image and of its label: the supervised keys, or else the only ones there are."""
    images = [key for key, feature in info.features.items() if isinstance(feature, features.Image)]
    labels = [key for key, feature in info.features.items() if isinstance(feature, features.ClassLabel)]
    chosen = info.supervised_keys
    if chosen and chosen[0] in images and chosen[1] in labels:
        return chosen[0], chosen[1]
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    every = ", ".join(f"{key}: {type(feature).__name__}" for key, feature in sorted(info.features.items()))
    raise ValueError(
        f"load needs one image and one class label in {info.full_name!r}, got {len(images)} and {len(labels)} of the features "
        f"{every}. Prepare the set with supervised_keys=('image', 'label'), or save the arrays that you want with np.savez."
    )


def _sized(image: np.ndarray, size: int | None) -> np.ndarray:
    if size is None:
        return image
    if image.dtype != np.uint8 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"load needs uint8 images of 1 or 3 channels for image_size, got {image.dtype} of {image.shape[-1]}. Leave it out."
        )
    pixels = np.asarray(resize(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), size))
    return pixels.reshape(size, size, -1)
