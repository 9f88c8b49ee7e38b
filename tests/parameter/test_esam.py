"""perturbjax.parameter.esam: five steps in numpy with the masks it draws, the selection, its limits, and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.parameter.problem import added, as_numpy, assert_close, by_hand, by_link, enable_x64, make, norm, one_update

KEY = jax.random.key(3)


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


def losses(problem, params):
    u = np.tanh(problem.x @ params["kernel"] + params["bias"]) @ params["head"]
    return np.log(np.exp(u).sum(1)) - (u * problem.y).sum(1)


def given(problem):
    """What ESAM asks of a trainer, in JAX."""

    def of(p, x, y):
        u = jnp.tanh(x @ p["kernel"] + p["bias"][None]) @ p["head"]
        return -(y * jax.nn.log_softmax(u)).sum(1)

    def grad_fn(p, *, weights=None):
        factor = 1.0 if weights is None else weights
        return jax.grad(lambda p: (factor * of(p, problem.x, problem.y)).mean())(p)

    return dict(grad_fn=grad_fn, loss_fn=lambda p: of(p, problem.x, problem.y))


def test_three_steps_with_momentum_and_decay_are_those_of_numpy(problem):
    """With γ = 0.45, 4 of the 9 samples count."""
    link, rho, beta, chosen = pj.esam(radius=0.6, beta=0.4, gamma=0.45), 0.6, 0.4, []

    def direction(w, t):
        g = problem.gradient(w)
        ones = {n: jnp.ones_like(v) for n, v in g.items()}
        length = np.sqrt(sum(v.size for v in ones.values()))
        mask = as_numpy(pj.esam_ascent(ones, KEY, radius=length, beta=1.0 * beta))
        assert set(np.unique(np.round(np.concatenate([v.ravel() for v in mask.values()]), 6))) == {0.0, 1 / beta}
        moved = {n: w[n] + rho * mask[n] * g[n] / norm(g) for n in w}
        rise = losses(problem, moved) - losses(problem, w)
        best = np.argsort(-rise)[:4]
        chosen.append(best)
        return problem._replace(x=problem.x[best], y=problem.y[best]).gradient(moved)

    class Trainer(type(problem)):  # `by_link` passes problem.slope as grad_fn
        def slope(self, params, *, weights=None):
            return given(problem)["grad_fn"](params, weights=weights)

    ours, state = by_link(Trainer(*problem), link, steps=3, key=KEY, loss_fn=given(problem)["loss_fn"])
    assert_close(ours, by_hand(problem, direction, steps=3), rtol=1e-9, atol=1e-12)
    assert int(state.evaluations) == 3


def test_the_samples_whose_loss_rose_most_count_and_their_mean_is_taken():
    rise = jnp.array([0.1, 0.5, -0.2, 0.5, 0.3])
    np.testing.assert_allclose(pj.esam_weights(rise, gamma=0.4), [0, 2.5, 0, 2.5, 0])
    np.testing.assert_allclose(pj.esam_weights(rise, gamma=0.2), [0, 5, 0, 0, 0])  # of equal ones the first
    np.testing.assert_allclose(pj.esam_weights(rise, gamma=0.01), [0, 5, 0, 0, 0])  # at least one
    many = jnp.arange(190, dtype=jnp.float32)
    assert (pj.esam_weights(many, gamma=0.15) > 0).sum() == round(0.15 * 190) == 28  # 28.500002 in float32
    np.testing.assert_array_equal(pj.esam_weights(rise, gamma=1.0), 1.0)
    # Per-device code chooses among the samples of all devices.
    rise = jax.random.normal(jax.random.key(0), [12])
    shared = jax.vmap(lambda r: pj.esam_weights(r, axis_name="d"), axis_name="d")(rise.reshape(4, 3))
    np.testing.assert_array_equal(shared.reshape(-1), pj.esam_weights(rise))


def test_the_climb_has_the_right_expectation():
    g = jnp.array([3.0, -4.0])
    climbs = jax.vmap(lambda key: pj.esam_ascent(g, key, radius=0.5, beta=0.25))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(climbs.mean(0), 0.5 * g / 5, atol=0.04)  # a standard deviation of the mean is 0.011
    np.testing.assert_allclose((climbs != 0).mean(0), 0.25, atol=0.03)
    np.testing.assert_array_equal(pj.esam_ascent(g, jax.random.key(0), radius=0.5, beta=1.0), pj.sam_ascent(g, radius=0.5))


def test_with_all_coordinates_and_all_samples_it_is_sam(problem):
    link, params = pj.esam(radius=0.3, beta=1.0, gamma=1.0), problem.params
    extra = given(problem)
    ours, _ = link.update(extra["grad_fn"](params), link.init(params), params, key=KEY, **extra)
    assert_close(ours, one_update(problem, pj.sam(radius=0.3))[0], rtol=1e-9, atol=1e-12)
    # The losses of the first pass may be given; here wrong ones, which are seen.
    part = pj.esam(radius=0.3, gamma=0.1)
    wrong = -100.0 * jnp.arange(9, dtype=jnp.float64)  # the last sample's loss seems to rise most
    found, _ = part.update(extra["grad_fn"](params), part.init(params), params, key=KEY, losses=wrong, **extra)
    climb = pj.esam_ascent(extra["grad_fn"](params), KEY, radius=0.3)
    last = problem._replace(x=problem.x[8:], y=problem.y[8:])
    assert_close(found, last.gradient(as_numpy(added(params, climb))), rtol=1e-9, atol=1e-12)


def test_errors_name_the_call(problem):
    link, w = pj.esam(), jnp.ones(2)
    with pytest.raises(ValueError, match="esam needs `key`, got none: call tx.update"):
        link.update(w, link.init(w), w, grad_fn=lambda p: p, loss_fn=lambda p: p)
    with pytest.raises(ValueError, match="esam needs `loss_fn`, got none: .*loss_fn=lambda p: losses"):
        link.update(w, link.init(w), w, grad_fn=lambda p: p, key=KEY)
    with pytest.raises(ValueError, match="esam needs `grad_fn`"):
        link.update(w, link.init(w), w, key=KEY)
    with pytest.raises(ValueError, match="esam needs 0 < gamma <= 1, got 0"):
        pj.esam(gamma=0)
    with pytest.raises(ValueError, match="esam needs 0 < beta <= 1, got 2"):
        pj.esam(beta=2)
