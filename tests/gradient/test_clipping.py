"""perturbjax.gradient.clipping: LPG's eq. 3, optax's link, and its place before momentum and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj

GRADS = {"a": jnp.array([[3.0, -4.0], [0.0, 1.0]]), "b": jnp.array([2.0])}
NORM = np.sqrt(9 + 16 + 1 + 4)


@pytest.mark.parametrize("bound", [0.5, 5.0, 100.0, jnp.inf])
def test_g_times_min_of_1_and_bound_over_norm(bound):
    link = pj.gradient_clipping(bound=bound)
    clipped, _ = link.update(GRADS, link.init(GRADS))
    jax.tree.map(lambda c, g: np.testing.assert_allclose(c, g * min(1, bound / NORM), rtol=1e-6), clipped, GRADS)
    other = optax.clip_by_global_norm(bound)
    jax.tree.map(np.testing.assert_array_equal, clipped, other.update(GRADS, other.init(GRADS))[0])


def test_below_the_bound_nothing_changes_bit_for_bit_and_zero_stays_zero():
    link = pj.gradient_clipping(bound=6.0)
    jax.tree.map(np.testing.assert_array_equal, link.update(GRADS, link.init(GRADS))[0], GRADS)
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    jax.tree.map(np.testing.assert_array_equal, link.update(zero, link.init(zero))[0], zero)


def test_in_a_chain_it_clips_before_momentum_and_decay():
    tx = optax.chain(pj.gradient_clipping(bound=1.0), optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9))
    params = jax.tree.map(jnp.ones_like, GRADS)
    state, w, m = tx.init(params), np.ones(5), np.zeros(5)
    flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(GRADS)])
    for _ in range(3):
        updates, state = tx.update(GRADS, state, params, grad_fn=None, key=None)  # foreign arguments pass through
        params = optax.apply_updates(params, updates)
        m = 0.9 * m + flat / NORM + 0.1 * w
        w = w - 0.5 * m
    np.testing.assert_allclose(np.concatenate([np.ravel(p) for p in jax.tree.leaves(params)]), w, rtol=1e-5)


def test_the_bound_must_be_positive():
    with pytest.raises(ValueError, match="gradient_clipping needs bound > 0, got 0"):
        pj.gradient_clipping(bound=0.0)
