"""Frozen parameters and BatchNorm: nothing moves them, everything else is trained as if they were no parameters, and less is computed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from experiments import domains, shared, train
from perturbjax.data import epoch_order
from perturbjax.frozen import check_frozen, join_params, split_params
from perturbjax.models import CNN, MLP, ImageNetResNet, ResNet, SEResNet, ShakeResNet, WideResNet, create
from perturbjax.models.describe import describe, from_description
from perturbjax.training import Devices, Options, Run, Schedule, device_data, fit, fit_many, init_state, load_variables
from perturbjax.training.step import as_arrays, compiled_step, pixels, train_step
from tests.experiments.test_domains import found, write
from tests.training.problem import NUMBERS, dataset, plain, recipe

pytestmark = pytest.mark.optax_promotes  # schedules, adam
SLOW = pytest.mark.slow


def frozen_recipe(*prefixes, build=plain, batchnorm=False, **options):
    """The tests' recipe with a part of its model frozen."""
    r = recipe(build, **options)
    return dataclasses.replace(r, model=r.model.clone(frozen=prefixes, **({"frozen_batchnorm": True} if batchnorm else {})))


def rows(r, number):
    """The samples of this step."""
    order = np.concatenate([epoch_order(r.num_examples, r.batch_size, 0, epoch) for epoch in range(r.epochs)])
    return jnp.asarray(order[number])[None]


def run(r, numbers, data, steps, state=None):
    """(the state before, the state after that many steps)."""
    before = init_state(r, numbers, data, 0) if state is None else state
    step, arrays, after = compiled_step(r), as_arrays(numbers), jax.tree.map(jnp.array, before)
    for number in range(steps):
        after, _, _ = step(after, arrays, data, rows(r, number))
    return before, after


def assert_bits(got, expected):
    def equal(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))

    jax.tree.map(equal, got, expected)


def assert_moved(got, before):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(before), strict=True):
        assert np.abs(np.asarray(a - b)).max() > 0, jax.tree_util.keystr(path)


# ------------------------------------------------------------------------------------------------------- what is trained, and how

METHODS = {
    "plain": (lambda n: (), {}),
    "nesterov": (lambda n: (), dict(nesterov=True)),
    "adamw": (lambda n: (), dict(optimizer="adamw")),
    "adam": (lambda n: (), dict(optimizer="adam")),
    "accumulate": (lambda n: (pj.sam(radius=0.1),), dict(accumulate=2)),
    "sam with decay": (lambda n: (pj.sam(radius=0.3, decay=0.1),), {}),
    "asam": (lambda n: (pj.asam(radius=0.5),), {}),
    "gsam": (lambda n: (pj.gsam(radius=0.3),), {}),
    "pugd": (lambda n: (pj.pugd(),), {}),
    "amp": (lambda n: (pj.amp(norm="global"),), {}),
    "esam": (lambda n: (pj.esam(radius=0.3),), {}),
    "ngd of noise": (lambda n: (pj.gradient_noise(eta=1.0), pj.ngd()), {}),
    "clip": (lambda n: (pj.gradient_clipping(bound=0.2),), {}),
    "dp_sgd": (lambda n: (pj.dp_sgd(bound=0.3),), {}),
    "pcgrad": (lambda n: (pj.pcgrad(),), {}),
    "lpg": (lambda n: (pj.lpg(inference="pgd", jacobian="full", num_steps=1, bound=0.5),), {}),
}


def smaller(r, state, data):
    """(recipe, data) of the net behind the frozen first stage, trained on that stage's values: no word of freezing in it."""
    values = r.model.apply({"params": state.params}, pixels(data.images), stop="stage1")
    model = MLP(hidden=r.model.hidden[1:], num_classes=3, mean=(0.0,) * values.shape[1], std=(1.0,) * values.shape[1])
    # Copies: the step gives the state's own buffers away.
    params = jax.tree.map(jnp.array, {"stage1": state.params["stage2"], "logits": state.params["logits"]})
    small = dataclasses.replace(r, model=model, initial=lambda variables: {"params": params})
    return small, data._replace(images=values[:, None, None, :])


