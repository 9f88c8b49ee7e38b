"""perturbjax.label.robust_lasso: the corruption is the best there is, and the loss is Huber's (optax)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.label.problem import C, batches, numeric_gradient, run, softmax, weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def huber(r, weight):
    return np.where(np.abs(r) <= weight / 2, r**2, weight * np.abs(r) - weight**2 / 4).sum(1)


@pytest.mark.parametrize("space", ["logit", "probability"])
@pytest.mark.parametrize("weight", [0.2, 0.5, 3.0])
def test_losses_and_gradient_are_hubers(space, weight):
    (x, y, _), w = next(batches(1)), weights()
    residual = lambda w: (x @ w if space == "logit" else softmax(x @ w)) - np.eye(C)[y]
    out, grad = run(w, x, y, pj.robust_lasso(weight=weight, space=space))
    np.testing.assert_allclose(out.losses, huber(residual(w), weight), rtol=1e-9)
    np.testing.assert_allclose(out.losses, 2 * optax.huber_loss(jnp.asarray(residual(w)), delta=weight / 2).sum(1), rtol=1e-9)
    np.testing.assert_allclose(grad, numeric_gradient(lambda w: huber(residual(w), weight).mean(), w), atol=1e-7)


def test_corruption_is_the_minimum():
    """Of (r − e)² + λ|e| on a grid; the loss is no more than the squared one."""
    r = np.linspace(-2, 2, 41)[None]
    ours = np.asarray(pj.corruption(jnp.asarray(r), jnp.zeros_like(jnp.asarray(r)), weight=0.5))
    for e in np.linspace(-2, 2, 401):
        assert ((r - ours) ** 2 + 0.5 * np.abs(ours) <= (r - e) ** 2 + 0.5 * np.abs(e) + 1e-12).all()
    assert (ours[np.abs(r) <= 0.25] == 0).all() and (huber(r, 0.5) <= (r**2).sum(1)).all()


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="robust_lasso needs weight > 0, got 0"):
        pj.robust_lasso(weight=0)
    with pytest.raises(ValueError, match="robust_lasso needs space to be one of its names, got 'loss'"):
        pj.robust_lasso(space="loss")
