"""perturbjax.feature.robust_clustering: exact minimisers, k-means as a limit, and the classifier's reading against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import perturbjax as pj

RNG = np.random.default_rng(0)


def cost(x, m, owner, o, weight):
    return (((x + o - m[owner]) ** 2).sum(1) + weight * np.linalg.norm(o, axis=1)).sum()


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 10.0])
def test_outlier_vectors_are_the_minimisers(weight):
    r = RNG.normal(size=(6, 3))
    with jax.enable_x64(True):
        o = np.asarray(pj.outlier_vectors(jnp.asarray(r), weight))
    for row, ours in zip(r, o, strict=True):
        of = lambda v, row=row: ((row + v) ** 2).sum() + weight * np.linalg.norm(v)
        assert of(ours) <= min(minimize(of, start, method="Nelder-Mead").fun for start in (0.1 * row, -row)) + 1e-9
    assert (np.linalg.norm(r + o, axis=1) <= weight / 2 + 1e-9).all()
    np.testing.assert_array_equal(pj.outlier_vectors(jnp.zeros([2, 3]), weight), 0)


def points():
    centres = np.array([[0.0, 0], [6, 0], [0, 6]])
    x = np.repeat(centres, 20, 0) + RNG.normal(0, 0.5, (60, 2))
    x[:3] += np.array([40.0, 40])  # outliers of the first
    return centres, x


def test_without_outliers_it_is_k_means_and_every_round_lowers_the_cost():
    centres, x = points()
    start = x[[5, 25, 45]]
    with jax.enable_x64(True):
        m, owner, o = pj.robust_kmeans(jnp.asarray(x), jnp.asarray(start), weight=jnp.inf, num_steps=8)
        rounds = [
            [np.asarray(v) for v in pj.robust_kmeans(jnp.asarray(x), jnp.asarray(start), weight=2.0, num_steps=k)]
            for k in range(7)
        ]
    theirs = start.copy()
    for _ in range(8):
        near = ((x[:, None] - theirs[None]) ** 2).sum(2).argmin(1)
        theirs = np.stack([x[near == c].mean(0) for c in range(3)])
    np.testing.assert_allclose(m, theirs, atol=1e-9)
    np.testing.assert_array_equal(o, 0)
    costs = [cost(x, *found, 2.0) for found in rounds]
    assert (np.diff(costs) <= 1e-9).all() and costs[-1] < costs[0]
    robust, _, o = rounds[-1]
    assert np.abs(robust - centres).max() < 0.5 < np.abs(np.asarray(m) - centres).max()  # three of twenty don't move its centre
    assert (np.linalg.norm(o[:3], axis=1) > 10).all()


C, B, D = 3, 12, 4
MODEL = {"features": lambda w, x: x @ w["a"], "logits": lambda w, a: a @ w["b"]}
PARAMS = {"a": jnp.asarray(RNG.normal(size=(D, 5)), jnp.float32), "b": jnp.asarray(RNG.normal(size=(5, C)), jnp.float32)}
BATCHES = [(RNG.normal(size=(B, D)).astype(np.float32), RNG.integers(0, C - (s < 2), B)) for s in range(5)]


@pytest.mark.parametrize("weight", [None, 1.5])
def test_features_far_from_their_centre_are_pulled_to_the_sphere(weight):
    """Transcribed to numpy: centres, radius and features over five batches; class 2 comes with the third."""
    see = pj.Perturbation("features", lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made = pj.objective(MODEL, pj.chain(pj.robust_clustering(weight=weight, quantile=0.75), see), num_classes=C)
    states = made.init(PARAMS, jnp.asarray(BATCHES[0][0]))
    step = jax.jit(lambda states, data: made(PARAMS, states, data)[1])
    means, radius = {}, None
    for x, y in BATCHES:
        out = step(states, pj.batch(jnp.asarray(x), jnp.asarray(y)))
        states = out.states
        a = x.astype(np.float64) @ np.asarray(PARAMS["a"], np.float64)
        r = np.stack([a[i] - means[y[i]] if y[i] in means else 0 * a[i] for i in range(B)])
        length, limit = np.linalg.norm(r, axis=1), np.inf if radius is None else 2 * radius
        limit = limit if weight is None else weight
        o = -r * np.maximum(0, 1 - limit / np.maximum(2 * length, 1e-30))[:, None]
        np.testing.assert_allclose(out.metrics["seen/value"], a + o, atol=2e-5)
        assert out.metrics["robust_clustering/pulled"] == pytest.approx((np.abs(o) > 0).any(1).mean())
        if known := [length[i] for i in range(B) if y[i] in means]:
            now = np.quantile(known, 0.75)
            radius = now if radius is None else 0.9 * radius + 0.1 * now
        for c in set(y.tolist()):
            now = (a + o)[y == c].mean(0)
            means[c] = 0.9 * means[c] + 0.1 * now if c in means else now
    np.testing.assert_allclose(states[0].radius, radius, rtol=1e-5)
    assert out.metrics["robust_clustering/pulled"] > 0


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="robust_clustering needs weight >= 0, got -1"):
        pj.robust_clustering(weight=-1)
    with pytest.raises(ValueError, match="robust_clustering needs 0 <= quantile <= 1, got 90"):
        pj.robust_clustering(quantile=90)
