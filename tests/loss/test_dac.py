"""perturbjax.loss.dac: both parts of training, the price of abstention, and what the extra output must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.loss.dac import DACState
from tests.loss.problem import B, C, D, difference, enable_x64, run

MODEL = pj.line({"outputs": lambda w, x: x @ w, "logits": lambda w, out: out[:, :C]})
FIRST = dict(progress=0.0)  # the first step


@pytest.fixture
def problem():
    """Weights of C + 1 outputs, inputs and labels in float64."""
    rng = np.random.default_rng(0)
    with enable_x64(True):
        yield rng.normal(size=(D, C + 1)), rng.normal(size=(B, D)), rng.integers(0, C, B).astype(np.int32)


def parts(u, y):
    """(cross entropy over the C classes, p₀)."""
    p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    real = np.exp(u[:, :C]) / np.exp(u[:, :C]).sum(1, keepdims=True)
    return -np.log(real[np.arange(len(y)), y]), p[:, -1]


def state(threshold, seen=True):
    return (DACState(jnp.float32(threshold), jnp.asarray(seen)),)


def test_first_it_is_cross_entropy_over_all_outputs(problem):
    w, x, y = problem
    out, grad = run(w, x, y, pj.dac(start=0.3), model=MODEL, options=dict(progress=0.29))
    loss = lambda w: -(np.eye(C + 1)[y] * (x @ w - np.log(np.exp(x @ w).sum(1, keepdims=True)))).sum(1)
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-10)
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-9)
    assert out.metrics["dac/alpha"] == 0


@pytest.mark.parametrize("progress", [0.3, 0.5, 1.0])
def test_later_abstention_has_its_price_with_alpha_on_its_line(problem, progress):
    w, x, y = problem
    links = pj.dac(start=0.3, weight=2.0, factor=32.0)
    out, grad = run(w, x, y, links, model=MODEL, states=state(1.6), options=dict(progress=progress))
    alpha = 1.6 / 32 + (2.0 - 1.6 / 32) * (progress - 0.3) / 0.7

    def loss(w):
        ce, p0 = parts(x @ w, y)
        return (1 - p0) * ce - alpha * np.log(1 - p0)

    np.testing.assert_allclose(out.metrics["dac/alpha"], alpha, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-5)  # alpha is a float32
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-5)
    np.testing.assert_array_equal(out.states[0].threshold, np.float32(1.6))  # fixed from here on


def test_the_threshold_is_a_running_mean_of_the_first_part(problem):
    w, x, y = problem
    links, now = pj.dac(start=0.5, decay=0.9), None
    ce, p0 = parts(x @ w, y)
    for step in range(3):
        states = None if now is None else state(now)
        out, _ = run((1 + 0.1 * step) * w, x, y, links, model=MODEL, states=states, options=FIRST)
        ce, p0 = parts((1 + 0.1 * step) * x @ w, y)
        batch = ((1 - p0) * ce).mean()
        now = batch if now is None else 0.9 * now + 0.1 * batch
        np.testing.assert_allclose(out.states[0].threshold, now, rtol=1e-5)


def test_without_a_first_part_the_first_batch_sets_the_threshold(problem):
    w, x, y = problem
    out, _ = run(w, x, y, pj.dac(start=0.0), model=MODEL, options=FIRST)
    ce, p0 = parts(x @ w, y)
    np.testing.assert_allclose(out.metrics["dac/alpha"], ((1 - p0) * ce).mean() / 64, rtol=1e-5)


def test_a_low_price_makes_it_abstain_a_high_one_not(problem):
    """The gradient with respect to the extra output is negative where (1 − p₀) ℓ > α only."""
    w, x, y = problem
    u = x @ w
    ce, p0 = parts(u, y)
    links = lambda alpha: pj.dac(start=0.0, factor=1.0, weight=alpha)
    slope = lambda alpha: run(u, np.eye(B), y, links(alpha), model=MODEL, states=state(alpha), options=FIRST)[1][:, -1]
    assert (slope(0.0) < 0).all() and (slope(100.0) > 0).all()
    alpha = float(np.median((1 - p0) * ce))
    np.testing.assert_array_equal(slope(alpha) < -1e-9, (1 - p0) * ce > alpha + 1e-6)


def test_numbers_stay_finite_where_it_is_sure_to_abstain():
    made = pj.objective(MODEL, pj.dac(start=0.0), num_classes=C)
    u = jnp.array([[0.0] * C + [1e4], [0.0] * C + [-1e4]])
    (loss, out), grad = jax.value_and_grad(made, has_aux=True)(
        u, made.init(u, jnp.eye(2)), pj.batch(jnp.eye(2), jnp.zeros(2, int)), **FIRST
    )
    assert np.isfinite(loss) and np.isfinite(grad).all()
    assert out.metrics["dac/abstained"] == 0.5


def test_other_links_and_predictions_go_by_the_real_classes(problem):
    w, x, y = problem
    counts = np.array([9, 4, 2, 1])
    links = pj.chain(pj.logit_adjustment(), pj.dac(start=0.3))
    out, _ = run(w, x, y, links, model=MODEL, settings=dict(class_counts=counts), options=FIRST)
    assert out.logits.shape == (B, C)
    u = x @ w + np.append(np.log(counts / 16), 0)
    np.testing.assert_allclose(
        out.losses, -(np.eye(C + 1)[y] * (u - np.log(np.exp(u).sum(1, keepdims=True)))).sum(1), rtol=1e-6
    )


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="dac needs 'outputs', got none"):
        pj.objective(lambda w, x: x @ w, pj.dac(), num_classes=C)
    same = pj.line({"outputs": lambda w, x: x @ w, "logits": lambda w, out: out})
    with pytest.raises(ValueError, match=r"dac needs outputs \[B, C \+ 1\] = \[B, 5\], got \(2, 4\)"):
        pj.objective(same, pj.dac(), num_classes=C).init(jnp.ones([D, C]), jnp.ones([2, D]))
    with pytest.raises(ValueError, match="dac needs factor > 0, got 0"):
        pj.dac(factor=0.0)
