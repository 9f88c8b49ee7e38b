"""perturbjax.line: four kinds of model, one form; names and numbers of sites; errors that say what to write."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.models import CNN

X = np.random.default_rng(0).normal(size=[3, 4]).astype(np.float32)
W = {"a": np.random.default_rng(1).normal(size=[4, 5]).astype(np.float32), "b": np.ones([5, 2], np.float32)}
TWO = {"features": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, a: a @ w["b"]}


def whole(line, variables=W, value=X, **options):
    return line.slice(variables, value, "input", "logits", stats=None, train=True, key=None, **options)


def test_a_function_has_the_sites_input_and_logits():
    made = pj.line(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"])
    assert made.sites == ("input", "logits") and made.head is None
    np.testing.assert_allclose(whole(made)[0], np.tanh(X @ W["a"]) @ W["b"], rtol=1e-5)


def test_a_mapping_is_cut_at_its_names():
    made = pj.line(TWO, head=lambda w: (w["b"].T, np.zeros(2)))
    assert made.sites == ("input", "features", "logits")
    features, none = made.slice(W, X, "input", "features", stats=None, train=True, key=None)
    np.testing.assert_allclose(features, np.tanh(X @ W["a"]), rtol=1e-5)
    assert none is None
    np.testing.assert_array_equal(
        made.slice(W, features, "features", "logits", stats=None, train=True, key=None)[0], whole(made)[0]
    )
    np.testing.assert_array_equal(made.slice(W, X, "input", "input", stats=None, train=True, key=None)[0], X)
    np.testing.assert_allclose(features @ made.head(W)[0].T + made.head(W)[1][None], whole(made)[0], rtol=1e-5)


def test_a_line_stays_as_it_is():
    made = pj.line(TWO)
    assert pj.line(made) is made


def test_stateful_functions_get_statistics_mode_and_key_and_hand_statistics_on():
    seen = []

    def stage(name):
        def run(w, x, stats, *, train, key):
            seen.append((name, train, key))
            return x + 1, {**stats, name: stats[name] + 1}

        return run

    made, key = pj.line({"stage1": stage("stage1"), "logits": stage("logits")}, stateful=True), jax.random.key(3)
    value, stats = made.slice(W, X, "input", "logits", stats={"stage1": 0, "logits": 5}, train=False, key=key)
    np.testing.assert_allclose(value, X + 2)
    assert stats == {"stage1": 1, "logits": 6}
    assert [(name, train) for name, train, _ in seen] == [("stage1", False), ("logits", False)]
    _, stats = made.slice(W, X, "stage1", "logits", stats={"stage1": 0, "logits": 5}, train=True, key=None)
    assert stats == {"stage1": 0, "logits": 6}


def test_every_piece_draws_for_itself_whichever_slice_it_is_run_in():
    """And a model of one piece draws with the key as it is."""
    dropped = lambda w, x, stats, *, train, key: (jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0), stats)
    three, key = pj.line(dict.fromkeys(("stage1", "stage2", "logits"), dropped), stateful=True), jax.random.key(3)
    ones = jnp.ones([8, 32])
    run = lambda start, stop: three.slice(W, ones, start, stop, stats=None, train=True, key=key)[0]
    masks = [run("input", "stage1"), run("stage1", "stage2"), run("stage2", "logits")]
    for i in range(3):
        assert not np.array_equal(masks[i], masks[i - 1])
    np.testing.assert_array_equal(run("input", "logits"), masks[0] * masks[1] * masks[2])
    one = pj.line(dropped, stateful=True)
    expected = jax.random.bernoulli(key, 0.5, ones.shape).astype(np.float32)
    np.testing.assert_array_equal(one.slice(W, ones, "input", "logits", stats=None, train=True, key=key)[0], expected)


class Net(nn.Module):
    """BatchNorm and dropout, cut at three sites in the way that `line` asks for."""

    sites = ("input", "stage1", "logits")

    @nn.compact
    def __call__(self, x, *, train=False, start="input", stop="logits"):
        if start == "input" and stop != "input":
            x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(5, name="dense")(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        if stop == "logits" and start != "logits":
            x = nn.Dense(2, name="head")(x)
            if train:  # every slice returns the whole collection
                self.sow("batch_stats", "passes", 1, reduce_fn=lambda a, b: a + b, init_fn=lambda: 0)
        return x

    def head_of(self, params):
        return params["head"]["kernel"].T, params["head"]["bias"]


def test_a_flax_module_has_its_own_sites_statistics_and_dropout():
    made, key = pj.line(Net()), jax.random.key(3)
    variables = jax.jit(Net().init)(jax.random.key(0), X)
    params, stats = variables["params"], variables["batch_stats"]
    assert made.sites == Net.sites
    rngs = {"dropout": key}
    expected, new = Net().apply(variables, X, train=True, mutable=["batch_stats"], rngs=rngs)
    value, after = made.slice(params, X, "input", "logits", stats=stats, train=True, key=key)
    jax.tree.map(np.testing.assert_array_equal, (value, after), (expected, new["batch_stats"]))
    assert float(jnp.abs(after["norm"]["mean"]).max()) > 0
    hidden, _ = made.slice(params, X, "input", "stage1", stats=stats, train=True, key=key)
    np.testing.assert_array_equal(made.slice(params, hidden, "stage1", "logits", stats=after, train=True, key=key)[0], value)
    # Evaluation: running statistics, which stay, and no dropout.
    value, same = made.slice(params, X, "input", "logits", stats=stats, train=False, key=None)
    np.testing.assert_array_equal(value, Net().apply(variables, X))
    assert same is stats
    weights, bias = made.head(params)
    np.testing.assert_array_equal(weights, params["head"]["kernel"].T)
    assert bias.shape == (2,)


def test_a_model_of_the_package_is_a_line():
    made = pj.line(CNN(num_classes=3, mean=(0.5,), std=(0.2,), width=2))
    assert made.sites[0] == "input" and made.sites[-2:] == ("features", "logits") and made.head is not None


def cut(*names):
    return pj.line(dict.fromkeys(names, TWO["logits"]))


def test_levels_are_the_numbers_of_the_stages():
    made = cut("stem", "stage1", "stage2", "stage3", "features", "logits")
    names = ("input", "stem", "stage1", "stage2", "stage3", "features", "logits")
    assert [made.level(name) for name in names] == [0, 0, 1, 2, 3, 3, 4]
    assert [cut("features", "logits").level(name) for name in ("input", "features", "logits")] == [0, 0, 1]
    between = cut("stage1", "pool", "stage2", "logits")
    assert [between.level(name) for name in between.sites] == [0, 1, 1, 2, 3]


def test_the_last_stage_has_a_name_of_its_own():
    made = cut("stem", "stage1", "stage2", "features", "logits")
    assert (made.site("last_stage"), made.site("stem")) == ("stage2", "stem")
    with pytest.raises(ValueError, match="'stage…' for site='last_stage', got the sites input, features, logits"):
        cut("features", "logits").site("last_stage")


def test_an_unknown_site_lists_those_there_are():
    with pytest.raises(ValueError, match="got 'feature'. Did you mean 'features'. There are: features, input, logits"):
        cut("features", "logits").site("feature")


@pytest.mark.parametrize("model", [{}, 3, {"logits": "head"}, nn.Dense(2)], ids=["empty", "number", "text", "module"])
def test_what_is_no_model_is_an_error_that_says_how_to_write_one(model):
    with pytest.raises(ValueError, match=r"pj.line\(model.apply\)"):
        pj.line(model)


@pytest.mark.parametrize("names", [("features",), ("logits", "features"), ("input", "logits")])
def test_a_mapping_ends_with_the_logits_and_leaves_out_the_input(names):
    with pytest.raises(ValueError, match=f"ends with 'logits' and leaves out 'input', got {', '.join(names)}"):
        cut(*names)


def test_a_flax_module_without_sites_goes_in_as_its_apply():
    module = nn.Dense(2)
    variables = module.init(jax.random.key(0), X)
    np.testing.assert_array_equal(whole(pj.line(module.apply), variables)[0], module.apply(variables, X))


class Usual(nn.Module):
    """BatchNorm and dropout as Flax users write them, without sites."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


