"""perturbjax.training.cost: paired ratios."""

import time

import pytest

from perturbjax.training import cost_ratios


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