LATER = ("nesterov", "adam", "amp", "esam", "clip", "dp_sgd", "pcgrad")


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) if name in LATER else name for name in METHODS])
def test_the_rest_is_trained_as_a_smaller_net_on_the_frozen_part_s_values(name):
    build, options = METHODS[name]
    r, data = frozen_recipe("stage1", build=build, **options), device_data(dataset())
    numbers = NUMBERS | {"method": (), "learning_rate": 0.01 if "optimizer" in options else 0.1, "weight_decay": 0.1}
    before, after = run(r, numbers, data, 4)
    assert_bits(after.params["stage1"], before.params["stage1"])
    small, values = smaller(r, before, data)
    _, expected = run(small, numbers, values, 4)
    got = {"stage1": after.params["stage2"], "logits": after.params["logits"]}
    assert_moved(got, {"stage1": before.params["stage2"], "logits": before.params["logits"]})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected.params)
    # Nothing is kept for what is frozen, and as many gradients are counted.
    assert sum(map(np.size, jax.tree.leaves(after.opt_state))) == sum(map(np.size, jax.tree.leaves(expected.opt_state)))
    counts = [optax.tree_utils.tree_get_all_with_path(state.opt_state, "evaluations") for state in (after, expected)]
    assert [int(n) for _, n in counts[0]] == [int(n) for _, n in counts[1]]


def test_a_net_with_batch_norm_is_trained_as_by_hand_with_a_masked_optimiser():
    """The front in evaluation mode, the rest in training mode, optax.multi_transform over all parameters; three steps."""
    r = frozen_recipe("stem", "stage1", model="cnn", schedule=Schedule("constant", warmup_epochs=0))
    data = device_data(dataset())
    state = init_state(r, NUMBERS, data, 0)
    random = np.random.default_rng(0)
    state = state._replace(stats=jax.tree.map(lambda x: jnp.float32(random.uniform(0.5, 1.5, x.shape)), state.stats))
    _, after = run(r, NUMBERS, data, 3, state)

    model = r.model.clone(frozen=())
    params, stats = state.params, state.stats
    kinds = {site: "still" if site in ("stem", "stage1") else "moved" for site in params}
    descent = optax.chain(optax.add_decayed_weights(NUMBERS["weight_decay"]), optax.sgd(0.1, momentum=0.9))
    tx = optax.multi_transform({"moved": descent, "still": optax.set_to_zero()}, kinds)
    opt_state = tx.init(params)

    @jax.jit
    def gradient(params, stats, index):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            front = model.apply(variables, pixels(data.images[index]), train=False, stop="stage1")
            logits, new = model.apply(variables, front, train=True, start="stage1", mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[index]).mean(), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    for number in range(3):
        grads, stats = gradient(params, stats, rows(r, number)[0])
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, (after.params, after.stats), (params, stats))
    for site in ("stem", "stage1"):
        assert_bits((after.params[site], after.stats[site]), (state.params[site], state.stats[site]))
    assert_moved((after.params["stage2"], after.stats["stage2"]), (state.params["stage2"], state.stats["stage2"]))


def test_parts_in_the_middle_and_single_parameters_are_frozen_and_what_is_before_them_is_trained():
    r, data = frozen_recipe("stage2/dense/kernel", "logits/bias", build=lambda n: (pj.sam(),)), device_data(dataset())
    before, after = run(r, NUMBERS, data, 2)
    (moved, still), (moved_before, still_before) = (split_params(s.params, r.frozen) for s in (after, before))
    assert_bits(still, still_before)
    assert_moved(moved, moved_before)
    assert len(jax.tree.leaves(still)) == 2 and len(jax.tree.leaves(moved)) == 4


def test_searches_go_through_frozen_parts():
    """Adversarial inputs and LPA's activations are those of the net that is trained as a whole: so is the first step's loss."""

    def searching(numbers):
        lpa = pj.lpa(bound=0.5, step_size=0.2, num_steps=2, site="stage1", split="all")
        return pj.adversarial_training(bound=0.1, step_size=0.05, num_steps=2), lpa

    data, losses = device_data(dataset()), []
    for r in (frozen_recipe("stage1", "stage2", build=searching), recipe(searching), recipe(plain)):
        state = init_state(r, NUMBERS, data, 0)
        losses.append(np.asarray(compiled_step(r)(state, as_arrays(NUMBERS), data, rows(r, 0))[2]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert (losses[0] > losses[2] + 1e-3).mean() > 0.9


def test_the_objective_gives_frozen_parameters_no_gradient_and_the_others_theirs():
    images, labels = pixels(jnp.asarray(dataset().train_images[:16])), jnp.asarray(dataset().train_labels[:16])
    r = recipe(plain)
    variables = r.model.init(jax.random.key(0), images)["params"]

    def gradient(model, links):
        made = pj.objective(model, links, num_classes=3)
        states = made.init(variables, images)
        return jax.jit(jax.grad(lambda p: made(p, states, pj.Batch(images, labels))[0]))(variables)

    for prefixes in (("stage1",), ("logits", "stage1/dense/bias")):
        whole, part = (
            gradient(model, pj.isda(strength=0.5, ramp="none")) for model in (r.model, r.model.clone(frozen=prefixes))
        )
        (others, still), (expected, _) = split_params(part, prefixes), split_params(whole, prefixes)
        assert all(not np.asarray(x).any() for x in jax.tree.leaves(still))
        assert all(np.asarray(x).any() for x in jax.tree.leaves(expected))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), others, expected)


