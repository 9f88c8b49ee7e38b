"""perturbjax.feature.mixed_uat: eq. 47 against numpy, its two limits, and the sum of both deltas in the range."""

import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.feature.problem import B, C, H, W, images, seen_steps, slope_of, weights

BATCHES = [(images(seed=s), np.random.default_rng(s).integers(0, C, B)) for s in range(4)]


def numpy_mixed(w, batches, *, bound, universal_bound, step_size, universal_step_size, num_steps):
    star, seen = np.zeros([H, W]), []
    for x, y in batches:
        base = np.clip(x + star[None], 0, 1)
        own = np.zeros_like(x)
        for _ in range(num_steps):
            own = np.clip(own + step_size * np.sign(slope_of(w, np.clip(base + own, 0, 1), y)), -bound, bound)
            own = np.clip(base + own, 0, 1) - base
        seen.append(base + own)
        star = np.clip(
            star + universal_step_size * np.sign(slope_of(w, base, y, 9.0).sum(0)), -universal_bound, universal_bound
        )
    return seen, star


@pytest.mark.parametrize("low, high", [(0.3, 0.7), (0.0, 1.0)])
def test_it_is_the_corpus_delta_and_pgd_from_there(low, high):
    settings = dict(bound=0.05, universal_bound=0.1, step_size=0.02, universal_step_size=0.04, num_steps=3)
    w, batches = weights(), [(images(seed=s, low=low, high=high), y) for s, (_, y) in enumerate(BATCHES)]
    found, [state, _], out = seen_steps(pj.mixed_uat(**settings), jnp.float32(w), batches)
    seen, star = numpy_mixed(w, batches, **settings)
    for ours, theirs in zip(found, seen, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
        assert ours.min() >= -1e-6 and ours.max() <= 1 + 1e-6
    np.testing.assert_allclose(state.delta[0], star, atol=1e-6)
    assert out.metrics["mixed_uat/inner_evaluations"] == 3


def test_without_one_of_the_two_it_is_the_other():
    w = jnp.float32(weights())
    corpus, *_ = seen_steps(pj.mixed_uat(bound=0.0, universal_bound=0.1, universal_step_size=0.04), w, BATCHES)
    uat, *_ = seen_steps(pj.uat(bound=0.1, step_size=0.04), w, BATCHES)
    np.testing.assert_allclose(corpus, uat, atol=1e-6)
    sample, *_ = seen_steps(pj.mixed_uat(bound=0.1, step_size=0.04, universal_bound=0.0, random_starts=True), w, BATCHES)
    at, *_ = seen_steps(pj.adversarial_training(bound=0.1, step_size=0.04), w, BATCHES)
    np.testing.assert_array_equal(sample, at)


def test_the_sum_is_bounded_by_both_bounds_together():
    found, *_ = seen_steps(
        pj.mixed_uat(bound=0.03, universal_bound=0.05, universal_step_size=0.05, step_size=0.03),
        jnp.float32(weights()),
        BATCHES,
    )
    gap = np.abs(found[-1] - BATCHES[-1][0])
    assert 0.05 < gap.max() <= 0.08 + 1e-6


def test_both_bounds_are_checked():
    with pytest.raises(ValueError, match="mixed_uat needs universal_bound <= 1, got 4: .* Write universal_bound=4/255"):
        pj.mixed_uat(universal_bound=4)
