"""perturbjax.logit.adaptive_margin: the margins' gradient by finite differences of the whole objective, and where they settle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C = 4
LOGITS = pj.line(lambda w, u: u + w[None], scale=30.0)  # the inputs are the logits


def softmax(u):
    e = np.exp(u - u.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(u, y):
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(y)), y]


@pytest.fixture
def batch():
    """cos θ, labels (class 3 is absent) and margins."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        yield rng.uniform(-1, 1, (9, C)), rng.integers(0, C - 1, 9).astype(np.int32), np.array([0.1, 0.5, 0.3, 0.4], np.float32)


def step(links, u, y, margins=None, **fields):
    """(loss, Output) of one pass of a chain whose first link is the margins'."""
    made, w = pj.objective(LOGITS, links, num_classes=C, class_counts=np.array([5, 9, 2, 30])), jnp.zeros(C, u.dtype)
    states = made.init(w, u)
    states = states if margins is None else (jnp.asarray(margins), *states[1:])
    return made(w, states, pj.batch(jnp.asarray(u), jnp.asarray(y), **fields))


def test_losses_are_cosface_with_a_margin_for_each_class(batch):
    cos, y, m = batch
    _, out = step(pj.adaptive_margin(), 30 * cos, y, m)
    np.testing.assert_allclose(out.losses, cross_entropy(30 * (cos - m[y][:, None] * np.eye(C)[y]), y), rtol=1e-6)
    _, out = step(pj.adaptive_margin(margin=0.2), 30 * cos, y)
    np.testing.assert_allclose(out.losses, step(pj.cosface(margin=0.2), 30 * cos, y)[1].losses, rtol=1e-6)
    np.testing.assert_allclose(out.metrics["adaptive_margin/margin_mean"], 0.2, rtol=1e-6)


@pytest.mark.parametrize("others", [(), (pj.label_smoothing(weight=0.2), pj.focal(gamma=2.0), pj.class_weighting())])
def test_margins_go_down_the_gradient_of_the_whole_loss(batch, others):
    """∂/∂m of mean_i ℓ_i − λ·mean_c m_c, with whatever links come after; the absent class is only rewarded."""
    cos, y, m = batch
    link = pj.chain(pj.adaptive_margin(weight=0.7, step_size=0.005, scale=10.0), *others)
    objective = lambda m: float(step(link, 10 * cos, y, m)[0]) - 0.7 * m.mean()
    numeric = np.array([(objective(m + e) - objective(m - e)) / 2e-5 for e in 1e-5 * np.eye(C)])
    after = step(link, 10 * cos, y, m)[1].states[0]
    np.testing.assert_allclose((m - after) / 0.005, numeric, atol=1e-4)  # the margins are kept in float32
    np.testing.assert_allclose(after[3] - m[3], 0.005 * 0.7 / C, rtol=1e-3)


def test_the_gradient_s_closed_form_for_cross_entropy(batch):
    cos, y, m = batch
    p = softmax(10 * (cos - m[y][:, None] * np.eye(C)[y]))[np.arange(9), y]
    gradient = np.array([10 * (1 - p)[y == c].sum() / 9 for c in range(C)]) - 0.1 / C
    found = pj.adaptive_margin_step(jnp.asarray(m), jnp.asarray(p - 1), jnp.asarray(y), scale=10.0, step_size=0.01)
    np.testing.assert_allclose(found, np.clip(m - 0.01 * gradient, 0, 1), rtol=1e-5)
    after = step(pj.adaptive_margin(scale=10.0), 10 * cos, y, m)[1].states[0]
    np.testing.assert_allclose(after, found, rtol=1e-5)


def test_samples_count_by_their_weights(batch):
    cos, y, m = batch
    link = pj.adaptive_margin(weight=0.0, scale=10.0)
    weights = jnp.asarray(np.r_[np.full(4, 2.0), np.zeros(5)])
    after = step(link, 10 * cos, y, m, weights=weights)[1].states[0]
    few = step(link, 10 * cos[:4], y[:4], m)[1].states[0]
    np.testing.assert_allclose(m - after, (m - few) * 2 * 4 / 9, rtol=1e-3, atol=1e-7)


def test_margins_stay_in_0_to_1_and_rest_without_a_step(batch):
    cos, y, m = batch
    after = lambda **kw: np.asarray(step(pj.adaptive_margin(**kw), 30 * cos, y, m)[1].states[0])
    assert after(step_size=100.0, weight=0.0).min() == 0 and after(step_size=100.0, weight=100.0).max() == 1
    np.testing.assert_array_equal(after(step_size=0.0), m)


def test_balanced_classes_settle_where_the_mean_error_is_lambda_over_s():
    """Of well separated classes whose logits stay as they are, until ⟨1 − p_y⟩ of each class is λ/s."""
    rng, y = np.random.default_rng(1), np.repeat(np.arange(C), 8).astype(np.int32)
    u = (10 * (0.5 * np.eye(C)[y] + 0.1 * rng.normal(size=(len(y), C)))).astype(np.float32)
    made = pj.objective(LOGITS, pj.adaptive_margin(weight=1.0, step_size=0.02, scale=10.0), num_classes=C)
    data, w = pj.batch(u, y), jnp.zeros(C)
    advance = jax.jit(lambda states: made(w, states, data)[1].states)
    states = made.init(w, u)
    for _ in range(300):
        states = advance(states)
    m = np.asarray(states[0])
    p = softmax(u - 10 * m[y][:, None] * np.eye(C)[y])[np.arange(len(y)), y]
    np.testing.assert_allclose([(1 - p)[y == c].mean() for c in range(C)], 0.1, rtol=1e-2)
    assert np.ptp(m) > 0.01 and 0 < m.min() and m.max() < 1


def test_no_gradient_of_the_network_comes_from_the_margins_step(batch):
    cos, y, m = batch
    made = pj.objective(LOGITS, pj.adaptive_margin(), num_classes=C)
    states = (jnp.asarray(m),)
    grad = lambda made, states: jax.grad(lambda w: made(w, states, pj.batch(jnp.asarray(30 * cos), y))[0])(jnp.zeros(C))
    expected = softmax(30 * (cos - m[y][:, None] * np.eye(C)[y])) - np.eye(C)[y]
    np.testing.assert_allclose(grad(made, states), expected.mean(0), atol=1e-6)
    after = lambda w: made(w, states, pj.batch(jnp.asarray(30 * cos), y))[1].states[0].sum()
    np.testing.assert_array_equal(jax.grad(after)(jnp.zeros(C)), 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(margin=1.5), "adaptive_margin needs 0 <= margin <= 1, got 1.5"),
        (dict(weight=-1.0), "adaptive_margin needs weight >= 0, got -1.0"),
        (dict(step_size=-1.0), "adaptive_margin needs step_size >= 0, got -1.0"),
        (dict(scale=0.0), "adaptive_margin needs scale > 0, got 0.0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.adaptive_margin(**settings)
