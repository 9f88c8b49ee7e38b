"""perturbjax.label.rlr: the relaxed targets are the best there are, the loss, its gradient, the graph term."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.label.problem import B, C, batches, numeric_gradient, run, weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def one_sided(u, y):
    own = np.eye(C, dtype=bool)[y]
    return np.where(own, np.maximum(0, 1 - u), np.maximum(0, u)) ** 2


def test_only_the_wrong_side_pays():
    (x, y, _), w = next(batches(1)), weights()
    out, grad = run(w, x, y, pj.rlr(weight=1.0))
    np.testing.assert_allclose(out.losses, one_sided(x @ w, y).sum(1), rtol=1e-10)
    np.testing.assert_allclose(grad, numeric_gradient(lambda w: one_sided(x @ w, y).sum(1).mean(), w), atol=1e-8)
    assert (out.losses <= ((x @ w - np.eye(C)[y]) ** 2).sum(1)).all()  # −1 against the squared loss


def test_targets_are_the_nearest_that_the_directions_allow():
    """y + E ⊙ M with M ≥ 0: no M on a grid is nearer."""
    (x, y, _), w = next(batches(1)), weights()
    u, sign = x @ w, 2 * np.eye(C)[y] - 1
    ours = np.asarray(pj.relaxed_targets(jnp.asarray(u), jnp.asarray(np.eye(C)[y])))
    assert (sign * (ours - np.eye(C)[y]) >= 0).all()
    for m in np.linspace(0, 5, 101):
        assert ((u - ours) ** 2 <= (u - np.eye(C)[y] - sign * m) ** 2 + 1e-12).all()


def test_graph_term_is_the_sum_over_pairs_of_a_class():
    (x, y, _), w = next(batches(1)), weights()

    def loss(w):
        u, total = x @ w, 0.0
        for i in range(B):
            for j in range(B):
                if y[i] == y[j]:
                    total += ((u[i] - u[j]) ** 2).sum() / (y == y[i]).sum()
        return one_sided(u, y).sum(1).mean() + 0.3 * total / B

    out, grad = run(w, x, y, pj.rlr(compactness=0.3, weight=1.0))
    np.testing.assert_allclose(out.losses.mean(), loss(w), rtol=1e-10)
    np.testing.assert_allclose(grad, numeric_gradient(loss, w), atol=1e-7)


def test_weight_is_a_factor_of_the_whole_loss():
    (x, y, _), w = next(batches(1)), weights()
    whole, part = (run(w, x, y, pj.rlr(compactness=0.3, **given)) for given in (dict(weight=1.0), {}))
    np.testing.assert_allclose(part[0].losses, whole[0].losses / 4, rtol=1e-12)
    np.testing.assert_allclose(part[1], whole[1] / 4, rtol=1e-12)


def test_a_negative_weight_is_an_error():
    with pytest.raises(ValueError, match="rlr needs weight >= 0, got -1"):
        pj.rlr(weight=-1)
    with pytest.raises(ValueError, match="rlr needs compactness >= 0, got -1"):
        pj.rlr(compactness=-1)
