"""perturbjax.label.disturb_label: how often, to what, by whose key, and label smoothing on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.label.problem import C, batches, losses, run, weights


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_labels_are_redrawn_at_the_rate_and_uniformly():
    y = jax.nn.one_hot(jnp.zeros(20_000, int), C)
    after = pj.disturbed_targets(jax.random.key(0), jnp.arange(20_000), y, rate=0.4)
    np.testing.assert_array_equal(jnp.sort(after, axis=1), jnp.sort(y, axis=1))  # one-hot still
    # Class 0 is kept, or drawn again, with probability 0.6 + 0.4/C; the others 0.4/C each.
    np.testing.assert_allclose(after.mean(0), [0.7, 0.1, 0.1, 0.1], atol=0.01)


def test_on_average_it_is_label_smoothing():
    y, keys = jnp.eye(C), jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: pj.disturbed_targets(key, jnp.arange(C), y, rate=0.3))(keys)
    np.testing.assert_allclose(drawn.mean(0), 0.7 * np.eye(C) + 0.3 / C, atol=0.03)


def test_losses_are_those_of_the_drawn_targets():
    (x, y, index), w = next(batches(1)), weights()
    out, _ = run(w, x, y, pj.disturb_label(rate=0.5), key=3, index=jnp.asarray(index))
    key = jax.random.fold_in(jax.random.key(3), 0)
    targets = pj.disturbed_targets(key, jnp.asarray(index), jnp.eye(C)[y], rate=0.5)
    np.testing.assert_allclose(out.losses, losses(x @ w, np.asarray(targets)), rtol=1e-9)
    assert (np.asarray(targets) != np.eye(C)[y]).any()


def test_draws_belong_to_the_position_in_the_data_set_and_change_with_the_step():
    y, index, key = jax.nn.one_hot(jnp.arange(100) % C, C), jnp.arange(100), jax.random.key(1)
    draw = lambda key, index, y: np.asarray(pj.disturbed_targets(key, index, y, rate=0.5))
    first = draw(key, index, y)
    np.testing.assert_array_equal(draw(key, index[::-1], y[::-1]), first[::-1])
    assert (draw(jax.random.key(2), index, y) != first).any(1).mean() > 0.2


def test_the_limits():
    y = jnp.array([[0.3, 0.7], [1.0, 0.0]])
    np.testing.assert_array_equal(pj.disturbed_targets(jax.random.key(0), jnp.arange(2), y, rate=0.0), y)
    with pytest.raises(ValueError, match="disturb_label needs 0 <= rate <= 1, got 1.2"):
        pj.disturb_label(rate=1.2)