# ------------------------------------------------------------------------------------------------------------- BatchNorm, forward

SHARED = dict(num_classes=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
NETS = {
    "cnn": CNN(width=2, remat=True, **SHARED),
    "resnet8": ResNet(depth=8, width=2, **SHARED),
    "resnet14 with remat": ResNet(depth=14, width=2, remat=True, **SHARED),
    "se_resnet8": SEResNet(depth=8, width=2, **SHARED),
    "wrn10-2": WideResNet(depth=10, width=2, widen=2, **SHARED),
    "shake8": ShakeResNet(depth=8, width=2, shake=False, **SHARED),
    "resnet of bottlenecks": ImageNetResNet(width=2, blocks=(1, 2), **SHARED),
}
SLOW_NETS = ("resnet8", "se_resnet8", "shake8", "resnet of bottlenecks")
IMAGES = jnp.asarray(np.random.default_rng(0).random((6, 8, 8, 3)), jnp.float32)


@functools.cache
def variables_of(model):
    """Positive numbers near one in every leaf: no leaf is as initialised."""
    random = np.random.default_rng(1)
    tree = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype), tree)


def forward(model, variables, value, *, train, **sites):
    apply = functools.partial(model.apply, train=train, mutable=["batch_stats"], **sites)
    return jax.jit(apply)(variables, value)


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW) if n in SLOW_NETS else n for n in NETS])
def test_a_frozen_front_runs_as_at_evaluation_and_the_rest_as_in_training(name):
    model, variables = NETS[name], variables_of(NETS[name])
    last = "stem" if "bottlenecks" in name else "stage1"
    front = model.sites[1 : model.sites.index(last) + 1]
    still = model.clone(frozen=front)
    logits, new = forward(still, variables, IMAGES, train=True)
    value, _ = forward(model, variables, IMAGES, train=False, stop=last)
    expected, updated = forward(model, variables, value, train=True, start=last)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), new, updated)
    for site in front:
        if site in variables["batch_stats"]:
            assert_bits(new["batch_stats"][site], variables["batch_stats"][site])
    assert_moved(
        *({k: v for k, v in stats.items() if k not in front} for stats in (new["batch_stats"], variables["batch_stats"]))
    )


@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet14 with remat", marks=SLOW)])
def test_slice_after_slice_is_the_whole_pass_bit_for_bit_with_frozen_parts(name):
    model = NETS[name].clone(frozen=("stem", "stage2") if name == "cnn" else ("stem", "stage2/block1", "logits"))
    variables = variables_of(NETS[name])
    whole, stats = forward(model, variables, IMAGES, train=True)
    value, now = IMAGES, variables
    for start, stop in zip(model.sites, model.sites[1:]):
        value, new = forward(model, now, value, train=True, start=start, stop=stop)
        now = now | new
    np.testing.assert_array_equal(value, whole)
    jax.tree.map(np.testing.assert_array_equal, now["batch_stats"], stats["batch_stats"])


def test_a_frozen_block_keeps_its_statistics_alone_and_a_frozen_scale_does_not():
    model, variables = NETS["resnet14 with remat"], variables_of(NETS["resnet14 with remat"])
    stats = variables["batch_stats"]
    block = forward(model.clone(frozen=("stage2/block1",)), variables, IMAGES, train=True)[1]["batch_stats"]
    assert_bits(block["stage2"]["block1"], stats["stage2"]["block1"])
    assert_moved(split_params(block, ("stage2/block1",))[0], split_params(stats, ("stage2/block1",))[0])
    scale = forward(model.clone(frozen=("stage2/block1/norm1/scale",)), variables, IMAGES, train=True)[1]["batch_stats"]
    assert_bits(scale, forward(model, variables, IMAGES, train=True)[1]["batch_stats"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW) if n in SLOW_NETS else n for n in NETS])
def test_with_frozen_batch_norm_training_mode_is_evaluation_mode(name):
    model, variables = NETS[name].clone(frozen_batchnorm=True), variables_of(NETS[name])
    (logits, new), (expected, _) = (forward(model, variables, IMAGES, train=train) for train in (True, False))
    np.testing.assert_array_equal(logits, expected)
    assert_bits(new["batch_stats"], variables["batch_stats"])
    assert np.abs(forward(NETS[name], variables, IMAGES, train=True)[0] - logits).max() > 1e-3


