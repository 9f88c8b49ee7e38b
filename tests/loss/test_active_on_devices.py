"""Methods that act only after a while (an epoch, a warm-up, a first visit), once they do: eight devices are one device.

tests/test_contract.py looks at three steps of every method with its default settings, where some of these still are plain training.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import perturbjax as pj

C, B, D, N, STEPS = 3, 16, 5, 32, 6  # three epochs of two batches
MODEL = pj.line(
    {"features": lambda w, x: jnp.tanh(x @ w["a"]), "logits": lambda w, h: h @ w["b"].T}, head=lambda w: (w["b"], jnp.zeros(C))
)
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, C, N)
INPUTS = (RNG.normal(size=(N, D)) + 1.5 * np.eye(C, D)[LABELS]).astype(np.float32)
START = {"a": jnp.asarray(RNG.normal(size=(D, 6)), jnp.float32), "b": jnp.asarray(RNG.normal(size=(C, 6)), jnp.float32)}

# What each step changes only once the method is active: the first of such steps.
METHODS = {
    "ols": (lambda: pj.online_label_smoothing(), 2),
    "dsl": (lambda: pj.dsl(num_samples=8, num_prototypes=2, start=0.5), 3),
    "forward(estimated)": (lambda: pj.forward_correction(transition="estimated", start=0.5), 3),
    "dlb": (lambda: pj.dlb(), 1),
    "bootstrapping(previous)": (lambda: pj.bootstrapping(weight=0.5, previous=True), 2),
    "bootstrapping(hard, previous)": (lambda: pj.bootstrapping(kind="hard", weight=0.9, previous=True), 2),
    "mixpert(eps2)": (lambda: pj.mixpert(eps1=0.5, eps2=0.05, value_range=None), 0),
    "mixpert(eps2, clean_weight)": (lambda: pj.mixpert(eps1=0.5, eps2=0.05, clean_weight=0.4, value_range=None), 0),
}


def batch(step):
    index = np.random.default_rng([1, step // 2]).permutation(N)[B * (step % 2) :][:B].astype(np.int32)
    x, y = jnp.asarray(INPUTS[index]), jnp.asarray(LABELS[index], jnp.int32)
    return pj.batch(x, y, index=jnp.asarray(index))


def objective(link, axis_name=None):
    counts = np.bincount(LABELS, minlength=C)
    return pj.objective(MODEL, link, num_classes=C, class_counts=counts, num_examples=N, axis_name=axis_name)


def one_step(link, axis_name=None):
    made = objective(link, axis_name)
    average = (lambda tree: tree) if axis_name is None else lambda tree: jax.lax.pmean(tree, axis_name)

    def step(state, data, number):
        params, states = state
        place = dict(key=jax.random.fold_in(jax.random.key(3), number), step=number, progress=number / STEPS, epoch=number // 2)
        (loss, out), grads = jax.value_and_grad(made, has_aux=True)(params, states, data, **place)
        params = jax.tree.map(lambda w, g: w - 0.3 * g, params, average(grads))
        return (params, out.states), average(loss)

    return step


def start(link):
    return START, jax.tree.map(jnp.array, objective(link).init(START, batch(0).inputs))


@pytest.mark.parametrize("name", METHODS)
def test_eight_devices_are_one_device_once_the_method_acts(name):
    make, first = METHODS[name]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    single = jax.jit(one_step(make()))
    per_device = jax.jit(
        jax.shard_map(one_step(make(), "d"), mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=P(), check_vma=False)
    )
    plain = jax.jit(lambda w, data: objective(())(w, (), data)[0])
    one = one_program = mapped = start(make())
    acted = []
    for number in range(STEPS):
        data, place = batch(number), jnp.int32(number)
        without = plain(one[0], data)
        one, loss = single(one, data, place)
        acted.append(abs(float(loss - without)) > 1e-4)
        sharded = jax.device_put((one_program, data), (replicated, split))
        one_program, same = single(*sharded, jax.device_put(place, replicated))
        mapped, other = per_device(mapped, data, place)
        for found, value in ((one_program, same), (mapped, other)):
            np.testing.assert_allclose(value, loss, rtol=1e-4, err_msg=f"{name}, step {number}")
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, one)
    assert acted == [number >= first for number in range(STEPS)]
