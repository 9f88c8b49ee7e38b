"""perturbjax.feature.free_at: algorithm 1 of its paper in numpy, replayed batches in the trainer, the cost, the messages."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from experiments import audit, shared
from experiments.leaveout import plan
from perturbjax.analysis.activation_view import activation_variations
from perturbjax.analysis.gradient_view import gradient_variations
from perturbjax.data import Augmentation, epoch_order
from perturbjax.models import create
from perturbjax.training import Devices, FineTuning, Options, Run, RunFolder, fit, fit_many
from perturbjax.training.feed import Feed
from perturbjax.training.step import as_arrays, compiled_step, device_data, draw_batch, init_state
from tests.feature.problem import B, C, H, W, images, log_softmax, model, onehot, slope_of, weights
from tests.training.problem import NUMBERS, dataset, plain, recipe

BATCHES = [(images(seed=s), np.random.default_rng(s).integers(0, C, B)) for s in range(3)]
BOUND, REPLAYS, RATE = 0.1, 4, 0.5


def free(numbers):
    return (pj.free_at(bound=BOUND, step_size=0.04, replays=REPLAYS),)


def numpy_free_at(w, batches, *, bound, step_size, replays, rate):
    """Algorithm 1 of Shafahi et al. for the linear net under plain gradient descent: (weights, deltas) at the end."""
    delta = np.zeros([B, H, W])
    for x, y in batches:
        for _ in range(replays):
            moved = np.clip(x + delta, 0, 1)
            towards = slope_of(w, moved, y)
            p = np.exp(log_softmax(moved.reshape(B, -1) @ w))
            w = w - rate * moved.reshape(B, -1).T @ (p - onehot(y)) / B
            delta = np.clip(delta + step_size * np.sign(towards), -bound, bound)
    return w, delta


@pytest.mark.parametrize("step_size", [None, 0.04])
def test_weights_and_deltas_are_those_of_the_paper_s_algorithm(step_size):
    """In float64, with batches that reach the edge of the pixel range."""
    batches = [(images(low=0.0, high=1.0, seed=s), y) for s, (_, y) in enumerate(BATCHES)]
    with jax.enable_x64(True):
        w = jnp.asarray(weights())
        made = pj.objective(
            model(), pj.free_at(bound=BOUND, step_size=step_size, replays=REPLAYS), num_classes=C, replays=REPLAYS
        )
        states, step = made.init(w, jnp.asarray(batches[0][0])), jax.jit(jax.grad(made, has_aux=True))
        for x, y in batches:
            for _ in range(REPLAYS):
                grad, out = step(w, states, pj.batch(jnp.asarray(x), jnp.asarray(y)))
                w, states = w - RATE * grad, out.states
    theirs, delta = numpy_free_at(
        weights(), batches, bound=BOUND, step_size=BOUND if step_size is None else step_size, replays=REPLAYS, rate=RATE
    )
    np.testing.assert_allclose(w, theirs, rtol=1e-6, atol=1e-7)  # δ is kept in float32
    np.testing.assert_allclose(states[0].delta, delta, atol=1e-6)
    assert np.abs(delta).max() == pytest.approx(BOUND)


def batches_of(r, step=0, **options):
    calls = Feed(r, [dataset()], [0], Devices(), options.get("steps_per_call", 1), False, False).calls(step)
    return np.concatenate([np.asarray(call.index) for call in calls])


def test_the_trainer_takes_each_batch_several_times_in_the_order_without_replays():
    """Three batches an epoch, four replays: they go on across the ends of epochs, and a resumed run's are the same."""
    r = recipe(free, epochs=5, replays=REPLAYS)
    found = batches_of(r)
    usual = np.concatenate([epoch_order(48, 16, seed=0, epoch=e) for e in range(5)])
    np.testing.assert_array_equal(found, np.repeat(usual, REPLAYS, axis=0)[:15])
    np.testing.assert_array_equal(batches_of(r, steps_per_call=2), found)
    np.testing.assert_array_equal(batches_of(r, step=7), found[7:])
    np.testing.assert_array_equal(batches_of(recipe(epochs=5)), usual)


