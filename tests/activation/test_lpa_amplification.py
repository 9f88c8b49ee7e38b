"""perturbjax.activation.lpa_amplification: against numpy's Jacobians and norms, and eq. 17 on nets of dense and convolutional layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.models import create

B, D, C = 5, 6, 4


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def dense():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape) for name, shape in dict(a=(3, D), b=(D, 7), c=(7, C)).items()}
    pieces = {
        "stage1": lambda w, x: x @ w["a"],
        "features": lambda w, a: jnp.tanh(jax.nn.relu(a) @ w["b"]),
        "logits": lambda w, a: a @ w["c"],
    }
    return params, pieces, rng.normal(size=(B, 3))


def test_locally_it_is_the_largest_singular_value_of_each_sample_s_jacobian(float64):
    params, pieces, x = dense()
    for site in ("stage1", "logits"):
        inside = list(pieces)[list(pieces).index(site) + 1 :]

        def behind(a, inside=inside):
            for name in inside:
                a = pieces[name](params, a)
            return a

        value = pj.line(pieces).slice(params, x, "input", site)[0]
        jacobians = jax.vmap(jax.jacobian(lambda a: behind(a[None])[0]))(jnp.asarray(value))
        wanted = np.linalg.svd(np.asarray(jacobians).reshape(B, C, -1), compute_uv=False)[:, 0]
        found = jax.jit(lambda w, x, site=site: pj.local_amplification(pieces, w, x, site=site, num_steps=200))(params, x)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_before_the_pooling_and_a_linear_head_it_is_k_itself():
    """Of a convolutional net, pooled by means over P positions: ‖W‖₂/√P, for every sample, BatchNorm in evaluation mode."""
    net = create("cnn", num_classes=C, mean=(0.5,) * 3, std=(0.2,) * 3, width=2)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 8, 8, 3)), jnp.float32)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    look = lambda w, s: pj.local_amplification(net, w, x, site="last_stage", stats=s, num_steps=100)
    found = jax.jit(look)(variables["params"], variables["batch_stats"])
    weight, _ = net.head_of(variables["params"])
    positions = 2 * 2
    np.testing.assert_allclose(found, np.linalg.norm(np.asarray(weight), ord=2) / np.sqrt(positions), rtol=1e-3)


def test_the_product_of_norms_is_numpy_s(float64):
    params, _, _ = dense()
    wanted = np.linalg.norm(params["b"], ord=2) * np.linalg.norm(params["c"], ord=2)
    np.testing.assert_allclose(pj.lipschitz_product(params["b"], params["c"]), wanted, rtol=1e-10)


@pytest.mark.parametrize("strides", [1, 2])
def test_no_perturbation_is_amplified_beyond_the_product(float64, strides):
    """Eq. 17 for a convolution, ReLU, mean pooling and a dense layer: pairs of points, and the direction that the Jacobian stretches
    most, where a convolution's bound is not far off."""
    rng = np.random.default_rng(1)
    params = {"k": rng.normal(size=(3, 3, 2, 5)), "c": rng.normal(size=(5, C))}
    shape = dict(window_strides=(strides, strides), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    pieces = {
        "stage1": lambda w, x: x,
        "features": lambda w, a: jax.nn.relu(jax.lax.conv_general_dilated(a, w["k"], **shape)).mean((1, 2)),
        "logits": lambda w, a: a @ w["c"],
    }
    a = rng.normal(size=(B, 6, 6, 2))
    bound = float(pj.lipschitz_product(params["k"], params["c"]))
    logits = lambda a: np.asarray(pieces["logits"](params, pieces["features"](params, jnp.asarray(a))))
    for size in (1e-3, 1.0, 30.0):
        delta = size * rng.normal(size=a.shape)
        change = np.linalg.norm(logits(a + delta) - logits(a), axis=1)
        ratio = change / np.linalg.norm(delta.reshape(B, -1), axis=1)
        assert (ratio > 0).all() and (ratio <= bound).all()
        found = pj.amplification(jnp.asarray(logits(a)), jnp.asarray(logits(a + delta)), jnp.asarray(delta))
        np.testing.assert_allclose(found, ratio.mean(), rtol=1e-10)
    local = np.asarray(pj.local_amplification(pieces, params, jnp.asarray(a), site="stage1"))
    assert (local <= bound).all() and (local > ratio).all()


def test_a_convolution_s_norm_on_a_torus_is_below_its_bound(float64):
    """Exactly known by the Fourier transform there: the largest singular value over the frequencies."""
    kernel = np.random.default_rng(2).normal(size=(3, 3, 2, 4))
    spectrum = np.fft.fft2(kernel, (16, 16), axes=(0, 1)).reshape(-1, 2, 4)
    exact = np.linalg.svd(spectrum, compute_uv=False).max()
    assert 0.3 * float(pj.lipschitz_product(kernel)) < exact <= float(pj.lipschitz_product(kernel))


def test_samples_that_are_not_perturbed_do_not_count():
    delta = jnp.asarray(np.float32([[0, 0], [3, 4], [0, 2]]))
    moved = jnp.asarray(np.float32([[9, 9], [10, 0], [0, 1]]))
    assert float(pj.amplification(jnp.zeros([3, 2]), moved, delta)) == (2 + 0.5) / 2
    assert float(pj.amplification(jnp.zeros([3, 2]), moved, 0 * delta)) == 0


def test_it_needs_a_step_and_a_known_site():
    params, pieces, x = dense()
    with pytest.raises(ValueError, match="local_amplification needs num_steps >= 1, got 0"):
        pj.local_amplification(pieces, params, x, site="stage1", num_steps=0)
    with pytest.raises(ValueError, match="got 'stage7'"):
        pj.local_amplification(pieces, params, x, site="stage7")
