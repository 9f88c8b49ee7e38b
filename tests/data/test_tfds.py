"""perturbjax.data.tfds: sets that the tests prepare themselves without TensorFlow, and every set that can't be read."""

import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from perturbjax.data import images as images_module
from perturbjax.data import load

pytest.importorskip("array_record", reason="array_record has no builds for this platform")
tfds = pytest.importorskip("tensorflow_datasets")

IMAGES = np.random.default_rng(0).integers(0, 256, [40, 6, 8, 3], dtype=np.uint8)
GREY = IMAGES[..., :1]
CLASSES = ["cat", "dog"]


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(train=20, test=10, ...) writes tmp_path/tiny/1.0.0: `id` in a split is the image's number within all."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def prepare(*, images=IMAGES, features=None, keys=("image", "label"), version="1.0.0", config="", name="tiny", **splits):
        shape = (None, None, images[0].shape[-1])
        features = features or {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(names=CLASSES)}
        number = iter(range(len(images)))

        class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self):
                columns = tfds.features.FeaturesDict({**features, "id": np.int64})
                return tfds.core.DatasetInfo(builder=self, features=columns, supervised_keys=keys)

            def _split_generators(self, manager):
                return {split: self._generate_examples([next(number) for _ in range(n)]) for split, n in splits.items()}

            def _generate_examples(self, numbers):
                for n in numbers:
                    value = {tfds.features.Image: png(images[n]), tfds.features.ClassLabel: n % 2, tfds.features.Text: "x"}
                    yield n, {"id": n, **{key: value[type(feature)] for key, feature in features.items()}}

        Tiny.name = name
        Tiny(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
        return tmp_path / name / config / version

    return prepare


def is_set_of(d, part, numbers, images=IMAGES):
    """The part's images are those of `numbers`, each with its label; tensorflow_datasets has them in an order of its own."""
    got, labels = getattr(d, f"{part}_images"), getattr(d, f"{part}_labels")
    place = {images[n].tobytes(): n for n in numbers}
    order = [place[image.tobytes()] for image in got]
    assert sorted(order) == list(numbers)
    np.testing.assert_array_equal(labels, np.array(order) % 2)


def test_train_test_and_validation(prepare):
    folder = prepare(train=20, test=10, validation=6, extra=2)
    for name in ("tfds:tiny", "tfds:tiny:1.0.0", f"tfds:{folder}", f"tfds:{folder.parent}", folder):
        d = load(name)
        assert (d.name, d.class_names, d.image_shape) == ("tiny/1.0.0", ("cat", "dog"), (6, 8, 3))
        is_set_of(d, "train", range(20))
        is_set_of(d, "test", range(20, 30))
        is_set_of(d, "validation", range(30, 36))
        assert d.notes == ("tiny/1.0.0: split extra is not read.",) and d.source_size == 20


def test_validation_is_the_test_set_where_there_is_no_other(prepare):
    prepare(train=20, validation=10)
    d = load("tfds:tiny")
    is_set_of(d, "test", range(20, 30))
    assert d.validation_images is None
    assert d.notes == ("tiny/1.0.0 has no test set: its validation set (10 images) is used as the test set.",)


def test_a_train_split_alone_is_split(prepare):
    prepare(train=40)
    d = load("tfds:tiny")
    assert (len(d.train_labels), len(d.test_labels), d.source_size) == (28, 12, 40)
    is_set_of(
        load("tfds:tiny"), "train", sorted(n for n in range(40) if IMAGES[n].tobytes() in {x.tobytes() for x in d.train_images})
    )
    together = {x.tobytes() for x in np.concatenate([d.train_images, d.test_images])}
    assert len(together) == 40 and d.subset_hash == load("tfds:tiny").subset_hash


def test_grey_images_and_image_size(prepare):
    prepare(images=GREY, train=20, test=10)
    is_set_of(load("tfds:tiny"), "train", range(20), GREY)
    small = load("tfds:tiny", image_size=3)
    assert small.image_shape == (3, 3, 1)
    want = {np.asarray(images_module.resize(Image.fromarray(GREY[n, ..., 0]), 3)).tobytes() for n in range(20)}
    assert {image.tobytes() for image in small.train_images} == want


def test_images_of_several_sizes_need_image_size(prepare):
    prepare(images=[*IMAGES[:20], *IMAGES[20:, :5]], train=30, test=10)
    with pytest.raises(ValueError, match=r"got image 0 of split train of 8x[56] and image \d+ of split train of 8x[56] pixels"):
        load("tfds:tiny")
    assert load("tfds:tiny", image_size=4).image_shape == (4, 4, 3)


def test_large_sets_are_mapped(prepare, tmp_path, monkeypatch):
    prepare(train=40)
    plain = load("tfds:tiny")
    monkeypatch.setenv("PERTURBJAX_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(images_module, "LIMIT", 100)
    for _ in range(2):
        d = load("tfds:tiny")
        assert type(d.train_images) is type(d.test_images) is np.memmap and len(list((tmp_path / "cache").iterdir())) == 2
        np.testing.assert_array_equal(d.train_images, plain.train_images)
        np.testing.assert_array_equal(d.test_images, plain.test_images)


def test_versions_and_configs(prepare):
    for version, images in (("1.2.0", IMAGES), ("1.10.0", IMAGES[:, :4])):
        prepare(images=images, train=8, test=4, version=version)
    assert load("tfds:tiny").image_shape == (4, 8, 3) and load("tfds:tiny").name == "tiny/1.10.0"  # the highest
    assert load("tfds:tiny:1.2.0").image_shape == (6, 8, 3)
    with pytest.raises(FileNotFoundError, match=re.escape("load needs 'tiny:2.0.0' prepared in")) as error:
        load("tfds:tiny:2.0.0")
    assert "got versions 1.2.0, 1.10.0 only" in str(error.value) and "tfds.builder('tiny:2.0.0')" in str(error.value)
    prepare(train=8, test=4, config="small", name="many")
    assert load("tfds:many").name == load("tfds:many/small").name == load("tfds:many/small:1.0.0").name == "many/small/1.0.0"
    prepare(train=8, test=4, config="large", name="many")
    message = "one config of 'many', got 2: large, small. Write load('tfds:many/large')."
    with pytest.raises(ValueError, match=re.escape(message)):
        load("tfds:many")


def test_a_set_that_is_not_prepared_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("mnist", "cifar10_corrupted/fog_1", "mnist:3.0.1"):
        with pytest.raises(FileNotFoundError) as error:
            load(f"tfds:{name}")
        assert str(error.value) == (
            f"load needs {name!r} prepared in {str(tmp_path)!r} ($TFDS_DATA_DIR, or ~/tensorflow_datasets), got none. Preparing "
            "needs TensorFlow once, training does not: pip install tensorflow-cpu && python -c "
            f"\"import tensorflow_datasets as tfds; tfds.builder('{name}').download_and_prepare(file_format='array_record')\""
        )
    (tmp_path / "mnist").mkdir()  # a download that was broken off
    with pytest.raises(FileNotFoundError, match="got none. Preparing"):
        load("tfds:mnist")
    with pytest.raises(FileNotFoundError, match="got only 'mnist'. Preparing"):
        load("tfds:mnits")
    for folder in (tmp_path / "nowhere", "./nowhere", "~/nowhere_at_all"):
        with pytest.raises(FileNotFoundError, match="a folder with dataset_info.json, got '.*nowhere"):
            load(f"tfds:{folder}")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="got none. Preparing"):
        load("tfds:mnist")


@pytest.mark.parametrize("form", ["tfrecord", "parquet", None])
def test_other_file_formats_say_how_to_prepare(prepare, form):
    file = prepare(train=4, test=4, config="small") / "dataset_info.json"
    info = json.loads(file.read_text())
    info.pop("fileFormat")  # as older versions write it
    file.write_text(json.dumps(info | ({"fileFormat": form} if form else {})))
    with pytest.raises(ValueError) as error:
        load("tfds:tiny/small")
    for wanted in (f"got {form or 'tfrecord'} in {str(file.parent)!r}", "delete that folder or set TFDS_DATA_DIR",
                   "tfds.builder('tiny/small').download_and_prepare(file_format='array_record')"):  # fmt: skip
        assert wanted in str(error.value)


def test_features_are_found_or_listed(prepare):
    image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=CLASSES)
    one = {"photo": image, "kind": label, "text": tfds.features.Text()}
    prepare(features=one, keys=None, train=8, test=4, version="1.0.0")
    is_set_of(load("tfds:tiny"), "train", range(8))
    prepare(features={"a": image, "b": image, "x": label, "y": label}, keys=("b", "y"), train=8, test=4, version="1.0.1")
    is_set_of(load("tfds:tiny"), "train", range(8))
    prepare(features={"a": image, "b": image, "x": label}, keys=None, train=8, test=4, version="1.0.2")
    message = "one image and one class label in 'tiny/1.0.2', got 2 and 1 of the features a: Image, b: Image, id: Tensor, x: ClassLabel"
    with pytest.raises(ValueError, match=message):
        load("tfds:tiny")
    prepare(features={"text": tfds.features.Text(), "x": label}, keys=None, train=8, test=4, version="1.0.3")
    with pytest.raises(ValueError, match="got 0 and 1 of the features"):
        load("tfds:tiny")


