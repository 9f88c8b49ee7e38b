"""perturbjax.loss.center_loss: the penalty, the centres' step, constants for the gradient, several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import perturbjax as pj
from perturbjax.loss.center_loss import CenterState
from tests.loss.problem import DEEP, B, C, assert_close, cross_entropy, deep, difference, onehot, run

CENTERS = np.random.default_rng(3).normal(size=(C, 6)).astype(np.float32)


@pytest.fixture
def problem():
    with deep() as found:
        yield found


def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem):
    """The centres are constants; the weights of the samples leave the penalty alone."""
    params, x, y = problem
    weights = np.linspace(0, 2, B)
    out, grad = run(
        params, x, y, pj.center_loss(weight=0.1), model=DEEP, states=(CenterState(jnp.asarray(CENTERS)),),
        weights=jnp.asarray(weights),
    )  # fmt: skip

    def loss(p):
        a = np.tanh(x @ p["a"])
        return weights * cross_entropy(a @ p["w"].T + p["b"], onehot(y)) + 0.05 * ((a - CENTERS[y]) ** 2).sum(1)

    np.testing.assert_allclose(out.losses, loss(params), rtol=1e-9)
    assert_close(grad, difference(lambda p: loss(p).mean(), params), atol=1e-8)


def test_centres_move_after_use_by_the_equation(problem):
    params, x, y = problem
    y = np.where(y == 3, 0, y)  # class 3 is absent
    out, _ = run(params, x, y, pj.center_loss(step_size=0.7), model=DEEP, states=(CenterState(jnp.asarray(CENTERS)),))
    a, expected = np.tanh(x @ params["a"]), CENTERS.astype(float)
    for j in range(C):
        mine = a[y == j]
        expected[j] -= 0.7 * (CENTERS[j] - mine).sum(0) / (1 + len(mine))
    np.testing.assert_allclose(out.states[0].centers, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.states[0].centers[3], CENTERS[3])


def test_centres_go_to_the_class_means():
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(30, 3)), jnp.float32), jnp.arange(30) % 3
    centers = jnp.zeros([3, 3], jnp.float32)
    for _ in range(60):
        centers = pj.moved_centers(centers, features, labels)
    np.testing.assert_allclose(centers, pj.class_mean(features, labels, 3), atol=1e-5)


def test_padding_has_no_centre_and_moves_none():
    features, labels = jnp.ones([2, 3]), jnp.array([-1, 5])
    np.testing.assert_array_equal(pj.center_penalty(features, labels, jnp.asarray(CENTERS[:, :3])), 0.0)
    np.testing.assert_array_equal(pj.moved_centers(jnp.asarray(CENTERS[:, :3]), features, labels), CENTERS[:, :3])


def test_every_loss_is_raised(problem):
    params, x, y = problem
    assert (run(params, x, y, pj.center_loss(), model=DEEP)[0].losses > run(params, x, y, (), model=DEEP)[0].losses).all()


def test_four_devices_move_the_centres_as_one():
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32), jnp.asarray(rng.integers(0, C, 16))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    P = PartitionSpec
    mapped = jax.shard_map(
        lambda a, y: pj.moved_centers(jnp.asarray(CENTERS), a, y, axis_name="d"),
        mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P(), check_vma=False,
    )  # fmt: skip
    expected = pj.moved_centers(jnp.asarray(CENTERS), features, labels)
    np.testing.assert_allclose(jax.jit(mapped)(features, labels), expected, rtol=1e-5, atol=1e-6)


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="center_loss needs weight >= 0, got -1"):
        pj.center_loss(weight=-1.0)
    with pytest.raises(ValueError, match="center_loss needs 0 <= step_size <= 1, got 2"):
        pj.center_loss(step_size=2.0)
    maps = pj.line({"features": lambda w, x: x, "logits": lambda w, a: a.sum([1, 2]) @ w})
    with pytest.raises(ValueError, match=r"center_loss needs features \[B, d\], got \(2, 3, 3, 4\)"):
        pj.objective(maps, pj.center_loss(), num_classes=C).init(jnp.ones([4, C]), jnp.ones([2, 3, 3, 4]))