def test_a_batch_is_augmented_once_for_all_its_replays():
    r = recipe(plain, augmentation=Augmentation(pad=2, flip=True), replays=REPLAYS)
    state, data, rows = init_state(r, NUMBERS, device_data(dataset()), 0), device_data(dataset()), jnp.arange(16)
    drawn = [np.asarray(draw_batch(r, state._replace(step=jnp.int32(n)), data, rows).inputs) for n in range(2 * REPLAYS)]
    for n in range(REPLAYS):
        np.testing.assert_array_equal(drawn[n], drawn[0])
        np.testing.assert_array_equal(drawn[REPLAYS + n], drawn[REPLAYS])
    assert np.abs(drawn[REPLAYS] - drawn[0]).max() > 0.05


@pytest.mark.optax_promotes  # schedules
def test_trained_deltas_are_the_same_on_two_and_eight_devices():
    r = recipe(free, epochs=3, replays=REPLAYS)
    [state] = fit(r, dataset(), NUMBERS, 0).state.states
    delta = np.asarray(state.delta)
    assert delta.shape == (16, 6, 6, 3) and np.abs(delta).max() == pytest.approx(BOUND)
    assert np.ptp(delta, axis=0).max() > BOUND  # each place has its own
    for devices in (Devices(2), Devices(8), Devices(2, "pmap"), Devices(8, "pmap")):
        [other] = fit(r, dataset(), NUMBERS, 0, options=Options(devices=devices)).state.states
        np.testing.assert_allclose(other.delta, delta, atol=1e-5)


@pytest.mark.optax_promotes  # schedules
def test_the_deltas_are_free():
    """By XLA's own count: one pass serves the weights and the deltas."""

    def flops(build, **options):
        r, data = recipe(build, **options), device_data(dataset())
        r = dataclasses.replace(r, model=create("cnn", num_classes=3, width=16, mean=(0.5,) * 3, std=(0.25,) * 3))
        state = init_state(r, NUMBERS, data, 0)
        lowered = compiled_step(r).lower(state, as_arrays(NUMBERS), data, jnp.zeros([1, 16], jnp.int32))
        return lowered.compile().cost_analysis()["flops"]

    assert flops(free, replays=REPLAYS) < 1.3 * flops(plain)


@pytest.mark.optax_promotes  # schedules
def test_runs_that_are_interrupted_between_replays_streamed_or_side_by_side_are_the_same(tmp_path):
    r = recipe(free, epochs=4, replays=REPLAYS, augmentation=Augmentation(pad=2, flip=True))
    whole = fit(r, dataset(), NUMBERS, 0)
    streamed = fit(r, dataset(), NUMBERS, 0, options=Options(stream=True))
    folder = tmp_path / "run"
    with RunFolder(folder) as kept, pytest.raises(KeyboardInterrupt):
        fit(r, dataset(), NUMBERS, 0, folder=kept, on_epoch=stop_after(2), options=Options(checkpoint_seconds=0.0))
    with RunFolder(folder) as kept:
        resumed = fit(r, dataset(), NUMBERS, 0, folder=kept, options=Options(say=lambda text: None))
    end = lambda history: (history.state.params, history.state.states, history.loss)
    for other in (streamed, resumed):
        jax.tree.map(np.testing.assert_array_equal, end(other), end(whole))
    both = fit_many(r, [Run(dataset(), NUMBERS, seed) for seed in (0, 1)])
    np.testing.assert_allclose(both[0].state.states[0].delta, whole.state.states[0].delta, atol=1e-5)


def stop_after(epochs):
    """Ends a run as Ctrl-C would."""

    def on_epoch(epoch, found):
        if epoch + 1 == epochs:  # six steps: in the middle of the second batch's replays
            raise KeyboardInterrupt

    return on_epoch


