"""remat: the same variables, values, gradients, statistics and masks as without, in less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.models import CNN, NAMES, ResNet, WideResNet, create
from perturbjax.models.blocks import KEEP_REMAT

IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 3)), jnp.float32)
SHARED = dict(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
MODELS = {
    "cnn": partial(CNN, width=2, num_stages=1, dropout=0.3, **SHARED),
    "cnn lax bfloat16": partial(CNN, width=2, num_stages=1, conv="lax", dtype=jnp.bfloat16, head="cosine", **SHARED),
    "resnet8": partial(ResNet, depth=8, width=2, **SHARED),
    "wrn10-2": partial(WideResNet, depth=10, width=2, widen=2, dropout=0.3, **SHARED),
}
RNGS = {"dropout": jax.random.key(1, impl="unsafe_rbg")}  # compiles faster than threefry


def variables_of(model, images=IMAGES):
    """Positive numbers near one in every leaf: no leaf is as initialised, and no compilation is spent on it."""
    random = np.random.default_rng(1)
    tree = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.5, 0.5, leaf.shape) ** 2, leaf.dtype), tree)


def close(got, expected, rtol=1e-5):
    """To rounding, relative to the largest number of the array."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.abs(b).max())), got, expected)


def loss(model, params, stats, value, **sites):
    """(a number, (the value at `stop`, the new statistics))"""
    variables = {"params": params, "batch_stats": stats}
    out, new = model.apply(variables, value, train=True, mutable=["batch_stats"], rngs=RNGS, **sites)
    return jnp.mean(out.astype(jnp.float32) ** 2), (out, new["batch_stats"])


def both(make):
    return make(remat=False), make(remat=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_variables_are_those_without(name):
    make = partial(create, name, width=2, **SHARED)
    plain, remat = (jax.eval_shape(model.init, jax.random.key(0), IMAGES) for model in both(make))
    assert plain == remat
    assert make(remat=True).sites == make().sites


@pytest.mark.parametrize("name", MODELS)
def test_values_gradients_statistics_and_masks_are_those_without(name):
    plain, remat = both(MODELS[name])
    variables = variables_of(plain)
    inputs = variables["params"], variables["batch_stats"], IMAGES
    run = lambda model, **options: jax.jit(jax.grad(partial(loss, model), has_aux=True), **options)(*inputs)
    expected, got = run(plain), run(remat, compiler_options=KEEP_REMAT)
    close(got[1], expected[1])  # equal logits: equal masks; each statistic averaged once
    close(got, expected, 0.02 if "bfloat16" in name else 1e-5)


def test_evaluation_is_that_without():
    plain, remat = both(MODELS["cnn"])
    variables = variables_of(plain)
    close(*(jax.jit(model.apply)(variables, IMAGES) for model in (plain, remat)))


@pytest.mark.parametrize("name", ["cnn", "wrn10-2"])
def test_slice_after_slice_is_the_whole_pass(name):
    plain, remat = both(MODELS[name])
    variables = variables_of(plain)
    params, stats, value = variables["params"], variables["batch_stats"], IMAGES
    whole = jax.jit(partial(loss, remat))(params, stats, value)[1]
    for start, stop in zip(plain.sites, plain.sites[1:]):
        value, stats = jax.jit(partial(loss, remat, start=start, stop=stop))(params, stats, value)[1]
    close((value, stats), whole)


def test_gradients_of_a_slice_are_those_without():
    plain, remat = both(partial(CNN, width=2, **SHARED))
    variables = variables_of(plain)
    hidden = plain.apply(variables, IMAGES, stop="stage1")
    slope = lambda model: jax.jit(jax.grad(partial(loss, model, start="stage1", stop="stage2"), 2, has_aux=True))(
        variables["params"], variables["batch_stats"], hidden
    )
    close(slope(remat), slope(plain))


def test_a_model_with_remat_is_a_static_argument():
    make = partial(create, "resnet8", **SHARED)
    assert make(remat=True) == make(remat=True) != make()
    assert hash(make(remat=True)) == hash(make(remat=True))
    assert create("mlp", remat=True, **SHARED) == create("mlp", **SHARED)


@pytest.fixture(scope="module")
def gradients():
    """resnet20 at width 4: {remat: the lowered gradient, and the bytes that wait for the backward pass}."""
    images = jnp.zeros([32, 16, 16, 3])
    found = {}
    for remat in (False, True):
        model = create("resnet20", width=4, remat=remat, **SHARED)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        of = lambda params, stats, model=model: loss(model, params, stats, images)[0]
        backward = jax.eval_shape(
            lambda p, s, of=of: jax.vjp(lambda p: of(p, s), p)[1], variables["params"], variables["batch_stats"]
        )
        lowered = jax.jit(jax.grad(of)).lower(variables["params"], variables["batch_stats"])
        found[remat] = lowered, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))
    return found


def test_less_waits_for_the_backward_pass(gradients):
    assert gradients[True][1] < 0.25 * gradients[False][1]  # 0.9 of 6.2 MiB


def test_the_inside_of_each_block_is_computed_once_more(gradients):
    count = {remat: lowered.as_text().count("stablehlo.convolution") for remat, (lowered, _) in gradients.items()}
    assert count[True] == count[False] + 1 + 9 * 2  # the stem, and two in each block


def test_the_compiled_gradient_needs_less_memory(gradients):
    size = lambda remat: gradients[remat][0].compile(compiler_options=KEEP_REMAT).memory_analysis().temp_size_in_bytes
    assert size(True) < 0.4 * size(False)  # 1.5 of 4.5 MiB
