"""perturbjax.parameter.ascent, and what all links that ask for a second gradient promise together.

The same loss twice, BatchNorm once, and company: in a chain with clipping, decay and momentum, before MultiSteps, under
inject_hyperparams, in bfloat16, on a disk, with nan.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.parameter.ascent import dot, move, safe, unit_tree
from perturbjax.training.schedule import Schedule
from perturbjax.training.step import DeviceData, Recipe, as_arrays, init_state, train_step
from tests.parameter.problem import assert_close, enable_x64, make, norm

LINKS = {
    "sam": partial(pj.sam, radius=0.5),
    "sam-inf": partial(pj.sam, radius=0.1, p=float("inf")),
    "asam": pj.asam,
    "gsam": partial(pj.gsam, radius=0.5),
    "amp": partial(pj.amp, num_steps=2),
    "looksam": partial(pj.looksam, radius=0.5, every=2),
    "pugd": pj.pugd,
    "rts": partial(pj.rts, timing=pj.every(2), inactive="unit"),
}
each_link = pytest.mark.parametrize("make_link", LINKS.values(), ids=LINKS)


def test_unit_tree_has_one_norm_over_all_leaves():
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    jax.tree.map(np.testing.assert_allclose, unit_tree(tree), {"a": np.array([0.6, 0.0]), "b": np.array([[0.8]])})
    zero = jax.tree.map(jnp.zeros_like, tree)
    jax.tree.map(np.testing.assert_array_equal, unit_tree(zero), zero)
    np.testing.assert_allclose(unit_tree(tree, epsilon=5.0)["a"], [0.3, 0.0], rtol=1e-6)


def test_what_is_not_finite_becomes_nan_as_a_whole_and_zero_stays_zero():
    """An infinite norm, if only by overflow, would turn a diverged gradient into a step of length zero."""
    for bad in ([1.0, jnp.nan], [1.0, jnp.inf], [1e30, 1e30]):
        assert np.isnan(unit_tree(jnp.array(bad))).all()
    np.testing.assert_array_equal(safe(jnp.array([0.0, 2.0])), [1.0, 2.0])
    np.testing.assert_array_equal(
        dot({"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}, {"a": jnp.ones(2), "b": jnp.ones([1, 1])}), 6
    )


def test_bfloat16_is_measured_and_moved_in_float32():
    """The norm of 350 equal numbers in bfloat16 is off by enough to change every quotient's last digit."""
    tree = {"a": jnp.full([350], 2.0**-4, jnp.bfloat16)}
    np.testing.assert_array_equal(unit_tree(tree)["a"], jnp.bfloat16(350**-0.5))
    moved = move({"w": jnp.ones([2], jnp.bfloat16)}, {"w": jnp.full([2], 0.25, jnp.bfloat16)}, jnp.float32(0.5))["w"]
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved.astype(jnp.float32), 1.125)


def test_radius_keeps_float64():
    with enable_x64(True):
        np.testing.assert_array_equal(move(np.ones(2), np.ones(2), 0.05), 1.05)


class Small(nn.Module):
    """A layer, BatchNorm and a head."""

    sites: tuple[str, ...] = ("input", "logits")

    @nn.compact
    def __call__(self, value, *, train=False, start="input", stop="logits"):
        hidden = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(value.reshape(len(value), -1)))
        return nn.Dense(3)(jnp.tanh(hidden))


def no_link(numbers):
    return ()


def one_trainer_step(build):
    images = jax.random.uniform(jax.random.key(0), [8, 2, 2, 1])
    data = DeviceData(images, jnp.arange(8, dtype=jnp.int32) % 3, jnp.array([3, 3, 2], jnp.int32))
    numbers = dict(method=(), learning_rate=0.1, momentum=0.9, weight_decay=0.0)
    recipe = Recipe(Small(), build, num_classes=3, num_examples=8, batch_size=8, epochs=1, schedule=Schedule(warmup_epochs=0))
    state = init_state(recipe, numbers, data, seed=0)
    after, _, _ = jax.jit(partial(train_step, recipe))(state, as_arrays(numbers), data, jnp.arange(8))
    return state, after


