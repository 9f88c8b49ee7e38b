"""perturbjax.logit.self_paced_logit: who is taken out, how far, that it is self-paced learning, and that more come in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import perturbjax as pj
from tests.loss.problem import MODEL, C, linear

B = 12


@pytest.fixture
def problem():
    with linear(size=B) as (w, x, y):
        yield 2 * w, x, y


def cross_entropy(u, y):
    return np.log(np.exp(u).sum(1)) - u[np.arange(len(y)), y]


def run(w, x, y, progress=0.0, **settings):
    made = pj.objective(MODEL, pj.self_paced_logit(**settings), num_classes=C)
    data = pj.batch(x, jnp.asarray(y))
    (_, out), grad = jax.value_and_grad(made, has_aux=True)(w, made.init(w, x), data, progress=progress)
    return out, grad


def test_hard_samples_are_moved_over_the_ball(problem):
    w, x, y = problem
    u = x @ w
    tau = np.median(cross_entropy(u, y))
    delta = pj.self_paced_logit_delta(jnp.asarray(u), jnp.asarray(y), tau=tau, scale=3.0)
    hard = cross_entropy(u, y) >= tau
    expected = np.where(hard[:, None], 3 * np.abs(u).max() * (2 * np.eye(C)[y] - 1), 0)
    np.testing.assert_allclose(delta, expected, rtol=1e-12)
    assert hard.any() and not hard.all()


def test_it_is_self_paced_learning(problem):
    """Eqs. 63–65: loss ratio and weight 1 below τ, about 0 above; so is the gradient."""
    w, x, y = problem
    u = x @ w
    out, grad = run(w, x, y, tau=1.0, growth=1e-9, start=0.1, progress=0.5)
    kept = cross_entropy(u, y) < np.log(C)
    ratio = np.asarray(out.losses) / cross_entropy(u, y)
    np.testing.assert_allclose(ratio[kept], 1, rtol=1e-12)
    assert (ratio[~kept] < 1e-3).all() and kept.any() and not kept.all()
    p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    np.testing.assert_allclose(grad, x.T @ (kept[:, None] * (p - np.eye(C)[y])) / B, atol=1e-3)
    assert out.metrics["self_paced_logit/taken_in"] == pytest.approx(kept.mean())


def test_threshold_grows_with_training_and_lets_more_samples_in(problem):
    found = [run(*problem, progress=t, tau=0.5, growth=3.0, start=0.01)[0].metrics for t in (0.02, 0.5, 1.0)]
    threshold = [f["self_paced_logit/threshold"] for f in found]
    np.testing.assert_allclose(threshold, 0.5 * np.log(C) * np.array([1.06, 2.5, 4]), rtol=1e-6)
    taken = [float(f["self_paced_logit/taken_in"]) for f in found]
    assert taken == sorted(taken) and taken[0] < taken[-1]


def test_an_infinite_threshold_is_plain_training_bit_for_bit(problem):
    w, x, y = problem
    out, grad = run(w, x, y, tau=np.inf)
    plain = pj.objective(MODEL, (), num_classes=C)
    (_, expected), plain_grad = jax.value_and_grad(plain, has_aux=True)(w, (), pj.batch(x, jnp.asarray(y)))
    np.testing.assert_array_equal(out.losses, expected.losses)
    np.testing.assert_array_equal(grad, plain_grad)


def test_before_its_start_it_is_plain_training(problem):
    w, x, y = problem
    (plain, plain_grad), (before, grad) = (
        run(w, x, y, progress=0.1, **s) for s in (dict(tau=np.inf), dict(tau=0.5, start=0.2))
    )
    np.testing.assert_array_equal(before.losses, plain.losses)
    np.testing.assert_array_equal(grad, plain_grad)
    assert before.metrics["self_paced_logit/taken_in"] == 1
    after, grad = run(w, x, y, progress=0.2, tau=0.5, start=0.2)
    assert np.abs(grad - plain_grad).max() > 1e-2 and after.metrics["self_paced_logit/taken_in"] < 1


def test_a_threshold_below_the_loss_of_knowing_nothing_is_an_error_from_the_first_step_on():
    for tau in (0.5, 1.0):
        with pytest.raises(
            ValueError, match=rf"self_paced_logit needs tau > 1 .*, got {tau}: .* Write tau=1\.5, or tau={tau}, start=0\.2"
        ):
            pj.self_paced_logit(tau=tau)
        pj.self_paced_logit(tau=tau, start=0.2)
    jax.jit(lambda tau: run(jnp.ones([3, C]), jnp.ones([2, 3]), np.array([0, 1]), tau=tau)[1])(0.5)  # can't be seen


def test_the_largest_logit_is_that_of_all_devices():
    rng = np.random.default_rng(1)
    u, y = jnp.asarray(rng.normal(size=(8, C)), jnp.float32), jnp.asarray(rng.integers(0, C, 8), jnp.int32)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    f = lambda u, y: pj.self_paced_logit_delta(u, y, tau=1.0, axis_name="d")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)(u, y)
    np.testing.assert_allclose(mapped, pj.self_paced_logit_delta(u, y, tau=1.0), rtol=1e-6)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="self_paced_logit needs scale > 2, got 2"):
        pj.self_paced_logit(scale=2)
    with pytest.raises(ValueError, match="self_paced_logit needs growth > 0, got 0"):
        pj.self_paced_logit(growth=0)
    with pytest.raises(ValueError, match="self_paced_logit needs tau >= 0, got -1"):
        pj.self_paced_logit(tau=-1)
