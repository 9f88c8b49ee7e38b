"""SEResNet: the pass of the equation in numpy, its size by counting, slices, one recomputation of each block, describe."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.models import create
from perturbjax.models.describe import describe, from_description
from perturbjax.models.resnet import LANet, ResNet, SEResNet, ShakeResNet, WideResNet
from tests.models.by_hand import conv, drawn, norm, relu

IMAGES = jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 3)), jnp.float32)
SHARED = dict(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
MODEL = SEResNet(depth=8, width=4, reduction=2, **SHARED)


@pytest.fixture(scope="module")
def variables():
    return drawn(MODEL, IMAGES)


def by_hand(variables, images):
    """The logits in evaluation mode, in float64 and without JAX."""
    params, stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables["params"], variables["batch_stats"]))

    def block(x, p, s, stride):
        y = relu(norm(conv(x, p["conv1"]["kernel"], stride), p["norm1"], s["norm1"]))
        y = norm(conv(y, p["conv2"]["kernel"]), p["norm2"], s["norm2"])
        inner = relu(y.mean((1, 2)) @ p["excitation"]["squeeze"]["kernel"])
        y = y / (1 + np.exp(-inner @ p["excitation"]["excite"]["kernel"]))[:, None, None]
        if "shortcut" in p:
            x = norm(conv(x, p["shortcut"]["kernel"], stride), p["shortcut_norm"], s["shortcut_norm"])
        return relu(x + y)

    x = (np.asarray(images, np.float64) - SHARED["mean"]) / SHARED["std"]
    x = relu(norm(conv(x, params["stem"]["conv"]["kernel"]), params["stem"]["norm"], stats["stem"]["norm"]))
    for i in (1, 2, 3):
        x = block(x, params[f"stage{i}"]["block0"], stats[f"stage{i}"]["block0"], 1 + (i > 1))
    return x.mean((1, 2)) @ params["logits"]["kernel"] + params["logits"]["bias"]


def test_the_pass_is_that_of_the_equation(variables):
    expected = by_hand(variables, IMAGES)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(jax.jit(MODEL.apply)(variables, IMAGES), expected, rtol=0, atol=1e-5 * scale)
    with_other = by_hand(jax.tree.map_with_path(lambda path, x: 0 * x if "excite" in str(path) else x, variables), IMAGES)
    assert np.abs(with_other - expected).max() > 1e-2 * scale  # without W₂ all factors are ½


@pytest.mark.parametrize("depth", [20, 110])
def test_its_size_is_that_of_isda_s_form(depth):
    """Counted by layer: convolutions, norms, 2 · C · C/16 for the factors, 1x1 convolutions with a norm where the shape changes."""
    count, width = 27 * 16 + 2 * 16, 16
    for channels in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            count += 9 * width * channels + 9 * channels**2 + 4 * channels + 2 * channels * (channels // 16)
            count += (width * channels + 2 * channels) * (width != channels)
            width = channels
    model = create(f"se_resnet{depth}", num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.ones([1, 32, 32, 3]))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == count + 64 * 10 + 10
    assert model.sites == ("input", "stem", "stage1", "stage2", "stage3", "features", "logits")


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_slice_after_slice_is_the_whole_pass(variables, train):
    run = lambda variables, value, **sites: jax.jit(partial(MODEL.apply, train=train, mutable=["batch_stats"], **sites))(
        variables, value
    )
    whole = run(variables, IMAGES)
    value, between = IMAGES, variables
    for start, stop in zip(MODEL.sites, MODEL.sites[1:]):
        value, new = run(between, value, start=start, stop=stop)
        between = between | new
    jax.tree.map(np.testing.assert_array_equal, (value, between["batch_stats"]), (whole[0], whole[1]["batch_stats"]))


@pytest.mark.parametrize("kind", [ResNet, WideResNet, ShakeResNet, SEResNet, LANet])
def test_remat_recomputes_every_block_once(kind):
    sizes = dict(width=2, **SHARED) | (dict(depth=10, widen=1) if kind is WideResNet else dict(depth=8))
    plain, remat = (kind(remat=remat, **sizes) for remat in (False, True))
    made = [jax.eval_shape(model.init, jax.random.key(0), IMAGES) for model in (plain, remat)]
    assert made[0] == made[1]
    text = str(jax.make_jaxpr(remat.apply)(made[0], IMAGES))
    stem = kind in (ResNet, SEResNet, LANet)  # with a norm
    assert text.count("remat") + text.count("checkpoint") == 3 + stem


def test_it_comes_back_from_its_description_and_bad_fields_are_named():
    model = create("se_resnet110", reduction=8, stochastic_depth=0.5, width=8, **SHARED)
    assert from_description(json.loads(json.dumps(describe(model)))) == model and model.reduction == 8
    assert len(model.branches) == 54
    with pytest.raises(ValueError, match="SEResNet needs reduction >= 1, got 0. Write reduction=16"):
        SEResNet(reduction=0, **SHARED)
    with pytest.raises(ValueError, match=r"SEResNet needs depth = 6n \+ 2, got 52"):
        SEResNet(depth=52, **SHARED)


def test_narrow_channels_keep_one_unit_and_bfloat16_computes_in_it():
    model = SEResNet(depth=8, width=2, dtype=jnp.bfloat16, **SHARED)
    made = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert made["params"]["stage1"]["block0"]["excitation"]["squeeze"]["kernel"].shape == (2, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    at = lambda stop: jax.eval_shape(lambda v: model.apply(v, IMAGES, stop=stop), made).dtype
    assert [at(stop) for stop in ("stage1", "stage3", "features")] == ["bfloat16", "bfloat16", "float32"]
