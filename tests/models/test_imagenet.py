"""ImageNetResNet: public weights against a pass in numpy that knows only torchvision's names, sizes, slices, foreign and damaged files."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import shared
from perturbjax import models
from perturbjax.data import Dataset, check
from perturbjax.models import ImageNetResNet, create, load_resnet, resnet_fields
from perturbjax.models.describe import describe, from_description
from perturbjax.training import device_data, init_state
from tests.models.test_bert import write_safetensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = jnp.asarray(np.random.default_rng(0).random((2, 33, 40, 3)), jnp.float32)  # an odd edge: padding shows
SHARED = dict(num_classes=5, mean=MEAN, std=STD)
MODEL = ImageNetResNet(width=2, blocks=(2, 1), **SHARED)


def weights_of(width=2, blocks=(2, 1), classes=5):
    """Random weights under the names and in the shapes of a torchvision ResNet."""
    random, found = np.random.default_rng(0), {}

    def conv(name, out, into, size):
        found[f"{name}.weight"] = random.normal(0, (2 / (into * size**2)) ** 0.5, (out, into, size, size)).astype(np.float32)

    def norm(name, size):
        for part, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
            found[f"{name}.{part}"] = random.uniform(low, low + 1, size).astype(np.float32)
        found[f"{name}.num_batches_tracked"] = np.array(7, np.int64)

    conv("conv1", width, 3, 7), norm("bn1", width)
    into = width
    for stage, number in enumerate(blocks):
        inner = width * 2**stage
        for block in range(number):
            at = f"layer{stage + 1}.{block}."
            for i, (out, of, size) in enumerate(((inner, into, 1), (inner, inner, 3), (4 * inner, inner, 1)), 1):
                conv(f"{at}conv{i}", out, of, size), norm(f"{at}bn{i}", out)
            if block == 0:
                conv(f"{at}downsample.0", 4 * inner, into, 1), norm(f"{at}downsample.1", 4 * inner)
            into = 4 * inner
    found["fc.weight"] = random.normal(0, 0.5, (classes, into)).astype(np.float32)
    found["fc.bias"] = random.normal(0, 0.5, classes).astype(np.float32)
    return found


WEIGHTS = weights_of()


def by_hand(weights, images):
    """The logits in evaluation mode in float64, images [B, channels, H, W], in torchvision's layout throughout."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    relu = lambda x: np.maximum(x, 0)

    def windows(x, size, stride, value):
        edge = size // 2
        x = np.pad(x, [(0, 0), (0, 0), (edge, edge), (edge, edge)], constant_values=value)
        return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]

    def conv(x, name, stride=1):
        kernel = w[f"{name}.weight"]
        return np.einsum("bihwkl,oikl->bohw", windows(x, kernel.shape[-1], stride, 0.0), kernel)

    def norm(x, name):
        along = lambda part: w[f"{name}.{part}"][:, None, None]
        return (x - along("running_mean")) / np.sqrt(along("running_var") + 1e-5) * along("weight") + along("bias")

    x = windows(relu(norm(conv(images, "conv1", 2), "bn1")), 3, 2, -np.inf).max((-2, -1))
    for at in dict.fromkeys(".".join(name.split(".")[:2]) for name in w if name.startswith("layer")):
        stride = 2 if at.endswith(".0") and not at.startswith("layer1") else 1
        y = relu(norm(conv(x, f"{at}.conv1"), f"{at}.bn1"))
        y = relu(norm(conv(y, f"{at}.conv2", stride), f"{at}.bn2"))
        y = norm(conv(y, f"{at}.conv3"), f"{at}.bn3")
        if f"{at}.downsample.0.weight" in w:
            x = norm(conv(x, f"{at}.downsample.0", stride), f"{at}.downsample.1")
        x = relu(y + x)
    return x.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.5, 0.5, leaf.shape) ** 2, leaf.dtype), shapes)


def test_loaded_weights_give_torchvision_s_pass(tmp_path, variables):
    loaded = load_resnet(write_safetensors(tmp_path / "model.safetensors", WEIGHTS, {"format": "pt"}), variables)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded) == jax.tree.map(lambda x: (x.shape, x.dtype), variables)
    normalised = (np.asarray(IMAGES, np.float64) - MEAN) / STD
    expected = by_hand(WEIGHTS, normalised.transpose(0, 3, 1, 2))
    got = jax.jit(MODEL.apply)(loaded, IMAGES)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    jax.tree.map(np.testing.assert_array_equal, load_resnet(tmp_path, variables), loaded)  # the folder


