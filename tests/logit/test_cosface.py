"""perturbjax.logit.cosface: the loss, and what it has in common with LDAM and ArcFace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C = 4
LOGITS = pj.line(lambda w, u: u + w[None], scale=30.0)  # the inputs are the logits


def cross_entropy(u, y):
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(y)), y]


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        yield rng.uniform(-1, 1, (9, C)), rng.integers(0, C, 9).astype(np.int32)


def run(link, u, y, counts=None):
    made = pj.objective(LOGITS, link, num_classes=C, class_counts=counts)
    w = np.zeros(C)
    return jax.grad(made, has_aux=True)(w, made.init(w, u), pj.batch(jnp.asarray(u), jnp.asarray(y)))


@pytest.mark.parametrize("margin, scale", [(0.35, None), (0.35, 64.0), (0.1, 10.0)])
def test_losses_are_those_of_the_cosine_less_the_margin(batch, margin, scale):
    cos, y = batch
    s = 30.0 if scale is None else scale
    grad, out = run(pj.cosface(margin=margin, scale=scale), s * cos, y)
    expected = s * (cos - margin * np.eye(C)[y])
    np.testing.assert_allclose(out.losses, cross_entropy(expected, y), rtol=1e-7, atol=1e-12)
    p = np.exp(expected) / np.exp(expected).sum(1, keepdims=True)
    np.testing.assert_allclose(grad, (p - np.eye(C)[y]).mean(0), atol=1e-7)
    assert (out.losses > cross_entropy(s * cos, y)).all()
    delta = pj.cosface_delta(jnp.asarray(y), C, margin=margin, scale=s)
    np.testing.assert_allclose(s * cos + delta, expected, rtol=1e-7, atol=1e-7)


def test_of_balanced_classes_ldam_is_cosface(batch):
    cos, y = batch
    ldam, cosface = run(pj.ldam(margin=0.35), 30 * cos, y, np.full(C, 7)), run(pj.cosface(), 30 * cos, y)
    np.testing.assert_allclose(ldam[1].losses, cosface[1].losses, rtol=1e-7)


def test_for_small_margins_at_a_right_angle_arcface_is_cosface(batch):
    """cos(π/2 + m) = −sin m."""
    u, y = 0 * batch[0], batch[1]
    losses = lambda make: run(make(margin=1e-3, scale=10.0), u, y)[1].losses
    np.testing.assert_allclose(losses(pj.arcface), losses(pj.cosface), rtol=1e-6)


def test_wrong_settings():
    with pytest.raises(ValueError, match="cosface needs margin >= 0, got -0.1"):
        pj.cosface(margin=-0.1)
    with pytest.raises(ValueError, match="cosface needs scale > 0, got 0.0"):
        pj.cosface(scale=0.0)
