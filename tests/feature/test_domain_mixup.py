"""perturbjax.feature.domain_mixup: who mixes with whom, by how much, and what stays the dominant sample's."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.loss.problem import MODEL

C = 3


def seeing():
    """A link behind it that reports what it sees."""

    def look(flow, rest, state, context):
        return flow, state, {"value": flow.value, "targets": flow.targets, "domain": flow.side["domain"]}

    return pj.Perturbation("input", lambda context: (), look, name="seen")


@jax.jit
def mixed(domains, labels, seed=0, alpha=1.0):
    """What a batch of unit vectors becomes: row i is λ_i e_i + (1 − λ_i) e_partner."""
    count = len(domains)
    made = pj.objective(MODEL, pj.chain(pj.domain_mixup(alpha=alpha), seeing()), num_classes=C, num_domains=4)
    w, x = jnp.zeros([count, C]), jnp.eye(count)
    data = pj.batch(x, labels, side={"domain": domains})
    return made(w, made.init(w, x), data, key=jax.random.key(seed))[1].metrics


def test_every_sample_meets_one_of_the_next_domain_of_a_ring():
    domains = np.repeat([0, 1, 2, 3], [5, 5, 5, 5])
    rings = collections.Counter()
    draw = jax.jit(lambda key: pj.ring_partners(key, jnp.asarray(domains), num_domains=4))
    for seed in range(40):
        partner = np.asarray(draw(jax.random.key(seed)))
        assert sorted(partner) == list(range(20))  # equal shares: everybody is somebody's partner
        following = [set(domains[partner[domains == d]]) for d in range(4)]
        assert all(len(found) == 1 for found in following)
        ring = [0]
        while len(ring) < 4:
            ring.append(next(iter(following[ring[-1]])))
        assert sorted(ring) == [0, 1, 2, 3] and following[ring[-1]] == {0}
        rings[tuple(ring)] += 1
    assert len(rings) == 6  # all rings of four occur


def test_absent_and_small_domains():
    domains = np.array([3, 0, 0, 3, 0, 0, 0, 3])  # 1 and 2 are absent; 5 and 3 samples
    for seed in range(10):
        partner = np.asarray(pj.ring_partners(jax.random.key(seed), jnp.asarray(domains), num_domains=4))
        assert (domains[partner] == 3 - domains).all()
        assert max(collections.Counter(partner).values()) == 2  # 5 samples share 3 partners evenly
    partner = np.asarray(pj.ring_partners(jax.random.key(0), jnp.full([6], 2), num_domains=4))
    assert sorted(partner) == list(range(6))  # one domain: within it


def test_inputs_and_targets_are_the_same_mixture_with_one_weight_a_domain():
    domains, labels = np.arange(12) % 3, np.arange(12) % C
    weights = []
    for seed in range(20):
        seen = mixed(domains, labels, seed)
        value = np.asarray(seen["seen/value"])
        own = np.diag(value)
        partner = np.array([next(j for j in np.argsort(-row) if j != i) for i, row in enumerate(value)])
        expected = own[:, None] * np.eye(12) + (1 - own)[:, None] * np.eye(12)[partner]
        np.testing.assert_allclose(value, expected, atol=1e-6)
        targets = own[:, None] * np.eye(C)[labels] + (1 - own)[:, None] * np.eye(C)[labels[partner]]
        np.testing.assert_allclose(seen["seen/targets"], targets, atol=1e-6)
        for d in range(3):
            np.testing.assert_allclose(own[domains == d], own[d], rtol=1e-6)
        assert (own >= 0.5).all()
        np.testing.assert_array_equal(seen["seen/domain"], domains)
        weights.extend(own[:3])
    assert len(set(np.round(weights, 5))) == 60  # drawn anew for each domain and batch
    assert abs(np.mean(weights) - 0.75) < 0.05  # max(λ, 1 − λ) of a uniform λ


def test_a_small_alpha_mixes_little():
    own = np.concatenate(
        [np.diag(mixed(np.arange(9) % 3, np.arange(9) % C, seed=s, alpha=0.02)["seen/value"])[:3] for s in range(20)]
    )
    assert np.mean(own > 0.99) > 0.8


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match="domain_mixup needs alpha > 0, got 0"):
        pj.domain_mixup(alpha=0.0)
    with pytest.raises(ValueError, match="domain_mixup needs 'domains', got none"):
        pj.objective(MODEL, pj.domain_mixup(), num_classes=C)
    made = pj.objective(MODEL, pj.domain_mixup(), num_classes=C, num_domains=1)
    with pytest.raises(ValueError, match="domain_mixup needs at least 2 training domains, got 1"):
        made.init(jnp.ones([4, C]), jnp.ones([2, 4]))
    made = pj.objective(MODEL, pj.domain_mixup(), num_classes=C, num_domains=2)
    tokens = pj.batch(jnp.ones([2, 4], jnp.int32), jnp.zeros([2], jnp.int32), side={"domain": jnp.arange(2)})
    with pytest.raises(ValueError, match="domain_mixup needs floating values, got int32"):
        made(jnp.ones([4, C], jnp.int32), ((),), tokens)