def test_a_head_of_another_size_stays_and_other_types_become_float32(tmp_path, variables):
    file = write_safetensors(
        tmp_path / "x.safetensors", {k: v.astype(np.float16) if v.ndim else v for k, v in weights_of(classes=7).items()}
    )
    loaded = load_resnet(file, variables)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"]["logits"], variables["params"]["logits"])
    kernel = loaded["params"]["stage2"]["block0"]["conv2"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel[1, 2, 3, 0], WEIGHTS["layer2.0.conv2.weight"].astype(np.float16)[0, 3, 1, 2])
    without = {name: array for name, array in WEIGHTS.items() if not name.startswith("fc.")}
    load_resnet(write_safetensors(tmp_path / "y.safetensors", without), variables)


def test_the_fields_follow_from_the_weights(tmp_path):
    file = write_safetensors(tmp_path / "x.safetensors", weights_of(width=4, blocks=(1, 3, 2)))
    assert resnet_fields(file) == dict(width=4, blocks=(1, 3, 2))
    model = ImageNetResNet(**resnet_fields(file), **SHARED)
    load_resnet(file, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0), IMAGES)))


def test_other_nets_other_sizes_and_damaged_files_are_named(tmp_path, variables):
    write = lambda name, arrays: write_safetensors(tmp_path / name, arrays)
    small = {name: array for name, array in WEIGHTS.items() if "conv3" not in name and "bn3" not in name}  # as of a resnet18
    with pytest.raises(
        ValueError, match="load_resnet needs the weights of a ResNet of bottleneck blocks.*layer1.0.conv3.weight among"
    ):
        load_resnet(write("small", small), variables)
    with pytest.raises(ValueError, match="resnet_fields needs the weights of a ResNet .*got embeddings.weight, ... .1 arrays"):
        resnet_fields(write("bert", {"embeddings.weight": np.zeros([2, 2], np.float32)}))
    with pytest.raises(ValueError, match=r"needs weights with \(2, 1\) blocks, got \(1, 1\) in .*blocks=\(1, 1\)"):
        load_resnet(write("short", weights_of(blocks=(1, 1))), variables)
    with pytest.raises(
        ValueError, match=r"needs conv1.weight of shape \(7, 7, 3, 2\), got \(7, 7, 3, 4\) in .*with \*\*resnet_fields"
    ):
        load_resnet(write("wide", weights_of(width=4)), variables)
    lacking = {name: array for name, array in WEIGHTS.items() if name != "layer2.0.bn2.running_var"}
    with pytest.raises(ValueError, match="layer2.0.bn2.running_var among them"):
        load_resnet(write("lacking", lacking), variables)
    squeezed = WEIGHTS | {f"layer1.0.se.fc{i}.weight": np.zeros([8, 8, 1, 1], np.float32) for i in (1, 2)}
    with pytest.raises(
        ValueError, match="a plain ResNet, got layer1.0.se.fc1.weight, layer1.0.se.fc2.weight too .2 arrays without a place. in"
    ):
        load_resnet(write("squeezed", squeezed), variables)
    whole = write("whole", WEIGHTS)
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(ValueError, match="read_safetensors needs a whole .safetensors file"):
        load_resnet(whole, variables)


