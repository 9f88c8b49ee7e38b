"""perturbjax.loss.self_paced: both forms as minima over the weights, the growing threshold, and the batch over all devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import perturbjax as pj
from tests.loss.problem import B, cross_entropy, linear, onehot, run


@pytest.fixture
def problem():
    with linear() as found:
        yield found


@given(st.floats(0, 10), st.floats(0.1, 5))
def test_losses_are_the_minimum_over_the_weight(loss, limit):
    """Eq. 63: min_w wℓ − λw, + λ so that w = 1 is the loss itself; linear: min_w wℓ + λ(w²/2 − w) + λ/2."""
    w = np.linspace(0, 1, 2001)
    hard, linear_form = (float(pj.self_paced_losses(jnp.float32(loss), limit, kind=kind)) for kind in ("hard", "linear"))
    assert hard == pytest.approx((w * loss - limit * w + limit).min(), rel=1e-5, abs=1e-6)
    assert linear_form == pytest.approx((w * loss + limit * (w**2 / 2 - w) + limit / 2).min(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["hard", "linear"])
def test_gradient_is_the_weighted_one(problem, kind):
    """w·∇ℓ with the weights of eq. 64, or max(0, 1 − ℓ/λ), held."""
    w, x, y = problem
    losses = cross_entropy(x @ w, onehot(y))
    limit = np.median(losses) + 1e-3
    weights = (losses <= limit).astype(float) if kind == "hard" else np.maximum(0, 1 - losses / limit)
    out, grad = run(w, x, y, pj.self_paced(tau=limit, kind=kind))
    _, expected = run(w, x, y, (), weights=jnp.asarray(weights))
    np.testing.assert_allclose(grad, expected, atol=1e-12)
    assert (out.losses <= losses + 1e-12).all()
    np.testing.assert_allclose(out.metrics["self_paced/kept"], (losses <= limit).mean(), rtol=1e-6)


@pytest.mark.parametrize("progress, share", [(0.0, 0.4), (0.25, 0.7), (0.5, 1.0), (0.9, 1.0)])
def test_the_share_that_counts_grows(problem, progress, share):
    w, x, y = problem
    losses = cross_entropy(x @ w, onehot(y))
    out, _ = run(w, x, y, pj.self_paced(start=0.4, ramp=0.5), options=dict(progress=progress))
    limit = np.sort(losses)[int(np.ceil(share * B - 1e-9)) - 1]
    np.testing.assert_allclose(out.losses, np.minimum(losses, limit), rtol=1e-12)


def test_all_samples_count_at_the_end_as_in_plain_training(problem):
    w, x, y = problem
    ours, plain = run(w, x, y, pj.self_paced(), options=dict(progress=0.7)), run(w, x, y, ())
    jax.tree.map(np.testing.assert_array_equal, (ours[0].losses, ours[1]), (plain[0].losses, plain[1]))


def test_no_ramp_takes_all_at_once_and_a_schedule_sets_the_threshold(problem):
    w, x, y = problem
    losses = cross_entropy(x @ w, onehot(y))
    np.testing.assert_array_equal(run(w, x, y, pj.self_paced(ramp=0.0))[0].losses, run(w, x, y, ())[0].losses)
    out, _ = run(w, x, y, pj.self_paced(tau=lambda step: 0.1 * step), options=dict(step=8))
    np.testing.assert_allclose(out.losses, np.minimum(losses, 0.8), rtol=1e-12)


def test_a_threshold_may_follow_the_progress_and_a_negative_one_is_nan(problem):
    w, x, y = problem
    losses = cross_entropy(x @ w, onehot(y))
    out, _ = run(w, x, y, pj.self_paced(tau=pj.linear(first=0.5, last=1.5)), options=dict(progress=0.5))
    np.testing.assert_allclose(out.losses, np.minimum(losses, 1.0), rtol=1e-6)
    for kind in ("hard", "linear"):
        falls = pj.self_paced(tau=lambda step: jnp.where(step == 4, -1.0, 1.0), kind=kind)
        assert np.isfinite(run(w, x, y, falls, options=dict(step=3))[0].losses).all()
        assert np.isnan(run(w, x, y, falls, options=dict(step=4))[0].losses).all()


def test_quantile_is_the_smallest_loss_that_a_share_does_not_exceed():
    losses = jnp.asarray(np.random.default_rng(0).permutation(10), jnp.float32)
    for level, expected in [(0.05, 0), (0.1, 0), (0.3, 2), (0.31, 3), (0.9, 8), (1.0, 9)]:
        assert float(pj.loss_quantile(losses, level)) == expected


def test_the_quantile_is_that_of_all_devices():
    losses = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda x: pj.loss_quantile(x, 0.3, axis_name="d"),
        mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec(), check_vma=False,
    )  # fmt: skip
    np.testing.assert_array_equal(jax.jit(mapped)(losses), pj.loss_quantile(losses, 0.3))


def test_errors_say_what_was_given():
    for wrong, message in [
        (dict(start=0.0), "self_paced needs 0 < start <= 1, got 0"),
        (dict(ramp=1.5), "self_paced needs 0 <= ramp <= 1, got 1.5"),
        (dict(tau=0.0), "self_paced needs tau > 0, got 0"),
        (dict(tau=lambda step: -1.0), "self_paced needs tau >= 0 at every step, got -1 at step 0"),
        (dict(tau=pj.by_rate()), "self_paced needs tau to follow the progress, got by_rate"),
        (dict(kind="soft"), "self_paced needs kind to be one of its names, got 'soft'"),
    ]:
        with pytest.raises(ValueError, match=message):
            pj.self_paced(**wrong)
