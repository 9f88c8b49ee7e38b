"""perturbjax.logit.arcface: angles by arccos in float64, monotone, finite where the angle is 0 or π, and eq. 48 of the taxonomy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.logit.arcface import arcface_shift

C = 4
LOGITS = pj.line(lambda w, u: u + w[None], scale=30.0)  # the inputs are the logits
FEATURES = pj.line(
    {"features": lambda w, x: x, "logits": lambda w, a: a @ w["w"].T + w["b"][None]}, head=lambda w: (w["w"], w["b"])
)


def cross_entropy(u, y):
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(y)), y]


def moved(cos, m):
    """cos(θ + m), or cos θ − m sin m beyond π."""
    theta = np.arccos(cos)
    return np.where(theta + m <= np.pi, np.cos(theta + m), cos - m * np.sin(m))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def batch():
    """cos θ and labels; the first two true angles are beyond π − m."""
    rng = np.random.default_rng(0)
    cos, y = rng.uniform(-0.8, 0.8, (9, C)), rng.integers(0, C, 9).astype(np.int32)
    cos[:2, y[:2]] = [[-0.95, -0.9], [-0.9, -0.99]]
    return cos, y


def run(link, u, y, w=None, model=LOGITS):
    made, w = pj.objective(model, link, num_classes=C), np.zeros(C) if w is None else w
    return jax.grad(made, has_aux=True)(w, made.init(w, u), pj.batch(jnp.asarray(u), jnp.asarray(y)))


@pytest.mark.parametrize("margin, scale", [(0.5, None), (0.5, 64.0), (0.1, 10.0), (1.2, 10.0)])
def test_losses_are_those_of_the_moved_angle(batch, margin, scale):
    cos, y = batch
    s = 30.0 if scale is None else scale
    _, out = run(pj.arcface(margin=margin, scale=scale), s * cos, y)
    own = np.eye(C)[y] > 0
    expected = s * np.where(own, moved(cos, margin), cos)
    np.testing.assert_allclose(out.logits, expected, rtol=1e-9)
    np.testing.assert_allclose(out.losses, cross_entropy(expected, y), rtol=1e-9)
    assert (out.losses > cross_entropy(s * cos, y)).all()
    delta = pj.arcface_delta(jnp.asarray(s * cos), jnp.asarray(y), margin=margin, scale=s)
    np.testing.assert_allclose(s * cos + delta, expected, rtol=1e-9)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.2, 2.0])
def test_the_moved_cosine_falls_over_the_whole_range_of_angles(margin):
    theta = np.linspace(0.01, np.pi - 0.01, 300)
    value = np.cos(theta) + np.asarray(arcface_shift(jnp.cos(theta), margin=margin, scale=1.0))
    assert (np.diff(value) < 0).all()


def test_a_margin_of_zero_is_nothing():
    u = jnp.linspace(-30, 30, 61)
    np.testing.assert_array_equal(arcface_shift(u, margin=0.0, scale=30.0), 0)


def test_gradient_goes_through_the_angle(batch):
    cos, y = batch
    cos, w = cos[2:], np.array([0.3, -0.2, 0.1, 0.4])
    y = y[2:]

    def loss(w):
        c = (10 * cos + w) / 10
        return cross_entropy(10 * np.where(np.eye(C)[y] > 0, moved(c, 0.5), c), y).mean()

    grad, _ = run(pj.arcface(scale=10.0), 10 * cos, y, w)
    numeric = [(loss(w + e) - loss(w - e)) / 2e-6 for e in 1e-6 * np.eye(C)]
    np.testing.assert_allclose(grad, numeric, atol=1e-8)


@pytest.mark.parametrize("cos", [1.0, -1.0, 1.0000001, -1.0000001])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gradients_are_finite_where_the_sine_is_zero(cos, dtype):
    value, slope = jax.value_and_grad(lambda u: arcface_shift(u[None], scale=30.0)[0])(jnp.asarray(30 * cos, dtype))
    assert np.isfinite(value) and np.isfinite(slope) and value.dtype == slope.dtype == dtype


def test_scale_norm_is_equation_48_with_the_log(batch):
    """s_i cos(θ + m) for the true class with s_i = ‖w_y‖‖a_i‖; the other logits and the bias stay."""
    rng, (_, y) = np.random.default_rng(1), batch
    w, x = dict(w=rng.normal(size=(C, 3)), b=rng.normal(size=C)), rng.normal(size=(len(y), 3))
    size = np.linalg.norm(w["w"][y], axis=1) * np.linalg.norm(x, axis=1)
    u = x @ w["w"].T + w["b"]
    expected = u.copy()
    along = (w["w"][y] * x).sum(1)
    expected[np.arange(len(y)), y] = size * moved(along / size, 0.3) + w["b"][y]
    _, out = run(pj.arcface(margin=0.3, scale="norm"), x, y, w, FEATURES)
    np.testing.assert_allclose(out.logits, expected, rtol=1e-9)

    def loss(part, value):
        v = w | {part: value}
        size = np.linalg.norm(v["w"][y], axis=1) * np.linalg.norm(x, axis=1)
        u = x @ v["w"].T + v["b"]
        u[np.arange(len(y)), y] = size * moved((v["w"][y] * x).sum(1) / size, 0.3) + v["b"][y]
        return cross_entropy(u, y).mean()

    grad, _ = run(pj.arcface(margin=0.3, scale="norm"), x, y, w, FEATURES)
    for part, value in w.items():
        steps = 1e-6 * np.eye(value.size).reshape(-1, *value.shape)
        numeric = [(loss(part, value + e) - loss(part, value - e)) / 2e-6 for e in steps]
        np.testing.assert_allclose(np.ravel(grad[part]), numeric, atol=1e-7)


def test_a_dead_feature_has_no_angle_but_finite_gradients():
    w = dict(w=np.ones((C, 3)), b=np.zeros(C))
    grad, out = run(pj.arcface(scale="norm"), np.zeros([2, 3]), np.array([0, 1], np.int32), w, FEATURES)
    assert np.isfinite(out.losses).all() and all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_padding_is_left_alone():
    u = jnp.linspace(-9.0, 9.0, 12).reshape(3, 4)
    np.testing.assert_array_equal(jax.jit(pj.arcface_delta)(u, jnp.array([-1, 4, 99]), scale=10.0), 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(margin=-0.1), "arcface needs 0 <= margin <= 3.14159, got -0.1"),
        (dict(scale=0.0), "arcface needs scale > 0, got 0.0"),
        (dict(scale="norms"), "arcface needs scale .* got 'norms'. Did you mean 'norm'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        pj.arcface(**settings)


def test_scale_norm_needs_features_and_a_head():
    with pytest.raises(ValueError, match="arcface needs 'features', got none"):
        pj.objective(LOGITS, pj.arcface(scale="norm"), num_classes=C)
    with pytest.raises(ValueError, match=r"arcface_delta needs logits \[B, C\] and labels \[B\], got \(4,\)"):
        pj.arcface_delta(jnp.zeros(4), jnp.zeros(4, int), scale=1.0)
