"""perturbjax.training.devices: the same training on one device, on many, per device, and side by side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.data import apply_views, check, thin
from perturbjax.training import Devices, Options, Run, fit, fit_many
from perturbjax.training.devices import from_host, to_host
from tests.training.problem import NUMBERS, dataset, recipe

pytestmark = pytest.mark.optax_promotes  # schedules
SLOW = pytest.mark.slow


def chained(numbers):
    """Links at four sites, with class statistics, random draws and a second gradient."""
    bound, radius = numbers
    return (
        pj.mixup(),
        pj.lpa(bound=bound, site="stage1"),
        pj.lpl(bound=bound, max_steps=3),
        pj.lpg(bound=bound),
        pj.sam(radius=radius),
    )


SETTINGS = NUMBERS | {"method": (0.2, 0.05)}


def trained(build=chained, model="mlp", **options):
    return fit(recipe(build, model=model), dataset(), SETTINGS, 0, options=Options(**options))


def assert_same(a, b, rtol=1e-4, atol=2e-5):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
    jax.tree.map(close, (a.state.params, a.state.stats), (b.state.params, b.state.stats))
    np.testing.assert_allclose(a.logits, b.logits, rtol=rtol, atol=atol)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4)
    for scores in ("accuracy", "balanced_accuracy", "macro_f1"):  # rounding moves no prediction here
        np.testing.assert_allclose(getattr(a, scores), getattr(b, scores), rtol=1e-12)
    assert a.gradient_evaluations == b.gradient_evaluations and a.inner_evaluations == b.inner_evaluations


@pytest.fixture(scope="module")
def alone():
    return {model: trained(model=model) for model in ("mlp", "cnn")}


@pytest.mark.parametrize(
    ("model", "count"), [pytest.param("mlp", 2, marks=SLOW), ("mlp", 8), pytest.param("mlp", 4, marks=SLOW), ("cnn", 4)]
)
def test_any_number_of_devices_gives_the_numbers_of_one_batch_norm_included(alone, model, count):
    assert_same(trained(model=model, devices=Devices(count)), alone[model])


def without_mixing(numbers):
    return chained(numbers)[1:]


def test_per_device_code_gives_the_same_class_statistics_gradients_and_losses():
    """A net without BatchNorm, links without pairs: nothing is left that is a device's own."""
    for count in (1, 4):
        assert_same(trained(without_mixing, devices=Devices(count, "pmap")), trained(without_mixing))


def test_streamed_images_give_the_same_run_bit_for_bit(alone):
    for model in ("mlp", "cnn"):
        streamed = trained(model=model, stream=True)
        jax.tree.map(np.testing.assert_array_equal, streamed.state.params, alone[model].state.params)
        np.testing.assert_array_equal(streamed.losses, alone[model].losses)
    assert_same(trained(devices=Devices(4), stream=True), alone["mlp"])
    assert_same(trained(without_mixing, devices=Devices(4, "pmap"), stream=True), trained(without_mixing))


@pytest.mark.parametrize(
    "options", [{}, dict(devices=4), pytest.param(dict(stream=True), marks=SLOW)], ids=["one device", "four", "streamed"]
)
def test_runs_side_by_side_are_the_runs_one_by_one(options):
    """Seeds and settings at once, each with its own subset of the data."""
    r = recipe(chained, batch_size=12)
    shared = [Run(dataset(), SETTINGS | {"learning_rate": 0.05 * (s + 1), "method": (0.1 * s, 0.05)}, s) for s in range(2)]
    small = apply_views(dataset(), [thin(12)], 0), apply_views(dataset(), [thin(12)], 1)
    own = [Run(small[s], SETTINGS, s) for s in range(2)]
    options = Options(**options | ({"devices": Devices(4)} if "devices" in options else {}))
    for runs in (shared, own):
        fitting = dataclasses.replace(r, num_examples=len(runs[0].dataset.train_labels))
        together = fit_many(fitting, runs, options=options)
        for run, found in zip(runs, together, strict=True):
            assert_same(found, fit(fitting, run.dataset, run.numbers, run.seed), rtol=1e-3, atol=1e-4)


def test_seeds_on_the_same_data_share_its_arrays_and_others_count_as_often_as_they_are_there(monkeypatch):
    """What `load` gives for one view lies on the device once; drawn subsets lie there once each."""
    from perturbjax.data import load
    from perturbjax.training import feed

    whole = load("digits")
    again = [check(dataclasses.replace(d)) for d in (whole, whole)]
    drawn = [apply_views(whole, [thin(20)], s) for s in range(2)]
    assert feed.same_arrays(again) and not feed.same_arrays(drawn)
    size = drawn[0].train_images.nbytes
    monkeypatch.setattr(feed, "HOST_LIMIT", 1.5 * size)
    assert not feed.streams(drawn[0], None) and feed.streams(drawn[0], None, copies=2)
    assert not feed.streams(drawn[0], False, copies=2)


def test_runs_on_sets_of_different_sizes_are_refused():
    runs = [Run(dataset(), SETTINGS, 0), Run(apply_views(dataset(), [thin(12)], 0), SETTINGS, 1)]
    with pytest.raises(ValueError, match=r"one size, got \[\(36, 6, 6, 3\), \(48, 6, 6, 3\)\]"):
        fit_many(recipe(chained), runs)


def test_a_batch_that_does_not_divide_names_the_nearest_sizes():
    with pytest.raises(ValueError, match="divides by its 8 devices, got 12. Write --batch-size 8 or 16"):
        fit(recipe(batch_size=12), dataset(), NUMBERS, 0, options=Options(devices=Devices(8)))
    with pytest.raises(ValueError, match="got 4. Write --batch-size 8"):
        Devices(8).check_batch(4)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="needs 1 to 8 devices .* got 9. Write --devices 8"):
        Devices(9)
    with pytest.raises(ValueError, match="Did you mean 'pmap'"):
        Devices(2, "pmapp")


@pytest.mark.parametrize("devices", [Devices(1), Devices(4), Devices(4, "pmap")], ids=["one", "jit", "pmap"])
def test_what_is_placed_comes_back(devices):
    tree = {"x": np.arange(6.0, dtype=np.float32).reshape(2, 3), "key": jax.random.key(7), "step": jnp.int32(3)}
    back = from_host(to_host(devices.first(devices.replicate(tree))), tree)
    np.testing.assert_array_equal(back["x"], tree["x"])
    assert back["step"] == 3 and back["step"].dtype == np.int32
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
    rows = np.arange(3 * 8).reshape(3, 8)
    split = devices.split(rows.shape, 1, lambda where: rows[:, where])
    whole = np.concatenate(list(np.asarray(split)), -1) if devices.mapped else np.asarray(split)
    np.testing.assert_array_equal(whole, rows)
