"""perturbjax.loss.kd: both forms against the equations, that they agree as section 0 says, limits, and what the teacher sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import B, C, D, cross_entropy, difference, linear, log_softmax, mixed, onehot, run

T = np.random.default_rng(7).normal(size=(D, C))
TEACHER = pj.Teacher(lambda v, x: x @ v, T)


@pytest.fixture
def problem():
    with linear() as found:
        yield found


def softmax(u):
    return np.exp(log_softmax(u))


def kl(z, u):
    return (softmax(z) * (log_softmax(z) - log_softmax(u))).sum(1)


def test_the_divergence_is_zero_for_the_same_logits_and_its_teacher_is_a_constant(problem):
    w, x, _ = problem
    u, z = jnp.asarray(x @ w), jnp.asarray(x @ T)
    np.testing.assert_allclose(pj.distillation_losses(u, u, temperature=2.0), 0, atol=1e-12)
    np.testing.assert_allclose(pj.distillation_losses(u, z, temperature=2.0), kl(x @ T / 2, x @ w / 2), rtol=1e-9)
    np.testing.assert_array_equal(jax.grad(lambda z: pj.distillation_losses(u, z).sum())(z), 0)


@pytest.mark.parametrize("weight, temperature", [(0.5, 4.0), (0.2, 1.0), (1.0, 2.5)])
def test_the_mixture_and_its_gradient_are_the_equation_and_its_finite_difference(problem, weight, temperature):
    w, x, y = problem
    out, grad = run(w, x, y, pj.kd(teacher=TEACHER, weight=weight, temperature=temperature))
    t = temperature
    loss = lambda w: (1 - weight) * cross_entropy(x @ w, onehot(y)) + weight * t**2 * kl(x @ T / t, x @ w / t)
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-9)
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-8)
    np.testing.assert_allclose(out.metrics["kd/distance"], kl(x @ T / t, x @ w / t).mean(), rtol=1e-9)
    np.testing.assert_allclose(out.metrics["kd/teacher_accuracy"], ((x @ T).argmax(1) == y).mean(), rtol=1e-6)


def test_the_perturbation_and_its_gradient_are_eq_15(problem):
    w, x, y = problem
    out, grad = run(w, x, y, pj.kd(teacher=TEACHER, weight=0.8, temperature=3.0, form="perturbation"))
    q, held = softmax(x @ T / 3), softmax(x @ w / 3)
    loss = lambda w: cross_entropy(x @ w, onehot(y)) + 0.8 * (cross_entropy(x @ w, q) - cross_entropy(x @ w, held))
    np.testing.assert_allclose(out.losses, loss(w), rtol=1e-9)
    np.testing.assert_allclose(grad, difference(lambda w: loss(w).mean(), w), atol=1e-8)
    residual = softmax(x @ w) - onehot(y) + 0.8 * (held - q)
    np.testing.assert_allclose(grad, x.T @ residual / B, atol=1e-10)


def test_eq_15_is_distillation(problem):
    """Its gradient is that of CE + (λ/T) · T² · CE(p′, q): the two forms agree up to the weight of the first term."""
    w, x, y = problem
    _, eq15 = run(w, x, y, pj.kd(teacher=TEACHER, weight=0.6, temperature=4.0, form="perturbation"))
    _, usual = run(w, x, y, pj.kd(teacher=TEACHER, weight=0.6 / 4, temperature=4.0))
    _, plain = run(w, x, y, ())
    np.testing.assert_allclose(eq15, usual + 0.6 / 4 * plain, atol=1e-10)


@pytest.mark.parametrize("form", ["mixture", "perturbation"])
def test_weight_zero_is_plain_training(problem, form):
    w, x, y = problem
    ours, plain = run(w, x, y, pj.kd(teacher=TEACHER, weight=0.0, form=form)), run(w, x, y, ())
    jax.tree.map(np.testing.assert_array_equal, (ours[0].losses, ours[1]), (plain[0].losses, plain[1]))


def test_a_teacher_that_agrees_costs_nothing(problem):
    w, x, y = problem
    same = pj.Teacher(lambda v, x: x @ v, w)
    np.testing.assert_allclose(run(w, x, y, pj.kd(teacher=same, weight=1.0))[0].losses, 0, atol=1e-12)
    plain = run(w, x, y, ())[0].losses
    eq15 = run(w, x, y, pj.kd(teacher=same, weight=3.0, form="perturbation"))[0].losses
    np.testing.assert_allclose(eq15, plain, rtol=1e-12)


def test_a_hot_teacher_matches_logits(problem):
    """T → ∞: the gradient of T² KL becomes that of (1/2C) Σ_c ((u_c − ū) − (z_c − z̄))² (Hinton et al.)."""
    w, x, y = problem
    _, grad = run(w, x, y, pj.kd(teacher=TEACHER, weight=1.0, temperature=1e4))
    centred = lambda u: u - u.mean(1, keepdims=True)
    np.testing.assert_allclose(grad, x.T @ (centred(x @ w) - centred(x @ T)) / C / B, atol=1e-4)


def test_the_virtual_teacher_is_nine_tenths_sure(problem):
    w, x, y = problem
    z = np.log(np.where(onehot(y) > 0, 0.9, 0.1 / (C - 1)))
    out, _ = run(w, x, y, pj.kd())
    expected = 0.5 * cross_entropy(x @ w, onehot(y)) + 0.5 * 16 * kl(z / 4, x @ w / 4)
    np.testing.assert_allclose(out.losses, expected, rtol=1e-9)


def test_the_teacher_sees_what_the_student_sees(problem):
    """The perturbed inputs; and its own logits stay as they are, whatever perturbs the student's."""
    w, x, y = problem
    shift = pj.Perturbation("input", lambda c: (), lambda flow, *rest: (flow._replace(value=flow.value + 1.0), (), {}))
    counts = np.array([9, 4, 2, 1])
    chain = pj.chain(pj.kd(teacher=TEACHER), pj.logit_adjustment(), shift)
    out, _ = run(w, x, y, chain, settings=dict(class_counts=counts), targets=jnp.asarray(mixed(y)))
    u = (x + 1) @ w + np.log(counts / 16)
    expected = 0.5 * cross_entropy(u, mixed(y)) + 0.5 * 16 * kl((x + 1) @ T / 4, u / 4)
    np.testing.assert_allclose(out.losses, expected, rtol=1e-6)


