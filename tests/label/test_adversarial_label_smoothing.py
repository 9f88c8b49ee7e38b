"""perturbjax.label.adversarial_label_smoothing: the exact maximum, and that it raises every loss by what the equation says."""

import jax
import numpy as np
import pytest

import perturbjax as pj
from tests.label.problem import B, C, batches, losses, numeric_gradient, run, softmax, weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_losses_and_gradient_are_the_equations():
    (x, y, _), w = next(batches(1)), weights()
    out, grad = run(w, x, y, pj.adversarial_label_smoothing(weight=0.3))
    least = np.eye(C)[softmax(x @ w).argmin(1)]
    targets = np.eye(C)[y] + 0.3 * (least - np.eye(C)[y])
    np.testing.assert_allclose(out.losses, losses(x @ w, targets), rtol=1e-10)
    np.testing.assert_allclose(grad, numeric_gradient(lambda w: losses(x @ w, targets).mean(), w), atol=1e-8)


def test_no_other_distribution_gives_a_larger_loss():
    """Eq. 26: p* over the simplex, by its corners and random points; the increase is λ·log(p_y/min p)."""
    (x, y, _), w = next(batches(1)), weights()
    out, _ = run(w, x, y, pj.adversarial_label_smoothing(weight=0.3))
    others = np.concatenate([np.eye(C), np.random.default_rng(0).dirichlet(np.ones(C), 200)])
    for p in others:
        assert (losses(x @ w, 0.7 * np.eye(C)[y] + 0.3 * p[None]) <= np.asarray(out.losses) + 1e-12).all()
    p = softmax(x @ w)
    rise = 0.3 * np.log(p[np.arange(B), y] / p.min(1))
    np.testing.assert_allclose(out.losses - losses(x @ w, np.eye(C)[y]), rise, atol=1e-12)
    assert (rise >= 0).all() and rise.max() > 0.1


def test_weight_outside_0_to_1_is_an_error():
    with pytest.raises(ValueError, match="adversarial_label_smoothing needs 0 <= weight <= 1, got -0.5"):
        pj.adversarial_label_smoothing(weight=-0.5)
