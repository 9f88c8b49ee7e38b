"""perturbjax.training.cost: paired ratios."""

import time

import jax
import numpy as np
import pytest

from perturbjax.training import Devices, TimedStep, cost_ratios, fit
from perturbjax.training.feed import Feed
from tests.training.problem import NUMBERS, dataset, recipe

pytestmark = pytest.mark.optax_promotes  # schedules


def test_a_program_twice_as_long_costs_about_two():
    calls = {"a": 0, "b": 0}

    def program(name, seconds):
        def run():
            calls[name] += 1
            time.sleep(seconds)

        return run

    ratios = cost_ratios({"a": program("a", 0.02), "b": program("b", 0.04)}, "a", rounds=5, steps=2)
    assert ratios["a"] == 1.0 and ratios["b"] == pytest.approx(2.0, rel=0.3)
    assert calls == {"a": 11, "b": 11}  # one to warm up, then rounds * steps


@pytest.mark.parametrize("streamed", [False, True])
def test_timed_steps_train_as_the_loop_does(streamed):
    r, d = recipe(epochs=1), dataset()
    run = TimedStep(r, NUMBERS, d, feed=Feed(r, [d], [0], Devices(), 1, streamed, False))
    for _ in range(r.total_steps):
        metrics = run()
    expected = fit(r, d, NUMBERS, 0)
    jax.tree.map(np.testing.assert_array_equal, run.state.params, expected.state.params)
    assert int(run.state.step) == r.total_steps and metrics["loss"].shape == (1,)
