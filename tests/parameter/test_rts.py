"""perturbjax.parameter.rts: five steps in numpy, its limits bit for bit, schedules, and that an inactive step costs one gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.parameter import rts as module
from tests.parameter.problem import (
    added,
    as_numpy,
    assert_close,
    by_link,
    enable_x64,
    make,
    norm,
    one_update,
    same_as_by_hand,
    unit,
)


@pytest.fixture
def problem():
    with enable_x64(True):
        yield make()


def unit_climb(w, g, ascent="weighted"):
    return unit({n: np.abs(w[n]) * g[n] if ascent == "weighted" else g[n] for n in w})


@pytest.mark.parametrize("ascent", ["weighted", "gradient"])
@pytest.mark.parametrize("inactive", ["plain", "unit"])
def test_five_steps_with_momentum_and_decay_are_those_of_numpy(problem, ascent, inactive):
    """Radius and scale change with the step, and every second step is inactive."""
    radius, scale = [0.5, 0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 1.0, 1.5, 2.0]

    def direction(w, t):
        g = problem.gradient(w)
        if t % 2:
            return unit(g) if inactive == "unit" else g
        above = problem.gradient(added(w, unit_climb(w, g, ascent), radius[t]))
        return unit(added(above, g, scale[t]))

    table = lambda numbers: lambda step: jnp.asarray(numbers)[jnp.minimum(step, 4)]
    link = pj.rts(radius=table(radius), scale=table(scale), timing=pj.every(2), ascent=ascent, inactive=inactive)
    same_as_by_hand(problem, link, direction, evaluations=3)


def test_radius_one_always_and_scale_one_is_pugd_bit_for_bit(problem):
    """Together with momentum and decay, compiled or not, in float64 and float32."""
    (ours, state), (other, _) = by_link(problem, pj.rts()), by_link(problem, pj.pugd())
    assert_close(ours, other, rtol=0)
    assert int(state.evaluations) == 5
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), problem)
    step = lambda link: jax.jit(lambda p: link.update(low.slope(p), link.init(p), p, grad_fn=low.slope)[0])(low.params)
    assert_close(step(pj.rts()), step(pj.pugd()), rtol=0)


def test_scale_zero_is_the_unit_gradient_further_up(problem):
    """Along |w| ⊙ g; normalised SAM only with ascent="gradient"."""
    w, g = problem.params, problem.gradient(problem.params)
    ours, _ = one_update(problem, pj.rts(radius=0.4, scale=0.0))
    assert_close(ours, unit(problem.gradient(added(w, unit_climb(w, g), 0.4))), rtol=1e-9)
    normalised, _ = one_update(problem, pj.rts(radius=0.4, scale=0.0, ascent="gradient"))
    assert_close(normalised, unit(one_update(problem, pj.sam(radius=0.4))[0]), rtol=1e-12, atol=1e-15)
    assert max(np.abs(normalised[n] - ours[n]).max() for n in w) > 1e-3


def test_never_is_the_base_optimiser_bit_for_bit(problem):
    ours, state = by_link(problem, pj.rts(timing=pj.never()))
    assert_close(ours, by_link(problem, optax.identity())[0], rtol=0)
    assert int(state.evaluations) == 0
    ours, _ = by_link(problem, pj.rts(timing=pj.never(), inactive="unit"))
    assert_close(ours, by_link(problem, pj.ngd())[0], rtol=0)


def test_radius_zero_is_the_unit_gradient(problem):
    ours, seen = one_update(problem, pj.rts(radius=0.0))
    assert_close(ours, unit(problem.gradient(problem.params)), rtol=1e-12)
    assert_close(seen[0], problem.params, rtol=0)
    # A cosine radius gets there.
    ours, seen = one_update(problem, pj.rts(radius=pj.cosine(first=0.5)), progress=1.0)
    assert_close(seen[0], problem.params, rtol=0)


def test_the_radius_follows_a_cosine_with_restarts(problem):
    lengths = []
    for progress in (0.0, 0.25, 0.5, 0.75):
        _, seen = one_update(problem, pj.rts(radius=pj.cosine(first=0.8, cycles=2)), progress=progress)
        lengths.append(norm(added(seen[0], problem.params, -1)))
    np.testing.assert_allclose(lengths, [0.8, 0.4, 0.8, 0.4], rtol=1e-5)


def test_the_unit_and_the_scaled_sum_have_length_one(problem):
    for settings in (
        dict(),
        dict(scale=3.0),
        dict(scale=0.0),
        dict(ascent="gradient"),
        dict(timing=pj.never(), inactive="unit"),
    ):
        np.testing.assert_allclose(norm(one_update(problem, pj.rts(**settings))[0]), 1, rtol=1e-9)


TIMINGS = {"every": (partial(pj.every, 2), 5), "after": (partial(pj.after, 0.3), 7), "last": (partial(pj.last, 0.2), 2),
           "never": (pj.never, 0), "always": (pj.always, 10)}  # fmt: skip


@pytest.mark.parametrize("name", TIMINGS)
@pytest.mark.parametrize("seeds", [None, 3])
def test_inactive_steps_cost_one_gradient_also_for_vmapped_seeds(name, seeds):
    """Counted where the gradient is computed: a select instead of a branch would compute it at each of the 10 steps."""
    made, active = TIMINGS[name]
    link, calls = pj.rts(timing=made()), []

    def grad_fn(p):
        jax.debug.callback(lambda x: calls.append(1), p)
        return p

    def update(state, params, step):
        place = dict(step=step, progress=step.astype(jnp.float32) / 10)
        return link.update(params, state, params, grad_fn=grad_fn, **place)[1]

    params = jnp.ones([2] if seeds is None else [seeds, 2])
    state = link.init(params) if seeds is None else jax.vmap(link.init)(params)
    run = jax.jit(update if seeds is None else jax.vmap(update, in_axes=(0, 0, None)))
    for step in range(10):
        state = run(state, params, jnp.int32(step))
    jax.effects_barrier()
    assert len(calls) == active * (seeds or 1)
    np.testing.assert_array_equal(state.evaluations, active)


def test_on_a_plateau_it_starts_with_the_second_gradient(problem):
    """As the draft has it: SGD first, PUGD once the loss stops to fall. Vmapped, this predicate is each seed's own."""
    link = pj.rts(timing=pj.plateau(patience=2, decay=0.0))
    params, state, found = problem.params, link.init(problem.params), []
    for value in (3.0, 2.0, 2.0, 2.0, 2.0, 1.0):
        updates, state = link.update(problem.slope(params), state, params, grad_fn=problem.slope, value=value)
        found.append(bool(np.isclose(norm({n: np.asarray(u) for n, u in updates.items()}), 1)))
    assert found == [False, False, False, True, True, True]
    assert int(state.evaluations) == 3
    both = jax.vmap(lambda s, v: link.update(params, s, params, grad_fn=lambda p: p, value=v)[1], in_axes=(None, 0))
    np.testing.assert_array_equal(both(state, jnp.array([0.1, 5.0])).evaluations, [4, 4])


