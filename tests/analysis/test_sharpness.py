"""perturbjax.analysis.sharpness: Hessians by finite differences, eigenvalues by numpy, sharpness by hand, BatchNorm, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from perturbjax.analysis.sharpness import data_loss, hessian_spectrum, lanczos, sam_sharpness
from perturbjax.models import create


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def net(params, x):
    return jnp.tanh(x @ params["a"] + params["b"][None]) @ params["c"]


def problem(count=11):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "c": rng.normal(size=(4, 3))}
    return jax.tree.map(jnp.asarray, params), rng.normal(size=(count, 3)), rng.integers(0, 3, count)


def by_hand(params, x, y):
    """The mean cross entropy in numpy."""
    u = np.tanh(x @ np.asarray(params["a"]) + np.asarray(params["b"])) @ np.asarray(params["c"])
    e = np.exp(u - u.max(1, keepdims=True))
    return -np.log((e / e.sum(1, keepdims=True))[np.arange(len(y)), y]).mean()


def hessian(params, x, y, step=1e-4):
    """By second differences of the loss in numpy."""
    flat, unravel = ravel_pytree(params)
    flat, unit = np.asarray(flat), np.eye(len(flat)) * step
    f = lambda v: by_hand(unravel(jnp.asarray(v)), x, y)
    found = np.zeros((len(flat), len(flat)))
    for i in range(len(flat)):
        for j in range(i + 1):
            corners = [f(flat + a * unit[i] + b * unit[j]) * a * b for a in (1, -1) for b in (1, -1)]
            found[i, j] = found[j, i] = sum(corners) / (4 * step**2)
    return found


@pytest.mark.parametrize("batch_size", [4, 11, 100])
def test_the_loss_and_its_gradient_are_numpy_s_whatever_the_batches(batch_size, float64):
    """11 samples: the last batch of 4 is padded, with samples that count nothing."""
    params, x, y = problem()
    loss = data_loss(net, x, y, batch_size=batch_size)
    assert loss(params) == pytest.approx(by_hand(params, x, y), rel=1e-12)
    gradient = loss.gradient(params)
    for name, i in (("a", (1, 2)), ("b", (3,)), ("c", (0, 1))):
        moved = [by_hand({**params, name: params[name].at[i].add(e)}, x, y) for e in (1e-6, -1e-6)]
        assert float(gradient[name][i]) == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5)


def test_hessian_products_and_eigenvalues_are_numpy_s(float64):
    params, x, y = problem()
    full = hessian(params, x, y)
    loss = data_loss(net, x, y, batch_size=4)
    direction = jax.tree.map(lambda w: jnp.cos(w), params)
    product = ravel_pytree(loss.hessian_product(params, direction))[0]
    np.testing.assert_allclose(product, full @ np.asarray(ravel_pytree(direction)[0]), atol=1e-6)  # the differences' error
    values, vectors = np.linalg.eigh(full)
    found = hessian_spectrum(loss, params, top=3, steps=28, tolerance=1e-10)
    np.testing.assert_allclose(found.values, values[::-1][:3], rtol=1e-5, atol=1e-6)
    for k, vector in enumerate(found.vectors):
        own = np.asarray(ravel_pytree(vector)[0])
        assert abs(own @ vectors[:, -1 - k]) == pytest.approx(1, abs=1e-4)
        assert np.linalg.norm(own) == pytest.approx(1, rel=1e-9)


def test_lanczos_is_eigh_and_its_errors_are_bounds(float64):
    """A spectrum with large outliers, where Lanczos without re-orthogonalisation finds copies of the first."""
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    true = np.sort(np.concatenate([rng.uniform(-1, 1, 56), [1e4, 3e3, 50.0, 20.0]]))[::-1]
    matrix = (q * true) @ q.T
    product = lambda v: jnp.asarray(matrix) @ v
    found = lanczos(product, 60, dtype=jnp.float64, top=5, steps=60, tolerance=0.0)
    np.testing.assert_allclose(found.values, true[:5], rtol=1e-9, atol=1e-8)
    early = lanczos(product, 60, dtype=jnp.float64, top=4, steps=9, tolerance=0.0)
    assert early.products == 9
    assert (np.abs(early.values[:, None] - true[None]).min(1) <= early.errors + 1e-9).all()
    assert (early.errors[:2] < 1e-6).all() and early.errors[3] < 1
    loose = lanczos(product, 60, dtype=jnp.float64, top=1, steps=60, tolerance=1e-3)
    assert loose.products < 20 and loose.values[0] == pytest.approx(1e4, rel=1e-3)


def test_lanczos_in_float32_has_no_copies():
    diagonal = jnp.concatenate([jnp.array([1e4, 10.0, 5.0]), jnp.linspace(0, 1, 97)])
    found = lanczos(lambda v: diagonal * v, 100, top=3, steps=60, tolerance=0.0)
    np.testing.assert_allclose(found.values, [1e4, 10.0, 5.0], rtol=1e-3)


def test_an_exhausted_space_ends_it(float64):
    """Two different eigenvalues: after two products there is nothing new."""
    diagonal = jnp.array([2.0, 2.0, 2.0, -3.0])
    found = lanczos(lambda v: diagonal * v, 4, dtype=jnp.float64, top=1, tolerance=0.0)
    assert found.products == 2 and found.values == pytest.approx([2.0])
    zero = lanczos(lambda v: 0 * v, 4, dtype=jnp.float64)
    assert zero.products == 1 and zero.values == pytest.approx([0.0])


def test_sharpness_is_the_loss_a_radius_up_the_gradient_of_each_batch(float64):
    params, x, y = problem()
    wanted, flat = 0.0, ravel_pytree(params)
    for rows in (range(0, 4), range(4, 8), range(8, 11)):
        rows = list(rows)
        part = data_loss(net, x[rows], y[rows])
        g = np.asarray(ravel_pytree(part.gradient(params))[0])
        up = flat[1](jnp.asarray(np.asarray(flat[0]) + 0.3 * g / np.linalg.norm(g)))
        wanted += len(rows) / 11 * (by_hand(up, x[rows], y[rows]) - by_hand(params, x[rows], y[rows]))
    assert sam_sharpness(data_loss(net, x, y, batch_size=4), params, radius=0.3) == pytest.approx(wanted, rel=1e-6)
    assert sam_sharpness(data_loss(net, x, y, batch_size=4), params, radius=0.0) == pytest.approx(0, abs=1e-15)


def test_on_a_quadratic_sharpness_is_known(float64):
    """Around a minimum with Hessian H, sharpness → ρ‖g‖ + ½ρ² ĝᵀHĝ; second order in ρ by Richardson."""
    params, x, y = problem()
    loss = data_loss(net, x, y)
    g = loss.gradient(params)
    norm = float(jnp.linalg.norm(ravel_pytree(g)[0]))
    unit = jax.tree.map(lambda v: v / norm, g)
    curvature = float(ravel_pytree(unit)[0] @ ravel_pytree(loss.hessian_product(params, unit))[0])
    for radius in (1e-2, 5e-3):
        left = sam_sharpness(loss, params, radius=radius) - radius * norm - radius**2 / 2 * curvature
        assert abs(left) < 5 * radius**3


def test_a_net_with_batch_norm_is_evaluated_with_its_running_statistics():
    """In batches of 4: the loss and its derivatives are those of one pass, forward over reverse."""
    model = create("cnn", num_classes=3, mean=(0.5,), std=(0.3,), width=2)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10, 8, 8, 1)).astype(np.uint8), rng.integers(0, 3, 10)
    pixels = images.astype(np.float32) / 255
    variables = jax.jit(model.init)(jax.random.key(0), pixels[:1])
    params, stats = variables["params"], jax.tree.map(lambda s: s + 0.3, variables["batch_stats"])
    loss = data_loss(model, images, labels, stats=stats, batch_size=4)

    def other(params):  # with lax's convolutions, which have a forward mode
        plain = create("cnn", num_classes=3, mean=(0.5,), std=(0.3,), width=2, conv="lax")
        log_p = jax.nn.log_softmax(plain.apply({"params": params, "batch_stats": stats}, pixels, train=False))
        return -log_p[jnp.arange(10), labels].mean()

    direction = jax.tree.map(jnp.cos, params)
    value, (gradient, product) = jax.jit(lambda w: (other(w), jax.jvp(jax.grad(other), (w,), (direction,))))(params)
    assert loss(params) == pytest.approx(float(value), rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, loss.gradient(params), gradient)
    jax.tree.map(close, loss.hessian_product(params, direction), product)


def test_bad_input_is_named(float64):
    params, x, y = problem()
    with pytest.raises(ValueError, match=r"data_loss needs inputs \[N, ...\] and labels \[N\], got \(11, 3\) and \(10,\)"):
        data_loss(net, x, y[:10])
    with pytest.raises(ValueError, match="data_loss needs labels in 0..2, got -1 at position 0"):
        data_loss(net, x, np.where(np.arange(11) == 0, -1, y % 3))
    with pytest.raises(ValueError, match="data_loss needs batch_size >= 1, got 0"):
        data_loss(net, x, y, batch_size=0)
    with pytest.raises(ValueError, match="sam_sharpness needs radius >= 0, got -1"):
        sam_sharpness(data_loss(net, x, y), params, radius=-1.0)
    with pytest.raises(ValueError, match="lanczos needs 1 <= top <= 4, got 5"):
        lanczos(lambda v: v, 4, top=5)
