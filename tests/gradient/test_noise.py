"""perturbjax.gradient.noise: the annealed variance, optax's numbers for the same key, and the key itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj

pytestmark = pytest.mark.optax_promotes  # add_noise divides a float by an int
GRADS = {"a": jnp.full([100, 100], 2.0), "b": jnp.full([5000], -1.0)}


def test_variance_is_eta_over_1_plus_t_to_the_gamma():
    """σ_t² = η/(1 + t)^γ, t = 0 in the first step; the mean is the gradient; leaves draw apart."""
    link = pj.gradient_noise(eta=0.3, gamma=0.8)
    state = link.init(GRADS)
    for t in range(4):
        noisy, state = link.update(GRADS, state, key=jax.random.key(t))
        for name, grad in GRADS.items():
            noise = np.asarray(noisy[name] - grad).ravel()
            variance = 0.3 / (1 + t) ** 0.8
            assert abs(noise.mean()) < 4 * np.sqrt(variance / noise.size)
            assert abs(noise.var() / variance - 1) < 4 * np.sqrt(2 / noise.size)
    assert int(state.count) == 4
    a, b = (np.asarray(noisy[n] - GRADS[n]).ravel()[:5000] for n in "ab")
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


@pytest.mark.parametrize("settings, drowned", [({}, False), (dict(eta=0.01), True)], ids=["default", "the paper's smallest"])
def test_as_it_comes_the_noise_does_not_drown_a_small_convolutional_net_s_gradient(settings, drowned):
    """ResNet-8 has 78,000 parameters and a gradient of norm 1 or so: against it the noise's norm √(η·d)/(1 + t)^(γ/2) counts."""
    grads = {"w": jnp.full([78_000], 1 / 78_000**0.5)}
    link = pj.gradient_noise(**settings)
    state = link.init(grads)._replace(count=jnp.int32(100))  # of 2,000 steps
    noise = link.update(grads, state, key=jax.random.key(0))[0]["w"] - grads["w"]
    assert (float(jnp.linalg.norm(noise)) > 1) == drowned


def test_the_same_key_gives_optax_s_numbers():
    link, other = pj.gradient_noise(eta=0.1), optax.add_noise(0.1, 0.55, jax.random.key(3))
    noisy, _ = link.update(GRADS, link.init(GRADS), key=jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, noisy, other.update(GRADS, other.init(GRADS))[0])


def test_the_key_comes_with_each_update():
    link = pj.gradient_noise()
    state = link.init(GRADS)
    draw = lambda key: link.update(GRADS, state, key=jax.random.key(key))[0]["b"]
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).mean() > 0.99
    with pytest.raises(ValueError, match=r"gradient_noise needs `key`, got none: call tx.update\(grads, state, params, key="):
        link.update(GRADS, state)


def test_in_a_chain_the_key_reaches_it():
    tx = optax.chain(pj.gradient_noise(eta=0.5), optax.sgd(0.1))
    updates, _ = tx.update(GRADS, tx.init(GRADS), GRADS, key=jax.random.key(0), grad_fn=None)
    link = pj.gradient_noise(eta=0.5)
    noisy, _ = link.update(GRADS, link.init(GRADS), key=jax.random.key(0))
    jax.tree.map(lambda u, n: np.testing.assert_allclose(u, -0.1 * n, rtol=1e-6), updates, noisy)


def test_negative_settings_are_errors():
    with pytest.raises(ValueError, match="gradient_noise needs eta >= 0, got -1"):
        pj.gradient_noise(eta=-1.0)
    with pytest.raises(ValueError, match="gradient_noise needs gamma >= 0, got -1"):
        pj.gradient_noise(gamma=-1.0)
