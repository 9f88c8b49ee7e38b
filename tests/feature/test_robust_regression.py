"""perturbjax.feature.robust_regression: the shift is the best there is, the loss is RLASSO's, wrong labels pull less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.label.problem import C, batches, run, softmax, weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("space", ["logit", "probability"])
@pytest.mark.parametrize("weight", [0.2, 0.5, 3.0])
def test_shifting_outputs_or_targets_is_one_loss(space, weight):
    """RLASSO's, which tests/label/test_robust_lasso.py compares with Huber's."""
    (x, y, _), w = next(batches(1)), weights()
    ours, theirs = (run(w, x, y, make(weight=weight, space=space)) for make in (pj.robust_regression, pj.robust_lasso))
    np.testing.assert_allclose(ours[0].losses, theirs[0].losses, rtol=1e-12)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-12, atol=1e-14)
    residual = (x @ w if space == "logit" else softmax(x @ w)) - np.eye(C)[y]
    np.testing.assert_allclose(ours[0].metrics["robust_regression/shifted"], (np.abs(residual) > weight / 2).mean(), rtol=1e-6)


def test_the_shift_is_the_minimum():
    """Of (r + f)² + λ|f| on a grid; it goes towards the target."""
    r = np.linspace(-2, 2, 41)[None]
    f = np.asarray(pj.sparse_shift(jnp.asarray(r), jnp.zeros_like(jnp.asarray(r)), weight=0.5))
    for other in np.linspace(-2, 2, 401):
        assert ((r + f) ** 2 + 0.5 * np.abs(f) <= (r + other) ** 2 + 0.5 * np.abs(other) + 1e-12).all()
    assert (f[np.abs(r) <= 0.25] == 0).all() and (f * r <= 0).all()


def test_a_wrong_label_pulls_no_harder_the_further_off_it_is():
    """The squared loss's gradient grows with the residual; this one's stops at λ."""
    slope = lambda u: np.asarray(
        run(np.array([[u, 0.0, 0.0, 0.0]]), np.ones([1, 1]), np.array([1]), pj.robust_regression(space="logit"))[1]
    )
    np.testing.assert_allclose(slope(3.0), slope(30.0))
    np.testing.assert_allclose(np.abs(slope(30.0)).max(), 0.5)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="robust_regression needs weight > 0, got 0"):
        pj.robust_regression(weight=0)
    with pytest.raises(ValueError, match="robust_regression needs space to be one of its names, got 'loss'"):
        pj.robust_regression(space="loss")
