"""Settings that are known are read on the host: a concrete jax.Array inside a trace serves as the Python number that it holds."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import perturbjax as pj
from perturbjax import spec, taxonomy
from tests.test_contract import BATCH, CLASSES, METHODS, each, one_step, problem, start

HELPERS = {
    "lpl(bound=varied(eps=0.2, delta_eps=0.3))", "lpl(bound=varied_by_frequency(eps=0.2, delta_eps=0.3))",
    "lpl(bound=linear(first=0.5, last=0.1))", "lpl(bound=cosine(first=0.5, last=0.1, growth=2.0, cycles=2))",
    "lpl(num_steps=head_tail_steps(most=4.0, head=0.5))", "lpl(num_steps=proportional_steps(most=4.0, base=1.0))",
    "lpl(split=by_accuracy(tau=0.5, decay=0.8))", "lpl(split=by_frequency(tau=0.4))", "lpl(split=all_classes(direction=1.0))",
    "lpl(bound=[0.1, 0.2, 0.3, 0.4, 0.5], step_size=[0.1, 0.1, 0.1, 0.1, 0.1])",
    "lpa(bound=layer_scaled(bound=0.5, beta=0.5))", "lpg(split=by_variance(tau=0.5, decay=0.8), bound=linear(first=0.2, last=0.1))",
    "sam(radius=by_rate(high=0.05, low=0.01, floor=0.1))", "rts(timing=plateau(patience=1, threshold=0.01, decay=0.5))",
    "rts(radius=cosine(first=0.5, last=0.1), scale=linear(first=1.0, last=0.5))",
}  # fmt: skip


def traced(make):
    """The shapes of one step of what `make` returns, called inside a trace, as in a jitted or scanned function."""
    params, stats, batch = problem()

    def step(state, key):
        made = make()
        if not hasattr(made, "update"):
            return one_step(made, state, batch, key)
        made = optax.chain(made)
        place = dict(step=jnp.int32(1), progress=0.5, value=jnp.float32(1.0), rate=0.5)
        given = dict(
            grad_fn=lambda p, weights=None: p, loss_fn=lambda p: jnp.zeros([BATCH]), labels=batch.labels, num_classes=CLASSES
        )
        return made.update(params, made.init(params), params, key=key, **given, **place)

    return jax.eval_shape(step, start(make(), params, stats, batch), jax.random.key(0))


def serves(make, **settings):
    """Whether these settings are allowed at all."""
    try:
        start(make(**settings), *problem())
    except (TypeError, ValueError):
        return False
    return True


def numbers_of(make):
    """{name: number} of the settings that take any: their defaults, and 0.5 for those that are None, where that is allowed."""
    given = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    floats = {name: value for name, value in given.items() if isinstance(value, float)}
    free = [name for name, value in given.items() if value is None and serves(make, **{name: 0.5})]
    return floats, free


@each([make for make in METHODS if any(numbers_of(make))])
def test_every_number_may_be_a_concrete_array_in_a_trace(make):
    floats, free = numbers_of(make)
    arrays = {name: jnp.float32(value) for name, value in floats.items()}
    assert traced(lambda: make(**arrays)) == traced(make)
    for name in free:
        by_number, array = traced(lambda name=name: make(**{name: 0.5})), jnp.float32(0.5)
        assert traced(lambda name=name, array=array: make(**{name: array})) == by_number


@pytest.mark.optax_promotes
@pytest.mark.parametrize("text", sorted(HELPERS))
def test_the_numbers_of_bounds_splits_rules_courses_and_timings_may_be_concrete_arrays_in_a_trace(text):
    registry, helpers = taxonomy.registry(), taxonomy.helpers()
    calls, values = spec.resolve(spec.parse_chain(text), registry, helpers), []

    def arrays(value):
        """The call with arrays for its numbers, made out of the trace."""
        if isinstance(value, spec.Call):
            return {"call": value.name, "settings": {name: arrays(v) for name, v in value.kwargs}}
        if isinstance(value, tuple):
            return jnp.array(value, jnp.float32)
        if isinstance(value, float):
            values.append(value)
            return jnp.float32(value)
        return value

    def made(plan, table):
        settings = {k: made(v, helpers) if isinstance(v, dict) else v for k, v in plan["settings"].items()}
        return table[plan["call"]](**settings)

    [plan] = [arrays(call) for call in calls]
    assert values or "[" in text
    traced(lambda: made(plan, registry))


def test_the_example_of_a_bound_of_one_has_the_numbers_of_the_python_number():
    params, stats, batch = problem()
    bound = jnp.float32(1.0)

    def run(make):
        state = start(make(), params, stats, batch)
        return jax.jit(lambda state, key: one_step(make(), state, batch, key))(state, jax.random.key(0))

    ours, theirs = run(lambda: pj.lpl(bound=bound)), run(lambda: pj.lpl(bound=1.0))
    assert float(ours[1]) == float(theirs[1])
