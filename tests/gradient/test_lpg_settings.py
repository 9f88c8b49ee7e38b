"""What the contract suite asks of `lpg` with its defaults, asked of every kind of setting; and LPG with other methods (Figure 4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import perturbjax as pj
from perturbjax import spec, taxonomy
from perturbjax.training import device_data, fit, init_state, split_methods
from perturbjax.training.step import as_arrays, compiled_step
from tests import test_contract as contract
from tests.training.problem import NUMBERS, dataset, recipe

SETTINGS = {
    "scale": dict(form="scale"),
    "sample": dict(granularity="sample"),
    "pgd": dict(inference="pgd"),
    "pgd_unit_sample": dict(inference="pgd", step="unit", granularity="sample", clamp=False),
    "full": dict(inference="pgd", jacobian="full"),
    "full_sample": dict(inference="pgd", jacobian="full", granularity="sample", num_steps=2, step_size=0.05),
}
each_setting = pytest.mark.parametrize("name", SETTINGS)


def assert_same(a, b):
    """Bit for bit; to rounding where older compilers fuse differently, as in the contract suite."""
    if jax.__version_info__ >= (0, 10):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    else:
        contract.assert_trees_close(a, b, rtol=1e-5, atol=1e-6)


def steps(settings, number=2):
    return contract.run(pj.lpg, settings=settings, steps=number)


@each_setting
def test_a_bound_of_zero_is_plain_training_bit_for_bit_and_the_default_is_not(name):
    (params, stats, _, _), losses = steps(SETTINGS[name] | dict(bound=0.0, split="all"))
    (plain, plain_stats, _, _), plain_losses = contract.run(pj.ce)
    assert_same((losses, params, stats), (plain_losses, plain, plain_stats))
    (params, _, _, _), losses = steps(SETTINGS[name] | dict(split="all"))
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, plain))) > 1e-4
    assert np.isfinite(losses).all()


@each_setting
def test_seeds_under_vmap_and_eight_devices_have_the_numbers_of_one(name):
    make = lambda: pj.lpg(**SETTINGS[name], split="frequency", bound=0.2)
    step = jax.jit(lambda state, batch, key: contract.one_step(make(), state, batch, key))
    states, batches = (
        [contract.start(make(), *contract.problem(s)) for s in range(2)],
        [contract.problem(s)[2] for s in range(2)],
    )
    keys = jax.random.split(jax.random.key(0), 2)
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    together = jax.jit(jax.vmap(lambda *a: contract.one_step(make(), *a)))(stack(states), stack(batches), keys)
    alone = [step(states[s], batches[s], keys[s]) for s in range(2)]
    for s in range(2):
        contract.assert_trees_close(jax.tree.map(lambda x, s=s: x[s], together), alone[s], rtol=1e-4, atol=1e-5)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    P = PartitionSpec
    held = jax.device_put((states[0], keys[0]), NamedSharding(mesh, P()))
    sharded = step(held[0], jax.device_put(batches[0], NamedSharding(mesh, P("d"))), held[1])
    contract.assert_trees_close(sharded, alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text", ["lpg(inference=pgd, step_size=0.1)", "lpg(0.2, inference=pgd, jacobian=full, granularity=sample)"]
)
def test_numbers_are_traced_and_the_rest_is_structure(text):
    structure, numbers = spec.split_numbers(spec.parse_chain(text), taxonomy.registry(), taxonomy.helpers())
    params, stats, batch = contract.problem()
    state, traces = (
        contract.start(pj.lpg(**dict(structure[0].kwargs) | dict(bound=0.1, step_size=None)), params, stats, batch),
        [],
    )

    @jax.jit
    def step(state, numbers, key):
        traces.append(1)
        [made] = spec.build(structure, numbers, taxonomy.registry(), taxonomy.helpers())
        return contract.one_step(made, state, batch, key)

    for number in range(2):
        state, loss = step(state, tuple(jnp.float32(x * (1 - 0.5 * number)) for x in numbers), jax.random.key(number))
        assert np.isfinite(loss)
    assert len(traces) == 1
    assert len(numbers) == (2 if "step_size" in text else 1)  # the other settings don't trace


# ------------------------------------------------------------------------------------------------------------- Figure 4


@functools.cache
def program(structure, model):
    """The recipe of a structure and its compiled step, which all bounds share."""
    r = recipe(lambda given: spec.build(structure, given, taxonomy.registry(), taxonomy.helpers()), model=model)
    return r, compiled_step(r)


def trained(text, count=2, model="mlp"):
    """Parameters after some steps of a chain as it is typed on the command line."""
    structure, numbers = spec.split_numbers(spec.parse_chain(text), taxonomy.registry(), taxonomy.helpers())
    r, step = program(structure, model)
    wanted, data = NUMBERS | {"method": numbers}, device_data(dataset())
    state = init_state(r, wanted, data, 0)
    index = jnp.arange(16, dtype=jnp.int32)[None]
    for _ in range(count):
        state, metrics, _ = step(state, as_arrays(wanted), data, index)
    assert np.isfinite(metrics["loss"]).all()
    return jax.device_get(state.params)


@pytest.mark.optax_promotes  # the schedule
@pytest.mark.parametrize("other", ["la", "lpl(split=all)", "sam", "mixup"])
def test_in_figure_4_s_combinations_it_builds_trains_acts_and_at_bound_zero_is_not_there(other):
    alone = trained(other)
    assert_same(trained(f"{other}+lpg(bound=0, split=all)"), alone)
    for lpg in ("lpg(bound=0.3, split=all)", "lpg(bound=0.3, split=all, inference=pgd)"):
        both = trained(f"{other}+{lpg}")
        assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), both, alone))) > 1e-4


def test_figure_4_s_names_as_typed_build_a_link_at_each_place():
    for text, sites, transforms in (
        ("la+lpg", ["logits", "logit_gradient"], 0),
        ("lpl+lpg", ["logits", "logit_gradient"], 0),
        ("sam+lpg", ["logit_gradient"], 1),
        ("mixup+lpg", ["input", "logit_gradient"], 0),
        ("la+lpl+sam+lpg(split=frequency)", ["logits", "logits", "logit_gradient"], 1),
    ):
        structure, numbers = spec.split_numbers(spec.parse_chain(text), taxonomy.registry(), taxonomy.helpers())
        links, found = split_methods(spec.build(structure, numbers, taxonomy.registry(), taxonomy.helpers()))
        assert ([link.site for link in links], len(found)) == (sites, transforms)


def test_sam_s_second_gradient_is_perturbed_too():
    """SAM asks for gradients of the same loss, LPG in it: at the ascended point its δ is found anew."""
    params, x, y = (jnp.asarray(v) for v in (np.eye(3, dtype=np.float32), np.ones((4, 3), np.float32), np.array([0, 1, 2, 0])))
    x = x * jnp.arange(1.0, 5.0)[:, None]
    made = pj.objective(lambda w, x: x @ w, pj.lpg(bound=0.3, direction=1.0), num_classes=3)
    gradient = jax.jit(jax.grad(lambda w: made(w, made.init(w, x), pj.batch(x, y))[0]))
    tx = pj.sam(radius=0.5)
    first = gradient(params)
    updates, _ = tx.update(first, tx.init(params), params, grad_fn=lambda p, **_: gradient(p), value=1.0, step=0, progress=0.0)
    ascended = params + 0.5 * first / jnp.linalg.norm(first)
    np.testing.assert_allclose(updates, gradient(ascended), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.optax_promotes
@pytest.mark.parametrize("model", ["cnn", "resnet8"])
@pytest.mark.parametrize("lpg", ["inference=pgd", "inference=pgd, jacobian=full"])
def test_through_convolutions_and_batch_norm(model, lpg):
    """The models' convolutions know no forward mode; with bound 0 it is plain training, bit for bit."""
    alone = trained("ce", model=model)
    assert_same(trained(f"lpg(bound=0, split=all, {lpg})", model=model), alone)
    both = trained(f"lpg(bound=0.3, split=all, {lpg})", model=model)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), both, alone))) > 1e-4


