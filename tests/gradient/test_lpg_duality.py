"""perturbjax.gradient.lpg_duality and lpg_generalization: Propositions 1 and 2, and where LPG goes and LPL can't."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.gradient.lpg_problem import (
    COUNTS,
    EPS,
    NET,
    SIGN,
    B,
    C,
    double,
    forward,
    hidden,
    jacobians,
    logit_gradients,
    problem,
    quick,
    softmax,
)


@pytest.fixture
def float64():
    with double():
        yield


def setting(seed=0):
    params, x, y = problem(seed)
    u = np.asarray(forward(params, x))
    return params, x, y, u, softmax(u), logit_gradients(u, y)


def hessians(p):
    """diag(p) − p pᵀ of every sample: [B, C, C]."""
    return np.einsum("bi,ij->bij", p, np.eye(C)) - np.einsum("bi,bj->bij", p, p)


# ---------------------------------------------------------------------------------------------------------- Proposition 1


def test_it_is_the_hessian_of_the_cross_entropy_times_delta(float64):
    _, _, y, u, p, _ = setting()
    delta = np.random.default_rng(3).normal(size=(B, C))
    ours = pj.logit_gradient_of(jnp.asarray(delta), jnp.asarray(p))
    ce = optax.softmax_cross_entropy_with_integer_labels
    second = quick(jax.vmap(jax.hessian(lambda u, y: ce(u, y))))(jnp.asarray(u), jnp.asarray(y))
    np.testing.assert_allclose(ours, np.einsum("bij,bj->bi", second, delta), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(pj.logit_gradient_of(jnp.asarray(delta[0]), jnp.asarray(p[0])), ours[0], rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_error_of_the_logit_gradient_falls_with_the_square_of_delta(float64, seed):
    """Halved δ, a quarter of the error; and the error of the parameter gradient likewise (eqs. 22–23)."""
    params, x, y, u, p, h = setting(seed)
    delta, j = np.random.default_rng(seed).normal(size=(B, C)), jacobians(forward, params, x)

    def errors(scale):
        moved = logit_gradients(u + scale * delta, y)
        first = np.asarray(pj.logit_gradient_of(jnp.asarray(scale * delta), jnp.asarray(p)))
        in_logits = moved - h - first
        return np.linalg.norm(in_logits), np.linalg.norm(np.einsum("bpc,bc->p", j, in_logits)), np.linalg.norm(first)

    for k in range(2):
        at = [errors(0.01 * 2.0**-n) for n in range(4)]
        ratios = [at[n][k] / at[n + 1][k] for n in range(3)]
        np.testing.assert_allclose(ratios, 4, rtol=0.05)
    assert errors(0.01)[0] < 0.01 * errors(0.01)[2]


def test_lpl_s_own_perturbation_is_a_perturbation_of_the_gradient_to_first_order(float64):
    _, _, y, u, p, h = setting()
    gap = {}
    for bound in (0.02, 0.01):
        delta = pj.lpl_delta(jnp.asarray(u), jnp.asarray(y), direction=SIGN, bound=bound, step_size=bound)
        change = logit_gradients(u + np.asarray(delta), y) - h
        gap[bound] = np.linalg.norm(change - pj.logit_gradient_of(delta, jnp.asarray(p)))
        assert gap[bound] < 0.02 * np.linalg.norm(change)
    np.testing.assert_allclose(gap[0.02] / gap[0.01], 4, rtol=0.05)


def test_the_closed_form_is_one_of_lpl_s_shifts(float64):
    """It sums to zero, so δ/p is a shift of the logits that makes it: in both forms, for classes and for samples."""
    _, _, y, _, p, h = setting()
    for options in (dict(), dict(form="scale"), dict(granularity="sample"), dict(clamp=False)):
        delta = pj.lpg_delta(jnp.asarray(h), jnp.asarray(y), direction=SIGN, bound=EPS, **options)
        np.testing.assert_allclose(pj.logit_gradient_of(delta / p, jnp.asarray(p)), delta, rtol=1e-9, atol=1e-12)
        assert np.abs(delta).max() > 0.05


def outside(delta, p):
    """How far every sample's δ is from all that LPL can make of it, by least squares: [B]."""
    gaps = []
    for matrix, d in zip(hessians(p), np.asarray(delta)):
        best, *_ = np.linalg.lstsq(matrix, d, rcond=None)
        gaps.append(np.linalg.norm(matrix @ best - d))
    return np.array(gaps)


