"""The runs of domains.py: training on all domains but one, and the weights that a run is judged by."""

import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments import shared
from experiments.leaveout.plan import DomainsSettings, Job, StepsRecipe, evaluate_every, recipe_of, sample
from experiments.shared.records import read_json
from perturbjax import objective
from perturbjax.analysis.metrics import scores
from perturbjax.data import Dataset
from perturbjax.data.domains import DomainSplit, domain_batches, split_domains
from perturbjax.frozen import covered, join_params, split_params
from perturbjax.models.blocks import MOMENTUM
from perturbjax.parameter.swad import SWADAverage, is_swad, swad_interval
from perturbjax.training import DeviceData, Devices, Recipe, RunFolder, TrainState, init_state, predict
from perturbjax.training.checkpoint import dump_json
from perturbjax.training.feed import call_length
from perturbjax.training.loop import EVALUATION_BATCH, predicted_classes
from perturbjax.training.step import as_arrays, compiled_step, draw_batch

STATS_BATCHES = 50
"""Training batches from which BatchNorm's statistics of averaged weights are computed."""


class Done(NamedTuple):
    """What became of all runs."""

    records: list[dict]  # of the methods that did not diverge
    trained: int  # runs that were trained now
    compiled: int  # steps that were compiled for them
    diverged: list[str]  # a sentence for each method that is missing