@pytest.mark.optax_promotes  # the schedule
@pytest.mark.parametrize("method", ["lpg", "lpl", "lpa(site=features)"])
def test_a_curriculum_typed_on_the_command_line_trains_with_the_bound_of_each_step(method):
    """Of six steps the fourth is halfway: after three with the linear bound a step moves as with the constant one of that moment."""
    name, settings = method.removesuffix(")").split("(") if "(" in method else (method, "")
    typed = lambda bound: f"{name}(bound={bound}, split=all{settings and ', ' + settings})"

    def step_of(bound, taken):
        structure, numbers = spec.split_numbers(spec.parse_chain(typed(bound)), taxonomy.registry(), taxonomy.helpers())
        r, step = program(structure, "mlp")
        given, data = NUMBERS | {"method": numbers}, device_data(dataset())
        state = init_state(r, given, data, 0)._replace(step=jnp.int32(taken))
        assert r.total_steps == 6
        state, metrics, _ = step(state, as_arrays(given), data, jnp.arange(16, dtype=jnp.int32)[None])
        return jax.device_get(state.params), float(metrics["loss"][0])

    ours, loss = step_of("linear(0.8, 0.2)", 3)
    wanted, other = step_of("0.5", 3)
    contract.assert_trees_close(ours, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    first, _ = step_of("linear(0.8, 0.2)", 0)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), first, wanted))) > 1e-5


@pytest.mark.optax_promotes
@pytest.mark.slow
def test_training_stops_where_a_bound_turns_negative():
    """Unseen on the host, where steps 0, 1 and 10 are looked at."""
    late = lambda step: jnp.where(step == 10, 0.1, 0.25 - 0.1 * jnp.asarray(step, jnp.float32))
    build = lambda numbers: (pj.lpg(bound=late, split="all"),)
    with pytest.raises(
        FloatingPointError, match="at step 4 .*It started at lpg .link 1 of 1, at site logit_gradient.*Lower its bound"
    ):
        fit(recipe(build), dataset(), NUMBERS, 0)