def test_lpg_pgd_is_strictly_more_expressive(float64):
    """Sign steps leave the range of diag(p) − ppᵀ along (1, …, 1), unit steps with the whole network's Jacobian too; unit steps on the
    head's don't, as b = mean h_i (…) sums to zero."""
    params, x, y, _, p, h = setting()
    pull = jax.vjp(lambda w: forward(w, x), jax.tree.map(jnp.asarray, params))[1]
    kw = dict(direction=SIGN, bound=EPS)
    head = lambda step: quick(lambda h: pj.lpg_head_delta(h, hidden(params, x), y, step=step, **kw))(h)
    full = lambda step: quick(lambda h: pj.lpg_full_delta(h, jnp.asarray(y), lambda v: pull(v)[0], step=step, **kw))(h)
    for delta in (head("sign"), full("sign"), full("unit")):
        gap = outside(delta, p)
        np.testing.assert_allclose(gap, np.abs(np.asarray(delta).sum(1)) / np.sqrt(C), atol=1e-9)
        assert gap.max() > 0.01
    np.testing.assert_allclose(outside(head("unit"), p), 0, atol=1e-9)
    closed = pj.lpg_delta(jnp.asarray(h), jnp.asarray(y), **kw)
    np.testing.assert_allclose(outside(closed, p), 0, atol=1e-9)


def test_errors_of_logit_gradient_of():
    with pytest.raises(
        ValueError, match=r"logit_gradient_of needs delta and probabilities of one shape, got \(3,\) and \(2, 3\)"
    ):
        pj.logit_gradient_of(jnp.zeros(3), jnp.zeros([2, 3]))


# ---------------------------------------------------------------------------------------------------------- Proposition 2


def test_the_generalization_bound_is_equation_24():
    counts, eps = np.array([600, 300, 100]), np.array([0.1, 0.2, 0.4])
    ours = pj.lpg_generalization_bound(0.25, 3.0, bound=eps, class_counts=counts, weight=0.7, beta=0.1)
    expected = 0.25 + np.sqrt((3.0 + np.log(2 * 1000 / 0.1)) / 2000) + 0.7 * (0.6 * 0.1 + 0.3 * 0.2 + 0.1 * 0.4)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    mcallester = pj.lpg_generalization_bound(0.25, 3.0, bound=0.0, class_counts=counts, weight=0.7, beta=0.1)
    np.testing.assert_allclose(ours - mcallester, 0.7 * 0.16, rtol=1e-5)


def test_the_bound_rises_with_what_it_should_and_traces():
    f = lambda **change: float(
        jax.jit(lambda kw: pj.lpg_generalization_bound(kw.pop("risk"), kw.pop("divergence"), class_counts=COUNTS, **kw))(
            {
                name: jnp.float32(x)
                for name, x in {**dict(risk=0.2, divergence=2.0, bound=0.1, weight=0.5, beta=0.05), **change}.items()
            }
        )
    )
    start = f()
    for change in (dict(risk=0.3), dict(divergence=3.0), dict(bound=0.2), dict(weight=1.0), dict(beta=0.01)):
        assert f(**change) > start, change
    many = pj.lpg_generalization_bound(0.2, 2.0, bound=0.1, class_counts=100 * COUNTS, weight=0.5)
    assert float(many) < start


def test_the_term_is_the_metric_of_training():
    _, x, y = problem()
    params, x = jax.tree.map(jnp.asarray, (problem()[0], x))
    for options in (dict(), dict(inference="pgd"), dict(granularity="sample")):
        made = pj.objective(NET, pj.lpg(bound=EPS, direction=SIGN, **options), num_classes=C, class_counts=COUNTS)
        _, out = made(params, made.init(params, x), pj.batch(x, y))
        np.testing.assert_allclose(out.metrics["lpg/bound_term"], pj.lpg_bound_term(EPS, COUNTS), rtol=1e-6)
    np.testing.assert_allclose(pj.lpg_bound_term(EPS, COUNTS), (COUNTS * EPS).sum() / COUNTS.sum(), rtol=1e-6)
    np.testing.assert_allclose(pj.lpg_bound_term(0.3, COUNTS), 0.3, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(divergence=-1.0), "lpg_generalization_bound needs divergence >= 0, got -1"),
        (dict(beta=0.0), "lpg_generalization_bound needs 0 < beta <= 1, got 0"),
        (dict(beta=1.5), "lpg_generalization_bound needs 0 < beta <= 1, got 1.5"),
        (dict(bound=[-0.1, 0.1]), "lpg_generalization_bound needs bound >= 0"),
        (dict(weight=-1), "lpg_generalization_bound needs weight >= 0, got -1"),
    ],
)
def test_errors_of_the_generalization_bound(change, message):
    kw = dict(risk=0.1, divergence=1.0, bound=0.1, class_counts=[5, 5], weight=1.0) | change
    with pytest.raises(ValueError, match=message):
        pj.lpg_generalization_bound(kw.pop("risk"), kw.pop("divergence"), **kw)
