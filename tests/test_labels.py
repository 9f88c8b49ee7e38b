"""Labels outside 0..C-1 inside jit, of every method: nan at the first step, unless the sample has weight 0 and is padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import perturbjax as pj
from tests import test_contract as contract

CLASSES, BATCH, EPOCH = contract.CLASSES, contract.BATCH, contract.EPOCH
OF_THE_LOSS = [pj.ce, *(f for f in contract.METHODS if f is not pj.ce and not hasattr(f(), "update"))]
WITHOUT_LABELS = (pj.coral, pj.dann)  # penalties, which unlabelled samples pay too
quick = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # to compile, not to run


def passes(links=(), *, targets=None, **options):
    """A function of (states, labels, weights) inside jit: (loss, Output), gradients, of one step in epoch 1."""
    params, stats, batch = contract.problem()
    made = contract.start(links, params, stats, batch)[2], batch
    sizes = dict(
        num_classes=CLASSES, class_counts=contract.COUNTS, num_examples=contract.EXAMPLES, num_domains=contract.DOMAINS
    )
    objective = pj.objective(contract.LINE, links, replays=8, **sizes, **options)
    place = dict(key=jax.random.key(0), step=EPOCH, progress=0.62, epoch=1, stats=stats)

    def run(states, labels, weights):
        data = batch._replace(labels=labels, weights=weights, targets=targets)
        return jax.value_and_grad(lambda w: objective(w, states, data, **place), has_aux=True)(params)

    return run, *made


def broken(tree):
    return any(np.isnan(np.asarray(leaf)).any() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("make", OF_THE_LOSS, ids=lambda f: f.__name__)
def test_a_label_that_is_none_makes_loss_and_gradient_nan_and_is_padding_with_weight_0(make):
    run, states, batch = passes(make())
    run, ones = quick(run), jnp.ones([BATCH])
    for label in (-1, CLASSES):
        labels, padding = batch.labels.at[3].set(label), ones.at[3].set(0)
        (loss, _), grads = run(states, labels, ones)
        assert np.isnan(loss) and (broken(grads) or make is pj.disturb_label)  # which draws other targets for some
        (loss, out), grads = run(states, labels, padding)
        assert np.isfinite(loss) and not broken((grads, out.states))
        if make in WITHOUT_LABELS:
            np.testing.assert_array_equal(out.losses, run(states, batch.labels, padding)[0][1].losses)
        else:
            np.testing.assert_array_equal(out.losses[3::BATCH], 0)


def test_so_it_is_for_given_targets_vmapped_and_on_eight_devices():
    targets = jnp.eye(CLASSES)[jnp.arange(BATCH) % CLASSES]
    run, states, batch = passes(pj.chain(pj.lpl(), pj.label_smoothing()), targets=targets)
    wrong, ones = batch.labels.at[3].set(CLASSES), jnp.ones([BATCH])
    assert np.isnan(jax.jit(run)(states, wrong, ones)[0][0])
    pair = jax.jit(jax.vmap(run, in_axes=(None, 0, None)))(states, jnp.stack([batch.labels, wrong]), ones)[0][0]
    assert np.isfinite(pair[0]) and np.isnan(pair[1])
    mesh, P = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)), PartitionSpec
    spread = lambda x: jax.device_put(x, NamedSharding(mesh, P("d")))
    assert np.isnan(jax.jit(run)(states, spread(wrong), spread(ones))[0][0])
    assert np.isfinite(jax.jit(run)(states, spread(batch.labels), spread(ones))[0][0])


def test_so_it_is_in_per_device_code_whose_mean_is_nan():
    params, stats, batch = contract.problem()
    made, P = pj.lpl(), PartitionSpec
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    step = lambda state, batch, key: contract.one_step(made, state, batch, key, axis_name="d")
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("d"), P()), out_specs=P(), check_vma=False))
    state, key = contract.start(made, params, stats, batch), jax.random.key(0)
    wrong = batch._replace(labels=batch.labels.at[3].set(-1))
    assert np.isfinite(mapped(state, batch, key)[1])
    after, loss = mapped(state, wrong, key)
    assert np.isnan(loss) and all(np.isnan(w).any() for name, w in after[0].items() if name != "c0")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32])
def test_labels_of_any_integer_type_are_compared_as_they_are(dtype):
    """300 classes are more than int8 holds."""
    objective = pj.objective(lambda w, x: x @ w, num_classes=300)
    run = jax.jit(lambda y: objective(jnp.zeros([4, 300]), (), pj.batch(jnp.ones([2, 4]), y))[0])
    assert np.isclose(run(np.array([0, 127], dtype)), np.log(300))
    last = run(np.array([0, -1], np.int64).astype(dtype))  # 255, or 2³² − 1, where there is no sign
    assert np.isclose(last, np.log(300)) if dtype is np.uint8 else np.isnan(last)
    with pytest.raises(ValueError, match=r"objective needs integer labels, got float32\. Cast them: labels\.astype"):
        run(np.array([0, 1], np.float32))


def test_a_loop_over_labels_from_1_to_c_is_nan_at_its_first_step_as_with_optax():
    """The loop of the README, whose data set has labels 0 … C − 1."""
    images, labels = jax.random.normal(jax.random.key(0), [64, 8]), jnp.arange(64) % 10 + 1
    loss = pj.objective(lambda w, x: x @ w, pj.chain(pj.logit_adjustment(), pj.lpl(bound=0.5)), num_classes=10,
                        class_counts=np.bincount(labels, minlength=10)[:10] + 1)  # fmt: skip
    params = jnp.zeros([8, 10])
    states, tx = loss.init(params, images), optax.chain(pj.sam(), optax.sgd(0.1))

    @jax.jit
    def step(params, states, opt_state, labels):
        perturbed = jax.value_and_grad(lambda p: loss(p, states, pj.batch(images, labels)), has_aux=True)
        (value, out), grads = perturbed(params)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=lambda p: perturbed(p)[1])
        return optax.apply_updates(params, updates), out.states, opt_state, value

    params, _, _, value = step(params, states, tx.init(params), labels)
    theirs = optax.softmax_cross_entropy_with_integer_labels(jnp.zeros([64, 10]), labels).mean()
    assert np.isnan(theirs) and np.isnan(value) and np.isnan(params).all()
