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

    made = pj.line({"stage1": stage("stage1"), "logits": stage("logits")}, stateful=True)
    value, stats = made.slice(W, X, "input", "logits", stats={"stage1": 0, "logits": 5}, train=False, key="k")
    np.testing.assert_allclose(value, X + 2)
    assert stats == {"stage1": 1, "logits": 6}
    assert seen == [("stage1", False, "k"), ("logits", False, "k")]
    _, stats = made.slice(W, X, "stage1", "logits", stats={"stage1": 0, "logits": 5}, train=True, key=None)
    assert stats == {"stage1": 0, "logits": 6}


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