@pytest.mark.parametrize("name, millions", [("resnet50", 25_557_032), ("resnet101", 44_549_160)])
def test_sizes_and_sites_are_those_of_resnet_50_and_101(name, millions):
    """Parameters with 1000 classes as torchvision's documentation gives them."""
    model = create(name, num_classes=1000, mean=MEAN, std=STD)
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.ones([1, 224, 224, 3]))
    assert sum(leaf.size for leaf in jax.tree.leaves(made["params"])) == millions
    assert model.sites == ("input", "stem", "stage1", "stage2", "stage3", "stage4", "features", "logits")
    at = lambda stop: jax.eval_shape(lambda v: model.apply(v, jnp.ones([1, 224, 224, 3]), stop=stop), made).shape[1:]
    assert [at(f"stage{i}") for i in (1, 2, 3, 4)] == [(56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048)]
    assert at("stem") == (56, 56, 64) and at("features") == (2048,)


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_slice_after_slice_is_the_whole_pass(variables, train):
    images, rngs = IMAGES[:, :16, :16], {"dropout": jax.random.key(1)}
    model = ImageNetResNet(width=2, blocks=(2, 1), dropout=0.3, **SHARED)
    run = lambda variables, value, **sites: jax.jit(
        partial(model.apply, train=train, mutable=["batch_stats"], rngs=rngs, **sites)
    )(variables, value)
    whole = run(variables, images)
    value, between = images, variables
    for start, stop in zip(model.sites, model.sites[1:]):
        value, new = run(between, value, start=start, stop=stop)
        between = between | new
    jax.tree.map(np.testing.assert_array_equal, (value, between["batch_stats"]), (whole[0], whole[1]["batch_stats"]))


def test_it_comes_back_from_its_description_and_bad_fields_are_named():
    model = create("resnet101", width=8, dropout=0.1, **SHARED)
    assert from_description(json.loads(json.dumps(describe(model)))) == model and model.blocks == (3, 4, 23, 3)
    for wrong in ((), (3, 0)):
        with pytest.raises(ValueError, match="ImageNetResNet needs blocks, one number >= 1 for each stage, got"):
            ImageNetResNet(blocks=wrong, **SHARED)


def small_dataset(channels):
    random, labels = np.random.default_rng(0), np.arange(12, dtype=np.int32) % 3
    images = lambda number: random.integers(0, 256, (number, 8, 8, channels), np.uint8)
    return check(Dataset("mine", images(12), labels, images(6), labels[:6]))


def test_a_run_starts_from_the_weights_with_their_statistics_and_normalisation(tmp_path, monkeypatch):
    monkeypatch.setitem(models._MODELS, "resnet50", partial(ImageNetResNet, blocks=(2, 1)))  # a named net that compiles fast
    file = write_safetensors(tmp_path / "model.safetensors", WEIGHTS)
    colour, grey = small_dataset(3), small_dataset(1)
    settings = shared.Settings(model="resnet50", width=2, weights=str(file), batch_size=4)
    [(method, numbers)] = shared.parse_methods("ce").values()
    recipe = shared.make_recipe(settings, colour, method)
    assert (recipe.model.blocks, recipe.model.mean, recipe.model.std) == ((2, 1), MEAN, STD)
    state = init_state(recipe, shared.make_numbers(settings, numbers), device_data(colour), 0)
    np.testing.assert_array_equal(state.params["stem"]["norm"]["scale"], WEIGHTS["bn1.weight"])
    np.testing.assert_array_equal(state.stats["stage2"]["block0"]["norm2"]["var"], WEIGHTS["layer2.0.bn2.running_var"])
    assert state.params["logits"]["kernel"].shape == (8 * 2, 3)  # its own
    with pytest.raises(ValueError, match="--weights needs colour images, got 1 channels"):
        shared.make_recipe(settings, grey, method)
    with pytest.raises(
        ValueError, match="--weights needs texts and --model bert-base or of images resnet50, .*got images and cnn"
    ):
        shared.make_recipe(dataclasses.replace(settings, model="cnn"), colour, method)


def test_weights_of_another_depth_than_the_named_net_are_an_error(tmp_path):
    """Not a net of the file's depth under the other name."""
    dataset, [(method, _)] = small_dataset(3), shared.parse_methods("ce").values()
    made = lambda model, file: shared.make_recipe(shared.Settings(model=model, weights=str(file)), dataset, method).model
    fifty, other = (
        write_safetensors(tmp_path / name, weights_of(blocks=blocks))
        for name, blocks in (("50", (3, 4, 6, 3)), ("26", (2, 2, 2, 2)))
    )
    assert made("resnet50", fifty).blocks == (3, 4, 6, 3)
    with pytest.raises(
        ValueError,
        match=r"with \(3, 4, 23, 3\) blocks for --model resnet101, got \(3, 4, 6, 3\) in .* Write --model resnet50\.",
    ):
        made("resnet101", fifty)
    with pytest.raises(ValueError, match=r"for --model resnet50, got \(2, 2, 2, 2\) in .* Give a resnet50's\."):
        made("resnet50", other)
