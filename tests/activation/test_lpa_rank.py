"""perturbjax.activation.lpa_rank: against numpy's SVD, the rank of the perturbation, the caps and their messages."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.activation import lpa_rank
from perturbjax.activation.lpa_rank import first_span, low_rank, rank_at, right_vectors

C, B, H, W, D = 3, 9, 2, 3, 5
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 1], np.int32)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def model():
    """Features maps [B, 2, 3, 5] at stage1, a vector of them at features."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(4, H * W * D)), "b": rng.normal(size=(H * W * D, 6)), "c": rng.normal(size=(6, C))}
    pieces = {
        "stage1": lambda w, x: (x @ w["a"]).reshape(-1, H, W, D),
        "features": lambda w, a: jnp.tanh(a).reshape(a.shape[0], -1) @ w["b"],
        "logits": lambda w, a: jnp.tanh(a) @ w["c"],
    }
    return params, pieces, rng.normal(size=(B, 4))


def delta_of(site, **settings):
    """[B, ...], as the pass adds it."""
    params, pieces, x = model()
    seen = pj.Perturbation(site, lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    settings = dict(bound=3.0, site=site, direction=np.array([1.0, -1.0, 1.0])) | settings

    def run(links):
        made = pj.objective(pieces, links, num_classes=C)
        return jax.jit(lambda w: made(w, made.init(w, x), pj.batch(x, jnp.asarray(LABELS)))[1])(params)

    out = run(pj.chain(pj.lpa(**settings), seen))
    return np.asarray(out.metrics["seen/value"] - run(seen).metrics["seen/value"]), out


def truncated(matrix, k):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :k] * s[..., None, :k]) @ v[..., :k, :]


@pytest.mark.parametrize("shape", [(C, 2, 3, 5), (C, 2, 2, 5), (C, 7, 3)], ids=["tall", "wide", "no second axis"])
def test_each_class_s_gradient_is_cut_as_its_svd(float64, shape):
    g = np.random.default_rng(1).normal(size=shape) * np.array([1.0, 1e-30, 1e20]).reshape(-1, *(1,) * (len(shape) - 1))
    for k in (1, 2, 3):
        found = low_rank(jnp.asarray(g), k)
        wanted = truncated(g.reshape(C, -1, shape[-1]), k).reshape(shape)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10 * np.abs(theirs).max())


def test_at_a_flat_site_the_classes_share_the_directions(float64):
    g = np.random.default_rng(1).normal(size=(C, 6))
    np.testing.assert_allclose(low_rank(jnp.asarray(g), 2), truncated(g, 2), rtol=1e-9)
    assert low_rank(jnp.asarray(g), 2).shape == g.shape


def test_a_matrix_of_lower_rank_and_a_zero_one_stay_themselves():
    g = np.zeros((C, 2, 2, 5), np.float32)  # class 0 is absent
    g[1] = np.outer(np.arange(4), np.arange(5)).reshape(2, 2, 5)  # rank 1
    g[2] = np.random.default_rng(0).normal(size=(2, 2, 5))
    found = low_rank(jnp.asarray(g), 4)
    np.testing.assert_allclose(found, g, atol=1e-4)
    np.testing.assert_array_equal(found[0], 0)
    vectors = right_vectors(jnp.asarray(g).reshape(C, 4, 5), 4)
    np.testing.assert_allclose(np.einsum("cdi,cdj->cij", vectors, vectors)[2], np.eye(4), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors[1], axis=0), [0, 0, 0, 1], atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (3, 3)], ids=["tall", "wide", "square"])
