"""perturbjax.activation.ada: the ascent and both halves of the loss of a linear model, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B, D, F = 4, 6, 5, 3
MODEL = pj.line({"features": lambda w, x: x @ w["a"], "logits": lambda w, z: z @ w["b"]})


def problem():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(D, F)), "b": rng.normal(size=(F, C))}
    return params, rng.uniform(size=(B, D)), rng.integers(0, C, B).astype(np.int32), rng.uniform(0.5, 2, B)


def evaluate(link, *, weights=None, grad=False, x64=True):
    params, x, y, _ = problem()
    dtype = np.float64 if x64 else np.float32
    with jax.enable_x64(x64):
        params, x = jax.tree.map(lambda v: jnp.asarray(v, dtype), (params, x))
        made = pj.objective(MODEL, link, num_classes=C)
        loss = lambda p: made(p, made.init(p, x), pj.batch(x, jnp.asarray(y), weights=weights))
        return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True) if grad else loss)(params))


def cross_entropy(params, x, y, xp=np):
    u = x @ params["a"] @ params["b"]
    return xp.log(xp.exp(u).sum(1)) - u[np.arange(B), y]


def ascent(params, x, y, *, gamma, rate, steps, bound=np.inf, value_range=None):
    """x^T by Algorithm 1's inner loop: the gradient of ℓ − γ/2 ‖z − z₀‖² by hand."""
    a, b = params["a"], params["b"]
    moved = x.copy()
    for _ in range(steps):
        u = moved @ a @ b
        p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
        cotangent = (p - np.eye(C)[y]) @ b.T - gamma * (moved - x) @ a
        delta = moved + rate * cotangent @ a.T - x
        length = np.linalg.norm(delta, axis=1, keepdims=True)
        delta = np.where(length > bound, delta * bound / np.maximum(length, 1e-30), delta)
        moved = x + delta if value_range is None else np.clip(x + delta, *value_range)
    return moved


SETTINGS = [
    dict(gamma=1.0, rate=0.05, steps=4),
    dict(gamma=0.0, rate=0.1, steps=3, bound=0.2),
    dict(gamma=0.5, rate=0.1, steps=3, value_range=(0.0, 1.0)),
    dict(gamma=1.0, rate=0.03, steps=12),  # more steps than are unrolled
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_losses_metrics_and_gradients_are_the_transcription(settings):
    params, x, y, weights = problem()
    moved = ascent(params, x, y, **settings)
    options = dict(gamma=settings["gamma"], step_size=settings["rate"], num_steps=settings["steps"])
    link = pj.ada(**options, bound=settings.get("bound", np.inf), value_range=settings.get("value_range"))
    (_, out), grads = evaluate(link, weights=weights, grad=True)
    clean, worse = cross_entropy(params, x, y), cross_entropy(params, moved, y)
    np.testing.assert_allclose(out.losses, weights * (clean + worse) / 2, rtol=1e-6)  # settings are float32
    np.testing.assert_allclose(out.metrics["ada/raised"], (worse - clean).mean(), rtol=1e-5)
    distance = (((moved - x) @ params["a"]) ** 2).sum(1) / 2
    np.testing.assert_allclose(out.metrics["ada/distance"], distance.mean(), rtol=1e-5)
    assert (worse > clean).all() and distance.min() > 1e-4
    with jax.enable_x64(True):  # x^T is a constant for the gradient
        halves = lambda p: (weights * (cross_entropy(p, x, y, jnp) + cross_entropy(p, moved, y, jnp)) / 2).mean()
        expected = jax.jit(jax.grad(halves))(params)
        jax.tree.map(lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-7), grads, expected)


def test_the_dearer_the_features_the_less_they_move():
    at = lambda gamma: evaluate(pj.ada(gamma=gamma, step_size=0.02, num_steps=8), x64=False)[1].metrics
    distances, raised = (np.array([at(g)[f"ada/{name}"] for g in (0.0, 2.0, 8.0)]) for name in ("distance", "raised"))
    assert (np.diff(distances) < 0).all() and (np.diff(raised) < 0).all()


def test_no_step_is_plain_training():
    plain, out = evaluate((), x64=False)[1], evaluate(pj.ada(num_steps=0), x64=False)[1]
    np.testing.assert_allclose(out.losses, plain.losses, rtol=1e-6)
    np.testing.assert_array_equal(out.logits, plain.logits)


def test_a_hidden_site_is_not_clipped():
    line = pj.line({"stage1": lambda w, x: 3 * x, "features": lambda w, x: x @ w["a"], "logits": lambda w, z: z @ w["b"]})
    params, x, y, _ = problem()
    made = pj.objective(line, pj.ada(site="stage1", step_size=0.1, num_steps=2), num_classes=C)
    params, x = jax.tree.map(jnp.float32, params), jnp.float32(x)
    out = made(params, made.init(params, x), pj.batch(x, jnp.asarray(y)))[1]
    assert out.metrics["ada/raised"] > 0 and out.losses.shape == (B,)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="ada needs gamma >= 0, got -1"):
        pj.ada(gamma=-1.0)
    with pytest.raises(ValueError, match="ada needs 'features', got none"):
        pj.objective(lambda w, x: x @ w, pj.ada(), num_classes=C)
