"""perturbjax.loss.nu_svm: the equation, the margin's gradient step and where it rests, and scale of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.loss.nu_svm import NuSVMState
from tests.loss.problem import DEEP, B, C, assert_close, deep, difference, mixed, onehot, run


@pytest.fixture
def problem():
    with deep() as found:
        yield found


def margins(params, x, normalize=True):
    a = np.tanh(x @ params["a"])
    u = a @ params["w"].T + params["b"]
    found = np.array([[row[c] - max(np.delete(row, c)) for c in range(C)] for row in u])
    return found / np.sqrt((params["w"] ** 2).sum(1).mean() * (a**2).sum(1).mean()) if normalize else found


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, normalize, soft):
    params, x, y = problem
    targets, rho = mixed(y) if soft else onehot(y), 0.75
    out, grad = run(
        params, x, y, pj.nu_svm(nu=0.3, normalize=normalize), model=DEEP, targets=jnp.asarray(targets),
        states=(NuSVMState(jnp.float32(rho)),),
    )  # fmt: skip
    loss = lambda p: (targets * (np.maximum(0, rho - margins(p, x, normalize)) - 0.3 * rho)).sum(1)
    np.testing.assert_allclose(out.losses, loss(params), rtol=1e-9, atol=1e-12)
    assert_close(grad, difference(lambda p: loss(p).mean(), params), atol=1e-8)


def test_the_margin_takes_a_gradient_step(problem):
    """∂/∂ρ of −νρ + mean max(0, ρ − m) is share(m < ρ) − ν."""
    params, x, y = problem
    m, rho = margins(params, x)[np.arange(B), y], 0.5
    objective = lambda rho: -0.4 * rho + np.maximum(0, rho - m).mean()
    slope = (objective(rho + 1e-6) - objective(rho - 1e-6)) / 2e-6
    links = pj.nu_svm(nu=0.4, step_size=0.2)
    out, _ = run(params, x, y, links, model=DEEP, states=(NuSVMState(jnp.float32(rho)),))
    np.testing.assert_allclose(out.states[0].rho, rho - 0.2 * slope, rtol=1e-5)
    np.testing.assert_allclose(out.metrics["nu_svm/short"], (m < rho).mean(), rtol=1e-6)


def test_nu_is_the_share_of_margins_that_fall_short():
    """ρ rests at the ν-quantile of the margins."""
    u = np.random.default_rng(0).normal(size=(400, 2)) + np.array([4.0, 0])
    m, y = np.asarray(u[:, 0] - u[:, 1], np.float32), np.zeros(400, np.int32)
    links = pj.nu_svm(nu=0.3, step_size=0.05, normalize=False)
    made = pj.objective(lambda w, x: x, links, num_classes=2)
    step = jax.jit(lambda states: made({}, states, pj.batch(jnp.float32(u), y))[1].states)
    states = made.init({}, jnp.float32(u))
    for _ in range(600):
        states = step(states)
    assert abs((m < float(states[0].rho)).mean() - 0.3) < 0.02
    np.testing.assert_allclose(states[0].rho, np.quantile(m, 0.3), atol=0.05)


def test_the_scales_of_head_and_features_do_not_matter(problem):
    params, x, y = problem
    line = pj.line({"features": lambda w, x: x @ w["a"], "logits": lambda w, a: a @ w["w"].T}, head=lambda w: (w["w"], 0))
    states = (NuSVMState(jnp.float32(1.0)),)
    larger = {"a": 3 * params["a"], "w": 5 * params["w"]}
    losses = [run(p, x, y, pj.nu_svm(), model=line, states=states)[0].losses for p in (params, larger)]
    np.testing.assert_allclose(*losses, rtol=1e-9)


def test_at_rest_the_loss_is_that_of_the_worst_share():
    """min over ρ of −νρ + mean max(0, ρ − m) is −ν times the mean of the smallest share ν of the margins."""
    m = np.random.default_rng(0).normal(size=20)
    for nu in (0.25, 0.5, 1.0):
        worst = np.sort(m)[: int(20 * nu)]
        at_rest = pj.nu_svm_losses(jnp.float32(m), rho=worst[-1], nu=nu).mean()
        np.testing.assert_allclose(at_rest, -nu * worst.mean(), rtol=1e-5)
        assert all(pj.nu_svm_losses(jnp.float32(m), rho=rho, nu=nu).mean() > at_rest - 1e-6 for rho in np.linspace(-3, 3, 13))


def test_errors_say_what_was_given():
    for nu in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"nu_svm needs 0 < nu <= 1, got {nu}"):
            pj.nu_svm(nu=nu)
    with pytest.raises(ValueError, match="nu_svm needs 'features', got none"):
        pj.objective(lambda w, x: x @ w, pj.nu_svm(), num_classes=C)
