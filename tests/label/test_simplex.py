"""Taxonomy eq. 7 for every perturbation of a label: Σ_c Δy_c = 0 and the result ≥ 0, for any soft target and any prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perturbjax as pj

B, C = 3, 4
LABELS = jnp.array([2, 0, 3])

logits = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=C, max_size=C), min_size=B, max_size=B)
share = st.floats(0, 1, width=32)


def softmax(rows):
    return jax.nn.softmax(jnp.array(rows, jnp.float32))


# (targets y, log p, some class predictions [C, C], two shares) -> (before, after)
ON_TARGETS = {
    "label_smoothing": lambda y, log_p, s, a, b: optax.smooth_labels(y, a),
    "bootstrapping": lambda y, log_p, s, a, b: pj.bootstrapped_targets(y, log_p, weight=a),
    "hard_bootstrapping": lambda y, log_p, s, a, b: pj.bootstrapped_targets(y, log_p, weight=a, kind="hard"),
    "online_label_smoothing": lambda y, log_p, s, a, b: pj.smoothed_online(y, LABELS, s, jnp.arange(C) > 0, weight=a),
    "mix_bootstrapping": lambda y, log_p, s, a, b: pj.mix_bootstrapped(y, log_p, s[LABELS], weight=a, beta=b),
    "adversarial_label_smoothing": lambda y, log_p, s, a, b: pj.adversarially_smoothed(y, log_p, weight=a),
    "disturb_label": lambda y, log_p, s, a, b: pj.disturbed_targets(jax.random.key(0), jnp.arange(B), y, rate=a),
    "proselflc": lambda y, log_p, s, a, b: y + pj.self_trust(log_p, a, turning=b)[:, None] * (jnp.exp(log_p) - y),
}
ON_PREDICTIONS = {
    "forward_correction": lambda log_p, s, a: pj.forward_corrected(log_p, s),
    "symmetric": lambda log_p, s, a: pj.forward_corrected(log_p, pj.noise_matrix("symmetric", C, a)),
    "pair": lambda log_p, s, a: pj.forward_corrected(log_p, pj.noise_matrix("pair", C, a)),
}


@pytest.mark.parametrize("name", ON_TARGETS)
@given(u=logits, v=logits, w=logits, a=share, b=share)
def test_targets_stay_on_the_simplex(name, u, v, w, a, b):
    targets = softmax(v)
    of_class = jnp.concatenate([softmax(w), jnp.full([1, C], 1 / C)])
    after = ON_TARGETS[name](targets, jax.nn.log_softmax(jnp.array(u, jnp.float32)), of_class, a, b)
    np.testing.assert_allclose((after - targets).sum(1), 0, atol=2e-6)
    assert (after >= 0).all()


@pytest.mark.parametrize("name", ON_PREDICTIONS)
@given(u=logits, w=logits, a=share)
def test_predictions_stay_on_the_simplex(name, u, w, a):
    log_p = jax.nn.log_softmax(jnp.array(u, jnp.float32))
    transition = jnp.concatenate([softmax(w), jnp.full([1, C], 1 / C)])
    after = jnp.exp(ON_PREDICTIONS[name](log_p, transition, a))
    np.testing.assert_allclose((after - jnp.exp(log_p)).sum(1), 0, atol=2e-6)
    assert (after >= 0).all()
