"""The propositions of the LPA paper (section 3.8): what is true in them, and where they stop being true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj

C, B, D, H = 3, 8, 5, 4
LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 2], np.int32)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def problem(width=H, classes=C):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(D, width)), "b": rng.normal(size=(width, width)), "c": rng.normal(size=(width, classes))}
    return params, rng.normal(size=(B, D))


PIECES = {
    "stage1": lambda w, x: x @ w["a"],  # before the nonlinearity
    "relu": lambda w, z: jax.nn.relu(z),  # after it
    "features": lambda w, a: jnp.tanh(a @ w["b"]),
    "logits": lambda w, a: a @ w["c"],
}


def run(links, params, x, see="stage1", classes=C):
    """(losses [B], logits, the value at `see` behind the links)."""
    seen = pj.Perturbation(see, lambda c: (), lambda flow, rest, s, c: (flow, s, {"value": flow.value}), name="seen")
    made = pj.objective(PIECES, pj.chain(links, seen), num_classes=classes)
    _, out = made(params, made.init(params, x), pj.batch(x, jnp.asarray(LABELS)))
    return np.asarray(out.losses), np.asarray(out.logits), np.asarray(out.metrics["seen/value"])


def softplus_losses(logits):
    u = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(u)), LABELS]


def after(params, z):
    """Logits of the value before the nonlinearity, in numpy."""
    return np.tanh(np.maximum(z, 0) @ params["b"]) @ params["c"]


def test_proposition_1_before_a_nonlinearity_a_shift_is_a_rank_one_change_of_the_weights():
    """W + δ_c xᵀ/‖x‖² gives each sample the loss that δ_c gives it (eq. 16, with = for ≈)."""
    params, x = problem()
    losses, _, z = run(pj.lpa(site="stage1", bound=1.0, direction=1.0), params, x)
    delta = z - x @ params["a"]
    assert np.linalg.norm(delta, axis=1).min() > 0.1
    for i in range(B):
        moved = params | {"a": params["a"] + np.outer(x[i], delta[i]) / (x[i] @ x[i])}
        own, _, _ = run((), moved, x)
        np.testing.assert_allclose(own[i], losses[i], rtol=1e-9)


def test_proposition_1_has_another_change_of_the_weights_for_every_sample():
    """One δ_c per class is no one point in the space of weights: what is right for a sample is wrong for the next of its class."""
    params, x = problem()
    losses, _, z = run(pj.lpa(site="stage1", bound=1.0, direction=1.0), params, x)
    delta = z - x @ params["a"]
    np.testing.assert_allclose(delta[2], delta[3])
    moved = params | {"a": params["a"] + np.outer(x[2], delta[2]) / (x[2] @ x[2])}
    change = np.abs(run((), moved, x)[0] - losses)[LABELS == 1]
    assert change[0] < 1e-9 and change[1:].max() > 1e-2


def test_proposition_1_fails_behind_a_relu():
    """Behind it δ makes values negative, which no weights do: relu(·) ≥ 0."""
    params, x = problem()
    _, _, a = run(pj.lpa(site="relu", bound=1.0, direction=1.0), params, x, see="relu")
    assert a.min() < -1e-2
    for _ in range(20):
        w = params | {"a": np.random.default_rng(1).normal(size=(D, H))}
        assert run((), w, x, see="relu")[2].min() >= 0


@pytest.mark.parametrize("site, layers", [("stage1", ("b", "c")), ("relu", ("b", "c")), ("features", ("c",))])
def test_proposition_2_the_change_of_the_logits_is_bounded_by_the_lipschitz_constant(site, layers):
    """K_l ≤ Π‖W‖₂ behind the site (ReLU and tanh have slope at most 1); ‖δ‖ is γ_l·ε at most."""
    params, x = problem()
    plain = run((), params, x, see=site)
    moved = run(pj.lpa(site=site, bound=0.8, direction=1.0), params, x, see=site)
    constant = np.prod([np.linalg.norm(params[name], 2) for name in layers])
    change, length = (np.linalg.norm(moved[i] - plain[i], axis=1) for i in (1, 2))
    assert (length > 1e-2).all() and (change <= constant * length * (1 + 1e-9)).all()
    if site == "features":  # linear from here on: the constant is reached along the first singular vector
        v = np.linalg.svd(params["c"])[0][:, 0]
        np.testing.assert_allclose(np.linalg.norm(v @ params["c"]), constant, rtol=1e-12)


def test_proposition_2_earlier_layers_need_not_amplify_more():
    """K_l ≤ ‖W_l+1‖·K_l+1: with ‖W‖ < 1 it is smaller at the earlier layer, and so is the logits' change."""
    params, x = problem()
    params["b"] *= 0.1 / np.linalg.norm(params["b"], 2)
    change = {}
    for site in ("relu", "features"):
        plain, moved = (run(links, params, x)[1] for links in ((), pj.lpa(site=site, bound=0.5, beta=1.0, direction=1.0)))
        change[site] = np.linalg.norm(moved - plain, axis=1).mean()
    assert change["relu"] < 0.2 * change["features"]


def test_proposition_3_at_the_features_every_logit_perturbation_can_be_made_and_no_other():
    """d ≥ C and W of full rank: δ = W⁺v gives LPL's v exactly. "Strict superset" is equality, as Wδ is in ℝ^C."""
    params, x = problem(width=6)
    assert np.linalg.matrix_rank(params["c"]) == C
    logits = run((), params, x)[1]
    v = np.asarray(pj.lpl_delta(jnp.asarray(logits), jnp.asarray(LABELS), direction=1.0, bound=1.0, step_size=0.2))
    delta = v @ np.linalg.pinv(params["c"])
    shift = pj.Perturbation("features", lambda c: (), lambda flow, rest, s, c: (flow._replace(value=flow.value + delta), s, {}))
    losses, moved, _ = run(shift, params, x)
    np.testing.assert_allclose(moved, logits + v, rtol=1e-9)
    np.testing.assert_allclose(losses, softplus_losses(logits + v), rtol=1e-9)


def test_proposition_3_needs_as_many_features_as_classes():
    """With d < C what LPA can do to the logits is a proper subspace: less than LPL, not more."""
    params, x = problem(width=2)
    logits = run((), params, x)[1]
    v = np.asarray(pj.lpl_delta(jnp.asarray(logits), jnp.asarray(LABELS), direction=1.0, bound=1.0, step_size=0.2))
    best = v @ np.linalg.pinv(params["c"]) @ params["c"]
    assert np.abs(best - v).max() > 0.05
    moved = run(pj.lpa(site="features", bound=1.0, direction=1.0), params, x)[1]
    assert np.linalg.matrix_rank(moved - logits, tol=1e-8) == 2 < C


def test_raising_a_loss_need_not_expand_the_activations():
    """Conjecture 1 is no theorem: the norm falls while every class's loss rises, and the metric says so."""
    params, x = problem()
    params = params | {"a": np.eye(D, H), "b": np.eye(H), "c": np.eye(H, C) * 4}
    x = np.eye(D)[LABELS] + 0.1
    made = pj.objective(PIECES, pj.lpa(site="relu", bound=1.0, direction=1.0), num_classes=C)
    out = made(params, made.init(params, x), pj.batch(x, jnp.asarray(LABELS)))[1]
    assert (np.asarray(out.losses) > run((), params, x)[0] + 1e-3).all()
    assert float(out.metrics["lpa/expansion_raised"]) < 0.95