def run_all(settings, dataset: Dataset, jobs: list[Job], out: pathlib.Path, identity: dict, console: Console) -> Done:
    """Takes the runs that are finished and trains the others. A method that diverges stops none but itself.

    Raises FloatingPointError if all do.
    """
    devices = shared.options(settings).devices
    everything: list[DeviceData] = []  # on the device: made when it is needed first
    records, recipes, trained = [], set(), 0
    diverged: dict[str, str] = {}
    for number, job in enumerate(jobs):
        if job.typed in diverged:
            continue
        domain = dataset.domain_names[job.domain]
        place = shared.run_place(out, job.typed) / shared.slug(domain) / f"seed-{job.seed}"
        with RunFolder(place) as folder:
            folder.claim(identity | shared.method_identity(job.typed, settings.plugin) | {"held_out": domain, "seed": job.seed})
            if not (record := read_json(place / "finished.json")):
                if not everything:
                    everything.append(devices.replicate(on_device(dataset)))
                recipe = recipe_of(settings, dataset, job.method)
                try:
                    record = train(settings, dataset, job, recipe, everything[0], devices)
                except ValueError as error:
                    raise ValueError(f"{job.typed}, without {domain}, seed {job.seed}: {error}") from error
                except FloatingPointError as error:
                    diverged[job.typed] = f"{job.typed}, without {domain}, seed {job.seed}: {error}"
                    continue
                dump_json(place / "finished.json", record)
                recipes.add(recipe)
                trained += 1
                console.print(
                    f"[{number + 1}/{len(jobs)}] {job.typed}, without {domain}, seed {job.seed}: {100 * record['accuracy']:.1f} "
                    f"({record['seconds_per_step']:.3f} s a step){span_of(record)}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
            records.append(record)
    if len(diverged) == len({job.typed for job in jobs}):
        raise FloatingPointError("\n".join(diverged.values()))
    kept = [record for record in records if record["method"] not in diverged]
    return Done(kept, trained, len(recipes), list(diverged.values()))


def span_of(record: dict) -> str:
    """Which weights were averaged, for SWAD."""
    if record["window"] is None:
        return ""
    first, last = record["window"]
    falling = "" if record["converged"] else ": the validation loss did not stop falling, which takes more steps"
    return f", weights of steps {first + 1} to {last}{falling}"


def on_device(dataset: Dataset) -> DeviceData:
    """All samples, of whichever domain: the arrays have one shape for all left-out domains."""
    labels = jnp.asarray(dataset.train_labels)
    counts = jnp.asarray(dataset.class_counts, jnp.int32)
    return DeviceData(jnp.asarray(dataset.train_images), labels, counts, jnp.asarray(dataset.train_domains))


def without(data: DeviceData, dataset: Dataset, job: Job, split: DomainSplit, devices: Devices) -> DeviceData:
    """The data with what depends on the left-out domain: class counts, and the other domains numbered 0..D-2."""
    counts = np.bincount(dataset.train_labels[np.concatenate(split.train)], minlength=dataset.num_classes).astype(np.int32)
    domains = dataset.train_domains - (dataset.train_domains > job.domain)  # the left-out one's own number is never looked up
    return data._replace(class_counts=devices.replicate(counts), domains=devices.replicate(domains.astype(np.int32)))


class Evaluation(NamedTuple):
    """The validation parts of the training domains, each counting the same."""

    accuracy: float
    loss: float


class Chosen(NamedTuple):
    """The weights that a run is judged by."""

    params: Any
    stats: Any
    validation_accuracy: float
    step: int | None  # None: an average
    window: list[int] | None = None  # of an average: the weights after these steps, the first excluded
    converged: bool | None = None  # of an average: whether SWAD's window has a beginning


def train(
    settings: DomainsSettings, dataset: Dataset, job: Job, recipe: StepsRecipe, data: DeviceData, devices: Devices
) -> dict:
    """One run's record."""
    devices.check_batch(recipe.batch_size)
    split = split_domains(dataset, job.domain, seed=job.seed)
    data = without(data, dataset, job, split, devices)
    numbers = shared.make_numbers(settings, job.numbers)
    state = devices.replicate(init_state(recipe, numbers, sample(dataset), job.seed))
    arrays, step = devices.replicate(as_arrays(numbers)), compiled_step(recipe, devices)
    averaging = any(is_swad(x) for x in jax.tree.leaves(state.opt_state, is_leaf=is_swad))
    window = SWADAverage(rule=getattr(recipe.build, "swad_rule", "paper"))
    curve: dict[str, list] = {"step": [], "loss": [], "validation_accuracy": [], "validation_loss": []}
    of_methods: dict[str, list[float]] = {}
    best: Chosen | None = None
    since, took = dict[str, list](), list[tuple[int, float]]()  # since: the steps' metrics since the last evaluation
    for rows, ends in calls(settings, split, job.seed):
        index = devices.split(rows.shape, 1, functools.partial(_columns, rows))
        began = time.perf_counter()
        state, metrics, _ = step(state, arrays, data, index)
        for name, values in jax.device_get(metrics).items():  # waits for the step
            since.setdefault(name, []).extend(values.tolist())
        took.append((len(rows), time.perf_counter() - began))
        if ends is None:
            continue
        means, since = {name: float(np.mean(values)) for name, values in since.items()}, {}
        loss = means.pop("loss")
        if not math.isfinite(loss):
            raise FloatingPointError(f"training needs finite losses, got {loss} before step {ends}. Lower --learning-rate.")
        found = evaluate(recipe, state, dataset, split)
        for name, value in zip(curve, (ends, loss, *found), strict=True):
            curve[name].append(value)
        for name, value in means.items():
            of_methods.setdefault(name, []).append(value)
        if averaging:
            mean, steps, opt_state = swad_interval(state.opt_state, split_params(state.params, recipe.frozen)[0])
            state = state._replace(opt_state=opt_state)
            if window.add(found.loss, mean, steps):
                break
        elif best is None or found.accuracy > best.validation_accuracy:  # the first of equals
            params, stats = jax.tree.map(jnp.copy, (state.params, state.stats))  # the step gives the state's own buffers away
            best = Chosen(params, stats, found.accuracy, ends)
    chosen = best or averaged(settings, dataset, job, recipe, data, state, window, curve["step"])
    test = lambda params, stats: scores_on(recipe, params, stats, dataset, split.test)
    warm = took[1:] or took  # the first call may compile
    record = {
        "method": job.typed, "domain": dataset.domain_names[job.domain], "seed": job.seed,
        **test(chosen.params, chosen.stats), "last_accuracy": test(state.params, state.stats)["accuracy"],
        "seconds": sum(seconds for _, seconds in took),
        "seconds_per_step": sum(seconds for _, seconds in warm) / sum(steps for steps, _ in warm),
        "curve": curve | {"metrics": of_methods},  # means over the steps since the evaluation before
        "sizes": {"train": sum(map(len, split.train)), "validation": sum(map(len, split.validation)), "test": len(split.test)},
    }  # fmt: skip
    return record | {key: value for key, value in chosen._asdict().items() if key not in ("params", "stats")}


def _columns(rows: np.ndarray, where: slice) -> np.ndarray:
    return rows[..., where]


def averaged(settings, dataset, job: Job, recipe, data, state: TrainState, window: SWADAverage, ends: list[int]) -> Chosen:
    """The weights of SWAD's window, with BatchNorm statistics of their own. ends: steps taken at each evaluation."""
    split = split_domains(dataset, job.domain, seed=job.seed)
    first, last = window.window
    begins = last if first is None else first  # never converged: the last interval alone
    trained, frozen = split_params(state.params, recipe.frozen)
    params = join_params(jax.tree.map(lambda a, w: jnp.asarray(a, w.dtype), window.average(), trained), frozen)
    state = with_statistics(recipe, state._replace(params=params), data, split, settings, job.seed)
    span = [0 if begins == 0 else ends[begins - 1], ends[last]]
    return Chosen(params, state.stats, evaluate(recipe, state, dataset, split).accuracy, None, span, first is not None)


def calls(settings: DomainsSettings, split: DomainSplit, seed: int) -> Iterator[tuple[np.ndarray, int | None]]:
    """(positions [K, B] for K steps, the number of steps taken if an evaluation is due after them)."""
    every = evaluate_every(settings)
    batches, per_call = domain_batches(split.train, settings.batch_size, seed=seed), call_length(settings.steps_per_call, False)
    done = 0
    while done < settings.steps:
        stop = min(done // every * every + every, settings.steps)
        count = min(per_call, stop - done)
        done += count
        yield np.stack(list(itertools.islice(batches, count))), done if done == stop else None


def evaluation_batch(dataset: Dataset) -> int:
    """One batch size, hence one program, for the evaluation of every left-out domain's splits (about their smallest)."""
    sizes = np.bincount(dataset.train_domains)
    return max(1, min(EVALUATION_BATCH, int(0.2 * (sizes.sum() - sizes.max())), int(0.8 * sizes.min())))


def logits_of(recipe: Recipe, params: Any, stats: Any, dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Logits [N, C] of the samples at these positions, in float64."""
    images, batch = dataset.train_images[rows], evaluation_batch(dataset)
    return predict(recipe.model, params, stats, images, batch_size=batch).astype(np.float64)


def scores_on(recipe: Recipe, params: Any, stats: Any, dataset: Dataset, rows: np.ndarray) -> dict:
    """What is right on the samples at these positions: accuracy, balanced accuracy, macro F1, the numbers of each class ("per_class" is
    accuracy, or recall) and the confusion matrix. Means over classes are over those that are there."""
    images, batch = dataset.train_images[rows], evaluation_batch(dataset)
    classes = predicted_classes(recipe.model, params, stats, images, batch_size=batch)
    return scores(classes, dataset.train_labels[rows], dataset.num_classes)


def evaluate(recipe: Recipe, state: TrainState, dataset: Dataset, split: DomainSplit) -> Evaluation:
    """Accuracy and cross entropy, averaged over the training domains' validation parts."""
    rows = np.concatenate(split.validation)
    logits, labels = logits_of(recipe, state.params, state.stats, dataset, rows), dataset.train_labels[rows]
    losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(rows)), labels]
    parts = np.cumsum([len(own) for own in split.validation])[:-1]
    over = lambda values: float(np.mean([part.mean() for part in np.split(values, parts)]))
    return Evaluation(over((logits.argmax(1) == labels).astype(float)), over(losses))


def with_statistics(recipe, state: TrainState, data: DeviceData, split: DomainSplit, settings, seed: int) -> TrainState:
    """The state with BatchNorm's statistics computed anew for its weights: their mean over training batches. Frozen ones stay."""
    if not state.stats or recipe.model.frozen_batchnorm:
        return state
    stays = lambda path: covered("/".join(key.key for key in path), recipe.frozen)
    begin = jax.tree_util.tree_map_with_path(lambda path, old: old if stays(path) else jnp.zeros_like(old), state.stats)
    update, count = compiled_statistics(recipe), min(STATS_BATCHES, settings.steps)
    total = jax.tree.map(jnp.zeros_like, begin)
    for rows in itertools.islice(domain_batches(split.train, settings.batch_size, seed=seed), count):
        # From zero, one step of the running mean is this share of the batch's own statistics.
        total = jax.tree.map(jnp.add, total, update(state._replace(stats=begin), data, jnp.asarray(rows)))
    mean = lambda path, old, summed: old if stays(path) else (summed / (count * (1 - MOMENTUM))).astype(old.dtype)
    return state._replace(stats=jax.tree_util.tree_map_with_path(mean, state.stats, total))


@functools.cache
def compiled_statistics(recipe: Recipe) -> Callable:
    """The jitted training pass that keeps nothing but its running statistics: (state, data, index [B]) -> stats."""
    plain = objective(recipe.model, (), num_classes=recipe.num_classes)
    return jax.jit(
        lambda state, data, index: plain(state.params, (), draw_batch(recipe, state, data, index), stats=state.stats)[1].stats
    )