def test_a_flax_model_with_batchnorm_and_dropout_goes_in_as_the_docstring_says():
    net, key, y = Usual(), jax.random.key(3), jnp.array([0, 1, 1])

    def apply(params, x, stats, *, train, key):
        variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": key} if train else {}
        logits, new = net.apply(variables, x, train=train, rngs=rngs, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    made, variables = pj.line(apply, stateful=True), net.init(jax.random.key(0), X, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    expected, new = net.apply(variables, X, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    value, after = made.slice(params, X, "input", "logits", stats=stats, train=True, key=key)
    jax.tree.map(np.testing.assert_array_equal, (value, after), (expected, new["batch_stats"]))
    value, same = made.slice(params, X, "input", "logits", stats=stats, train=False, key=None)
    np.testing.assert_array_equal(value, net.apply(variables, X, train=False))
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    loss = pj.objective(made, pj.lpl(bound=0.5), num_classes=2)
    _, out = loss(params, loss.init(params, X, stats=stats), pj.batch(X, y), key=key, stats=stats)
    jax.tree.map(np.testing.assert_array_equal, out.stats, after)
    with pytest.raises(ValueError, match=r"with BatchNorm or dropout: pj.line\(apply, stateful=True\)"):
        pj.line(net)


def test_a_module_of_flax_nnx_is_an_error_whose_recipe_works():
    nnx = pytest.importorskip("flax.nnx")
    model, y = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.array([0, 1, 1])
    for given in (model, {"features": lambda w, x: x, "logits": model}):
        with pytest.raises(
            ValueError, match=r"got Linear, .*Write graphdef, params = nnx.split\(model\); pj.line\(lambda p, x:"
        ):
            pj.line(given)
    graphdef, params = nnx.split(model)
    loss = pj.objective(pj.line(lambda p, x: nnx.merge(graphdef, p)(x)), num_classes=2)
    states = loss.init(params, X)
    (_, out), grads = jax.jit(jax.value_and_grad(lambda p: loss(p, states, pj.batch(X, y)), has_aux=True))(params)
    np.testing.assert_allclose(out.logits, model(X), rtol=1e-5)
    assert float(jnp.abs(grads["kernel"][...]).max()) > 0


def test_an_nnx_module_with_batchnorm_and_dropout_goes_in_as_the_docstring_says():
    nnx = pytest.importorskip("flax.nnx")
    rngs, y = nnx.Rngs(0), jnp.array([0, 1, 1])
    model = nnx.Sequential(nnx.Linear(4, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)

    def apply(params, x, stats, *, train, key):
        net = nnx.merge(graphdef, params, stats, copy=True)
        net.train() if train else net.eval()
        return net(x), nnx.state(net, nnx.Not(nnx.Param))

    loss = pj.objective(pj.line(apply, stateful=True), num_classes=2)
    states = loss.init(params, X, stats=stats)
    step = jax.jit(jax.grad(lambda p, s, stats: loss(p, s, pj.batch(X, y), stats=stats), has_aux=True))
    grads, out = step(params, states, stats)
    _, later = step(params, out.states, out.stats)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not np.array_equal(out.logits, later.logits)  # other units were dropped
    model.train()
    np.testing.assert_allclose(out.logits, model(X), rtol=1e-5)
    np.testing.assert_allclose(out.stats.layers[1].mean[...], model.layers[1].mean[...], rtol=1e-5)
