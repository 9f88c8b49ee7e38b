"""perturbjax.loss.coral: the penalty over pairs of domains, its gradient, the mean term as a switch, domains that are absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import DEEP, B, C, assert_close, cross_entropy, deep, difference, onehot, run

DOMAINS = np.array([0, 1, 2, 0, 1, 2, 0], np.int32)  # 3, 2 and 2 samples


def pairwise(features, domains, mean_term=True):
    """The equation, pair by pair, in numpy."""
    parts = [features[domains == d] for d in np.unique(domains) if (domains == d).sum() > 1]
    terms = []
    for i, one in enumerate(parts):
        for other in parts[:i]:
            term = ((np.cov(one.T) - np.cov(other.T)) ** 2).mean()
            terms.append(term + ((one.mean(0) - other.mean(0)) ** 2).mean() * mean_term)
    return np.mean(terms)


@pytest.fixture
def problem():
    with deep() as found:
        yield found


@pytest.mark.parametrize("mean_term", [True, False])
def test_the_penalty_is_the_mean_over_pairs(mean_term):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for domains in (rng.integers(0, 4, 30), np.repeat([0, 2], [12, 18]), np.repeat([3, 1, 0], [1, 15, 14])):
            features = rng.normal(size=(30, 5)) * (1 + domains[:, None]) + domains[:, None]
            found = pj.coral_penalty(features, jnp.asarray(domains), num_domains=4, mean_term=mean_term)
            np.testing.assert_allclose(found, pairwise(features, domains, mean_term), rtol=1e-10)


@pytest.mark.parametrize("mean_term", [True, False])
def test_losses_and_gradient_are_the_equation_and_its_finite_difference(problem, mean_term):
    params, x, y = problem
    link = pj.coral(weight=0.7, mean_term=mean_term)
    out, grad = run(params, x, y, link, model=DEEP, settings=dict(num_domains=3), side={"domain": jnp.asarray(DOMAINS)})

    def loss(p):
        a = np.tanh(x @ p["a"])
        return cross_entropy(a @ p["w"].T + p["b"], onehot(y)) + 0.7 * pairwise(a, DOMAINS, mean_term)

    np.testing.assert_allclose(out.losses, loss(params), rtol=1e-9)
    assert_close(grad, difference(lambda p: loss(p).mean(), params), atol=1e-8)
    np.testing.assert_allclose(out.metrics["coral/penalty"], pairwise(np.tanh(x @ params["a"]), DOMAINS, mean_term), rtol=1e-9)


def test_the_mean_term_alone_sees_a_shift():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        own = rng.normal(size=(6, 4))
        both, domains = np.concatenate([own, own + 2.0]), jnp.repeat(jnp.arange(2), 6)
        np.testing.assert_allclose(pj.coral_penalty(both, domains, num_domains=2), 4.0, rtol=1e-12)
        np.testing.assert_allclose(pj.coral_penalty(both, domains, num_domains=2, mean_term=False), 0.0, atol=1e-25)


def test_without_a_pair_there_is_no_penalty_and_a_finite_gradient():
    features = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    penalty = jax.jit(jax.value_and_grad(lambda a, d: pj.coral_penalty(a, d, num_domains=4)))
    for domains in ([0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 1], [-1, 9, 0, 0]):
        value, grad = penalty(features, jnp.array(domains))
        assert abs(value) < 1e-12  # a mean that is fused with its use is rounded otherwise
        np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_descending_the_penalty_brings_the_domains_together():
    rng = np.random.default_rng(0)
    domains = jnp.repeat(jnp.arange(3), 10)
    features = jnp.asarray(rng.normal(size=(30, 2)) * np.repeat([1, 2, 3], 10)[:, None], jnp.float32)
    step = jax.jit(lambda a: a - 0.5 * jax.grad(pj.coral_penalty)(a, domains, num_domains=3))
    before = pj.coral_penalty(features, domains, num_domains=3)
    for _ in range(200):
        features = step(features)
    assert pj.coral_penalty(features, domains, num_domains=3) < 0.01 * before


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="coral needs weight >= 0, got -1"):
        pj.coral(weight=-1.0)
    with pytest.raises(ValueError, match=r"coral_penalty needs features \[B, d\] and domains \[B\], got \(2, 3, 4\)"):
        pj.coral_penalty(jnp.ones([2, 3, 4]), jnp.zeros([2], jnp.int32), num_domains=2)
    with pytest.raises(ValueError, match="coral needs 'domains', got none. Pass num_domains="):
        pj.objective(DEEP, pj.coral(), num_classes=C)
    params = dict(a=jnp.ones([5, 6]), w=jnp.ones([C, 6]), b=jnp.ones([C]))
    with pytest.raises(ValueError, match="coral needs at least 2 training domains, got 1"):
        pj.objective(DEEP, pj.coral(), num_classes=C, num_domains=1).init(params, jnp.ones([B, 5]))
    made = pj.objective(DEEP, pj.coral(), num_classes=C, num_domains=2)
    with pytest.raises(ValueError, match=r"coral needs side\['domain'\], got \[\]. Write pj.batch"):
        made(params, ((),), pj.batch(jnp.ones([B, 5]), jnp.zeros([B], jnp.int32)))
    maps = pj.line({"features": lambda w, x: x, "logits": lambda w, a: a.sum([1, 2]) @ w})
    with pytest.raises(ValueError, match=r"coral needs a site \[B, d\], got \(2, 3, 3, 4\)"):
        pj.objective(maps, pj.coral(), num_classes=C, num_domains=2).init(jnp.ones([4, C]), jnp.ones([2, 3, 3, 4]))
