"""perturbjax.feature.regpert: minimisers by other roads, both directions, the range, and no leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import perturbjax as pj
from tests.feature.problem import B, C, D, H, W, images, losses_of, seen_steps, slope_of, weights

Y = np.random.default_rng(1).integers(0, C, B)


def jax_losses(w):
    return lambda x: -jnp.take_along_axis(jax.nn.log_softmax(x.reshape(x.shape[0], -1) @ w), Y[:, None], axis=1)[:, 0]


def delta_of(w, x, **settings):
    with jax.enable_x64(True):
        return np.asarray(
            pj.regularised_delta(jax_losses(jnp.asarray(w)), jnp.asarray(x), num_steps=400, step_size=0.1, **settings)
        )


def test_lowering_it_is_the_minimiser_that_scipy_finds():
    """ℓ + λ‖δ‖² is convex in δ for a linear net: one minimum."""
    w, x = weights(), images()
    delta = delta_of(w, x, weight=0.7, direction=-1.0)
    for i in range(B):
        of = lambda d, i=i: losses_of(w, x[i : i + 1] + d.reshape(1, H, W), Y[i : i + 1])[0] + 0.7 * (d**2).sum()
        np.testing.assert_allclose(delta[i].ravel(), minimize(of, np.zeros(D), tol=1e-10).x, atol=1e-5)


def test_raising_it_stands_still_where_slope_and_price_balance():
    w, x = weights(), images()
    delta = delta_of(w, x, weight=20.0)
    np.testing.assert_allclose(delta, slope_of(w, x + delta, Y) / 40, atol=1e-9)
    assert (losses_of(w, x + delta, Y) > losses_of(w, x, Y)).all()


def test_under_l1_only_steep_pixels_move():
    """The minimum's own conditions: |slope| ≤ λ where δ = 0, slope = −λ·sign δ elsewhere."""
    w, x = weights(), images()
    delta = delta_of(w, x, weight=0.5, direction=-1.0, norm="l1")
    slope, still = slope_of(w, x + delta, Y), delta == 0
    assert 0.2 < still.mean() < 1
    assert (np.abs(slope[still]) <= 0.5 + 1e-6).all()
    np.testing.assert_allclose(slope[~still], -0.5 * np.sign(delta[~still]), atol=1e-6)


def test_in_training_images_keep_to_their_range_and_no_gradient_leaks():
    w, x = weights(), images(low=0.0, high=1.0)
    [moved], _, out = seen_steps(pj.regpert(weight=1.0), jnp.float32(w), [(x, Y)])
    assert moved.min() >= -1e-6 and moved.max() <= 1 + 1e-6 and np.abs(moved - x).max() > 0.05
    assert out.metrics["regpert/inner_evaluations"] == 3
    model = pj.line(lambda w, x: x.reshape(B, -1) @ w)
    made, plain = (pj.objective(model, link, num_classes=C) for link in (pj.regpert(weight=1.0), ()))
    data = pj.batch(jnp.asarray(x, jnp.float32), jnp.asarray(Y))
    grads = jax.grad(lambda w: made(w, made.init(w, data.inputs), data)[0])(jnp.float32(w))
    fixed = jax.grad(lambda w: plain(w, (), data._replace(inputs=jnp.asarray(moved)))[0])(jnp.float32(w))
    np.testing.assert_allclose(grads, fixed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_steps", [3, 12])  # unrolled, and as a loop
def test_steps_are_those_of_numpy(num_steps):
    w, x, kappa, lam = weights(), images(low=0.0, high=1.0), 0.05, 2.0
    with jax.enable_x64(True):
        found = pj.regularised_delta(
            jax_losses(jnp.asarray(w)), jnp.asarray(x), weight=lam, step_size=kappa, num_steps=num_steps, value_range=(0.0, 1.0)
        )
    delta = 0 * x
    for _ in range(num_steps):
        delta = (delta + kappa * slope_of(w, x + delta, Y)) / (1 + 2 * kappa * lam)
        delta = np.clip(x + delta, 0, 1) - x
    np.testing.assert_allclose(found, delta, atol=1e-12)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="regpert needs norm to be one of its names, got 'linf'"):
        pj.regpert(norm="linf")
    with pytest.raises(ValueError, match="regpert needs -1 <= direction <= 1, got 2"):
        pj.regpert(direction=2)
