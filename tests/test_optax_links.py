"""What every optax link promises, asked of all of them as optax asks it of contributed optimisers; a method joins by being exported."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from tests.methods import ASKING, LINKS, each
from tests.optax_links import QUIET, assert_trees_close, given, losses, parameters

every_link = each(LINKS)


def stepper(tx):
    """(params, state, step number) -> (params, state), with all that a trainer gives."""

    def step(params, state, number):
        extra = given(losses) | dict(step=number, progress=number.astype(jnp.float32) / 10)
        extra["key"] = jax.random.fold_in(jax.random.key(1), number)
        updates, state = tx.update(extra["grad_fn"](params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def test_all_kinds_of_links_are_found():
    names = {f.__name__ for f in LINKS}
    assert names >= {"sam", "asam", "gsam", "amp", "looksam", "esam", "pugd", "rts", "swad"}
    assert names >= {"gradient_clipping", "gradient_noise", "ngd", "pcgrad", "graddrop", "dp_sgd"}
    assert {f.__name__ for f in ASKING} >= {"sam", "rts", "pcgrad", "dp_sgd"} and pj.ngd not in ASKING


@every_link
def test_the_gradients_that_it_asks_for_are_in_its_state(make):
    """As `evaluations`, which the trainer adds to the gradients that a step takes: as many as were computed, none for others."""
    link, params, extra, calls = make(), parameters(), given(losses), []

    def grad_fn(p, *, weights=None):
        jax.debug.callback(lambda _: calls.append(1), jnp.sum(p["last"]["kernel"]) if weights is None else weights.sum())
        return extra["grad_fn"](p, weights=weights)

    @jax.jit
    def step(state, number):
        place = dict(step=number, progress=number.astype(jnp.float32) / 6, grad_fn=grad_fn)
        return link.update(extra["grad_fn"](params), state, params, **extra | place)[1]

    state = link.init(params)
    for number in range(6):
        state = step(state, jnp.int32(number))
    jax.effects_barrier()
    counted = optax.tree_utils.tree_get_all_with_path(state, "evaluations")
    assert sum(int(value) for _, value in counted) == len(calls)
    assert (len(calls) > 0) == (make in ASKING)


@every_link
def test_arguments_for_others_pass_it_by_also_outside_a_chain(make):
    link, params = make(), parameters()
    extra = given(losses)
    g = extra["grad_fn"](params)
    alone, _ = link.update(g, link.init(params), params, **extra, meant_for_another=object())
    assert isinstance(link, optax.GradientTransformationExtraArgs)
    chained = optax.chain(link)
    assert_trees_close(alone, chained.update(g, chained.init(params), params, **extra)[0], rtol=0)


@every_link
def test_all_steps_share_one_compilation_and_a_scan_is_the_loop(make):
    tx, params, traces = optax.chain(make(), optax.sgd(0.1)), parameters(), []
    step = stepper(tx)
    compiled = jax.jit(lambda *args: (traces.append(1), step(*args))[1])
    ours, state = params, tx.init(params)
    for number in range(4):
        ours, state = compiled(ours, state, jnp.int32(number))
    assert len(traces) == 1
    body = lambda carry, number: (step(*carry, number), None)
    scanned, _ = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(4, dtype=jnp.int32))
    assert_trees_close(scanned, (ours, state), rtol=1e-5, atol=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours, params))) > 1e-3


@every_link
def test_what_its_state_has_of_the_parameters_shape_is_found_by_map_params(make):
    link, params = make(), parameters()
    marked = optax.tree.map_params(link, lambda x: jnp.full_like(x, 7), link.init(params))
    found = [bool((leaf == 7).all()) for leaf in jax.tree.leaves(marked)]
    shapes = [w.shape for w in jax.tree.leaves(params)]
    assert found == [leaf.shape in shapes for leaf in jax.tree.leaves(marked)]
    assert sum(found) in (0, len(shapes))


@every_link
@pytest.mark.optax_promotes
def test_injected_hyper_parameters_give_its_own_numbers(make):
    settings = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    numbers = {name: 0.9 * value for name, value in settings.items() if type(value) is float}
    injected, link = optax.inject_hyperparams(make, static_args=set(settings) - set(numbers))(**numbers), make(**numbers)
    params, extra = parameters(), given(losses)
    g = extra["grad_fn"](params)
    found, state = jax.jit(lambda s: injected.update(g, s, params, **extra))(injected.init(params))
    wanted, _ = jax.jit(lambda s: link.update(g, s, params, **extra))(link.init(params))
    assert_trees_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert set(state.hyperparams) == set(numbers)


@every_link
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_updates_have_the_gradients_type_and_the_state_keeps_its_own(make, dtype):
    link, params = make(**QUIET.get(make, {})), parameters(dtype)
    extra = given(losses)
    g, state = extra["grad_fn"](params), link.init(params)
    updates, after = link.update(g, state, params, **extra)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    signature = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    assert signature(after) == signature(state)
    high = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    wanted, _ = link.update(extra["grad_fn"](high), link.init(high), high, **extra)
    scale = max(float(jnp.abs(u).max()) for u in jax.tree.leaves(wanted))
    for u, w in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):  # a few roundings to 8 bits
        np.testing.assert_allclose(u.astype(jnp.float32), w, atol=0.04 * scale)


MASK = {"first": False, "last": True}  # a prefix of the parameters


def on_these_alone(link, params):
    """(the link's update of params["last"], its state) where "first" is no parameter but a constant of the loss."""
    own = {"last": params["last"]}
    extra = given(lambda p: losses({"first": params["first"], **p}))
    return link.update(extra["grad_fn"](own), link.init(own), own, **extra)


@every_link
@pytest.mark.parametrize("how", ["masked", "partition", "mask"])
def test_of_some_parameters_it_is_what_it_is_on_these_alone(make, how):
    """Norms, climbs, products and draws know nothing of the others, which get their plain gradients."""
    params, extra = parameters(), given(losses)
    g, link = extra["grad_fn"](params), make()
    if how == "mask":
        if "mask" not in inspect.signature(make).parameters:
            assert make not in ASKING
            return
        tx = make(mask=MASK)
    else:
        labels = {"first": "others", "last": "own"}
        tx = optax.masked(link, MASK) if how == "masked" else optax.partition({"own": link, "others": optax.identity()}, labels)
        extra |= {name: pj.unmasked(extra[name], params) for name in ("grad_fn", "loss_fn")}
    updates, state = jax.jit(lambda s: tx.update(g, s, params, **extra))(tx.init(params))
    wanted, _ = on_these_alone(link, params)
    assert_trees_close(updates["last"], wanted["last"], rtol=1e-5, atol=1e-7)
    assert_trees_close(updates["first"], g["first"], rtol=0)


@every_link
def test_a_zero_gradient_stays_zero(make):
    link, params = make(**QUIET.get(make, {})), parameters()
    extra = given(lambda p: 0 * losses(p))
    updates, _ = link.update(extra["grad_fn"](params), link.init(params), params, **extra)
    for u in jax.tree.leaves(updates):
        np.testing.assert_array_equal(u, 0.0)
