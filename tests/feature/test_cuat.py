"""perturbjax.feature.cuat: a delta per class or domain against numpy, absent groups, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from tests.feature.problem import C, H, W, images, model, seen_steps, slope_of, weights

LABELS = [[0, 0, 2, 2, 2, 0, 0, 0], [2, 2, 2, 2, 2, 2, 2, 2], [0, 1, 2, 0, 1, 2, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0]]
BATCHES = [(images(seed=s), np.array(y)) for s, y in enumerate(LABELS)]


def numpy_cuat(w, batches, groups, number, *, bound, step_size):
    delta, seen = np.zeros([number, H, W]), []
    for (x, y), who in zip(batches, groups, strict=True):
        seen.append(np.clip(x + delta[who], 0, 1))
        slopes = slope_of(w, seen[-1], y, 9.0)
        for g in set(who.tolist()):
            delta[g] = np.clip(delta[g] + step_size * np.sign(slopes[who == g].sum(0)), -bound, bound)
    return seen, delta


def test_every_class_has_its_own_delta_and_absent_ones_keep_theirs():
    w, made = weights(), pj.cuat(bound=0.1, step_size=0.04)
    found, [state, _], _ = seen_steps(made, jnp.float32(w), BATCHES)
    seen, delta = numpy_cuat(w, BATCHES, [y for _, y in BATCHES], C, bound=0.1, step_size=0.04)
    for ours, theirs in zip(found, seen, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(state.delta, delta, atol=1e-6)
    _, [before, _], _ = seen_steps(made, jnp.float32(w), BATCHES[:1])
    _, [after, _], _ = seen_steps(made, jnp.float32(w), BATCHES[:2])
    np.testing.assert_array_equal(after.delta[:2], before.delta[:2])  # the second batch holds class 2 only
    assert np.abs(before.delta[0]).max() > 0 and np.abs(before.delta[1]).max() == 0
    assert (after.delta[2] != before.delta[2]).any()


@pytest.mark.parametrize("name", ["domain", "camera"])
def test_domains_or_anything_else_that_the_batch_carries_take_the_place_of_classes(name):
    w, who = weights(), [np.random.default_rng(s).integers(0, 4, 8) for s in range(len(BATCHES))]
    made = pj.cuat(bound=0.1, step_size=0.04, groups=name, num_groups=None if name == "domain" else 4)
    found, [state, _], _ = seen_steps(made, jnp.float32(w), BATCHES, side=[{name: g} for g in who], num_domains=4)
    seen, delta = numpy_cuat(w, BATCHES, who, 4, bound=0.1, step_size=0.04)
    np.testing.assert_allclose(found[-1], seen[-1], atol=1e-6)
    np.testing.assert_allclose(state.delta, delta, atol=1e-6)


def test_with_a_single_class_it_is_uat_bit_for_bit():
    batches = [(x, np.full(8, 2)) for x, _ in BATCHES]
    settings = dict(bound=0.1, step_size=0.03, num_steps=2)
    ours, [state, _], _ = seen_steps(pj.cuat(**settings), jnp.float32(weights()), batches)
    uat, [whole, _], _ = seen_steps(pj.uat(**settings), jnp.float32(weights()), batches)
    np.testing.assert_array_equal(ours, uat)
    np.testing.assert_array_equal(state.delta[2], whole.delta[0])


def test_a_group_per_sample_and_a_fresh_start_is_adversarial_training():
    """A first batch moved "before" training, everybody its own group: AT from zero."""
    w, batch = jnp.float32(weights()), BATCHES[:1]
    settings = dict(bound=0.1, step_size=0.04, num_steps=3)
    alone = pj.cuat(groups="who", num_groups=8, update="before", clip_loss=np.inf, **settings)
    [ours], *_ = seen_steps(alone, w, batch, side=[{"who": np.arange(8)}])
    [theirs], *_ = seen_steps(pj.adversarial_training(random_starts=False, **settings), w, batch)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_random_starts_differ_between_classes():
    found, [state, _], _ = seen_steps(pj.cuat(bound=0.1, step_size=0.0, random_starts=True), jnp.float32(weights()), BATCHES)
    assert np.abs(state.delta[0] - state.delta[1]).max() > 0.01 and np.abs(state.delta).max() <= 0.1
    np.testing.assert_allclose(found[1] - BATCHES[1][0], np.broadcast_to(state.delta[2:], (8, H, W)), atol=1e-6)


def test_errors_tell_what_to_pass():
    x, y = jnp.asarray(images(), jnp.float32), jnp.zeros(8, jnp.int32)
    w = jnp.asarray(weights(), jnp.float32)
    made = lambda **settings: pj.objective(model(), pj.cuat(**settings), num_classes=C)
    with pytest.raises(
        ValueError, match=r"needs the number of groups for groups='domain', got none. Pass objective\(..., num_domains=D\)"
    ):
        made(groups="domain").init(w, x)
    with pytest.raises(ValueError, match=r"for groups='camera', got none. Pass num_groups=G"):
        made(groups="camera").init(w, x)
    one = made(groups="camera", num_groups=2)
    with pytest.raises(ValueError, match=r"cuat needs side\['camera'\], got none. Pass pj.batch\(..., side="):
        jax.eval_shape(one, w, one.init(w, x), pj.batch(x, y))
