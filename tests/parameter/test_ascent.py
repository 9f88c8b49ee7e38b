"""perturbjax.parameter.ascent, and what SAM and PUGD promise together: the same loss twice, BatchNorm once, company in a chain."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.parameter.ascent import move, unit_tree
from perturbjax.training.schedule import Schedule
from perturbjax.training.step import DeviceData, Recipe, as_arrays, init_state, train_step

LINKS = {"sam": partial(pj.sam, radius=0.5), "pugd": pj.pugd}
each_link = pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)


def test_unit_tree_has_one_norm_over_all_leaves():
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    jax.tree.map(np.testing.assert_allclose, unit_tree(tree), {"a": np.array([0.6, 0.0]), "b": np.array([[0.8]])})
    zero = jax.tree.map(jnp.zeros_like, tree)
    jax.tree.map(np.testing.assert_array_equal, unit_tree(zero), zero)


def test_bfloat16_is_measured_and_moved_in_float32():
    """The norm of 350 equal numbers in bfloat16 is off by enough to change every quotient's last digit."""
    tree = {"a": jnp.full([350], 2.0**-4, jnp.bfloat16)}
    np.testing.assert_array_equal(unit_tree(tree)["a"], jnp.bfloat16(350**-0.5))
    moved = move({"w": jnp.ones([2], jnp.bfloat16)}, {"w": jnp.full([2], 0.25, jnp.bfloat16)}, jnp.float32(0.5))["w"]
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved.astype(jnp.float32), 1.125)


def test_radius_keeps_float64():
    with jax.enable_x64(True):
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


def with_sam(numbers):
    return (pj.sam(radius=0.5),)


def with_pugd(numbers):
    return (pj.pugd(),)


@pytest.mark.optax_promotes
def test_batch_norm_statistics_come_from_the_first_pass_only():
    """After one step of the trainer they are those of plain training; the parameters are not."""
    images = jax.random.uniform(jax.random.key(0), [8, 2, 2, 1])
    data = DeviceData(images, jnp.arange(8, dtype=jnp.int32) % 3, jnp.array([3, 3, 2], jnp.int32))
    numbers = dict(method=(), learning_rate=0.1, momentum=0.9, weight_decay=0.0)
    after = {}
    for build in (no_link, with_sam, with_pugd):
        recipe = Recipe(
            Small(), build, num_classes=3, num_examples=8, batch_size=8, epochs=1, schedule=Schedule(warmup_epochs=0)
        )
        state = init_state(recipe, numbers, data, seed=0)
        after[build], _, _ = jax.jit(partial(train_step, recipe))(state, as_arrays(numbers), data, jnp.arange(8))
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.stats, after[build].stats)
        assert max(jax.tree.leaves(moved)) > 1e-3
    for build in (with_sam, with_pugd):
        close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
        jax.tree.map(close, after[build].stats, after[no_link].stats)
        gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), after[build].params, after[no_link].params)
        assert max(jax.tree.leaves(gap)) > 1e-4


@each_link
def test_the_second_gradient_is_of_the_same_perturbed_loss(make):
    """With LPL, dropout and mixup in the loss: the gradient at w + ε̂ of the objective with the same key and states."""
    params, x = (
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32),
        jax.random.normal(jax.random.key(0), [9, 4]),
    )
    links = pj.chain(pj.mixup(), pj.dropout(rate=0.3, site="input"), pj.lpl(bound=0.3), pj.label_smoothing())
    made = pj.objective(pj.line(lambda w, x: x @ w), links, num_classes=3)
    states, batch = made.init(params, x), pj.batch(x, jnp.arange(9) % 3)
    grad_fn = jax.jit(lambda p: jax.grad(made, has_aux=True)(p, states, batch, key=jax.random.key(7))[0])
    link, g = make(), grad_fn(params)
    updates, _ = link.update(g, link.init(params), params, grad_fn=grad_fn)
    if make is pj.pugd:
        climb = jnp.abs(params) * g
        total = g + grad_fn(params + climb / jnp.linalg.norm(climb))
        expected = total / jnp.linalg.norm(total)
    else:
        expected = grad_fn(params + 0.5 * g / jnp.linalg.norm(g))
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.optax_promotes
@each_link
def test_before_multi_steps_it_averages_perturbed_gradients(make):
    """chain(link, MultiSteps(sgd)): k perturbed gradients are averaged into one step."""
    tx = optax.chain(make(), optax.MultiSteps(optax.sgd(0.1), 2))
    params, targets = jnp.array([1.0, -2.0]), [jnp.array([0.0, 1.0]), jnp.array([3.0, 1.0])]
    grad_of = lambda target: lambda p: (p - target) ** 3
    state, seen, start = tx.init(params), [], params
    for target in targets:
        link = make()
        seen.append(link.update(grad_of(target)(params), link.init(params), params, grad_fn=grad_of(target))[0])
        updates, state = tx.update(grad_of(target)(params), state, params, grad_fn=grad_of(target))
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, start - 0.1 * (seen[0] + seen[1]) / 2, rtol=1e-6)
