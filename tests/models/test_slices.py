"""Slice after slice is the whole pass, bit for bit (but for what a compiler fuses): values, statistics, dropout masks; every site and family."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.models import CNN, MLP, NAMES, TEXT_NAMES, ResNet, WideResNet, create

IMAGES = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 3)), jnp.float32)
SHARED = dict(num_classes=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
MODELS = {
    "mlp": MLP(hidden=(8, 6), dropout=0.3, **SHARED),
    "cnn": CNN(width=2, **SHARED),
    "cnn bfloat16 cosine": CNN(width=2, dtype=jnp.bfloat16, head="cosine", num_stages=1, **SHARED),
    "resnet8": ResNet(depth=8, width=2, **SHARED),
    "resnet8 option B": ResNet(depth=8, width=2, shortcut="B", **SHARED),
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
    if jax.__version_info__ < (0, 12) or not isinstance(model, WideResNet):
        assert_equal(walk, whole)
    else:
        # From JAX 0.12 on, XLA fuses pre-activation blocks across stages (without jit they are equal, below): ten layers of it differ
        # by about 1e-7 of the largest number.
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.abs(b).max()))
        jax.tree.map(close, walk, whole)


def test_without_jit_a_cut_at_any_site_is_the_whole_pass(model):
    variables = variables_of(model)
    whole = run(model, variables, IMAGES, train=True, jit=False)
    for site in model.sites:
        value, between = run(model, variables, IMAGES, train=True, jit=False, stop=site)
        assert_equal(run(model, between, value, train=True, jit=False, start=site), whole)


FAST = ("mlp", "cnn", "resnet8", "resnet20")
TOKENS = jnp.asarray([[3, 1, 4, 0], [1, 5, 9, 2], [6, 0, 0, 0], [5, 3, 5, 8]], jnp.int32)


def narrow(name):
    """The net of that name in its full depth, as narrow as can be, with an output for abstention: (net, inputs)."""
    if name in TEXT_NAMES:
        fields = dict(width=8, num_heads=2, inner=6, positions=8) if name == "bert-base" else dict(width=3, embedding=4)
        return create(name, num_classes=5, vocabulary_size=10, abstain=True, **fields), TOKENS
    return create(name, width=8 if name == "mlp" else 2, abstain=True, **SHARED), IMAGES


def tame(model, inputs):
    """Variables under which hundreds of layers neither blow up nor die out."""
    random = np.random.default_rng(1)
    fill = lambda shape: random.normal(0, shape[-2] ** -0.5 / 3, shape) if len(shape) > 1 else random.uniform(0.5, 1.5, shape)
    tree = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return jax.tree.map(lambda leaf: jnp.asarray(fill(leaf.shape), leaf.dtype), tree)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in NAMES + TEXT_NAMES])
def test_every_named_net_is_its_slices_one_after_the_other(name):
    """In training and in evaluation, at all of its sites, `outputs` among them; without jit, so bit for bit on every compiler."""
    model, inputs = narrow(name)
    variables = tame(model, inputs)
    masks = model.side_of(inputs) if name in TEXT_NAMES else {}
    assert model.sites[-2:] == ("outputs", "logits")
    for train in (True, False):
        whole, walk = run(model, variables, inputs, train=train, jit=False), (inputs, variables)
        for start, stop in zip(model.sites, model.sites[1:]):
            told = {} if start == "input" else {argument: masks[argument] for argument in getattr(model, "takes", ())}
            walk = run(model, walk[1], walk[0], train=train, jit=False, start=start, stop=stop, **told)
        assert_equal(walk, whole)
        assert np.isfinite(whole[0]).all() and np.ptp(whole[0], axis=0).max() > 1e-4  # not the same for all inputs


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
