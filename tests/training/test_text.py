"""Texts through the trainer: where perturbations act, the mask's way, the optimisers for them, pretrained parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import perturbjax as pj
from perturbjax.data import Dataset, check
from perturbjax.data.text import build_words, objects
from perturbjax.feature.mixup import mix_side
from perturbjax.models import create, with_vectors
from perturbjax.training import Devices, Options, Recipe, Run, Schedule, device_data, fit, fit_many, init_state
from perturbjax.training.step import compiled_step, draw_batch, pixels

GOOD, BAD, FILL = ["good", "great", "fine"], ["bad", "poor", "weak"], ["the", "a", "film", "was", "it", "plot"]
NUMBERS = {"method": (), "learning_rate": 0.02, "momentum": 0.9, "weight_decay": 0.0}


@functools.cache
def dataset(count=80) -> Dataset:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    words = lambda label: [*rng.choice(FILL, rng.integers(1, 6)), rng.choice((BAD, GOOD)[label])]
    texts = objects([" ".join(rng.permutation(words(label))) for label in labels])
    tokenizer, half = build_words(texts), count // 2
    rows = tokenizer.rows(texts)
    return check(
        Dataset("toy", rows[:half], labels[:half], rows[half:], labels[half:], ("neg", "pos"), tokenizer=tokenizer,
                train_texts=texts[:half], test_texts=texts[half:])
    )  # fmt: skip


def plain(numbers):
    return ()


def at(numbers):
    return (pj.adversarial_training(bound=0.05, step_size=0.02, num_steps=2),)


def mixed(numbers):
    return (pj.mixup(),)


def recipe(build=plain, **changes):
    d = dataset()
    model = create("bilstm", num_classes=2, vocabulary_size=len(d.tokenizer.words), embedding=6, width=4)
    base = dict(batch_size=8, epochs=2, schedule=Schedule("constant", 0), optimizer="adam")
    return Recipe(model=model, build=build, num_classes=2, num_examples=len(d.train_labels), **base | changes)


def first_pass(build):
    """The objective of one batch: (loss function of the parameters, parameters, line, batch)."""
    r, data = recipe(build), device_data(dataset())
    state = init_state(r, NUMBERS, data, 0)
    batch = draw_batch(r, state, data, jnp.arange(8))
    made = pj.objective(r.model, build(()), num_classes=2)
    states = made.init(state.params, batch.inputs)
    run = lambda params: made(params, states, batch, key=jax.random.key(1), train=False)
    return jax.jit(run), state.params, made, batch


def test_tokens_are_no_pixels():
    tokens = jnp.arange(3, dtype=jnp.int32)
    assert pixels(tokens) is tokens
    assert pixels(jnp.arange(3, dtype=jnp.uint8)).dtype == jnp.float32


@pytest.mark.optax_promotes
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_bilstm_learns_texts(optimizer):
    history = fit(recipe(epochs=12, optimizer=optimizer), dataset(), NUMBERS, 0)
    assert history.accuracy[-1] == 1.0


@pytest.mark.slow
@pytest.mark.optax_promotes
def test_streamed_vmapped_and_on_eight_devices_the_numbers_are_the_same():
    r, d = recipe(mixed), dataset()
    alone = fit(r, d, NUMBERS, 0)
    kinds = {
        "streamed": fit(r, d, NUMBERS, 0, options=Options(stream=True)),
        "in a scan": fit(r, d, NUMBERS, 0, options=Options(steps_per_call=5)),
        "side by side": fit_many(r, [Run(d, NUMBERS, seed) for seed in (0, 1)])[0],
        "eight devices": fit(r, d, NUMBERS, 0, options=Options(devices=Devices(8))),
    }
    for kind, history in kinds.items():
        np.testing.assert_allclose(history.logits, alone.logits, rtol=1e-3, atol=1e-4, err_msg=kind)


def test_perturbations_of_the_input_act_at_the_embedding():
    run, params, made, batch = first_pass(at)
    assert [link.site for link in made.links] == ["embedding"] and made.line.sites[0] == "input"
    loss, out = run(params)
    clean, _ = first_pass(plain)[0](params)
    assert loss > clean and float(out.metrics["adversarial_training/inner_evaluations"]) == 2
    np.testing.assert_array_equal(batch.inputs, dataset().train_images[:8])
    with pytest.raises(ValueError, match="embedding"):
        made.line.site("embeding")


def dlb(numbers):
    return (pj.dlb(weight=0.5, temperature=2.0),)


@pytest.mark.optax_promotes
def test_dlb_sees_the_words_of_the_last_texts_again():
    """Three steps of the trainer against the model alone; the second batch has longer texts than the last one, and other padding."""
    r, data, numbers = recipe(dlb), device_data(dataset()), NUMBERS
    r = dataclasses.replace(r, model=dataclasses.replace(r.model, dropout=0.0))
    state, step, last = init_state(r, numbers, data, 0), compiled_step(r), None
    masks = (dataset().train_images != 0).sum(1)
    order = np.argsort(masks, kind="stable")[[*range(8), *range(20, 28), *range(32, 40)]].astype(np.int32).reshape(3, 8)
    logits_of = jax.jit(lambda params, rows: r.model.apply({"params": params}, rows))
    for rows in order:
        tokens, labels = data.images[rows], data.labels[rows]
        logits = logits_of(state.params, tokens)
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if last is not None:
            now, then = logits_of(state.params, last[0]), last[2]
            again = optax.softmax_cross_entropy_with_integer_labels(now, last[1]).mean()
            apart = optax.kl_divergence(jax.nn.log_softmax(now / 2), jax.nn.softmax(then / 2)).mean()
            expected = expected / 2 + again / 2 + 0.5 * 4 * apart
        state, metrics, _ = step(state, numbers, data, rows[None])
        np.testing.assert_allclose(metrics["loss"][0], expected, rtol=1e-5)
        last = tokens, labels, logits
    assert (masks[order[0]].max(), masks[order[2]].min()) == (2, 6)


@pytest.mark.optax_promotes
def test_dlb_learns_texts():
    history = fit(recipe(dlb, epochs=12), dataset(), NUMBERS, 0)
    assert history.accuracy[-1] == 1.0


def test_embeddings_are_not_clipped_to_the_range_of_pixels():
    zero = lambda numbers: (pj.adversarial_training(bound=0.0),)
    run, params, _, _ = first_pass(zero)
    np.testing.assert_array_equal(run(params)[0], first_pass(plain)[0](params)[0])


def test_the_padding_moves_nothing():
    run, params, made, batch = first_pass(plain)
    longer = batch._replace(inputs=jnp.pad(batch.inputs, ((0, 0), (0, 3))))
    loss = jax.jit(lambda p: made(p, (), longer, train=False)[0])(params)
    np.testing.assert_allclose(loss, run(params)[0], rtol=1e-6)


def test_a_mixture_has_the_words_of_both_texts():
    mask = jnp.array([[True, False, False], [True, True, True]])
    side = {"mask": mask, "domain": jnp.arange(2)}
    found = mix_side(side, 0.7, jnp.array([1, 0]))
    assert found["mask"].all() and found["domain"] is side["domain"]
    np.testing.assert_array_equal(mix_side(side, 1.0, jnp.array([1, 0]))["mask"], mask)
    assert mix_side({}, 0.7, jnp.array([1, 0])) == {}


@pytest.mark.optax_promotes
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_optimisers_are_those_of_optax(optimizer):
    numbers = NUMBERS | {"weight_decay": 0.1}
    r, data = recipe(optimizer=optimizer), device_data(dataset())
    state = init_state(r, numbers, data, 0)
    rows = np.arange(24, dtype=np.int32).reshape(3, 8)
    links = {
        "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.02, 0.9)),
        "adam": optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.02, 0.9)),
        "adamw": optax.adamw(0.02, 0.9, weight_decay=0.1),
    }[optimizer]
    params, opt_state = state.params, links.init(state.params)

    @jax.jit
    def by_hand(params, opt_state, state, index):
        made = pj.objective(r.model, (), num_classes=2)
        key = jax.random.split(jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step))[0]
        grads = jax.grad(lambda p: made(p, (), draw_batch(r, state, data, index), key=key)[0])(params)
        updates, opt_state = links.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step, arrays = compiled_step(r), jax.tree.map(jnp.float32, numbers)
    for index in rows:
        params, opt_state = by_hand(params, opt_state, state, jnp.asarray(index))
        state, _, _ = step(state, arrays, data, jnp.asarray(index)[None])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, params)


def test_an_unknown_optimiser_names_the_nearest():
    with pytest.raises(ValueError, match="Recipe needs optimizer .*got 'adamm'. Did you mean 'adam'"):
        init_state(recipe(optimizer="adamm"), NUMBERS, device_data(dataset()), 0)


@pytest.mark.optax_promotes
def test_training_starts_from_given_parameters():
    size = len(dataset().tokenizer.words)
    vectors, found = np.full([size, 6], 0.25, np.float32), np.arange(size) > 3
    put = functools.partial(with_vectors, vectors=vectors, found=found)
    r = dataclasses.replace(recipe(), initial=lambda variables: {**variables, "params": put(variables["params"])})
    table = init_state(r, NUMBERS, device_data(dataset()), 0).params["embedding"]["embedding"]
    np.testing.assert_array_equal(table[found], vectors[found])
    assert r == recipe() and hash(r) == hash(recipe())  # one compilation for both
