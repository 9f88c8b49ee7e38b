"""perturbjax.activation.dropout: inverted scaling, one mask per position in the data set, the same mask wherever the pass reruns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B, D = 3, 6, 5
MODEL = {"features": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, x: x @ w["b"]}


def problem():
    a, b, c, d = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(a, [4, D]), "b": jax.random.normal(b, [D, C])}
    return params, jax.random.normal(c, [B, 4]), jax.random.randint(d, [B], 0, C)


def see(where="features"):
    return pj.Perturbation(where, lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")


def run(links, params, x, y, index, key=0):
    made = pj.objective(MODEL, links, num_classes=C)
    grads, out = jax.grad(made, has_aux=True)(
        params, made.init(params, x), pj.batch(x, y, index=index), key=jax.random.key(key)
    )
    return out, grads


def test_entries_are_zero_or_scaled_up():
    params, x, y = problem()
    out, grads = run(pj.chain(pj.dropout(rate=0.3), see()), params, x, y, jnp.arange(B))
    clean, value = np.tanh(x @ params["a"]), out.metrics["seen/value"]
    kept = np.asarray(value) != 0
    np.testing.assert_allclose(value, np.where(kept, clean / 0.7, 0), rtol=1e-6)
    assert 0 < kept.sum() < kept.size and len({tuple(row) for row in kept}) > 1  # a mask for each sample
    np.testing.assert_allclose(out.logits, value @ params["b"], rtol=1e-5, atol=1e-6)
    h = jax.nn.softmax(out.logits) - jax.nn.one_hot(y, C)
    pulled = x.T @ (h @ params["b"].T * np.where(kept, 1 / 0.7, 0) * (1 - clean**2)) / B  # masked entries pass no gradient
    np.testing.assert_allclose(grads["a"], pulled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_mean_stays_and_the_rate_is_met(rate):
    mask = pj.dropout_mask(jax.random.key(1), jnp.arange(200), (100,), rate=rate)
    assert mask.shape == (200, 100) and mask.dtype == jnp.float32
    deviation = np.sqrt(rate * (1 - rate) / mask.size)
    assert abs(np.mean(mask == 0) - rate) < 4 * deviation
    assert abs(np.mean(mask) - 1) < 4 * deviation / (1 - rate)
    np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)], rtol=1e-6)


def test_permuting_the_batch_permutes_the_masks():
    params, x, y = problem()
    index, order = 100 + 7 * jnp.arange(B), np.array([3, 0, 5, 1, 4, 2])
    link = pj.chain(pj.dropout(), see())
    there, _ = run(link, params, x, y, index)
    here, _ = run(link, params, x[order], y[order], index[order])
    np.testing.assert_array_equal(here.metrics["seen/value"], there.metrics["seen/value"][order])
    elsewhere, _ = run(link, params, x, y, index + 1)
    assert (elsewhere.metrics["seen/value"] != there.metrics["seen/value"]).any()


def test_a_step_s_key_draws_anew():
    params, x, y = problem()
    masks = [run(pj.chain(pj.dropout(), see()), params, x, y, jnp.arange(B), key)[0].metrics["seen/value"] for key in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


def test_two_dropouts_of_a_chain_draw_their_own_masks():
    params, x, y = problem()
    out, _ = run(
        pj.chain(pj.dropout(site="input"), see("input"), pj.dropout(site="input"), see("input")), params, x, y, jnp.arange(B)
    )
    twice = np.asarray(out.metrics["seen/value@input#2"] / x)  # the second of the two that look at the input
    np.testing.assert_allclose(np.unique(twice.round(5)), [0, 4])
    assert 0.05 < (twice > 0).mean() < 0.45  # a quarter; half if both masks were one


def test_a_search_before_it_sees_the_same_masks():
    """rest(value) of an earlier site gives the losses that the outer pass ends with."""

    def search(flow, rest, state, context):
        return flow, state, {"losses": rest(flow.value)}

    params, x, y = problem()
    probe = pj.Perturbation("input", lambda context: (), search, search=True, name="probe")
    out, _ = run(pj.chain(probe, pj.dropout()), params, x, y, jnp.arange(B))
    np.testing.assert_allclose(out.metrics["probe/losses"], out.losses, rtol=1e-6)


def test_rates_outside_the_range_are_errors():
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"dropout needs 0 <= rate <= 0.999, got {rate}"):
            pj.dropout(rate=rate)
