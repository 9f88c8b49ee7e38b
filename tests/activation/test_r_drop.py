"""perturbjax.activation.r_drop: two passes with known masks against the paper's equation, and nothing where there is no dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B, D, H = 4, 6, 5, 7
MODEL = {"stage1": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, x: x @ w["b"]}
KEY, INDEX = jax.random.key(9), 20 + 3 * jnp.arange(B)


def problem():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(D, H)), "b": rng.normal(size=(H, C))}
    return params, rng.normal(size=(B, D)), rng.integers(0, C, B).astype(np.int32), rng.uniform(0.5, 2, B)


def evaluate(links, *, model=MODEL, weights=None, grad=False):
    params, x, y, _ = problem()
    params = jax.tree.map(jnp.asarray, params)
    made = pj.objective(model, links, num_classes=C)
    loss = lambda p: made(
        p, made.init(p, jnp.asarray(x)), pj.batch(jnp.asarray(x), jnp.asarray(y), index=INDEX, weights=weights), key=KEY
    )
    return jax.jit(jax.value_and_grad(loss, has_aux=True) if grad else loss)(params)


def masks(rate, number):
    """Of the dropout that is link `number`, in the first and in the second pass: the keys as core.py makes them."""
    second = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)  # R-Drop is link 0
    keys = (jax.random.fold_in(key, number) for key in (KEY, second))
    return [np.asarray(pj.dropout_mask(key, INDEX, (H,), rate=rate), np.float64) for key in keys]


def paper(params, masked, alpha, weights, share, xp=np):
    """Eq. 4 with both KLs as they are written there: (losses [B], symmetric divergence [B])."""
    _, x, y, _ = problem()
    logs = []
    for mask in masked:
        u = (xp.tanh(x @ params["a"]) * mask) @ params["b"]
        logs.append(u - xp.log(xp.exp(u).sum(1, keepdims=True)))
    (p, q), ce = (xp.exp(log) for log in logs), [-log[np.arange(B), y] for log in logs]
    log_p, log_q = logs
    both = (p * (log_p - log_q)).sum(1) + (q * (log_q - log_p)).sum(1)
    return weights * (share * (ce[0] + ce[1]) + alpha / 2 * both), both / 2


@pytest.mark.parametrize("ce, share", [("sum", 1.0), ("mean", 0.5)])
def test_losses_and_gradients_are_the_paper_s(ce, share):
    params, _, _, weights = problem()
    with jax.enable_x64(True):
        chain = pj.chain(pj.r_drop(alpha=0.7, ce=ce), pj.dropout(rate=0.4, site="stage1"))
        (value, out), grads = evaluate(chain, weights=weights, grad=True)
        masked = masks(0.4, 2)
        losses, divergence = paper(params, masked, 0.7, weights, share)
        np.testing.assert_allclose(out.losses, losses, rtol=1e-6)  # masks are float32: 1/0.6
        np.testing.assert_allclose(out.metrics["r_drop/divergence"], divergence.mean(), rtol=1e-6)
        assert divergence.mean() > 0.01
        expected = jax.jit(jax.grad(lambda p: paper(p, masked, 0.7, weights, share, jnp)[0].mean()))(params)
        jax.tree.map(lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-8), grads, expected)


def test_without_dropout_both_passes_are_plain_training():
    _, plain = evaluate(())
    for alpha in (0.0, 5.0):
        _, mean = evaluate(pj.r_drop(alpha=alpha, ce="mean"))
        np.testing.assert_allclose(mean.losses, plain.losses, rtol=1e-6)
        _, both = evaluate(pj.r_drop(alpha=alpha))
        np.testing.assert_allclose(both.losses, 2 * plain.losses, rtol=1e-6)
        np.testing.assert_allclose(both.metrics["r_drop/divergence"], 0, atol=1e-7)


def test_dropout_before_its_site_is_the_same_in_both_passes():
    before = pj.chain(pj.dropout(rate=0.4, site="input"), pj.r_drop(site="stage1"))
    _, out = evaluate(before)
    np.testing.assert_allclose(out.metrics["r_drop/divergence"], 0, atol=1e-7)
    behind = pj.chain(pj.r_drop(site="stage1"), pj.dropout(rate=0.4, site="stage1"))
    assert evaluate(behind)[1].metrics["r_drop/divergence"] > 0.01


def test_the_model_s_own_dropout_draws_anew():
    def dropped(w, x, stats, *, train, key):
        return (jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0) if train else x), stats

    pieces = {"stage1": dropped, "logits": lambda w, x, stats, **_: (x @ w["a"] @ w["b"], stats)}
    _, out = evaluate(pj.r_drop(), model=pj.line(pieces, stateful=True))
    assert out.metrics["r_drop/divergence"] > 0.01


def probe():
    look = lambda flow, rest, state, context: (flow, state, {"losses": rest(flow.value)})
    return pj.Perturbation("input", lambda context: (), look, search=True, name="probe")


def test_a_search_before_it_sees_plain_losses_and_one_behind_it_what_the_first_pass_ends_with():
    seen = lambda *links: evaluate(pj.chain(*links, pj.dropout(rate=0.4, site="stage1")))[1]
    none, some = (seen(probe(), pj.r_drop(alpha=alpha)) for alpha in (0.0, 3.0))
    np.testing.assert_array_equal(none.metrics["probe/losses"], some.metrics["probe/losses"])
    assert (some.losses > none.losses).all()
    none, some = (seen(pj.r_drop(alpha=alpha), probe()) for alpha in (0.0, 3.0))
    first, both = none.metrics["probe/losses"], some.metrics["probe/losses"]
    np.testing.assert_allclose((both - first).mean(), 3 * some.metrics["r_drop/divergence"], rtol=1e-4)
    np.testing.assert_allclose(some.losses - none.losses, both - first, rtol=1e-4, atol=1e-5)


def test_the_divergence_is_half_of_both_kl():
    rng = np.random.default_rng(1)
    u, v = rng.normal(size=(2, 5, C)) * 3
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (u, v))
    expected = ((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)) / 2
    np.testing.assert_allclose(pj.symmetric_divergence(jnp.float32(u), jnp.float32(v)), expected, rtol=1e-5)
    np.testing.assert_array_equal(pj.symmetric_divergence(jnp.float32(u), jnp.float32(u)), 0)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="r_drop needs alpha >= 0, got -1"):
        pj.r_drop(alpha=-1.0)
    with pytest.raises(ValueError, match="r_drop needs ce to be one of its names, got 'half'"):
        pj.r_drop(ce="half")