def test_frozen_batch_norm_still_learns_its_scales_and_shifts():
    r, data = frozen_recipe(batchnorm=True, model="cnn"), device_data(dataset())
    before, after = run(r, NUMBERS, data, 2)
    assert_moved(after.params, before.params)
    assert_bits(after.stats, before.stats)


def test_a_description_keeps_what_is_frozen():
    model = create("resnet8", frozen=("stem", "stage1/block0"), frozen_batchnorm=True, **SHARED)
    assert from_description(json.loads(json.dumps(describe(model)))) == model and model.frozen == ("stem", "stage1/block0")


# ------------------------------------------------------------------------------------------------ devices, seeds side by side, cost


def searching(numbers):
    return pj.lpa(bound=0.2, site="stage1", num_steps=1), pj.sam(radius=0.1)


@pytest.mark.parametrize(
    ("model", "devices"),
    [("mlp", Devices(8)), pytest.param("cnn", Devices(4), marks=SLOW), pytest.param("mlp", Devices(4, "pmap"), marks=SLOW)],
    ids=["eight devices", "four, with BatchNorm", "per-device code"],
)
def test_any_number_of_devices_trains_the_same(model, devices):
    part = "stem" if model == "cnn" else "stage1"
    r = frozen_recipe(part, build=searching, model=model)
    alone, many = (fit(r, dataset(), NUMBERS, 0, options=Options(devices=d)) for d in (Devices(), devices))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, (many.state.params, many.state.stats), (alone.state.params, alone.state.stats))
    before = init_state(r, NUMBERS, device_data(dataset()), 0)
    for history in (alone, many):
        assert_bits(history.state.params[part], before.params[part])
        assert history.gradient_evaluations == 2.0 and history.inner_evaluations == 1.0


@pytest.mark.parametrize("model", ["mlp", pytest.param("cnn", marks=SLOW)])
def test_seeds_side_by_side_are_the_seeds_one_by_one(model):
    part = "stem" if model == "cnn" else "stage1"
    r = frozen_recipe(part, build=lambda n: (pj.sam(radius=0.1),), model=model)
    together = fit_many(r, [Run(dataset(), NUMBERS, seed) for seed in range(2)])
    for seed, history in enumerate(together):
        alone = fit(r, dataset(), NUMBERS, seed)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        jax.tree.map(close, (history.state.params, history.state.stats), (alone.state.params, alone.state.stats))
        before = init_state(r, NUMBERS, device_data(dataset()), seed)
        of = lambda state: (state.params[part], state.stats.get(part, {}))
        assert_bits(of(history.state), of(before))


def flops(r, data):
    """Floating-point operations of one compiled step."""
    state = jax.eval_shape(lambda: init_state(r, NUMBERS, data, 0))
    step = jax.jit(lambda state, numbers, index: train_step(r, state, numbers, data, index))
    cost = step.lower(state, as_arrays(NUMBERS), rows(r, 0)[0]).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def test_nothing_is_computed_backwards_through_a_frozen_front():
    """A backward pass costs two forward passes, so that with all but the head frozen about a third is left; SAM's second pass likewise."""
    data = device_data(dataset())
    wide = lambda build, *prefixes: dataclasses.replace(
        frozen_recipe(build=build), model=MLP(hidden=(256, 256), frozen=prefixes, **SHARED)
    )
    for build in (plain, lambda n: (pj.sam(),)):
        whole, front, head = (flops(wide(build, *p), data) for p in ((), ("stage1",), ("stage1", "stage2")))
        assert head < 0.45 * whole and head < front < whole


def test_a_divergence_is_explained_with_frozen_parts_too():
    def spoiled(updates, state, params=None, *, step=None, **extra):
        return jax.tree.map(lambda g, w: jnp.where(step >= 1, jnp.nan, 1.0) * g + 0 * w, updates, params), state

    bad = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), spoiled)
    with pytest.raises(FloatingPointError, match=r"in the update of step 2, at \w+ \(link 1 of the optimiser\)"):
        fit(frozen_recipe("stage1", build=lambda n: (bad,)), dataset(), NUMBERS, 0)


# --------------------------------------------------------------------------------------------------------------- what people write


def test_split_and_join_are_each_other_s_inverse():
    params = {"stage1": {"w": 1.0, "b": 2.0}, "stage10": {"w": 3.0}, "logits": {"kernel": 4.0, "bias": 5.0}}
    trained, frozen = split_params(params, ("stage1", "logits/bias"))
    assert trained == {"stage10": {"w": 3.0}, "logits": {"kernel": 4.0}}
    assert frozen == {"stage1": {"w": 1.0, "b": 2.0}, "logits": {"bias": 5.0}}
    assert join_params(trained, frozen) == params == join_params(*split_params(params, ()))
    assert split_params(params, params)[0] == {}


