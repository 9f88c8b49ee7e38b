"""perturbjax.projection: the nearest point of the ball, by scipy, by optax and by its definition; every edge is finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from perturbjax.projection import NORMS, group_norm, per_group, project, unit

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

ORDER = {"l2": 2, "linf": np.inf, "l1": 1}
OPTAX = {
    "l2": optax.projections.projection_l2_ball,
    "linf": optax.projections.projection_linf_ball,
    "l1": optax.projections.projection_l1_ball,
}
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # to compile, not to run
each_norm = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


def sizes(delta, norm):
    return np.linalg.norm(np.reshape(delta, [len(delta), -1]), ORDER[norm], axis=1)


def by_scipy(delta, radius, norm):
    """The nearest point, with x = p − n and p, n ≥ 0, so that every constraint is smooth."""
    size = delta.size
    point = lambda z: z[:size] - z[size:]
    inside = {
        "l1": lambda z: radius - z.sum(),
        "l2": lambda z: radius**2 - (point(z) ** 2).sum(),
        "linf": lambda z: np.r_[radius - point(z), radius + point(z)],
    }[norm]
    start = np.r_[np.maximum(delta, 0), np.maximum(-delta, 0)] * 0.1
    found = minimize(
        lambda z: ((point(z) - delta) ** 2).sum(), start, bounds=[(0, None)] * 2 * size, method="SLSQP",
        constraints={"type": "ineq", "fun": inside}, options=dict(ftol=1e-12, maxiter=500),
    )  # fmt: skip
    assert found.success
    return point(found.x)


@each_norm
def test_is_the_nearest_point_of_the_ball(x64, norm):
    delta = np.random.default_rng(0).normal(size=[6, 5])
    radius = np.array([0.1, 0.5, 1.0, 1.5, 2.0, 9.0])
    ours = project(jnp.asarray(delta), jnp.asarray(radius), norm)
    expected = [by_scipy(d, r, norm) for d, r in zip(delta, radius)]
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ours.dtype == jnp.float64
    np.testing.assert_array_equal(ours[-1], delta[-1])  # inside: untouched


@each_norm
@pytest.mark.optax_promotes
def test_is_optax_for_one_group(norm):
    delta = np.random.default_rng(0).normal(size=[3, 2, 4]).astype(np.float32)
    theirs = quick(jax.vmap(OPTAX[norm], in_axes=(0, None)))
    for radius in (0.3, 1.0, 3.0, 100.0):
        expected = theirs(delta, radius)
        np.testing.assert_allclose(project(delta, jnp.full([3], radius), norm), expected, rtol=1e-5, atol=1e-6)


@st.composite
def problems(draw):
    """Groups in eighths, so that entries are equal often, and radii that are met exactly."""
    number = st.integers(-16, 16).map(lambda n: n / 8)
    row = st.lists(number, min_size=4, max_size=4)
    radius = st.one_of(st.integers(0, 32).map(lambda n: n / 8), st.just(np.inf))
    return np.array(draw(st.lists(row, min_size=3, max_size=3))), np.array(draw(st.lists(radius, min_size=3, max_size=3)))


@each_norm
@given(problems())
@settings(max_examples=50)
def test_obeys_the_definition_of_a_projection(norm, problem):
    """P(d) lies in the ball, no point of the ball lies further along d − P(d), and P(P(d)) = P(d)."""
    delta, radius = problem
    with enable_x64(True):
        ours = np.asarray(project(jnp.asarray(delta), jnp.asarray(radius), norm))
        again = project(jnp.asarray(ours), jnp.asarray(radius), norm)
    assert (sizes(ours, norm) <= radius + 1e-12).all()
    np.testing.assert_allclose(again, ours, rtol=1e-12, atol=1e-12)
    gap = delta - ours
    furthest = {"l1": np.abs(gap).max(1), "l2": np.sqrt((gap**2).sum(1)), "linf": np.abs(gap).sum(1)}[
        norm
    ]  # max ⟨gap, ball of 1⟩
    finite = np.isfinite(radius)
    assert (np.where(finite, radius, 0) * furthest <= (gap * ours).sum(1) + 1e-12)[finite].all()
    np.testing.assert_array_equal(ours[~finite], delta[~finite])


@each_norm
def test_radius_zero_and_infinity_and_a_zero_delta(norm):
    delta = jnp.asarray([[3.0, -4.0], [3.0, -4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    radius = jnp.array([0.0, jnp.inf, 0.0, 1.0, jnp.inf])
    np.testing.assert_array_equal(project(delta, radius, norm), jnp.zeros([5, 2]).at[1].set(delta[1]))


@each_norm
def test_derivatives_are_finite_everywhere(norm):
    delta = jnp.asarray([[3.0, -4.0], [3.0, -4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [3.0, 4.0]])
    radius = jnp.array([0.0, jnp.inf, 0.0, 1.0, jnp.inf, 1.0, 5.0])
    for derivative in quick(jax.jacobian(lambda d, r: project(d, r, norm), (0, 1)))(delta, radius):
        assert np.isfinite(derivative).all()


@each_norm
def test_derivatives_are_finite_differences(x64, norm):
    delta, radius = np.random.default_rng(1).normal(size=[3, 4]), np.array([0.4, 1.1, 20.0])
    f = functools.partial(project, norm=norm)
    by_delta, by_radius = quick(jax.jacobian(f, (0, 1)))(delta, radius)
    f = quick(f)
    for i in np.ndindex(3, 4):
        e = np.zeros([3, 4])
        e[i] = 1e-6
        np.testing.assert_allclose(by_delta[:, :, *i], (f(delta + e, radius) - f(delta - e, radius)) / 2e-6, atol=1e-8)
    for i in range(3):
        e = 1e-6 * np.eye(3)[i]
        np.testing.assert_allclose(by_radius[:, :, i], (f(delta, radius + e) - f(delta, radius - e)) / 2e-6, atol=1e-8)


def test_norm_and_unit_of_each_group_with_zero_left_at_zero():
    x = jnp.asarray([[[3.0], [4.0]], [[0.0], [0.0]]])
    np.testing.assert_allclose(group_norm(x), [5, 0])
    np.testing.assert_allclose(unit(x), [[[0.6], [0.8]], [[0], [0]]])
    assert per_group(jnp.ones(2), x).shape == (2, 1, 1)
    for f in (group_norm, unit):
        assert np.isfinite(quick(jax.jacobian(f))(x)).all()


def test_an_unknown_norm_is_an_error():
    with pytest.raises(ValueError, match="project needs norm .*'L2'.*'l2'"):
        project(jnp.ones([1, 2]), jnp.ones([1]), "L2")