@pytest.mark.optax_promotes
@each_link
def test_batch_norm_statistics_come_from_the_first_pass_only(make_link):
    """After one step of the trainer they are those of plain training; the parameters are not."""
    before, plain = one_trainer_step(no_link)
    _, after = one_trainer_step(lambda numbers: (make_link(),))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.stats, plain.stats)
    assert max(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), after.stats, plain.stats)
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, plain.params)
    assert max(jax.tree.leaves(gap)) > 1e-4


@pytest.mark.parametrize("make_link", [LINKS["sam"], pj.pugd], ids=["sam", "pugd"])
def test_the_second_gradient_is_of_the_same_perturbed_loss(make_link):
    """With LPL, dropout and mixup in the loss: the gradient at w + ε̂ of the objective with the same key and states."""
    params, x = (
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32),
        jax.random.normal(jax.random.key(0), [9, 4]),
    )
    links = pj.chain(pj.mixup(), pj.dropout(rate=0.3, site="input"), pj.lpl(bound=0.3), pj.label_smoothing())
    made = pj.objective(pj.line(lambda w, x: x @ w), links, num_classes=3)
    states, batch = made.init(params, x), pj.batch(x, jnp.arange(9) % 3)
    grad_fn = jax.jit(lambda p: jax.grad(made, has_aux=True)(p, states, batch, key=jax.random.key(7))[0])
    link, g = make_link(), grad_fn(params)
    updates, _ = link.update(g, link.init(params), params, grad_fn=grad_fn)
    if make_link is pj.pugd:
        climb = jnp.abs(params) * g
        total = g + grad_fn(params + climb / jnp.linalg.norm(climb))
        expected = total / jnp.linalg.norm(total)
    else:
        expected = grad_fn(params + 0.5 * g / jnp.linalg.norm(g))
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-6)


CUBE = lambda target: lambda p: (p - target) ** 3


@pytest.mark.optax_promotes
@each_link
def test_before_multi_steps_it_averages_perturbed_gradients(make_link):
    """chain(link, MultiSteps(sgd)): k perturbed gradients are averaged into one step."""
    tx = optax.chain(make_link(), optax.MultiSteps(optax.sgd(0.1), 2))
    params, targets = jnp.array([1.0, -2.0]), [jnp.array([0.0, 1.0]), jnp.array([3.0, 1.0])]
    state, alone, seen, start = tx.init(params), make_link().init(params), [], params
    for target in targets:
        g = CUBE(target)(params)
        made, alone = make_link().update(g, alone, params, grad_fn=CUBE(target))
        seen.append(made)
        updates, state = tx.update(g, state, params, grad_fn=CUBE(target))
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, start - 0.1 * (seen[0] + seen[1]) / 2, rtol=1e-6)


@pytest.mark.optax_promotes
@each_link
def test_in_a_jitted_chain_the_others_see_what_it_returns(make_link):
    """Clipping before it: it climbs along the clipped gradient. Clipping, decay and Adam after it: they get its update."""
    g, params, grad_fn = jnp.array([3.0, 4.0]), jnp.array([1.0, -2.0]), CUBE(jnp.array([0.5, 0.5]))
    link = make_link()
    before, after = (
        optax.clip_by_global_norm(1.0),
        optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.1, weight_decay=0.1)),
    )
    tx = optax.chain(before, link, after)
    ours, _ = jax.jit(lambda s: tx.update(g, s, params, grad_fn=grad_fn, step=jnp.int32(0)))(tx.init(params))
    between, _ = link.update(g / 5, link.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(ours, after.update(between, after.init(params), params)[0], rtol=1e-5)


@pytest.mark.optax_promotes
@each_link
def test_numbers_may_be_injected_hyper_parameters(make_link):
    """optax.inject_hyperparams makes the radius a schedule and traces all other numbers."""
    factory, settings = getattr(make_link, "func", make_link), dict(getattr(make_link, "keywords", {}))
    settings["radius"] = optax.piecewise_constant_schedule(0.2, {1: 0.5})
    static = ("num_steps",) if factory is pj.amp else ()
    injected = optax.inject_hyperparams(factory, static_args=static)(**settings)
    params, grad_fn = jnp.array([1.0, -2.0]), CUBE(jnp.array([0.5, 0.5]))
    state, update = injected.init(params), jax.jit(lambda s: injected.update(grad_fn(params), s, params, grad_fn=grad_fn))
    found, state = update(state)
    link = factory(**settings | dict(radius=0.2))
    wanted, _ = link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    _, state = update(state)
    np.testing.assert_allclose(state.hyperparams["radius"], 0.1, rtol=1e-6)
    assert optax.tree_utils.tree_get(state, "evaluations") >= 1


@each_link
def test_bfloat16_parameters_and_gradients_keep_their_type_and_the_float32_values(make_link):
    grad_fn = lambda p: {"w": 3 * p["w"] ** 2, "b": -p["b"]}
    rng = np.random.default_rng(0)
    low = {"w": jnp.asarray(rng.normal(size=6), jnp.bfloat16), "b": jnp.asarray(rng.normal(size=3), jnp.bfloat16)}
    high, link = jax.tree.map(lambda x: x.astype(jnp.float32), low), make_link()
    ours, state = link.update(grad_fn(low), link.init(low), low, grad_fn=grad_fn)
    wanted, _ = link.update(grad_fn(high), link.init(high), high, grad_fn=grad_fn)
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype(jnp.bfloat16)}
    scale = norm({n: np.asarray(w) for n, w in wanted.items()})
    for name in low:  # a few roundings to 8 bits
        np.testing.assert_allclose(ours[name].astype(jnp.float32), wanted[name], rtol=0.05, atol=0.02 * float(scale))
    # Parameters in bfloat16 and gradients in float32: as the gradients are.
    mixed = lambda p: jax.tree.map(lambda x: x.astype(jnp.float32), grad_fn(p))
    ours, _ = link.update(mixed(low), link.init(low), low, grad_fn=mixed)
    assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float32)}


