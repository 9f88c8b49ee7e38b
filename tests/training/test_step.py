"""perturbjax.training: one step for everything, compiled once, and what it promises to chains, optimisers and BatchNorm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from experiments.shared import parse_methods
from perturbjax.data import Augmentation, epoch_order
from perturbjax.training import Options, Schedule, device_data, fit, init_state, predict, split_methods
from perturbjax.training.step import accumulated, as_arrays, compiled_step, draw_batch, pixels, train_step
from tests.training.problem import NUMBERS, dataset, plain, recipe

pytestmark = pytest.mark.optax_promotes  # schedules

TRACES = []


def lpl_and_sam(numbers):
    if any(isinstance(x, jax.core.Tracer) for x in numbers):
        TRACES.append(1)
    bound, radius = numbers
    return pj.lpl(bound=bound, max_steps=4), pj.sam(radius=radius)


def one(made, numbers=(), **options):
    r = recipe(made, **options)
    wanted = NUMBERS | {"method": numbers}
    data = device_data(dataset())
    state = init_state(r, wanted, data, 0)
    index = jnp.asarray(epoch_order(r.num_examples, r.batch_size, 0, 0)[0])
    return r, wanted, data, state, index


def test_all_seeds_and_settings_of_a_structure_share_one_compilation():
    r = recipe(lpl_and_sam)
    TRACES.clear()
    for seed, numbers in [(0, (0.2, 0.05)), (1, (0.2, 0.05)), (0, (0.4, 0.01))]:
        fit(r, dataset(), NUMBERS | {"method": numbers, "learning_rate": 0.05 + 0.01 * seed}, seed)
    assert len(TRACES) == 1


def test_same_seed_same_numbers_and_other_seed_others():
    r = recipe(plain)
    a, b, c = (fit(r, dataset(), NUMBERS, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.logits, b.logits)
    assert a.accuracy == b.accuracy and a.loss == b.loss
    assert np.abs(a.logits - c.logits).max() > 1e-3


def test_several_steps_in_one_call_are_the_single_steps():
    r = recipe(plain)
    a, b = (fit(r, dataset(), NUMBERS, 0, options=Options(steps_per_call=k)) for k in (1, 2))
    np.testing.assert_allclose(a.logits, b.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)


def test_plain_training_is_the_loop_people_write_by_hand():
    r, numbers, data, state, index = one(plain, model="cnn")
    after, metrics, _ = jax.jit(lambda s, n, d, i: train_step(r, s, n, d, i))(state, as_arrays(numbers), data, index)

    def loss(params):
        variables = {"params": params, "batch_stats": state.stats}
        logits, new = r.model.apply(variables, pixels(data.images[index]), train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[index])
        return losses.mean(), new["batch_stats"]

    (value, stats), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    rate = 0.1 * r.schedule.factor(r.steps_per_epoch, r.total_steps)(0)
    expected = jax.tree.map(lambda w, g: w - rate * (g + 5e-4 * w), state.params, grads)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    close(metrics["loss"], value)
    jax.tree.map(close, (after.params, after.stats), (expected, stats))


def test_sam_takes_the_gradient_of_the_perturbed_loss_and_batch_norm_is_written_once():
    r, numbers, data, state, index = one(lambda n: (pj.lpl(bound=0.5), pj.sam(radius=0.3)), model="cnn")
    after, _, _ = jax.jit(lambda s, n, d, i: train_step(r, s, n, d, i))(state, as_arrays(numbers), data, index)
    objective = pj.objective(r.model, pj.lpl(bound=0.5), num_classes=3, class_counts=data.class_counts)
    batch = pj.Batch(pixels(data.images[index]), data.labels[index], index=index)
    key = jax.random.split(jax.random.fold_in(jax.random.fold_in(state.key, 0), 0))[0]

    @jax.jit
    def gradient(params):
        loss = lambda p: objective(p, state.states, batch, key=key, stats=state.stats)
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, out

    first, out = gradient(state.params)
    norm = optax.tree.norm(first)
    second, elsewhere = gradient(jax.tree.map(lambda w, g: w + 0.3 * g / norm, state.params, first))
    rate = 0.1 * r.schedule.factor(r.steps_per_epoch, r.total_steps)(0)
    expected = jax.tree.map(lambda w, g: w - rate * (g + 5e-4 * w), state.params, second)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6)
    jax.tree.map(close, after.params, expected)
    jax.tree.map(close, after.stats, out.stats)
    gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), out.stats, elsewhere.stats)
    assert max(jax.tree.leaves(gap)) > 1e-4  # the second pass would have written something else


@pytest.mark.parametrize(
    "switched_off",
    [
        lambda n: (pj.lpa(bound=0.0, site="stage1"),),
        lambda n: (pj.adversarial_training(bound=0.0, num_steps=1),),
        lambda n: (pj.lpl(bound=0.0), pj.lpg(bound=0.0), pj.sam(radius=0.0)),
    ],
    ids=["lpa", "at", "lpl+lpg+sam"],
)
def test_bound_zero_is_plain_training_bit_for_bit_through_convolutions_and_batch_norm(switched_off):
    def run(build):
        r, numbers, data, state, index = one(build, model="resnet8")
        step, arrays = compiled_step(r), as_arrays(numbers)
        for _ in range(2):
            state, _, _ = step(state, arrays, data, index[None])
        return state.params, state.stats

    jax.tree.map(np.testing.assert_array_equal, run(switched_off), run(plain))


def test_gradient_and_inner_evaluations_are_counted():
    counted = lambda build: fit(recipe(build, epochs=1), dataset(), NUMBERS, 0)
    runs = [counted(plain), counted(lambda n: (pj.sam(),)), counted(lambda n: (pj.lpa(num_steps=2, site="stage1"), pj.pugd()))]
    assert [r.gradient_evaluations for r in runs] == [1.0, 2.0, 2.0]
    assert [r.inner_evaluations for r in runs] == [0.0, 0.0, 2.0]


def test_training_losses_are_those_of_the_perturbed_pass():
    run = fit(recipe(lambda n: (pj.logit_adjustment(tau=0.0), pj.label_smoothing(weight=0.3))), dataset(), NUMBERS, 0)
    clean, perturbed, labels = run.losses
    assert clean.shape == perturbed.shape == labels.shape
    assert np.abs(clean - perturbed).max() > 1e-3
    assert fit(recipe(lambda n: (pj.sam(),)), dataset(), NUMBERS, 0).losses is None


def test_a_second_view_is_drawn_for_itself_and_changes_nothing_of_the_first():
    data, index = device_data(dataset()), jnp.arange(8)
    plain = recipe(augmentation=Augmentation(pad=2, flip=True))
    state = init_state(plain, NUMBERS, data, 0)
    once = draw_batch(plain, state, data, index)
    twice = draw_batch(dataclasses.replace(plain, second_view=True), state, data, index)
    np.testing.assert_array_equal(once.inputs, twice.inputs)
    assert once.side == {} and (twice.side["second_view"] != twice.inputs).any((1, 2, 3)).sum() >= 6
    still = draw_batch(recipe(second_view=True), state, data, index)
    np.testing.assert_array_equal(still.side["second_view"], still.inputs)


def test_dlb_asks_for_it_on_the_command_line():
    asked = {typed: method.second_view for typed, (method, _) in parse_methods("ce, dlb, dlb(view=new)").items()}
    assert asked == {"ce": False, "dlb": False, "dlb(view=new)": True}


def test_padding_of_the_last_evaluation_batch_changes_no_number():
    r, _, _, state, _ = one(plain, model="cnn")
    images = dataset().test_images
    whole = predict(r.model, state.params, state.stats, images, batch_size=len(images))
    np.testing.assert_allclose(predict(r.model, state.params, state.stats, images, batch_size=7), whole, rtol=1e-4, atol=1e-5)
    assert whole.shape == (len(images), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=49), "1 <= batch_size <= 48"),
        (dict(epochs=0), "epochs >= 1"),
        (dict(schedule=Schedule("step", milestones=(1.5, 3))), "milestones before the end of the run, 2 epochs"),
        (dict(accumulate=0), "1 <= accumulate <= 6"),
    ],
)
def test_recipes_that_cannot_run_are_found_before_anything_compiles(options, message):
    with pytest.raises(ValueError, match=message):
        init_state(recipe(plain, **options), NUMBERS, device_data(dataset()), 0)


def test_accumulated_batches_are_one_large_batch():
    """Without BatchNorm and momentum: k small steps move the parameters as one step on all their samples."""
    large, small = recipe(batch_size=48, epochs=3), recipe(batch_size=16, epochs=3, accumulate=3)
    schedule = Schedule("constant", warmup_epochs=0)
    make = lambda r: dataclasses.replace(r, schedule=schedule)
    a, b = (fit(make(r), dataset(), NUMBERS | {"momentum": 0.0}, 0) for r in (large, small))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a.state.params, b.state.params)
    assert a.gradient_evaluations == b.gradient_evaluations == 1.0


def test_accumulation_scales_the_schedule_with_the_batches():
    """The last of 12 batches, 3 to an update, has the learning rate of three quarters of the run."""
    r = recipe(batch_size=12, epochs=3, accumulate=3)
    seen = []
    build = lambda numbers: (seen.append(numbers), ())[1]
    run = fit(dataclasses.replace(r, build=build), dataset(), NUMBERS, 0)
    counts = optax.tree_utils.tree_get_all_with_path(run.state.opt_state, "count")
    assert [int(c) for _, c in counts] == [4]
    factor = r.schedule.factor(r.steps_per_epoch, r.total_steps)
    assert 0 < factor(3 * 3) < factor(2 * 3) < 1


def test_links_that_ask_for_gradients_stand_before_the_accumulation():
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"sam inside, where it would see the last batch only. Write optax.chain\(pj.sam"):
        accumulated(optax.chain(pj.sam(), optax.sgd(0.1)), 4).init(params)
    optax.chain(pj.sam(), accumulated(optax.sgd(0.1), 4)).init(params)
    inside = recipe(lambda n: (optax.MultiSteps(optax.chain(pj.sam(), optax.identity()), 2).gradient_transformation(),))
    with pytest.raises(ValueError, match="MultiSteps needs links that ask for gradients"):
        init_state(inside, NUMBERS, device_data(dataset()), 0)
    run = fit(recipe(lambda n: (pj.sam(),), accumulate=2), dataset(), NUMBERS, 0)
    assert run.gradient_evaluations == 2.0 and np.isfinite(run.logits).all()


def test_methods_are_sorted_into_chain_and_optimiser_links():
    chain, transforms = split_methods((pj.sam(), pj.lpl(), pj.manifold_mixup(), pj.gradient_clipping(), ()))
    assert [link.name for link in chain] == ["lpl"] + ["manifold_mixup"] * 3 and len(transforms) == 2
