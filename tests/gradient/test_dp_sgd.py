"""perturbjax.gradient.dp_sgd: clipping sample by sample in numpy, optax's numbers and noise, limits, and several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import perturbjax as pj
from perturbjax.training import Devices, Options, fit
from tests.gradient.problem import KEY, MODEL, B, C, data, flat, grad_fn_of, losses, part
from tests.training import problem as training


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def updated(link, *, links=(), key=KEY):
    params, _, y, _ = data()

    @jax.jit
    def update(params, key):
        grad_fn = grad_fn_of(links)
        return link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn, key=key, labels=jnp.asarray(y))

    return update(params, key)


def stacked():
    """∇ℓ_i of every sample, as rows and as a tree [B, ...]."""
    params, x, y, _ = data()
    tree = jax.jit(jax.vmap(jax.grad(lambda p, x, y: losses(p, x[None], y[None])[0]), in_axes=(None, 0, 0)))(
        params, x, jnp.asarray(y)
    )
    return np.array([B * part(params, x, y, np.arange(B) == i) for i in range(B)]), tree


def test_every_sample_is_clipped_before_the_mean(float64):
    rows, _ = stacked()
    norms = np.linalg.norm(rows, axis=1)
    bound = float(np.median(norms))  # half of them
    updates, state = updated(pj.dp_sgd(bound=bound, noise_multiplier=0.0))
    wanted = (rows * np.minimum(1, bound / norms)[:, None]).mean(0)
    np.testing.assert_allclose(flat(updates), wanted, rtol=1e-9, atol=1e-12)
    assert int(state.evaluations) == B + 1


@pytest.mark.optax_promotes
@pytest.mark.parametrize("noise_multiplier", [0.0, 0.7])
def test_it_is_optax_on_the_stacked_gradients_noise_and_all(noise_multiplier, float64):
    params, (_, tree) = data()[0], stacked()
    other = optax.contrib.differentially_private_aggregate(0.4, noise_multiplier, key=KEY)
    wanted, _ = other.update(tree, other.init(params))
    found, _ = updated(pj.dp_sgd(bound=0.4, noise_multiplier=noise_multiplier))
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-9, atol=1e-12)


def test_no_sample_moves_the_sum_further_than_the_bound(float64):
    """The sensitivity that the noise is made for: without sample i, B·g̃ changes by at most τ."""
    params, x, y, _ = data()
    whole = B * flat(updated(pj.dp_sgd(bound=0.3, noise_multiplier=0.0))[0])
    rows, _ = stacked()
    cut = rows * np.minimum(1, 0.3 / np.linalg.norm(rows, axis=1))[:, None]
    for i in range(B):
        assert np.linalg.norm(whole - np.delete(cut, i, axis=0).sum(0)) < 0.3 + 1e-9


def test_without_bound_and_noise_it_is_plain_training(float64):
    plain = flat(jax.jit(grad_fn_of())(data()[0]))
    found, _ = updated(pj.dp_sgd(bound=jnp.inf, noise_multiplier=0.0))
    np.testing.assert_allclose(flat(found), plain, rtol=1e-9, atol=1e-12)


def test_chunks_change_nothing_and_the_key_draws_the_noise(float64):
    one, other = (flat(updated(pj.dp_sgd(bound=0.4), key=jax.random.key(k))[0]) for k in (0, 1))
    assert (one != other).all()
    np.testing.assert_allclose(
        flat(updated(pj.dp_sgd(bound=0.4, chunk=5), key=jax.random.key(0))[0]), one, rtol=1e-9, atol=1e-12
    )


def test_a_penalty_is_neither_clipped_nor_counted_for_every_sample(float64):
    params, x, _, _ = data()
    link = pj.Perturbation(
        "stage1", lambda context: (),
        lambda flow, rest, state, context: (flow._replace(penalty=flow.penalty + 9 * (flow.value**2).sum(1)), state, {}),
    )  # fmt: skip
    with_penalty, _ = updated(pj.dp_sgd(bound=0.3, noise_multiplier=0.0), links=link)
    without, _ = updated(pj.dp_sgd(bound=0.3, noise_multiplier=0.0))
    penalty = jax.grad(lambda a: 9 * (jnp.tanh(x @ a) ** 2).sum(1).mean())(params["a"])
    np.testing.assert_allclose(with_penalty["a"] - without["a"], penalty, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(with_penalty["b"], without["b"], rtol=1e-9, atol=1e-12)


def test_per_device_code_gives_the_numbers_of_one_device(float64):
    """Four devices with three samples each: clipping stays sample by sample, and the noise is one draw for all."""
    params, x, y, _ = data()
    link = pj.dp_sgd(bound=0.4)

    def on_a_device(params, x, y):
        made = pj.objective(MODEL, (), num_classes=C, axis_name="d")
        grad = lambda p, weights: jax.grad(made, has_aux=True)(p, (), pj.batch(x, y), weights=weights)[0]
        grad_fn = lambda p, *, weights=None: jax.lax.pmean(grad(p, weights), "d")
        given = dict(grad_fn=grad_fn, key=KEY, labels=y, axis_name="d")
        return link.update(grad_fn(params), link.init(params), params, **given)[0]

    P = PartitionSpec
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(on_a_device, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P(), check_vma=False)
    found = jax.jit(mapped)(params, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(flat(found), flat(updated(link)[0]), rtol=1e-9, atol=1e-12)


def test_a_zero_gradient_stays_zero():
    link, w = pj.dp_sgd(bound=1.0, noise_multiplier=0.0), jnp.ones(3)
    given = dict(key=KEY, labels=jnp.zeros(2, jnp.int32))
    out, _ = link.update(w, link.init(w), w, grad_fn=lambda p, *, weights=None: jnp.zeros(3), **given)
    np.testing.assert_array_equal(out, 0.0)


def test_errors_name_the_call():
    params, _, y, _ = data()
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    link, given = pj.dp_sgd(), dict(grad_fn=grad_fn_of(), key=KEY, labels=jnp.asarray(y))
    for name in given:
        with pytest.raises(ValueError, match=f"dp_sgd needs `{name}`, got none: call tx.update"):
            link.update(params, link.init(params), params, **{**given, name: None})
    with pytest.raises(ValueError, match="dp_sgd needs bound > 0, got 0"):
        pj.dp_sgd(bound=0.0)
    with pytest.raises(ValueError, match="dp_sgd needs noise_multiplier >= 0, got -1"):
        pj.dp_sgd(noise_multiplier=-1.0)


@pytest.mark.slow
@pytest.mark.optax_promotes  # schedules
@pytest.mark.parametrize("link", [pj.dp_sgd(bound=0.5), pj.pcgrad(), pj.graddrop()], ids=["dp_sgd", "pcgrad", "graddrop"])
def test_the_trainer_s_devices_train_the_same_net(link):
    """One device, four under jit, four under pmap, with gradients accumulated over two batches."""
    runs = []
    for devices in (Devices(), Devices(4), Devices(4, "pmap")):
        recipe = training.recipe(lambda numbers: (link,), epochs=2, accumulate=2)
        history = fit(recipe, training.dataset(), training.NUMBERS, 0, options=Options(devices=devices))
        runs.append(history.logits)
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], rtol=1e-4, atol=1e-4)