@each_link
def test_its_state_survives_a_disk_and_keeps_shapes_and_types(make_link):
    """Flattened, as numpy, and back: the next step is the same, bit for bit, and needs no second compilation."""
    link, params, grad_fn = make_link(), jnp.array([1.0, -2.0]), CUBE(jnp.array([0.5, 0.5]))
    traced = []

    @jax.jit
    def update(g, s):
        traced.append(True)
        return link.update(g, s, params, grad_fn=grad_fn)

    first = jax.tree.map(jnp.array, link.init(params))
    state = first
    for _ in range(3):
        _, state = update(grad_fn(params), state)
    signature = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert signature(first) == signature(state)
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    for one, other in zip(*(jax.tree.leaves(update(grad_fn(params), s)) for s in (state, restored))):
        np.testing.assert_array_equal(one, other)
    assert len(traced) == 1
    assert optax.tree_utils.tree_get(state, "evaluations").dtype == jnp.int32


@each_link
def test_zero_gradients_give_zero_and_nan_is_not_hidden(make_link):
    link, w = make_link(), jnp.array([1.0, 2.0])
    zero, _ = link.update(jnp.zeros(2), link.init(w), w, grad_fn=jnp.zeros_like)
    np.testing.assert_array_equal(zero, 0.0)
    bad = jnp.array([1.0, jnp.nan])
    for grads, second in [(bad, lambda p: p), (jnp.ones(2), lambda p: p * bad)]:
        out, _ = link.update(grads, link.init(w), w, grad_fn=second)
        assert np.isnan(out).any()


@each_link
def test_compiled_and_vmapped_it_is_the_same(make_link):
    with enable_x64(True):
        problem, link = make(), make_link()
        update = lambda params: link.update(problem.slope(params), link.init(params), params, grad_fn=problem.slope)[0]
        wanted = update(problem.params)
        assert_close(jax.jit(update)(problem.params), wanted, rtol=1e-9, atol=1e-12)
        both = jax.tree.map(lambda x: np.stack([x, 2 * x]), problem.params)
        assert_close(jax.tree.map(lambda x: x[0], jax.vmap(update)(both)), wanted, rtol=1e-9, atol=1e-12)


@each_link
def test_a_missing_grad_fn_is_named(make_link):
    link, w = make_link(), jnp.ones(2)
    name = getattr(make_link, "func", make_link).__name__
    with pytest.raises(
        ValueError, match=f"{name} needs `grad_fn`, got none: call tx.update.grads, state, params, grad_fn=lambda p"
    ):
        link.update(w, link.init(w), w)
    with pytest.raises(ValueError, match=f"{name} needs `params`, got none"):
        link.update(w, link.init(w), grad_fn=lambda p: p)
