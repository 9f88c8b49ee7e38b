"""perturbjax.activation.rsc: which features of which samples are muted, against a transcription with numpy's percentiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

B, D, F, C = 12, 5, 9, 4
# Two layers after the features, so that the logit's gradient differs from sample to sample.
MODEL = pj.line(
    {
        "features": lambda w, x: jnp.tanh(x @ w["a"]),
        "hidden": lambda w, a: jnp.tanh(a @ w["b"]),
        "logits": lambda w, z: z @ w["c"],
    }
)


def params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in dict(a=(D, F), b=(F, 6), c=(6, C)).items()}


def data():
    rng = np.random.default_rng(1)
    return rng.normal(size=(B, D)), rng.integers(0, C, B).astype(np.int32)


def softmax(u):
    e = np.exp(u - u.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def transcription(p, x, y, feature_share, batch_share, of):
    """(kept [B, F], logits of the features with the others muted) by hand."""
    a = np.tanh(x @ p["a"])
    forward = lambda a: np.tanh(a @ p["b"]) @ p["c"]
    inner = 1 - np.tanh(a @ p["b"]) ** 2
    true = np.eye(C)[y]
    cotangent = true if of == "logit" else true - softmax(forward(a))
    g = ((cotangent @ p["c"].T) * inner) @ p["b"].T
    mask = g < np.percentile(g, 100 * (1 - feature_share), axis=1, keepdims=True)
    drop = ((softmax(forward(a)) - softmax(forward(a * mask))) * true).sum(1)
    spared = drop < np.percentile(drop, 100 * (1 - batch_share))
    kept = mask | spared[:, None]
    return kept, forward(a * kept)


@pytest.mark.parametrize("of", ["logit", "loss"])
@pytest.mark.parametrize(("feature_share", "batch_share"), [(1 / 3, 1 / 3), (0.5, 0.25), (0.1, 1.0)])
def test_muted_features_and_losses_are_the_transcription(of, feature_share, batch_share):
    (x, y), p = data(), params()
    kept, logits = transcription(p, x, y, feature_share, batch_share, of)
    link = pj.rsc(feature_share=feature_share, batch_share=batch_share, of=of)
    with jax.enable_x64(True):
        made = pj.objective(MODEL, link, num_classes=C)
        (_, out), grad = jax.jit(jax.value_and_grad(made, has_aux=True))(p, made.init(p, x), pj.batch(x, jnp.asarray(y)))
        np.testing.assert_allclose(out.logits, logits, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(out.metrics["rsc/muted"], 1 - kept.mean(), rtol=1e-6)

        def fixed(w):
            """The same mask as a constant: no gradient flows through the choice."""
            u = jnp.tanh((jnp.tanh(x @ w["a"]) * np.where(kept, 1.0, 0.0)) @ w["b"]) @ w["c"]
            return -jnp.mean(jax.nn.log_softmax(u)[jnp.arange(B), y])

        jax.tree.map(lambda g, h: np.testing.assert_allclose(g, h, atol=1e-12), grad, jax.jit(jax.grad(fixed))(p))


def test_the_gradients_of_logit_and_loss_choose_differently():
    """That of the true class's logit is the official code's."""
    (x, y), p = data(), params()
    masks = [transcription(p, x, y, 1 / 3, 1.0, of)[0] for of in ("logit", "loss")]
    assert (masks[0] != masks[1]).any()


def test_a_third_of_the_features_of_a_third_of_the_batch():
    (x, y), p = data(), jax.tree.map(jnp.float32, params())
    made = pj.objective(MODEL, pj.rsc(), num_classes=C)
    out = made(p, made.init(p, jnp.float32(x)), pj.batch(jnp.float32(x), jnp.asarray(y)))[1]
    # Of 9 values those at or above the percentile are 3 (its position, 16/3, lies between two), of 12 samples 4 (22/3).
    np.testing.assert_allclose(out.metrics["rsc/muted"], 3 / 9 * 4 / 12, rtol=1e-6)


def test_muting_what_the_class_leans_on_lowers_its_confidence_where_the_net_is_linear():
    """Muting positive contributions only: features positive, so that a_j·g_j > 0 wherever g_j > 0 is muted."""
    rng = np.random.default_rng(0)
    line = pj.line({"features": lambda w, x: x, "logits": lambda w, a: a @ w})
    w, x, y = rng.normal(size=(F, C)), rng.uniform(0.1, 1, size=(B, F)), rng.integers(0, C, B)
    w[:3] = np.abs(w[:3])
    with jax.enable_x64(True):
        made = pj.objective(line, pj.rsc(feature_share=0.2, batch_share=1.0), num_classes=C)
        out = made(w, made.init(w, x), pj.batch(x, jnp.asarray(y)))[1]
        true = lambda u: np.asarray(u)[np.arange(B), y]
        assert (true(out.logits) < true(x @ w)).all()


@pytest.mark.parametrize("share", [1 / 3, 0.5, 0.05, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 10])
def test_the_top_share_is_numpys_percentile(share, count):
    values = (
        np.random.default_rng(count).permutation(count).astype(np.float32)
    )  # whole numbers apart: no rounding at the percentile
    position = (1 - share) * (count - 1)
    expected = values >= np.ceil(position - 1e-9)
    np.testing.assert_array_equal(pj.top_share(jnp.asarray(values), share=share), expected)
    if abs(position - round(position)) > 1e-6:  # where numpy's own rounding does not matter
        np.testing.assert_array_equal(expected, values >= np.percentile(values, 100 * (1 - share)))


def test_ties_are_all_in_and_a_share_of_zero_is_nobody():
    np.testing.assert_array_equal(pj.top_share(jnp.array([1.0, 1.0, 1.0, 0.0]), share=0.3), [True, True, True, False])
    assert not pj.top_share(jnp.arange(5.0), share=0.0).any()


def test_any_site_will_do():
    maps = pj.line({"stage1": lambda w, x: x, "logits": lambda w, a: a.sum([1, 2]) @ w})
    made = pj.objective(maps, pj.rsc(site="stage1", batch_share=1.0), num_classes=C)
    w, x = jnp.asarray(np.random.default_rng(0).normal(size=(4, C)), jnp.float32), jnp.ones([2, 3, 3, 4])
    out = made(w, made.init(w, x), pj.batch(x, jnp.array([0, 1])))[1]
    assert 12 / 36 <= out.metrics["rsc/muted"] <= 0.5  # the same gradient at all positions: whole channels tie


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="rsc needs 0 <= feature_share <= 1, got 1.5"):
        pj.rsc(feature_share=1.5)
    with pytest.raises(ValueError, match="rsc needs 0 <= batch_share <= 1, got -0.1"):
        pj.rsc(batch_share=-0.1)
    with pytest.raises(ValueError, match="rsc needs of to be one of its names, got 'logits'. Did you mean 'logit'"):
        pj.rsc(of="logits")