@pytest.mark.optax_promotes  # schedules
def test_the_losses_of_a_finished_run_are_of_different_batches_at_their_last_replay():
    r = recipe(free, epochs=4, replays=REPLAYS)
    history = fit(r, dataset(), NUMBERS, 0)
    clean, perturbed, labels = history.losses
    assert sorted(labels) == sorted(dataset().train_labels)  # an epoch of all samples
    state, rows = history.state, epoch_order(48, 16, seed=0, epoch=0)[0]
    made = pj.objective(r.model, free({}), num_classes=3, replays=REPLAYS)
    batch, states = pj.batch(dataset().train_images[rows] / np.float32(255), labels[:16]), state.states
    for _ in range(REPLAYS):
        _, out = made(state.params, states, batch, stats=state.stats)
        states = out.states
    np.testing.assert_allclose(perturbed[:16], out.losses, rtol=1e-4, atol=1e-5)
    assert perturbed.mean() > clean.mean()


def test_views_of_gradients_and_activations_take_batches_as_often():
    x, y = BATCHES[0]
    net, w = {"stage1": lambda w, x: x.reshape(len(x), -1), "logits": lambda w, a: a @ w}, jnp.float32(weights())
    link = pj.free_at(bound=BOUND, replays=3)
    place = dict(num_classes=C, batch_size=4, replays=3)
    moved = activation_variations(link, net, w, np.float32(x), y, site="stage1", **place)
    turned = gradient_variations(link, net, w, np.float32(x), y, **place)
    assert (moved.relative > 0.05).all() and (turned.relative > 0.05).all()


def test_an_audit_knows_which_samples_a_training_leaves_out():
    """Three batches an epoch, four replays: the third one comes in the third epoch."""
    for epochs, message in ((2, "leave 16 of 48 out. Write --epochs 6"), (3, None)):
        r = recipe(free, epochs=epochs, replays=REPLAYS)
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            audit.check_all_seen(audit.AuditSettings(), r, dataset().train_labels)


def test_its_name_on_the_command_line_asks_the_trainer():
    found = shared.parse_methods("ce, at, la+free_at, free_at(replays=4)")
    assert [method.replays for method, _ in found.values()] == [1, 1, 8, 4]
    settings = shared.Settings(view="none", epochs=10, batch_size=16)
    assert [shared.make_recipe(settings, dataset(), method).replays for method, _ in found.values()] == [1, 1, 8, 4]
    with pytest.raises(
        ValueError, match="domains.py needs methods that take each batch once, got one that asks for 8 times in a row"
    ):
        plan.recipe_of(plan.DomainsSettings(), dataset(), found["la+free_at"][0])


def test_errors_say_what_to_write():
    with pytest.raises(ValueError, match="free_at needs replays >= 1, got 0"):
        pj.free_at(replays=0)
    with pytest.raises(ValueError, match=r"needs every batch 4 times in a row, got replays=1. Write Recipe\(..., replays=4\)"):
        fit(recipe(free), dataset(), NUMBERS, 0)
    with pytest.raises(ValueError, match=r"Recipe needs 1 <= replays <= 6 \(the run's steps\), got 7"):
        fit(recipe(plain, replays=7), dataset(), NUMBERS, 0)
    with pytest.raises(ValueError, match="Recipe needs replays=1 for class-balanced fine-tuning"):
        fit(recipe(plain, replays=2, fine_tuning=FineTuning(0.5)), dataset(), NUMBERS, 0)
    with pytest.raises(ValueError, match="objective needs replays >= 1, got 0"):
        pj.objective(model(), (), num_classes=C, replays=0)
    made = pj.objective(model(), pj.free_at(replays=2), num_classes=C, replays=2)
    w, (x, y) = jnp.float32(weights()), BATCHES[0]
    states = made.init(w, jnp.float32(x))
    with pytest.raises(
        ValueError, match="the number of samples that its deltas were made for, 8, got 4. Call init with a whole"
    ):
        made(w, states, pj.batch(jnp.float32(x[:4]), y[:4]))
