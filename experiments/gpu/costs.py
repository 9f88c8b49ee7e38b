"""Times: a step's relative to plain training, data on the device against streamed, seeds side by side. The parts bench and vmap."""

import itertools
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from experiments import bench, shared
from experiments.gpu.check import Check, chosen, with_conv
from experiments.gpu.longtail import datasets
from experiments.gpu.sizes import Sizes
from experiments.shared.many import PLAIN
from perturbjax.data import Dataset
from perturbjax.models.blocks import CONVOLUTIONS
from perturbjax.training import (
    Devices,
    Options,
    Recipe,
    Run,
    TimedStep,
    cost_ratios,
    fit,
    fit_many,
    init_state,
    sample_data,
    split_methods,
)
from perturbjax.training.feed import Feed
from perturbjax.training.loop import extra_gradients

HOPELESS = 5.0  # so many times slower than the other kind, they are not measured further


def costs(check: Check) -> None:
    """Part (b): bench.py's table for each net, and the data rates."""
    for model in check.sizes.bench_models:
        check.measure(("bench",), model, partial(ratios, check, model))
    check.measure(("bench",), "data", partial(data_rates, check))


def ratios(check: Check, model: str) -> dict:
    """Step times relative to plain training, in the form that one call of the step has."""
    sizes = check.sizes
    settings = bench.BenchSettings(
        model=model, width=sizes.width, batch_size=sizes.batch_size, image_size=sizes.image_size, methods=sizes.bench_methods,
        augment=True,
    )  # fmt: skip
    dataset, methods = bench.random_dataset(settings), shared.parse_methods(f"{PLAIN}, {settings.methods}")
    recipe = lambda typed: shared.make_recipe(settings, dataset, methods[typed][0])
    start = lambda recipe, typed: stepper(check, recipe, shared.make_numbers(settings, methods[typed][1]), dataset)
    plain = {conv: start(with_conv(recipe(PLAIN), conv), PLAIN)[0] for conv in CONVOLUTIONS}
    steps = steps_in_a_round(plain["canonical"], sizes.most_steps)
    lax = cost_ratios(plain, "canonical", rounds=sizes.rounds, steps=steps)["lax"]
    conv = chosen(check, lax)
    programs, ideals, left_out = {}, {}, {}
    for typed in methods:
        check.say(f"bench/{model}: compiles {typed}")
        try:
            programs[typed], ideals[typed] = start(with_conv(recipe(typed), conv), typed)
        except Exception as error:  # one method that doesn't run costs its own line only
            traceback.print_exc()
            left_out[typed] = f"{type(error).__name__}: {str(error)[:300]}"
    again = f"{PLAIN}, once more"
    programs[again] = start(with_conv(recipe(PLAIN), conv), PLAIN)[0]
    programs[bench.HAND_WRITTEN] = bench.hand_written(with_conv(recipe(PLAIN), conv), settings, dataset)
    steps = steps_in_a_round(programs[PLAIN], sizes.most_steps)
    milliseconds = 1000 * seconds_a_step(programs[PLAIN], steps)
    found = cost_ratios(programs, PLAIN, rounds=sizes.rounds, steps=steps)
    trainer, noise = found.pop(bench.HAND_WRITTEN), found.pop(again)
    ideal = {typed: ideals[typed]() for typed in found}
    return {
        "ratios": {t: {"ratio": r, "ideal": ideal[t], "quotient": r / ideal[t]} for t, r in found.items() if t != PLAIN},
        "trainer": trainer, "noise": noise, "lax_over_canonical": lax, "conv": conv, "step_milliseconds": milliseconds,
        "rounds": sizes.rounds, "steps": steps, "batch_size": sizes.batch_size, "image_size": sizes.image_size, "left_out": left_out,
    }  # fmt: skip


def stepper(check: Check, recipe: Recipe, numbers: dict, dataset: Dataset) -> tuple[Callable[[], dict], Callable[[], float]]:
    """As bench.stepper: (a call that trains one more step, a call that gives the ideal cost of a step so far).

    The share of the work behind a site is counted on the CPU: compiled for a GPU, convolutions are calls of a library, whose
    operations the compiler doesn't know.
    """
    run = TimedStep(recipe, numbers, dataset)
    metrics, work = jax.device_get(run()), 1.0
    with jax.default_device(check.cpu):
        for link in split_methods(recipe.build(numbers["method"]))[0]:
            if link.search:
                state = init_state(recipe, numbers, sample_data(dataset), 0)
                share = bench.share_after(recipe, state, dataset.train_images[: recipe.batch_size], link.site)
                work += 2 * bench.inner_evaluations(recipe, metrics, link) / 3 * share
    return run, lambda: work * (1 + extra_gradients(run.state.opt_state) / int(run.state.step))


