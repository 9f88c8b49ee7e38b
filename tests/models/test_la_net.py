"""LANet: the pass of the equation in numpy, its size by counting, slices, its description."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.models import LANet, create
from perturbjax.models.describe import describe, from_description
from tests.models.by_hand import conv, drawn, norm, relu

IMAGES = jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 3)), jnp.float32)
SHARED = dict(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
MODEL = LANet(depth=14, width=4, **SHARED)  # two blocks a stage


@pytest.fixture(scope="module")
def variables():
    return drawn(MODEL, IMAGES)


def by_hand(variables, images):
    """The logits in evaluation mode, in float64 and without JAX."""
    params, stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables["params"], variables["batch_stats"]))

    def block(x, p, s, stride, first):
        y = relu(norm(conv(x, p["conv1"]["kernel"]), p["norm1"], s["norm1"]))
        y = relu(norm(conv(y, p["conv2"]["kernel"], stride), p["norm2"], s["norm2"]))
        y = norm(conv(y, p["conv3"]["kernel"]), p["norm3"], s["norm3"])
        if first:
            x = norm(conv(x, p["shortcut"]["kernel"], stride), p["shortcut_norm"], s["shortcut_norm"])
        return relu(x + y)

    x = (np.asarray(images, np.float64) - SHARED["mean"]) / SHARED["std"]
    x = relu(norm(conv(x, params["stem"]["conv"]["kernel"], padding=3), params["stem"]["norm"], stats["stem"]["norm"]))
    for i in (1, 2, 3):
        for j in (0, 1):
            stride = 2 if i > 1 and j == 0 else 1
            x = block(x, params[f"stage{i}"][f"block{j}"], stats[f"stage{i}"][f"block{j}"], stride, j == 0)
    x = norm(x, params["features"]["norm"], stats["features"]["norm"]).mean((1, 2))
    return x @ params["logits"]["kernel"] + params["logits"]["bias"]


def test_the_pass_is_that_of_the_equation(variables):
    expected = by_hand(variables, IMAGES)
    np.testing.assert_allclose(jax.jit(MODEL.apply)(variables, IMAGES), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_it_has_47_layers_on_36_pixels():
    """Counted by layer: 11 C² and three norms a block, 1x1 convolutions with a norm before each stage, stage1 too."""
    model = create("la_net", num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.ones([1, 32, 32, 3]))
    count, width = 27 * 16 + 2 * 16, 16
    for channels in (16, 32, 64):
        for block in range(5):
            count += width * channels + 10 * channels**2 + 6 * channels + (block == 0) * (width * channels + 2 * channels)
            width = channels
    assert sum(leaf.size for leaf in jax.tree.leaves(made["params"])) == count + 2 * 64 + 64 * 10 + 10
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree.flatten_with_path(made["params"])[0]]
    assert len([path for path in paths if path.endswith("kernel") and "shortcut" not in path]) == 47
    at = lambda stop: jax.eval_shape(lambda v: model.apply(v, jnp.ones([2, 32, 32, 3]), stop=stop), made).shape
    found = [at(stop) for stop in ("stem", "stage1", "stage2", "stage3", "features")]
    assert found == [(2, 36, 36, 16), (2, 36, 36, 16), (2, 18, 18, 32), (2, 9, 9, 64), (2, 64)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_slice_after_slice_is_the_whole_pass(variables, train):
    """Without jit, so bit for bit on every compiler."""
    run = partial(MODEL.apply, train=train, mutable=["batch_stats"])
    whole = run(variables, IMAGES)
    value, between = IMAGES, variables
    for start, stop in zip(MODEL.sites, MODEL.sites[1:]):
        value, new = run(between, value, start=start, stop=stop)
        between = between | new
    jax.tree.map(np.testing.assert_array_equal, (value, between["batch_stats"]), (whole[0], whole[1]["batch_stats"]))


def test_it_comes_back_from_its_description():
    model = create("la_net", stochastic_depth=0.5, width=8, **SHARED)
    assert from_description(json.loads(json.dumps(describe(model)))) == model
    assert len(model.branches) == 15
