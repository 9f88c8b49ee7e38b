"""perturbjax.activation.spatial_dropout: whole channels of a sample, by its position in the data set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

MAPS = pj.line({"stage1": lambda w, x: x + w, "logits": lambda w, a: a.mean([1, 2])})
SEE = pj.Perturbation("stage1", lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")


def value_of(link, x, index, *, key=0):
    """What `link` makes of ones + x [B, H, W, C] at stage1."""
    made = pj.objective(MAPS, pj.chain(link, SEE), num_classes=x.shape[-1])
    y = jnp.zeros(x.shape[0], jnp.int32)
    w = jnp.float32(1)
    out = made(w, made.init(w, x), pj.batch(x, y, index=index), key=jax.random.key(key))[1]
    return np.asarray(out.metrics["seen/value"])


def test_a_channel_is_there_or_not_at_all_positions():
    x = jnp.asarray(np.random.default_rng(0).random((40, 3, 5, 20)), jnp.float32)
    factor = value_of(pj.spatial_dropout(rate=0.3), x, jnp.arange(40)) / (1 + np.asarray(x))
    assert (np.ptp(factor, axis=(1, 2)) < 1e-5).all()
    np.testing.assert_allclose(np.unique(factor.round(4)), [0, 1.4286])
    mask = factor[:, 0, 0]
    assert len({tuple(row) for row in mask.round(3)}) == 40  # each sample has its own draw
    deviation = np.sqrt(0.3 * 0.7 / mask.size)
    assert abs((mask == 0).mean() - 0.3) < 4 * deviation and abs(mask.mean() - 1) < 4 * deviation / 0.7


def test_of_vectors_it_is_dropout_bit_for_bit():
    rng = np.random.default_rng(0)
    line = pj.line({"stage1": lambda w, x: x, "logits": lambda w, a: a @ w})
    x, w, y = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), jnp.ones([8, 3]), jnp.zeros(6, jnp.int32)
    logits = []
    for link in (pj.spatial_dropout(rate=0.4), pj.dropout(rate=0.4, site="stage1")):
        made = pj.objective(line, link, num_classes=3)
        logits.append(made(w, made.init(w, x), pj.batch(x, y))[1].logits)
    np.testing.assert_array_equal(*logits)


def test_the_draw_follows_the_sample_and_the_key():
    x, order = jnp.zeros([6, 2, 2, 9]), np.array([3, 0, 5, 1, 4, 2])
    link, index = pj.spatial_dropout(rate=0.5), 10 + 3 * jnp.arange(6)
    there = value_of(link, x, index)
    np.testing.assert_array_equal(value_of(link, x, index[order]), there[order])
    assert (value_of(link, x, index, key=1) != there).any()


def test_a_rate_outside_the_range_is_an_error():
    with pytest.raises(ValueError, match="spatial_dropout needs 0 <= rate <= 0.999, got 1"):
        pj.spatial_dropout(rate=1.0)