def seconds_a_step(run: Callable, steps: int) -> float:
    """Of a program that is compiled: the mean over `steps` calls, waited for at the end."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    for _ in range(steps):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / steps


def steps_in_a_round(run: Callable, most: int) -> int:
    """So many that a program's turn takes a tenth of a second: far above the clock's noise, and calls run ahead of the device."""
    return int(np.clip(0.1 / seconds_a_step(run, 3), 1, most))


def random_images(sizes: Sizes) -> Dataset:
    """Noise: rates don't depend on the values."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sizes.examples, sizes.image_size, sizes.image_size, 3), dtype=np.uint8)
    labels = (np.arange(sizes.examples) % 10).astype(np.int32)
    return Dataset("random", images, labels, images[:512], labels[:512], tuple(map(str, range(10))))


def plain_training(sizes: Sizes, model: str, dataset: Dataset, width: int | None) -> tuple[Recipe, dict]:
    """Plain cross entropy, LDAM's crops and flips, for a few epochs."""
    settings = shared.Settings(
        model=model, width=width, batch_size=sizes.batch_size, epochs=sizes.train_epochs, augment=True, learning_rate=0.05
    )
    method, numbers = shared.parse_methods(PLAIN)[PLAIN]
    return shared.make_recipe(settings, dataset, method), shared.make_numbers(settings, numbers)


def data_rates(check: Check) -> dict:
    """Training images a second: data on the device and streamed, one step in a call and many."""
    sizes, dataset = check.sizes, random_images(check.sizes)
    recipe, numbers = plain_training(sizes, sizes.bench_models[0], dataset, sizes.width)
    rates = {}
    for streamed, steps in itertools.product((False, True), (1, 100)):
        found = fit(recipe, dataset, numbers, 0, options=Options(stream=streamed, steps_per_call=steps))
        rates[f"{'streamed' if streamed else 'resident'}, {steps} a call"] = found.examples_per_second
    for steps in (1, 100):
        feed = Feed(recipe, [dataset], [0], Devices(), steps, True, False)
        began = time.perf_counter()
        for call in feed.calls(0):
            jax.block_until_ready(call.images)
        rates[f"reading alone, {steps} a call"] = recipe.total_steps * recipe.batch_size / (time.perf_counter() - began)
    return {
        "model": sizes.bench_models[0], "images_a_second": rates,
        "data_path": bench.data_path(recipe, numbers, dataset, sizes.rounds),
        "checkpoint": bench.checkpoint_share(recipe, numbers, dataset),
    }  # fmt: skip


def side_by_side(check: Check) -> None:
    """Part (c): seeds at once against one after the other, for both kinds of convolutions."""
    for conv in ("lax", "canonical"):  # JAX's own first: the other may be far slower where it wasn't made for
        check.measure(("vmap",), conv, partial(speed_up, check, conv))


def speed_up(check: Check, conv: str) -> dict:
    """Seconds of training (no compilation, no evaluation) of one run, and of a run among `seeds`; medians of alternating repeats."""
    sizes, count = check.sizes, check.flags.seeds
    dataset = datasets(check)[1][0] if check.flags.data and not check.flags.tiny else random_images(sizes)
    recipe, numbers = plain_training(sizes, sizes.train_model, dataset, sizes.width)
    recipe, options = with_conv(recipe, conv), Options(steps_per_call=100)
    runs = [Run(dataset, numbers, seed) for seed in range(count)]
    rival = min([row["seconds_one"] for row in check.report["vmap"].values() if "seconds_one" in row], default=np.inf)
    one, many = [], []
    for _ in range(sizes.repeats):
        one.append(fit(recipe, dataset, numbers, 0, options=options).seconds)
        if one[0] > HOPELESS * rival and not check.flags.tiny:
            return {"seconds_one": one[0], "given_up": f"{one[0] / rival:.1f} times the other kind's time"}
        many.append(sum(history.seconds for history in fit_many(recipe, runs, options=options)))
    ratio = [m / (count * o) for m, o in zip(many, one)]
    return {
        "model": sizes.train_model, "steps": recipe.total_steps, "runs": count, "seconds_one": statistics.median(one),
        "seconds_a_run_of_many": statistics.median(many) / count, "ratio": statistics.median(ratio), "ratio_from": min(ratio),
        "ratio_to": max(ratio), "speed_up": 1 / statistics.median(ratio), "one": one, "many": many,
    }  # fmt: skip
