"""perturbjax.label.proselflc: trust by time and by sureness, the target, and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.label.problem import C, batches, losses, numeric_gradient, run, softmax, weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def trust(u, progress, sharpness=6.0, turning=0.3):
    p = softmax(u)
    return (1 + (p * np.log(p)).sum(1) / np.log(C)) / (1 + np.exp(-sharpness * (progress - turning)))


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_losses_are_those_of_the_corrected_targets(progress):
    (x, y, _), w = next(batches(1)), weights()
    out, grad = run(w, x, y, pj.proselflc(), step=dict(progress=progress))
    eps = trust(x @ w, progress)[:, None]
    targets = (1 - eps) * np.eye(C)[y] + eps * softmax(x @ w)
    np.testing.assert_allclose(out.losses, losses(x @ w, targets), rtol=1e-9)
    np.testing.assert_allclose(grad, numeric_gradient(lambda w: losses(x @ w, targets).mean(), w), atol=1e-8)
    np.testing.assert_allclose(out.metrics["proselflc/trust"], eps.mean(), rtol=1e-9)


def test_official_gradient_goes_through_the_prediction_but_not_through_trust():
    (x, y, _), w = next(batches(1)), weights()
    _, grad = run(w, x, y, pj.proselflc(through=True), step=dict(progress=0.8))
    _, stopped = run(w, x, y, pj.proselflc(), step=dict(progress=0.8))
    eps = trust(x @ w, 0.8)[:, None]
    through = lambda w: losses(x @ w, (1 - eps) * np.eye(C)[y] + eps * softmax(x @ w)).mean()
    np.testing.assert_allclose(grad, numeric_gradient(through, w), atol=1e-8)
    assert np.abs(grad - stopped).max() > 1e-3


def test_trust_grows_with_time_and_with_sureness():
    unsure, sure = jnp.log(jnp.array([[0.25] * 4, [0.97, 0.01, 0.01, 0.01]]))
    early, late = (pj.self_trust(jnp.stack([unsure, sure]), t) for t in (0.1, 0.9))
    np.testing.assert_allclose([early[0], late[0]], 0, atol=1e-12)
    assert 0 < early[1] < late[1] < 1
    certain = pj.self_trust(jax.nn.log_softmax(jnp.array([[1e4, 0.0]])), 1.0)
    assert np.isfinite(certain).all() and certain[0] > 0.9


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="proselflc needs sharpness > 0, got 0"):
        pj.proselflc(sharpness=0)