def test_a_set_without_train(prepare):
    prepare(test=4)
    with pytest.raises(ValueError, match="needs a split named train in 'tiny/1.0.0', got test. Prepare"):
        load("tfds:tiny")


def test_damaged_sets(prepare):
    folder = prepare(train=20, test=10)
    (file,) = folder.glob("*-test.*")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a whole prepared set, got .* Delete that folder and prepare the set again"):
        load("tfds:tiny")
    file.unlink()
    with pytest.raises(ValueError, match="a whole prepared set, got "):
        load("tfds:tiny")
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="whose dataset_info.json is damaged"):
        load("tfds:tiny")
    shutil.rmtree(folder)


def test_tensorflow_is_never_imported_and_tfds_only_when_used(prepare):
    prepare(train=8, test=4)
    code = (
        "import sys; from perturbjax.data import load; load('digits')\n"
        "assert not {'tensorflow_datasets', 'array_record'} & set(sys.modules)\n"
        "print(load('tfds:tiny')); assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tiny/1.0.0: 8 training and 4 test images of 6x8x3 uint8, 2 classes of 4 to 4\n"


@pytest.mark.optax_promotes  # schedules
def test_a_prepared_set_is_compared_from_the_command_line(prepare, tmp_path):
    from experiments import compare

    prepare(train=30, test=10)
    flags = ["--view", "none", "--model", "cnn", "--methods", "ce, lpl", "--seeds", "1", "--epochs", "2", "--batch-size", "8"]
    compare.main(["--data", "tfds:tiny", *flags, "--cost-rounds", "0", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["data"]["train_size"] == 30 and found["data"]["class_names"] == CLASSES
