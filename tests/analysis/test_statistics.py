"""perturbjax.analysis.statistics against the standard library and scipy.stats."""

import statistics

import numpy as np
import pytest
from scipy import stats

from perturbjax import analysis as pa


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_summary_and_difference_are_the_textbooks(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.8, 0.02, n).tolist(), rng.normal(0.75, 0.02, n).tolist()
    out = pa.summary(a)
    assert out["mean"] == pytest.approx(statistics.mean(a)) and out["std"] == pytest.approx(statistics.stdev(a))
    assert out["values"] == a
    difference, interval = pa.paired_difference(a, b), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert difference["n"] == n and difference["mean"] == pytest.approx(statistics.mean(a) - statistics.mean(b))
    assert (difference["low"], difference["high"]) == pytest.approx((interval.low, interval.high))


def test_what_both_methods_share_under_a_seed_drops_out():
    seed = np.array([0.5, 0.7, 0.9])
    out = pa.paired_difference(seed + 0.01, seed)
    assert out == {"mean": pytest.approx(0.01), "low": pytest.approx(0.01), "high": pytest.approx(0.01), "n": 3}


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng, trials = np.random.default_rng(0), 2000
    d = rng.normal(0.3, 1.0, [trials, 4])
    outs = [pa.paired_difference(x, np.zeros(4)) for x in d]
    covered = np.mean([o["low"] <= 0.3 <= o["high"] for o in outs])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / trials)


def test_one_seed_has_no_spread_and_no_interval():
    assert pa.summary([0.5]) == {"mean": 0.5, "std": 0.0, "values": [0.5]}
    assert pa.paired_difference([0.5], [0.25]) == {"mean": 0.25, "low": None, "high": None, "n": 1}


def test_a_missing_seed_is_not_averaged_away():
    assert pa.summary([0.5, float("nan")]) == {"mean": None, "std": None, "values": [0.5, None]}
    assert pa.paired_difference([0.5, None], [0.5, 0.5]) == {"mean": None, "low": None, "high": None, "n": 2}


def test_mean_by_class_leaves_out_the_seeds_without_the_class():
    assert pa.mean_by_class([[1.0, None, None], [0.0, 0.5, None]]) == [0.5, 0.5, None]
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        pa.mean_by_class([0.5, 0.5])


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="got 2 and 3"):
        pa.paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"summary needs a list of numbers, one per seed, got shape \(0,\)"):
        pa.summary([])
