"""perturbjax.gradient.normalisation: length one, optax's function, PUGD's limit, and where the gradient vanishes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.parameter.problem import assert_close, by_hand, by_link, enable_x64, make, norm, one_update, unit


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem):
    ours, _ = by_link(problem, pj.ngd())
    assert_close(ours, by_hand(problem, lambda w, t: unit(problem.gradient(w))), rtol=1e-9, atol=1e-12)


def test_it_is_optax_s_and_pugd_with_radius_zero(problem):
    g = problem.slope(problem.params)
    found, _ = pj.ngd().update(g, pj.ngd().init(problem.params))
    theirs, _ = optax.contrib.normalize().update(g, optax.contrib.normalize().init(problem.params))
    assert_close(found, theirs, rtol=1e-12)
    assert_close(found, one_update(problem, pj.pugd(radius=0.0))[0], rtol=1e-12)
    np.testing.assert_allclose(norm({n: np.asarray(v) for n, v in found.items()}), 1, rtol=1e-12)


def test_zero_stays_zero_and_epsilon_is_added_to_the_norm():
    update = lambda g, **settings: pj.ngd(**settings).update(g, optax.EmptyState())[0]
    np.testing.assert_array_equal(update(jnp.zeros(3)), 0.0)  # nan in optax
    np.testing.assert_allclose(update(jnp.array([3.0, 4.0]), epsilon=5.0), [0.3, 0.4], rtol=1e-6)
    assert np.isnan(update(jnp.array([1.0, jnp.nan]))).all()
    assert update(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="ngd needs epsilon >= 0, got -1"):
        pj.ngd(epsilon=-1)
