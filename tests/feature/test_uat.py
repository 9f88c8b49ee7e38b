"""perturbjax.feature.uat: one delta that persists, against numpy; where it is trained; the cost; checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.training import Checkpoints, fit, init_state
from perturbjax.training.devices import to_host
from tests.feature.problem import C, H, W, images, losses_of, model, seen_steps, slope_of, weights
from tests.training.problem import NUMBERS, dataset, recipe

BATCHES = [(images(seed=s), np.random.default_rng(s).integers(0, C, 8)) for s in range(5)]


def numpy_uat(w, batches, *, bound, step_size, beta=9.0, before=False):
    """Algorithm 3 of Shafahi et al. with the weights fixed: (images trained on, δ)."""
    delta, seen = np.zeros([H, W]), []
    for x, y in batches:
        moved = lambda: np.clip(x + delta[None], 0, 1)
        if not before:
            seen.append(moved())
        delta = np.clip(delta + step_size * np.sign(slope_of(w, moved(), y, beta).sum(0)), -bound, bound)
        if before:
            seen.append(moved())
    return seen, delta


@pytest.mark.parametrize("update", ["after", "before"])
def test_batches_train_at_one_delta_that_grows_from_batch_to_batch(update):
    w = weights()
    found, [state, _], out = seen_steps(pj.uat(bound=0.1, step_size=0.04, update=update), jnp.float32(w), BATCHES)
    seen, delta = numpy_uat(w, BATCHES, bound=0.1, step_size=0.04, before=update == "before")
    for ours, theirs in zip(found, seen, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(state.delta[0], delta, atol=1e-6)
    assert np.abs(delta).max() == pytest.approx(0.1) and out.metrics["uat/inner_evaluations"] == int(update == "before")


def test_it_raises_the_loss_of_images_that_it_has_not_seen():
    w, held = weights(), (images(64, seed=9), np.random.default_rng(9).integers(0, C, 64))
    batches = [(images(32, seed=s), np.random.default_rng(s).integers(0, C, 32)) for s in range(8)]
    _, [state, _], _ = seen_steps(pj.uat(bound=0.1, step_size=0.02), jnp.float32(w), batches)
    noise = 0.1 * np.sign(np.random.default_rng(0).normal(size=(H, W)))
    mean = lambda delta: losses_of(w, held[0] + delta[None], held[1]).mean()
    assert mean(np.asarray(state.delta[0])) > max(mean(np.zeros([H, W])), mean(noise))


def test_a_random_start_is_drawn_once_within_the_ball():
    w = weights()
    still = pj.uat(bound=0.1, step_size=0.0, random_starts=True)
    found, [state, _], _ = seen_steps(still, jnp.float32(w), BATCHES)
    first = found[0] - BATCHES[0][0]
    assert 0.05 < np.abs(first).max() <= 0.1 + 1e-6
    for (x, _), moved in zip(BATCHES, found, strict=True):  # every image of every batch by the same
        np.testing.assert_allclose(moved - x, np.broadcast_to(first[:1], x.shape), atol=1e-6)
    other, *_ = seen_steps(still, jnp.float32(w), BATCHES, key=1)
    assert np.abs(other[0] - found[0]).max() > 1e-3
    np.testing.assert_allclose(state.delta[0], first[0], atol=1e-6)


def test_no_gradient_leaks_through_the_delta():
    """The weights' gradient is the one at the moved images held fixed."""
    x, y = BATCHES[0]
    w, x, y = jnp.asarray(weights(), jnp.float32), jnp.asarray(x, jnp.float32), jnp.asarray(y)
    made = pj.objective(model(), pj.uat(bound=0.2, step_size=0.1, update="before"), num_classes=C)
    states = made.init(w, x)
    grads, out = jax.grad(made, has_aux=True)(w, states, pj.batch(x, y))
    moved = pj.shifted(x, out.states[0].delta, jnp.zeros(8, jnp.int32), value_range=(0.0, 1.0))
    plain = pj.objective(model(), (), num_classes=C)
    fixed = jax.grad(lambda w: plain(w, (), pj.batch(moved, y))[0])(w)
    np.testing.assert_allclose(grads, fixed, rtol=1e-4, atol=1e-6)


@pytest.mark.optax_promotes  # schedules
def test_the_delta_is_in_the_checkpoint_and_the_same_on_two_and_eight_devices(tmp_path):
    from perturbjax.training import Devices, Options

    r = recipe(lambda numbers: (pj.uat(bound=0.1, step_size=0.02),), batch_size=8)
    history = fit(r, dataset(), NUMBERS, 0)
    [state] = history.state.states
    delta = np.asarray(state.delta)
    assert delta.shape == (1, 6, 6, 3) and np.abs(delta).max() == pytest.approx(0.1)
    for count in (2, 8):
        [other] = fit(r, dataset(), NUMBERS, 0, options=Options(devices=Devices(count))).state.states
        np.testing.assert_allclose(other.delta, delta, atol=1e-6)
    host = to_host(history.state)
    with Checkpoints(tmp_path / "checkpoints") as kept:
        kept.save(1, host, {})
        kept.wait()
        step, found, _ = kept.restore(jax.tree.map(np.zeros_like, host))
    assert step == 1
    np.testing.assert_array_equal(found.states[0].delta, delta)


@pytest.mark.optax_promotes  # schedules
def test_one_pass_serves_the_weights_and_the_delta():
    """By XLA's own count, next to a plain step and to one that moves δ in a pass of its own (forward and backward: x 1.8)."""
    from perturbjax.training.step import as_arrays, compiled_step, device_data

    def flops(build):
        r = recipe(build, model="cnn")
        data = device_data(dataset())
        state = init_state(r, NUMBERS, data, 0)
        lowered = compiled_step(r).lower(state, as_arrays(NUMBERS), data, jnp.zeros([1, 16], jnp.int32))
        return lowered.compile().cost_analysis()["flops"]

    plain, ours = flops(lambda numbers: ()), flops(lambda numbers: (pj.uat(),))
    assert ours < 1.3 * plain


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="uat needs update to be one of its names, got 'never'"):
        pj.uat(update="never")
    with pytest.raises(ValueError, match="uat needs clip_loss > 0, got 0"):
        pj.uat(clip_loss=0)
    with pytest.raises(ValueError, match="uat needs num_steps >= 1, got 0"):
        pj.uat(num_steps=0)
