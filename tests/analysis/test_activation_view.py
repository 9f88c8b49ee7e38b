"""perturbjax.analysis.activation_view: δ of each kind of method against formulas written out, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.analysis.activation_view import activation_variation, activation_variations

C, B, D = 4, 9, 5
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2], np.int32)  # class 3 is absent
INDEX = np.arange(B, dtype=np.int32) + 7
KEY = jax.random.key(3)
MODEL = {"stage1": lambda w, x: x @ w["a"], "features": lambda w, a: jnp.tanh(a), "logits": lambda w, a: a @ w["c"]}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problem():
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=(D, D)), "c": rng.normal(size=(D, C))}, rng.normal(size=(B, D))


def view(methods, **given):
    params, x = problem()
    batch = pj.batch(jnp.asarray(x), jnp.asarray(LABELS), index=jnp.asarray(INDEX))
    settings = dict(site="stage1", num_classes=C, class_counts=np.array([5, 9, 3, 1]), num_examples=30, key=KEY) | given
    return jax.jit(lambda w: activation_variation(methods, MODEL, w, batch, **settings))(params)


def losses(params, a, targets=None):
    u = np.tanh(a) @ params["c"]
    log_p = u - np.log(np.exp(u).sum(1, keepdims=True))
    return -(log_p * (np.eye(C)[LABELS] if targets is None else targets)).sum(1)


def slopes(params, a):
    """∂ℓ/∂a at stage1, by the chain rule."""
    u = np.tanh(a) @ params["c"]
    p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    return (p - np.eye(C)[LABELS]) @ params["c"].T * (1 - np.tanh(a) ** 2)


def check(found, moved, targets=None, rtol=1e-9):
    """The view against ã [B, D], class by class."""
    params, x = problem()
    a = x @ params["a"]
    for c in range(3):
        own = LABELS == c
        length = lambda v: np.linalg.norm(v[own], axis=1).mean()
        np.testing.assert_allclose(found.norm[c], length(a), rtol=1e-9)
        np.testing.assert_allclose(found.relative[c], length(moved - a) / length(a), rtol=rtol, atol=1e-12)
        np.testing.assert_allclose(found.gain[c], length(moved) / length(a) - 1, rtol=rtol, atol=1e-9)
        np.testing.assert_allclose(
            found.loss_change[c], (losses(params, moved, targets) - losses(params, a))[own].mean(), rtol=10 * rtol, atol=1e-9
        )
    np.testing.assert_array_equal(found.present, [True, True, True, False])
    assert [float(values[3]) for values in found[1:]] == [0, 0, 0, 0]


def test_dropout_is_the_activation_times_its_mask():
    params, x = problem()
    mask = np.asarray(pj.dropout_mask(jax.random.fold_in(KEY, 0), jnp.asarray(INDEX), (D,), rate=0.4), np.float64)
    check(view(pj.dropout(rate=0.4, site="stage1")), x @ params["a"] * mask)


def test_adversarial_feature_perturbation_climbs_each_sample_s_own_slope():
    """One step of length ε (LPA eq. 5): the same length for every class, so that the relative variation is ε/E‖a‖."""
    params, x = problem()
    a = x @ params["a"]
    g = slopes(params, a)
    at = pj.adversarial_training(
        site="stage1", norm="l2", step="unit", bound=0.5, step_size=0.5, num_steps=1, random_starts=False
    )
    found = view(at)
    check(found, a + 0.5 * g / np.linalg.norm(g, axis=1, keepdims=True))
    np.testing.assert_allclose(found.relative[:3] * found.norm[:3], 0.5, rtol=1e-9)
    assert (found.loss_change[:3] > 0.01).all()


def test_manifold_mixup_moves_towards_the_partner():
    """δ_i = (1 − λ)(a_j − a_i), eq. 4 (whose λ is 1 − λ here); the loss is that of the mixed targets."""
    params, x = problem()
    a = x @ params["a"]
    weight, partner = pj.draw_mixing(jax.random.split(jax.random.fold_in(KEY, 0))[1], B, alpha=2.0)
    share, other = 1 - float(weight), np.asarray(partner)
    assert 0.02 < share < 0.98
    y = np.eye(C)[LABELS]
    check(view(pj.manifold_mixup(sites=("stage1",))), a + share * (a[other] - a), y + share * (y[other] - y), rtol=1e-6)


def test_lpa_moves_a_class_together():
    params, x = problem()
    a, sign, eps = x @ params["a"], np.array([1.0, -1.0, 1.0, 1.0]), np.array([0.5, 0.25, 1.0, 1.0])
    g = slopes(params, a)
    mean = np.stack([g[LABELS == c].mean(0) if c < 3 else np.ones(D) for c in range(C)])
    delta = (sign * eps)[:, None] * mean / np.linalg.norm(mean, axis=1, keepdims=True)
    found = view(pj.lpa(site="stage1", bound=eps, beta=1.0, direction=sign, num_steps=1))
    check(found, a + delta[LABELS])
    assert found.loss_change[0] > 0 > found.loss_change[1]


def test_what_acts_elsewhere_counts_as_far_as_it_gets_to_the_site():
    """A shift of the input arrives through the weights; behind the site nothing does, but the loss still changes."""
    params, x = problem()
    shift = pj.Perturbation("input", lambda c: (), lambda flow, rest, s, c: (flow._replace(value=flow.value + 0.3), s, {}))
    check(view([shift, optax.identity()]), (x + 0.3) @ params["a"])
    behind = view(pj.lpa(site="features", bound=0.5, direction=1.0))
    np.testing.assert_array_equal(behind.relative, 0.0)
    assert (behind.loss_change[:3] > 1e-3).all()
    for none in ((), pj.lpa(site="stage1", bound=0.0, direction=1.0)):
        check(view(none), x @ params["a"])


def test_a_method_with_more_samples_than_the_batch_is_an_error():
    double = lambda x: jnp.concatenate([x, x])
    twice = lambda flow, rest, s, c: (
        flow._replace(**{n: double(getattr(flow, n)) for n in ("value", "labels", "targets", "weights", "index", "penalty")}),
        s,
        {},
    )
    with pytest.raises(
        ValueError, match=r"needs methods that keep the samples of the batch, got \(18, 5\) at 'stage1' for \(9, 5\)"
    ):
        view(pj.Perturbation("input", lambda c: (), twice))


def test_over_a_data_set_statistics_are_gathered_first():
    """Without the first pass a split by accuracy leaves every class alone; at one batch the ratios are that batch's."""
    params, x = problem()
    given = dict(site="stage1", num_classes=C, batch_size=B)
    lpa = activation_variations(pj.lpa(site="stage1", bound=0.5), MODEL, params, x, LABELS, **given)
    np.testing.assert_allclose(lpa.relative[:3] * lpa.norm[:3], 0.35, rtol=0.2)  # 0.5·β, nearly reached by three steps
    assert np.abs(lpa.gain[:3]).min() > 1e-3 and all(np.isnan(values[3]) for values in lpa)
    nothing = activation_variations((), MODEL, params, x, LABELS, **given)
    np.testing.assert_array_equal(nothing.relative[:3], 0)


def test_over_a_data_set_an_lpa_with_several_sites_perturbs_all_batches_but_the_one_where_it_compares():
    """Steps go on from batch to batch: with all of them the first of an epoch there would be nothing to see. None compiles anew."""
    rng, traced = np.random.default_rng(1), []
    params, _ = problem()
    x, labels = rng.normal(size=(32, D)), np.arange(32) % 3
    model = {**MODEL, "features": lambda w, a: (traced.append(1), MODEL["features"](w, a))[1]}

    def relative(site, batches):
        method = pj.lpa(site=site, bound=0.5, beta=1.0, direction=1.0, every=3)
        given = dict(site="features", num_classes=C, batch_size=8, batches=batches)
        del traced[:]
        return activation_variations(method, model, params, x, labels, **given).relative[:3], len(traced)

    (found, first), (fewer, second) = (relative(("stage1", "features"), batches) for batches in (None, 2))
    assert first == second and (fewer > 0.02).all()
    np.testing.assert_allclose(found / relative("features", None)[0], 3 / 4, atol=0.1)  # the first of four is left alone