def test_prefixes_that_fit_nothing_and_nothing_left_to_train_are_errors():
    data = device_data(dataset())
    with pytest.raises(
        ValueError,
        match=r"frozen needs prefixes of this model's parameters, got 'stage3'\. Did you mean 'stage[12]'\? It has logits, st",
    ):
        init_state(frozen_recipe("stage1", "stage3"), NUMBERS, data, 0)
    with pytest.raises(ValueError, match=r"got stage1, stage2, logits: nothing is left to train\. Leave out 'logits'"):
        init_state(frozen_recipe("stage1", "stage2", "logits"), NUMBERS, data, 0)
    with pytest.raises(ValueError, match="got 'stage'"):  # a part of a name is no prefix
        check_frozen("frozen", {"stage1": {}, "logits": {}}, ("stage",))
    made = pj.objective(MLP(hidden=(4,), frozen=("stage2",), **SHARED), num_classes=3)
    params = MLP(hidden=(4,), **SHARED).init(jax.random.key(0), IMAGES)["params"]
    with pytest.raises(ValueError, match="got 'stage2'"):
        made(params, (), pj.batch(IMAGES, jnp.zeros(6, jnp.int32)))
    for wrong in ("stem", ["stem"]):
        with pytest.raises(ValueError, match=r"CNN needs a tuple of prefixes for frozen, got .*\. Write frozen=\('stem',\)"):
            create("cnn", frozen=wrong, **SHARED)


QUICK = ["--view", "thin(20)", "--model", "cnn", "--width", "4", "--epochs", "2", "--batch-size", "32"]


def test_train_py_leaves_what_freeze_names(tmp_path, capsys):
    command = ["--out", str(tmp_path), "--method", "sam", *QUICK]
    train.main([*command, "--freeze", "stem", "stage1/conv", "--freeze-batchnorm"])
    left = load_variables(tmp_path)
    settings = shared.Settings(view="thin(20)", model="cnn", width=4, epochs=2, batch_size=32)
    [(method, numbers)] = shared.parse_methods("sam").values()
    data = shared.load_view(settings, 0)
    r = shared.make_recipe(settings, data, method, shared.channel_stats(settings))
    before = init_state(r, shared.make_numbers(settings, numbers), device_data(data), 0)
    (moved, still), (moved_before, still_before) = (
        split_params(p, ("stem", "stage1/conv")) for p in (left["params"], before.params)
    )
    assert_bits(still, jax.tree.map(np.asarray, still_before))
    assert_moved(moved, moved_before)
    assert_bits(left["batch_stats"], jax.tree.map(np.asarray, before.stats))
    with pytest.raises(ValueError, match=r'freeze: \["stem", "stage1/conv"\] there, \["stem"\] now'):
        train.main([*command, "--freeze", "stem", "--freeze-batchnorm"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--freeze", "layer1"],
            r"--freeze needs prefixes of this model's parameters, got 'layer1'\. .*It has logits, stage1, stage2, stem\.",
        ),
        (["--freeze", "stem", "stage1/norms"], r"got 'stage1/norms'\. Did you mean 'stage1/norm'\?"),
        (["--freeze", "stem", "stage1", "stage2", "logits"], r"nothing is left to train\. Leave out 'logits'\."),
        (
            ["--model", "mlp", "--freeze-batchnorm"],
            r"--freeze-batchnorm needs a model with BatchNorm .*, got mlp\. Leave it out",
        ),
    ],
)
def test_flags_that_do_not_fit_the_model_say_what_it_has(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(["--out", str(tmp_path / "run"), *QUICK, *flags])
    assert not (tmp_path / "run").exists()


def test_domains_py_averages_what_is_trained(tmp_path, capsys):
    """SWAD's sums know the trained weights only; the frozen ones come back with their average."""
    file = write(tmp_path / "TINY.npz")
    command = ["--data", file, "--steps", "4", "--evaluate-every", "2", "--batch-size", "6", "--model", "mlp", "--width", "4"]
    domains.main(
        [*command, "--methods", "swad", "--seeds", "1", "--held-out", "art", "--freeze", "stage1", "--out", str(tmp_path / "a")]
    )
    assert "weights of steps" in capsys.readouterr().out
    [one] = found(tmp_path / "a")["methods"]["swad"]["runs"]
    assert np.isfinite(one["curve"]["loss"]).all() and 0 <= one["accuracy"] <= 1
