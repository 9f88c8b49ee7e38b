"""Slice after slice is the whole pass, bit for bit: values, running statistics and dropout masks, at every site of every family."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.models import CNN, MLP, ResNet, WideResNet

IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 3)), jnp.float32)
SHARED = dict(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
MODELS = {
    "mlp": MLP(hidden=(8, 6), dropout=0.3, **SHARED),
    "cnn": CNN(width=2, **SHARED),
    "cnn bfloat16 cosine": CNN(width=2, dtype=jnp.bfloat16, head="cosine", num_stages=1, **SHARED),
    "resnet8": ResNet(depth=8, width=2, **SHARED),
    "wrn10-2": WideResNet(depth=10, width=2, widen=2, dropout=0.3, **SHARED),
}
RNGS = {"dropout": jax.random.key(1, impl="unsafe_rbg")}  # compiles faster than threefry


def variables_of(model, images=IMAGES):
    """Positive numbers near one in every leaf: no leaf is as initialised, and no compilation is spent on it."""
    random = np.random.default_rng(1)
    tree = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.5, 0.5, leaf.shape) ** 2, leaf.dtype), tree)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def run(model, variables, value, *, train, jit=True, **sites):
    """The value at `stop` and the variables after it: the next slice gets this slice's statistics."""
    apply = partial(model.apply, train=train, mutable=["batch_stats"], rngs=RNGS, **sites)
    value, new = (jax.jit(apply) if jit else apply)(variables, value)
    return value, variables | new


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluation"])
def test_slice_after_slice_is_the_whole_pass(model, train):
    variables = variables_of(model)
    whole = run(model, variables, IMAGES, train=train)
    walk = IMAGES, variables
    for start, stop in zip(model.sites, model.sites[1:]):
        walk = run(model, walk[1], walk[0], train=train, start=start, stop=stop)
    assert_equal(walk, whole)


def test_without_jit_a_cut_at_any_site_is_the_whole_pass(model):
    variables = variables_of(model)
    whole = run(model, variables, IMAGES, train=True, jit=False)
    for site in model.sites:
        value, between = run(model, variables, IMAGES, train=True, jit=False, stop=site)
        assert_equal(run(model, between, value, train=True, jit=False, start=site), whole)


def test_a_slice_updates_its_own_statistics_only():
    model = MODELS["resnet8"]
    variables = variables_of(model)
    _, after = run(model, variables, IMAGES, train=True, stop="stage1")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after["batch_stats"], variables["batch_stats"])
    all_same = {site: set(jax.tree.leaves(same[site])) for site in same}
    assert all_same == {"stem": {False}, "stage1": {False}, "stage2": {True}, "stage3": {True}}  # all four are returned


def test_init_up_to_a_site_makes_the_variables_up_to_there(model):
    variables = variables_of(model)
    for last, stop in enumerate(model.sites):
        made = jax.eval_shape(partial(model.init, stop=stop), jax.random.key(0), IMAGES)
        for name, whole in variables.items():
            wanted = {site: whole[site] for site in whole if model.sites.index(site) <= last}
            assert jax.tree.map(jnp.shape, made.get(name, {})) == jax.tree.map(jnp.shape, wanted)


def test_the_variables_of_a_slice_are_enough_to_run_it():
    model = MODELS["wrn10-2"]
    made = jax.eval_shape(partial(model.init, start="stage3"), jax.random.key(0), jnp.ones([2, 2, 2, 16]))
    assert set(made["params"]) == {"features", "logits"}
    made = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), made)
    assert model.apply(made, jnp.ones([2, 2, 2, 16]), start="stage3").shape == (2, 5)


def test_a_slice_of_nothing_returns_the_value(model):
    variables = variables_of(model)
    for site in model.sites:
        assert model.apply(variables, IMAGES, start=site, stop=site) is IMAGES


def test_dropout_follows_its_key_and_rests_at_evaluation():
    model = MODELS["mlp"]
    variables = variables_of(model)
    out = lambda seed, train=True: model.apply(variables, IMAGES, train=train, rngs={"dropout": jax.random.key(seed)})
    assert_equal(out(0), out(0))
    assert (out(0) != out(1)).any()
    assert_equal(out(0, train=False), model.apply(variables, IMAGES))


@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_a_wrong_site_names_the_sites(name):
    model = MODELS[name]
    for wrong in ({"start": "stagee1"}, {"stop": "stagee1"}):
        with pytest.raises(ValueError, match=r"'input', .*'stage1', .*'logits'.*got 'stagee1'. Write 'stage1'"):
            model.apply({}, IMAGES, **wrong)
    with pytest.raises(ValueError, match="needs start before stop.*start='features', stop='stage1'"):
        model.apply({}, IMAGES, start="features", stop="stage1")
