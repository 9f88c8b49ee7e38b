"""perturbjax.analysis.dynamics: the recorder changes nothing, keeps what it says, on any number of devices and across interruptions."""

import os
import signal

import jax
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.analysis.dynamics import SCALARS, dynamics, mean_dynamics, sample_signals
from perturbjax.training import Devices, Interrupted, Options, RunFolder, fit
from tests.training.problem import NUMBERS, dataset, plain, recipe

pytestmark = pytest.mark.optax_promotes  # schedules


def watched(numbers):
    return (dynamics(),)


def test_signals_are_their_equations():
    rng = np.random.default_rng(0)
    u, y, weight = rng.normal(size=(50, 7)) * 4, rng.integers(0, 7, 50), 0.2
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        found = {name: np.asarray(x) for name, x in sample_signals(u, y, weight).items()}
    p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    for i in range(50):
        rest = np.delete(u[i], y[i])
        # LogPert's exact minimiser of CE(u + v, y) + λ‖v‖₁: the true class is lifted until p_y = 1 − λ.
        v = max(0.0, np.log((1 - weight) / weight) - (u[i, y[i]] - np.log(np.exp(rest).sum())))
        assert found["logpert"][i] == pytest.approx(v, abs=1e-9)
        if v > 0:
            lifted = np.exp(u[i] + v * np.eye(7)[y[i]])
            assert lifted[y[i]] / lifted.sum() == pytest.approx(1 - weight)
        assert found["loss"][i] == pytest.approx(-np.log(p[i, y[i]]))
        assert found["margin"][i] == pytest.approx(u[i, y[i]] - rest.max())
        assert found["gradient_norm"][i] == pytest.approx(np.linalg.norm(p[i] - np.eye(7)[y[i]]))
    np.testing.assert_allclose(found["probability"], p)


@pytest.fixture(scope="module")
def run():
    return fit(recipe(watched, epochs=3), dataset(), NUMBERS, 0)


def test_the_recorder_changes_no_number_and_sees_every_sample_once_an_epoch(run):
    alone = fit(recipe(plain, epochs=3), dataset(), NUMBERS, 0)
    np.testing.assert_array_equal(run.logits, alone.logits)
    [state] = run.state.states
    np.testing.assert_array_equal(state.count, np.full(48, 3.0))


def test_the_loss_it_keeps_is_the_loss_of_training(run):
    means = mean_dynamics(run.state.states[0])
    assert means["loss"].mean() == pytest.approx(np.mean(run.loss), rel=1e-5)
    np.testing.assert_allclose(means["probability"].sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("devices", [Devices(4), Devices(4, "pmap")], ids=["jit", "pmap"])
def test_the_tables_are_those_of_one_device(run, devices):
    found = fit(recipe(watched, epochs=3), dataset(), NUMBERS, 0, options=Options(devices=devices))
    for a, b in zip(found.state.states[0], run.state.states[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_tables_survive_an_interruption(run, tmp_path):
    stop = lambda epoch, found: os.kill(os.getpid(), signal.SIGTERM) if epoch == 0 else None
    with RunFolder(tmp_path) as folder:
        with pytest.raises(Interrupted):
            fit(recipe(watched, epochs=3), dataset(), NUMBERS, 0, folder=folder, on_epoch=stop)
        found = fit(recipe(watched, epochs=3), dataset(), NUMBERS, 0, folder=folder, options=Options(say=lambda text: None))
    jax.tree.map(np.testing.assert_array_equal, found.state.states, run.state.states)


def test_samples_that_were_never_seen_have_no_signals():
    state = dynamics(probabilities=False).init(pj.core.Context(num_classes=3, num_examples=4))
    assert state.probability.shape == (4, 0)
    means = mean_dynamics(state._replace(count=state.count.at[1].add(2.0), loss=state.loss.at[1].add(3.0)))
    np.testing.assert_array_equal(means["loss"], [np.nan, 1.5, np.nan, np.nan])
    assert set(SCALARS) < set(means)


def test_bad_settings_are_errors():
    with pytest.raises(ValueError, match="0 < weight <= 1"):
        dynamics(weight=0.0)
    with pytest.raises(ValueError, match="needs num_examples"):
        dynamics().init(pj.core.Context(num_classes=3))
