"""perturbjax.feature.mixup: convex combinations of values and targets, λ's distribution, who mixes with whom, the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perturbjax as pj
from tests.loss.problem import MODEL, cross_entropy, difference, linear

C, B = 3, 8


@pytest.fixture
def problem():
    with linear(C, B) as found:
        yield found


def seeing():
    """A link behind mixup that reports the mixed inputs, targets and labels."""

    def look(flow, rest, state, context):
        return flow, state, {"value": flow.value, "targets": flow.targets, "labels": flow.labels}

    return pj.Perturbation("input", lambda context: (), look, name="seen")


def run(w, x, y, link, key, **fields):
    made = pj.objective(MODEL, pj.chain(link, seeing()), num_classes=C)
    (loss, out), grad = jax.value_and_grad(made, has_aux=True)(
        w, made.init(w, x), pj.batch(x, jnp.asarray(y), **fields), key=key
    )
    return loss, out, grad


def test_inputs_and_targets_are_the_same_convex_combination(problem):
    """Every sample mixes with its partner by one λ; the partners are a permutation; the gradient is that of the mixed batch."""
    w, x, y = problem
    for seed in range(3):
        loss, out, grad = run(w, x, y, pj.mixup(alpha=1.0), jax.random.key(seed))
        weight, value = float(out.metrics["mixup/weight"]), np.asarray(out.metrics["seen/value"])
        others = (value - weight * x) / (1 - weight)
        partner = np.abs(others[:, None] - x[None]).sum(2).argmin(1)
        assert 0.5 <= weight <= 1 and sorted(partner) == list(range(B))
        np.testing.assert_allclose(others, x[partner], atol=1e-6)
        targets = weight * np.eye(C)[y] + (1 - weight) * np.eye(C)[y[partner]]
        np.testing.assert_allclose(out.metrics["seen/targets"], targets, atol=1e-6)
        of = lambda w: cross_entropy(value @ w, targets).mean()
        np.testing.assert_allclose(loss, of(w), rtol=1e-6)
        np.testing.assert_allclose(grad, difference(of, w), atol=1e-6)


def test_as_a_perturbation_it_is_the_way_towards_the_partner(problem):
    """δ_i = (1 − λ)(x_j − x_i)."""
    _, x, _ = problem
    partner = np.roll(np.arange(B), 1)
    np.testing.assert_allclose(pj.mix(jnp.asarray(x), 0.7, partner) - x, 0.3 * (x[partner] - x), atol=1e-12)


def test_labels_stay_the_dominant_class(problem):
    w, x, y = problem
    for seed in range(5):
        _, out, _ = run(w, x, y, pj.mixup(alpha=1.0), jax.random.key(seed))
        np.testing.assert_array_equal(out.metrics["seen/labels"], y)
        targets = np.asarray(out.metrics["seen/targets"])
        assert (targets[np.arange(B), y] >= targets.max(1) - 1e-7).all()


def test_weight_is_the_larger_half_of_a_beta_and_every_pair_occurs():
    draw = jax.jit(jax.vmap(lambda key, alpha: pj.draw_mixing(key, 4, alpha=alpha), in_axes=(0, None)))
    for alpha in (0.2, 1.0, 4.0):
        weights, partners = jax.device_get(draw(jax.random.split(jax.random.key(0), 4000), alpha))
        beta = np.random.default_rng(0).beta(alpha, alpha, 400_000)
        assert weights.min() >= 0.5
        expected = np.quantile(np.maximum(beta, 1 - beta), (np.arange(4000) + 0.5) / 4000)
        np.testing.assert_allclose(np.sort(weights), expected, atol=0.03)
        counts = np.array([[(partners[:, i] == j).sum() for j in range(4)] for i in range(4)])
        assert abs(counts - 1000).max() < 150  # standard deviation 27


@given(st.integers(0, 2**31 - 1), st.floats(0.05, 10))
def test_mixing_keeps_means_and_the_simplex(seed, alpha):
    """A permutation and one λ: the batch's mean stays, targets stay non-negative and sum to one."""
    weight, partner = pj.draw_mixing(jax.random.key(seed), 6, alpha=alpha)
    targets = jax.nn.softmax(jax.random.normal(jax.random.key(seed + 1), [6, C]))
    mixed = pj.mix(targets, weight, partner)
    assert 0.5 <= weight <= 1 and (mixed >= 0).all()
    np.testing.assert_allclose(mixed.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(mixed.mean(0), targets.mean(0), atol=1e-5)


def test_soft_targets_are_mixed_as_they_are(problem):
    w, x, y = problem
    given = 0.9 * np.eye(C)[y] + 0.1 / C
    _, out, _ = run(w, x, y, pj.mixup(), jax.random.key(0), targets=jnp.asarray(given))
    _, onehot, _ = run(w, x, y, pj.mixup(), jax.random.key(0))
    np.testing.assert_allclose(out.metrics["seen/targets"], 0.9 * onehot.metrics["seen/targets"] + 0.1 / C, atol=1e-6)


def test_bfloat16_and_images():
    x = jnp.linspace(0, 1, 2 * 3 * 3).reshape(2, 3, 3).astype(jnp.bfloat16)
    mixed = pj.mix(x, 0.75, jnp.array([1, 0]))
    assert mixed.dtype == jnp.bfloat16 and mixed.shape == x.shape


def test_whole_numbers_are_an_error():
    with pytest.raises(ValueError, match=r"mix needs floating values, got uint8. Convert them first: values.astype"):
        pj.mix(jnp.zeros([2, 3], jnp.uint8), 0.7, jnp.array([1, 0]))
    with pytest.raises(ValueError, match="mixup needs alpha > 0, got 0"):
        pj.mixup(alpha=0.0)
