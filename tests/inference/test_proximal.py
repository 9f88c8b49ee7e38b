"""perturbjax.inference.proximal: the steps minimise what they say, and the search finds the minimum of cross entropy plus size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import perturbjax as pj


def test_soft_threshold_is_the_minimum_of_distance_plus_size():
    x = np.linspace(-3, 3, 13)
    grid = np.linspace(-4, 4, 8001)
    best = grid[np.argmin(0.5 * (grid[None] - x[:, None]) ** 2 + 0.7 * np.abs(grid)[None], axis=1)]
    np.testing.assert_allclose(pj.soft_threshold(jnp.asarray(x), 0.7), best, atol=1e-3)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_step_is_the_minimum_of_the_linearised_problem(norm):
    """argmin_z ⟨slope, z⟩ + ‖z − v‖²/(2κ) + λ·Reg(z), entry by entry on a grid."""
    v, slope, grid = np.array([0.5, -1.0, 0.1]), np.array([1.0, -2.0, 0.05]), np.linspace(-4, 4, 80_001)
    size = np.abs(grid) if norm == "l1" else grid**2
    cost = slope[:, None] * grid[None] + (grid[None] - v[:, None]) ** 2 / (2 * 0.3) + 0.4 * size[None]
    ours = pj.proximal_step(jnp.asarray(v), jnp.asarray(slope), weight=0.4, step_size=0.3, norm=norm)
    np.testing.assert_allclose(ours, grid[np.argmin(cost, axis=1)], atol=2e-4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("weight", [0.05, 0.35])
def test_search_finds_the_minimum_for_cross_entropy(norm, weight):
    """Against scipy on v = v⁺ − v⁻ with v± ≥ 0, where ‖v‖₁ is smooth."""
    with jax.enable_x64(True):
        u, y = np.array([2.0, -1.0, 0.5, 0.0]), 1
        found = pj.proximal_search(lambda v: jax.nn.softmax(u + v) - jnp.eye(4)[y], jnp.zeros(4), weight=weight, norm=norm)

        def cost(parts):
            v = parts[:4] - parts[4:]
            size = parts.sum() if norm == "l1" else v @ v
            return np.log(np.exp(u + v).sum()) - (u + v)[y] + weight * size

        best = optimize.minimize(cost, np.full(8, 0.1), bounds=[(0, None)] * 8, options=dict(ftol=1e-15, gtol=1e-10))
        np.testing.assert_allclose(found, best.x[:4] - best.x[4:], atol=1e-4)
        assert cost(np.concatenate([np.maximum(found, 0), np.maximum(-found, 0)])) <= best.fun + 1e-10


def test_search_stops_at_once_where_nothing_pays():
    zero = pj.proximal_search(lambda v: jax.nn.softmax(v) - jnp.eye(3)[0], jnp.zeros(3), weight=1.0)
    np.testing.assert_array_equal(zero, 0)


def test_an_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="proximal_step needs norm to be one of its names, got 'l3'"):
        pj.proximal_step(jnp.zeros(2), jnp.zeros(2), weight=1.0, step_size=1.0, norm="l3")