def test_a_zero_gradient_stays_zero_and_nan_is_not_hidden():
    link, w = pj.rts(), jnp.ones(3)
    zero, _ = link.update(jnp.zeros(3), link.init(w), w, grad_fn=jnp.zeros_like)
    np.testing.assert_array_equal(zero, 0.0)
    bad = jnp.array([1.0, jnp.nan, jnp.inf])
    for grads, second in [(bad, jnp.ones(3)), (jnp.ones(3), bad), (1e30 * jnp.ones(3), jnp.ones(3))]:
        out, _ = link.update(grads, link.init(w), w, grad_fn=lambda p: second + 0 * p)
        assert np.isnan(out).any()  # the last one: an overflow of the norm, not a step of length zero


def test_a_schedule_that_turns_negative_gives_nan_under_jit():
    link, w = pj.rts(radius=lambda step: 20.0 - step.astype(jnp.float32)), jnp.ones(3)
    run = jax.jit(lambda step: link.update(w, link.init(w), w, grad_fn=lambda p: p, step=step)[0])
    assert np.isfinite(run(jnp.int32(20))).all() and np.isnan(run(jnp.int32(21))).all()


def test_errors_name_the_value(problem):
    with pytest.raises(ValueError, match="rts needs radius >= 0, got -1"):
        pj.rts(radius=-1.0)
    with pytest.raises(ValueError, match="rts needs scale >= 0, got -1"):
        pj.rts(scale=-1.0)
    with pytest.raises(ValueError, match="rts needs ascent to be one of its names, got 'sam'"):
        pj.rts(ascent="sam")
    with pytest.raises(ValueError, match="rts needs inactive to be one of its names, got 'zero'"):
        pj.rts(inactive="zero")
    with pytest.raises(ValueError, match="rts needs `grad_fn`, got none"):
        pj.rts().update(problem.params, pj.rts().init(problem.params), problem.params)
    with pytest.raises(ValueError, match="timing needs `progress`"):
        one_update(problem, pj.rts(timing=pj.last(0.5)))


def test_plain_inactive_steps_jump_where_the_timing_switches_and_a_note_says_so(problem, caplog):
    """Unit ones don't; nor is there a note where a run has steps of one kind only."""
    module._note.cache_clear()
    for inactive, before in (("unit", 1.0), ("plain", norm(problem.gradient(problem.params)))):
        link, found = pj.rts(timing=pj.last(0.5), inactive=inactive), []
        for progress in (0.0, 1.0):
            place = dict(grad_fn=problem.slope, progress=progress)
            updates, _ = link.update(problem.slope(problem.params), link.init(problem.params), problem.params, **place)
            found.append(norm(as_numpy(updates)))
        np.testing.assert_allclose(found, [before, 1], rtol=1e-9)
        assert len(caplog.messages) == (inactive == "plain")
    assert "the updates jump where its timing switches" in caplog.messages[0] and "Write inactive=unit" in caplog.messages[0]
    for timing in (pj.always(), pj.never(), pj.last(1.0), pj.every(1), pj.last(0.5), pj.every(2), pj.plateau()):
        module._note.cache_clear()
        caplog.clear()
        pj.rts(timing=timing).init(problem.params)
        assert len(caplog.messages) == (timing in (pj.last(0.5), pj.every(2), pj.plateau()))
