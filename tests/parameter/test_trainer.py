"""The links in the trainer: gradients counted where they are computed and in the results, seeds vmapped, devices, the diagnosis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perturbjax as pj
from perturbjax.training import Devices, Options, Run, fit, fit_many
from perturbjax.training.step import as_arrays, compiled_step, device_data, init_state, update_arguments
from tests.training.problem import NUMBERS, dataset, recipe

pytestmark = pytest.mark.optax_promotes  # the learning rate's schedule

STEPS = 6  # two epochs of three


def hold(made):
    """A build function (recipes need one that is hashable)."""
    return lambda numbers: (made(),)


# Per step, beside the first gradient.
EXTRA = {
    "sam": (pj.sam, 1), "asam": (pj.asam, 1), "gsam": (pj.gsam, 1), "esam": (pj.esam, 1), "pugd": (pj.pugd, 1), "ngd": (pj.ngd, 0),
    "amp": (lambda: pj.amp(num_steps=2), 2),
    "looksam": (lambda: pj.looksam(every=3), 2 / 6),
    "rts": (pj.rts, 1), "never": (lambda: pj.rts(timing=pj.never()), 0),
    "every": (lambda: pj.rts(timing=pj.every(2)), 0.5), "last": (lambda: pj.rts(timing=pj.last(1 / 3)), 2 / 6),
    "two links": (lambda: (pj.sam(), pj.ngd()), 1),
}  # fmt: skip


def some_fast(names, fast):
    """Parametrises over the names; those that are not in `fast` are slow tests."""
    return pytest.mark.parametrize("name", [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names])


@some_fast(EXTRA, ["looksam", "two links"])
def test_the_results_say_how_many_gradients_a_step_took(name):
    made, extra = EXTRA[name]
    build = lambda numbers: made() if isinstance(made(), tuple) and not hasattr(made(), "update") else (made(),)
    history = fit(recipe(build), dataset(), NUMBERS, 0)
    np.testing.assert_allclose(history.gradient_evaluations, 1 + extra, rtol=1e-6)


def test_every_second_step_of_ten_takes_fifteen_gradients():
    calls, link, w = [], pj.rts(timing=pj.every(2)), jnp.ones(2)

    def gradient(p):
        jax.debug.callback(lambda _: calls.append(1), p)
        return p

    step = jax.jit(lambda state, t: link.update(gradient(w), state, w, grad_fn=gradient, step=t)[1])
    state = link.init(w)
    for t in range(10):
        state = step(state, jnp.int32(t))
    jax.effects_barrier()
    assert len(calls) == 10 + int(state.evaluations) == 15


CALLS = []


def counted():
    """A link of the loss that counts the passes through it, whoever asks for them."""

    def apply(flow, rest, state, context):
        jax.debug.callback(lambda _: CALLS.append(1), flow.value[0, 0])
        return flow, state, {}

    return pj.Perturbation("logits", lambda context: (), apply)


@some_fast(["looksam", "every", "last"], ["every"])
def test_inactive_steps_run_one_pass_also_for_vmapped_seeds(name):
    """The step number is one for all seeds, so the phase stays a branch; with a select, every step would run two passes."""
    made, extra = EXTRA[name]
    r = recipe(lambda numbers: (counted(), made()), epochs=2)
    data = device_data(dataset())
    index = jnp.arange(r.batch_size, dtype=jnp.int32)
    for seeds in (1, 2):
        CALLS.clear()
        states = [init_state(r, NUMBERS, data, seed) for seed in range(seeds)]
        if seeds == 1:
            state, step, numbers = states[0], compiled_step(r), as_arrays(NUMBERS)
            rows = index[None]
        else:
            stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
            state = stack(states)._replace(step=states[0].step)
            step, numbers, rows = (
                compiled_step(r, vmapped="shared"),
                stack([as_arrays(NUMBERS)] * 2),
                jnp.stack([index[None]] * 2),
            )
        CALLS.clear()
        for _ in range(STEPS):
            state, _, _ = step(state, numbers, data, rows)
        jax.effects_barrier()
        assert len(CALLS) == round(seeds * STEPS * (1 + extra))


def test_vmapped_seeds_are_single_seeds_and_count_the_same():
    r = recipe(hold(lambda: pj.rts(radius=pj.cosine(first=0.5), timing=pj.every(2), scale=pj.linear())))
    together = fit_many(r, [Run(dataset(), NUMBERS, seed) for seed in (0, 1)])
    for seed, found in enumerate(together):
        alone = fit(r, dataset(), NUMBERS, seed)
        np.testing.assert_allclose(found.logits, alone.logits, rtol=1e-3, atol=1e-4)
        assert found.gradient_evaluations == alone.gradient_evaluations == 1.5


@pytest.mark.slow
def test_several_steps_in_one_call_are_the_single_steps():
    """A scan around the branch."""
    r = recipe(hold(lambda: pj.rts(radius=pj.cosine(first=0.5), timing=pj.every(2))))
    single, scanned = (fit(r, dataset(), NUMBERS, 0, options=Options(steps_per_call=k)) for k in (1, 3))
    np.testing.assert_allclose(scanned.logits, single.logits, rtol=1e-4, atol=1e-5)
    assert scanned.gradient_evaluations == single.gradient_evaluations == 1.5


DEVICE_LINKS = {
    "sam": pj.sam, "asam": pj.asam, "gsam": lambda: pj.gsam(radius=pj.by_rate(high=0.1, low=0.01)), "amp": pj.amp, "esam": pj.esam,
    "looksam": lambda: pj.looksam(every=2), "pugd": pj.pugd, "rts": lambda: pj.rts(radius=pj.cosine(first=0.5), timing=pj.every(2)),
}  # fmt: skip
DEVICES = [(name, count, parallel) for name in DEVICE_LINKS for count in (2, 8) for parallel in ("jit", "pmap")]
FAST = [("rts", 2, "jit"), ("sam", 2, "pmap")]


def trained(r, devices, steps=3):
    data = device_data(dataset())
    state = devices.replicate(init_state(r, NUMBERS, data, 0))
    numbers, placed = devices.replicate(as_arrays(NUMBERS)), devices.replicate(data)
    step = compiled_step(r, devices)
    for number in range(steps):
        rows = np.arange(r.batch_size, dtype=np.int32)[None] + number
        index = devices.split(rows.shape, 1, lambda where: rows[:, where])
        state, _, _ = step(state, numbers, placed, index)
    return devices.first(state)


@pytest.mark.parametrize(
    ("name", "count", "parallel"), [pytest.param(*x, marks=[] if x in FAST else pytest.mark.slow) for x in DEVICES]
)
def test_several_devices_are_one_device(name, count, parallel):
    r = recipe(hold(DEVICE_LINKS[name]))
    one, several = trained(r, Devices()), trained(r, Devices(count, parallel))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), several.params, one.params)
    jax.tree.map(np.testing.assert_array_equal, several.opt_state[0].evaluations, one.opt_state[0].evaluations)


@some_fast(["sam", "asam", "gsam", "amp", "looksam", "esam", "pugd", "rts"], ["sam"])
def test_unsynchronised_perturbations_need_devices_that_have_gradients_of_their_own(name):
    link = getattr(pj, name)
    r = recipe(hold(lambda: link(radius=1.0, sync_perturbation=False)))
    alone, synced = trained(r, Devices()), trained(recipe(hold(lambda: link(radius=1.0))), Devices())
    jax.tree.map(np.testing.assert_array_equal, alone.params, synced.params)  # on one device there is one gradient
    mapped = trained(r, Devices(2, "pmap"))
    gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), mapped.params, synced.params)
    assert max(jax.tree.leaves(gap)) > 1e-5
    with pytest.raises(ValueError, match=f"{name} needs `local_grads` .* Write --parallel pmap, or sync_perturbation=true"):
        trained(r, Devices(2))


def test_links_are_given_the_learning_rate_s_course():
    """`rate` is the factor of the schedule at the optimiser's own steps."""
    r = recipe(accumulate=2)
    state = init_state(r, NUMBERS, device_data(dataset()), 0)
    made = type("made", (), {"context": pj.Context(3)})
    batch = pj.batch(jnp.zeros([2, 3]), jnp.zeros([2], jnp.int32))
    factor = r.schedule.factor(r.steps_per_epoch, r.total_steps)
    for step in range(STEPS):
        given = update_arguments(made, state._replace(step=jnp.int32(step)), r, batch, 0.0, {})
        np.testing.assert_array_equal(given["rate"], factor(step // 2 * 2))
        np.testing.assert_allclose(given["progress"], step / STEPS, rtol=1e-6)


@pytest.mark.slow
def test_a_radius_that_turns_negative_is_found_by_the_diagnosis():
    falling = lambda step: 12.0 - 4.0 * jnp.asarray(step, jnp.float32)  # checked at steps 0, 1 and 10: an error there
    with pytest.raises(ValueError, match="sam needs radius >= 0 at every step, got -28 at step 10"):
        pj.sam(radius=falling)
    late = lambda step: jnp.where(step == 10, 1.0, 2.5 - jnp.asarray(step, jnp.float32))
    with pytest.raises(
        FloatingPointError, match="step 4, at sam .link 1 of the optimiser.: the update of .* is nan.*Lower its radius"
    ):
        fit(recipe(hold(lambda: pj.sam(radius=late))), dataset(), NUMBERS, 0)