def test_directions_that_a_matrix_does_not_have_are_zero(shape):
    """Rank 1, and rank 0: no vector of the null space, which rounding would choose, takes part in later steps."""
    rng = np.random.default_rng(2)
    one = np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1])).astype(np.float32)
    vectors = np.asarray(right_vectors(jnp.asarray(np.stack([one, 0 * one])), 2))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [[0, 1], [0, 0]], atol=1e-5)
    np.testing.assert_allclose(np.abs(one @ vectors[0][:, 1]), np.linalg.norm(one, axis=1), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_the_perturbation_of_each_class_has_rank_k_after_all_steps(float64, k):
    """Three steps, each along another gradient; the ball of radius γ·ε is reached all the same."""
    delta, _ = delta_of("stage1", rank=k)
    full, _ = delta_of("stage1")
    of_class = lambda d: np.stack([d[np.flatnonzero(LABELS == c)[0]] for c in range(C)]).reshape(C, H * W, D)
    s, s_full = (np.linalg.svd(of_class(d), compute_uv=False) for d in (delta, full))
    assert (s[:, k:] < 1e-10).all() and (s[:, k - 1] > 1e-2).all() and (s_full[:, k] > 1e-2).all()
    np.testing.assert_allclose(np.linalg.norm(delta.reshape(B, -1), axis=1), 3.0 * 0.7, rtol=0.15)


def test_at_features_all_classes_move_in_k_directions(float64):
    delta, _ = delta_of("features", rank=2)
    s = np.linalg.svd(delta, compute_uv=False)
    assert s[1] > 1e-2 and (s[2:] < 1e-10).all()
    assert np.linalg.svd(delta_of("features")[0], compute_uv=False)[2] > 1e-2


def test_one_step_goes_along_the_truncated_gradient(float64):
    """Eq. 12 with the left vectors and the signs: δ_c = s_c κ Ĝ_c for step="raw"."""
    params, pieces, x = model()
    a = np.asarray(pieces["stage1"](params, x))
    head = lambda a: jax.nn.log_softmax(pieces["logits"](params, pieces["features"](params, a)))
    g = np.asarray(jax.grad(lambda a: -head(a)[np.arange(B), LABELS].sum())(jnp.asarray(a)))
    mean = np.stack([g[LABELS == c].mean(0) for c in range(C)]).reshape(C, H * W, D)
    wanted = 0.3 * np.array([1.0, -1.0, 1.0])[:, None, None] * truncated(mean, 2)
    delta, _ = delta_of("stage1", rank=2, step="raw", project=False, step_size=0.3, num_steps=1)
    np.testing.assert_allclose(delta.reshape(B, H * W, D), wanted[LABELS], rtol=1e-6, atol=1e-9)  # step sizes are float32


def test_a_share_counts_channels_and_full_rank_is_no_restriction():
    full, _ = delta_of("stage1")
    np.testing.assert_array_equal(delta_of("stage1", rank=D)[0], full)
    np.testing.assert_array_equal(delta_of("stage1", rank=1.0)[0], full)
    np.testing.assert_array_equal(delta_of("stage1", rank=0.4)[0], delta_of("stage1", rank=2)[0])
    assert [rank_at(r, (8, 8, 64), 10, "s") for r in (0.25, 1e-3, 16, 63)] == [16, 1, 16, 63]


def test_plus_still_raises_and_minus_still_lowers_the_loss():
    params, pieces, x = model()
    made = pj.objective(pieces, (), num_classes=C)
    plain = made(params, (), pj.batch(x, jnp.asarray(LABELS)))[1].losses
    change = np.asarray(delta_of("stage1", rank=1, bound=0.5)[1].losses - plain)
    assert all(sign * change[LABELS == c].mean() > 1e-3 for c, sign in enumerate((1, -1, 1)))


def test_more_than_the_matrix_has_is_cut_with_one_note(caplog):
    lpa_rank._note.cache_clear()
    with caplog.at_level(logging.WARNING, "perturbjax.activation.lpa_rank"):
        for _ in range(3):
            assert rank_at(16, (64,), 10, "features") == 10  # d/4 of 64 features, ten classes
        assert rank_at(0.9, (2, 3, 20), 10, "stage3") == 6
    assert [record.getMessage() for record in caplog.records] == [
        "lpa: rank 16 at site features is 10, the number of classes",
        "lpa: rank 18 at site stage3 is 6, the number of positions",
    ]


@pytest.mark.parametrize("rank", [0, -2, 0.0, -0.5, 1.5, True, "half", np.nan])
def test_what_is_no_rank_is_an_error(rank):
    with pytest.raises(ValueError, match=r"lpa needs rank to be a number of directions >= 1, or a share .*Write rank=8"):
        pj.lpa(rank=rank)


def test_more_than_the_channels_is_an_error_before_anything_runs():
    params, pieces, x = model()
    made = pj.objective(pieces, pj.lpa(site="stage1", rank=6), num_classes=C)
    with pytest.raises(ValueError, match="lpa needs rank <= 5, the channels at the site 'stage1', got 6. Write rank=5"):
        made.init(params, x)
    with pytest.raises(ValueError, match="lpa needs step='unit' or 'raw' with a rank, got 'sign'"):
        pj.lpa(rank=2, step="sign")


def test_on_the_command_line_the_rank_is_structure():
    from perturbjax import spec, taxonomy

    split = lambda text: spec.split_numbers(spec.parse_chain(text), taxonomy.registry(), taxonomy.helpers())
    (quarter, numbers), (plain, same), (eight, _) = split("lpa(rank=0.25)"), split("lpa"), split("lpa(rank=8)")
    assert numbers == same and dict(quarter[0].kwargs)["rank"] == 0.25 and type(dict(eight[0].kwargs)["rank"]) is int
    assert "rank" not in dict(plain[0].kwargs) or dict(plain[0].kwargs)["rank"] is None


def test_the_span_is_that_of_the_first_gradient():
    one, two = np.random.default_rng(0).normal(size=(2, C, 6, 4)).astype(np.float32)
    span = first_span(1, C)
    np.testing.assert_allclose(span(jnp.asarray(one)), truncated(one, 1), atol=1e-4)
    v = np.linalg.svd(one)[2][:, :1]  # [C, 1, D]
    np.testing.assert_allclose(span(jnp.asarray(two)), two @ np.swapaxes(v, 1, 2) @ v, atol=1e-4)
    assert first_span(None, C) is None


def test_only_classes_of_the_batch_are_decomposed():
    """Of 50 classes 3 are there: the same span as of all of them, from decompositions of 4 matrices."""
    g = np.zeros((50, 6, 4), np.float32)
    g[[3, 17, 42]] = np.random.default_rng(0).normal(size=(3, 6, 4))
    few = lambda g: lpa_rank.batch_vectors(g, 2, 4)
    found, all_of_them = few(jnp.asarray(g)), right_vectors(jnp.asarray(g), 2)
    np.testing.assert_allclose(_projection(found), _projection(all_of_them), atol=1e-5)
    assert "f32[4,4,4]" in str(jax.make_jaxpr(few)(g)) and "f32[50,4,4]" not in str(jax.make_jaxpr(few)(g))
    np.testing.assert_array_equal(lpa_rank.batch_vectors(jnp.asarray(g), 2, 50), all_of_them)


def _projection(v):
    return np.asarray(v) @ np.swapaxes(np.asarray(v), 1, 2)