def test_two_teachers_teach_side_by_side(problem):
    w, x, y = problem
    other = pj.Teacher(lambda v, x: x @ v, -T)
    links = pj.chain(*(pj.kd(teacher=t, weight=0.1, temperature=1.0, form="perturbation") for t in (TEACHER, other)))
    p = softmax(x @ w)
    expected = cross_entropy(x @ w, onehot(y))
    for z in (x @ T, -x @ T):
        expected = expected + 0.1 * ((p - softmax(z)) * log_softmax(x @ w)).sum(1)
    np.testing.assert_allclose(run(w, x, y, links)[0].losses, expected, rtol=1e-9)


def test_no_gradient_reaches_the_teacher(problem):
    w, x, y = problem
    made = pj.objective(lambda w, x: x @ w, pj.kd(teacher=TEACHER), num_classes=C)

    def loss(variables):
        states = made.init(w, x)
        return made(w, (states[0]._replace(teacher=variables), *states[1:]), pj.batch(x, jnp.asarray(y)))[0]

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(T)), 0.0)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="kd needs temperature > 0, got 0"):
        pj.kd(temperature=0.0)
    with pytest.raises(ValueError, match="kd needs 0 <= weight <= 1, got 1.5"):
        pj.kd(weight=1.5)
    pj.kd(weight=1.5, form="perturbation")
    with pytest.raises(ValueError, match="kd needs form to be one of its names, got 'soft'"):
        pj.kd(form="soft")
