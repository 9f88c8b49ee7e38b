"""Domain generalization: trains on all domains but one, tests on that one, for every domain; DomainBed's protocol and table.

    python experiments/domains.py --data PACS.npz --steps 1000                                    # eight methods, three seeds
    python experiments/domains.py --data PACS.npz --methods "erm, coral, dann, rsc, swad, lpa" --seeds 1 --steps 50 --out DIR
    python experiments/domains.py --data PACS.npz --methods "erm, lpa(bound=0.1), lpa+swad" --held-out sketch photo
    python experiments/domains.py --data FOLDER --image-size 224 --model resnet20                 # FOLDER/domain/class/image

Every domain is split 80/20 by class, the split drawn with the seed. Training takes --batch-size samples of the 80 % of each training
domain in every step; the 20 % of the training domains choose the step (best mean accuracy over them: training-domain validation), and
the accuracy there on the 80 % of the left-out domain is reported, which nothing was chosen by. SWAD's weights are averaged over the
window that the validation losses give instead. Unlike DomainBed's, the 20 % are not augmented, nothing is pretrained, and there is one
setting per method, no random search: numbers compare methods here, not with published ones.

Writes domains.json and table.md to --out and prints the table. A run that is finished is not trained again: the same command, also with
more methods, seeds or left-out domains, trains what is missing.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import shared
from experiments.compare import digest
from experiments.shared.building import IMAGENET
from perturbjax import objective, spec
from perturbjax.analysis import summary
from perturbjax.checks import check_choice, check_number
from perturbjax.data import Dataset, apply_views
from perturbjax.data.domains import DomainSplit, domain_batches, missing_classes, pooled, split_domains
from perturbjax.frozen import covered, join_params, split_params
from perturbjax.models.blocks import MOMENTUM
from perturbjax.parameter.swad import SWADAverage, is_swad, swad_interval
from perturbjax.training import DeviceData, Devices, Recipe, RunFolder, TrainState, init_state, predict
from perturbjax.training.checkpoint import dump_json
from perturbjax.training.feed import step_size
from perturbjax.training.loop import EVALUATION_BATCH
from perturbjax.training.step import as_arrays, compiled_step, draw_batch

SELECTION = (
    "Accuracy on 80 % of the left-out domain, at the step with the best mean accuracy on 20 % of each training domain "
    "(training-domain validation); SWAD: weights averaged over the window found on those 20 %."
)
DRAWS = ("thin", "longtail")
"""Views that keep some of the samples: they act on the pooled ones."""
STATS_BATCHES = 50
"""Training batches from which BatchNorm's statistics of averaged weights are computed."""
NOT_HERE = ("epochs", "recipe", "stream", "checkpoint_seconds", "log_every", "test_every", "tensorboard")


@dataclasses.dataclass(frozen=True)
class DomainsSettings(shared.Settings):
    """Flags of domains.py."""

    methods: str = "erm, coral, dann, domain_mixup, manifold_mixup, rsc, swad, lpa"
    """Methods, separated by commas: a name, settings in brackets, + for a chain. lpa raises all classes if it says nothing else."""
    seeds: int = 3
    """n: seeds 0 to n-1, each for the splits, the initialisation and every draw, the same for all methods."""
    steps: int = 1000
    """Optimiser steps of a run."""
    evaluate_every: int | None = None
    """Steps between two evaluations (SWAD needs about ten in all, or more); a tenth of the steps if not given."""
    held_out: tuple[str, ...] = ()
    """Domains to leave out in turn; all if not given."""
    out: str | None = None
    """Folder for domains.json and table.md; runs/domains-DATA-VIEW if not given."""
    view: str = "none"
    """What is made of the data first: none, shrink(size), thin(per_class), drop_duplicates; + chains."""
    model: str = "cnn"
    """mlp, cnn, resnet8/20/32/44/56/110, la_net, se_resnet20/110, wrn16-8, wrn28-10, shake26, resnet50/101 (for large images)."""
    batch_size: int = 32
    """Samples of each training domain in a step."""
    epochs: int = 0
    """Not for domains.py, which counts --steps."""
    learning_rate: float = 1e-3
    """Base learning rate; DomainBed has 5e-5 for a pretrained ResNet-50."""
    optimizer: str = "adam"
    """sgd, adam or adamw."""
    weight_decay: float = 0.0
    """Weight decay on all parameters; coupled, but for adamw."""
    schedule: str = "constant"
    """cosine (to zero), step or constant, after the warm-up; epochs are those of the average training set."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""


@dataclasses.dataclass(frozen=True)
class StepsRecipe(Recipe):
    """A recipe whose length is counted in steps; the same for all left-out domains, whose training sets differ in size."""

    steps: int = 1
    epoch_steps: int = 1
    """What counts as an epoch, for schedules and for statistics by epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Of the average training set."""
        return self.epoch_steps

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps


class Job(NamedTuple):
    """One run: a method, a left-out domain, a seed."""

    typed: str
    method: shared.Method
    numbers: tuple
    domain: int
    seed: int


def main(argv: list[str]) -> None:
    """Runs all methods on all left-out domains."""
    settings = shared.first_flags(argv, DomainsSettings, __doc__, one_process=True)
    check_flags(settings)
    methods, notes = parse_methods(settings)
    dataset = load_pooled(settings)
    held = held_out_domains(settings, dataset)
    for domain, seed in itertools.product(held, range(settings.seeds)):
        next(domain_batches(split_domains(dataset, domain, seed=seed).train, settings.batch_size, seed=0))
    check_methods(settings, dataset, methods)
    identity = run_identity(settings, dataset)
    with shared.prepare_out(settings.out, "domains", settings.view, identity) as folder:
        console = Console()
        shared.print_notes(dataset, console, settings, steps=settings.steps)
        for note in [*missing_classes(dataset), *notes]:
            console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
        jobs = [
            Job(typed, *what, domain, seed)
            for typed, what in methods.items()
            for domain in held
            for seed in range(settings.seeds)
        ]
        started = time.perf_counter()
        runs, trained, steps = run_all(settings, dataset, jobs, folder.path, identity, console)
        results = results_of(settings, dataset, held, runs)
        dump_json(folder.path / "domains.json", results)
        (folder.path / "table.md").write_text(markdown(results))
        print_results(results, console)
        took = time.perf_counter() - started
        console.print(
            f"{took:.0f} s: {trained} of {len(jobs)} runs trained, {steps} compiled steps. "
            f"Wrote {folder.path / 'domains.json'} and {folder.path / 'table.md'}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ what is to be done


def load_pooled(settings: DomainsSettings) -> Dataset:
    """All samples as the view makes them. What draws samples draws from all of them, those of the file's test part included."""
    others = shared.views_of(settings.view, lambda name: name not in DRAWS)
    draws = shared.views_of(settings.view, lambda name: name in DRAWS)
    return apply_views(pooled(shared.load_view(settings, 0, others)), draws, 0)


def check_flags(settings: DomainsSettings) -> None:
    """Raises ValueError for flags that can't be."""
    defaults = DomainsSettings()
    for name in NOT_HERE:
        if getattr(settings, name) != getattr(defaults, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is not for domains.py, got {getattr(settings, name)!r}. Leave it out; --steps is the length."
            )
    check_number("--seeds", low=1, seeds=settings.seeds)
    check_number("--steps", low=1, steps=settings.steps)
    check_number("--evaluate-every", low=1, high=settings.steps, evaluate_every=settings.evaluate_every)
    if settings.parallel != "jit":
        raise ValueError(f"--parallel needs jit here, got {settings.parallel!r}. Leave it out.")


def parse_methods(settings: DomainsSettings) -> tuple[dict[str, tuple[shared.Method, tuple]], list[str]]:
    """(methods by their name as typed, what to say of them). LPA raises all classes unless it says how it splits them."""
    found: dict[str, tuple[shared.Method, tuple]] = {}
    notes = []
    for typed, chain in spec.parse_list(settings.methods):
        raised = [_all_raised(call) for call in chain]
        if raised != list(chain):
            notes.append(f"{typed} is {spec.canonical(raised)}: all classes are raised, as in LPA's domain generalization.")
        if typed in found:
            raise ValueError(f"--methods needs every method once, got {typed!r} twice. Remove one of them.")
        [found[typed]] = shared.parse_methods(spec.canonical(raised), settings.plugin).values()
    return found, notes


def _all_raised(call: spec.Call) -> spec.Call:
    settled = call.name != "lpa" or {"split", "direction", "tau"} & dict(call.kwargs).keys()
    return call if settled else dataclasses.replace(call, kwargs=(*call.kwargs, ("split", "all")))


def held_out_domains(settings: DomainsSettings, dataset: Dataset) -> list[int]:
    """Numbers of the domains to leave out."""
    for name in settings.held_out:
        check_choice("--held-out", "a domain", name, dataset.domain_names)
    return [n for n, name in enumerate(dataset.domain_names) if not settings.held_out or name in settings.held_out]


def run_identity(settings: DomainsSettings, dataset: Dataset) -> dict:
    """What all runs of a folder share."""
    whole = shared.identity(settings, dataset) | {"domains": list(dataset.domain_names)}
    return {name: value for name, value in whole.items() if name != "held_out"}


def recipe_of(settings: DomainsSettings, dataset: Dataset, method: shared.Method) -> StepsRecipe:
    """The static part of a run: the same for all left-out domains and seeds."""
    channels = dataset.image_shape[-1]
    # ImageNet's, as in DomainBed: statistics of our own would look at the left-out domain.
    stats = tuple(IMAGENET.values()) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    base = shared.make_recipe(settings, dataset, method, stats)
    if base.fine_tuning is not None:
        raise ValueError(
            "balanced_fine_tuning needs class-balanced batches for form='samples', got domains.py, which draws from every domain alike. "
            "Write form=weights."
        )
    domains = len(dataset.domain_names) - 1
    average = 0.8 * len(dataset.train_labels) * domains / (domains + 1)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    fields |= {"batch_size": settings.batch_size * domains, "epochs": 1, "num_domains": domains}
    return StepsRecipe(**fields, steps=settings.steps, epoch_steps=max(1, int(average / fields["batch_size"])))


def check_methods(settings: DomainsSettings, dataset: Dataset, methods: dict) -> None:
    """Builds every method and traces its step, so that a wrong setting ends the program before anything is trained."""
    shared.check_runs(dataclasses.replace(settings, epochs=max(1, math.ceil(settings.warmup_epochs))), dataset, {})
    for typed, (method, numbers) in methods.items():
        try:
            recipe, wanted = recipe_of(settings, dataset, method), shared.make_numbers(settings, numbers)
            state = init_state(recipe, wanted, sample(dataset), 0)
            steps = min(step_size(settings.steps_per_call, False), evaluate_every(settings), settings.steps)
            shared.check_step(settings, recipe, state, wanted, dataset, steps=steps)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{typed}: {error}") from error


def sample(dataset: Dataset) -> DeviceData:
    """The data set with its first image only."""
    counts = jnp.asarray(dataset.class_counts, jnp.int32)
    return DeviceData(jnp.asarray(dataset.train_images[:1]), jnp.asarray(dataset.train_labels[:1]), counts)


# ---------------------------------------------------------------------------------------------------------------------- training


def run_all(settings, dataset: Dataset, jobs: list[Job], out: pathlib.Path, identity: dict, console: Console):
    """([record of each job], how many were trained now, how many steps were compiled for them)."""
    devices = shared.options(settings).devices
    everything: list[DeviceData] = []  # on the device: made when it is needed first
    records, recipes, trained = [], set(), 0
    for number, job in enumerate(jobs):
        domain = dataset.domain_names[job.domain]
        place = out / "runs" / f"{shared.slug(job.typed)}-{digest(job.typed)}" / shared.slug(domain) / f"seed-{job.seed}"
        with RunFolder(place) as folder:
            folder.claim(identity | {"method": job.typed, "held_out": domain, "seed": job.seed})
            if (record := finished(place / "finished.json")) is None:
                if not everything:
                    everything.append(devices.replicate(on_device(dataset)))
                recipe = recipe_of(settings, dataset, job.method)
                try:
                    record = train(settings, dataset, job, recipe, everything[0], devices)
                except (ValueError, FloatingPointError) as error:
                    raise type(error)(f"{job.typed}, without {domain}, seed {job.seed}: {error}") from error
                dump_json(place / "finished.json", record)
                recipes.add(recipe)
                trained += 1
                console.print(
                    f"[{number + 1}/{len(jobs)}] {job.typed}, without {domain}, seed {job.seed}: {100 * record['accuracy']:.1f} "
                    f"({record['seconds_per_step']:.3f} s a step){span_of(record)}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
            records.append(record)
    return records, trained, len(recipes)


def span_of(record: dict) -> str:
    """Which weights were averaged, for SWAD."""
    if record["window"] is None:
        return ""
    first, last = record["window"]
    falling = "" if record["converged"] else ": the validation loss did not stop falling, which takes more steps"
    return f", weights of steps {first + 1} to {last}{falling}"


def finished(file: pathlib.Path) -> dict | None:
    """What a finished run left; None if it isn't there or is damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


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
    averaging, window = any(is_swad(x) for x in jax.tree.leaves(state.opt_state, is_leaf=is_swad)), SWADAverage()
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
    test = lambda params, stats: accuracy(recipe, params, stats, dataset, split.test)
    warm = took[1:] or took  # the first call may compile
    record = {
        "method": job.typed, "domain": dataset.domain_names[job.domain], "seed": job.seed,
        "accuracy": test(chosen.params, chosen.stats), "last_accuracy": test(state.params, state.stats),
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
    batches, per_call = domain_batches(split.train, settings.batch_size, seed=seed), step_size(settings.steps_per_call, False)
    done = 0
    while done < settings.steps:
        stop = min(done // every * every + every, settings.steps)
        count = min(per_call, stop - done)
        done += count
        yield np.stack(list(itertools.islice(batches, count))), done if done == stop else None


def evaluate_every(settings: DomainsSettings) -> int:
    """Steps between two evaluations."""
    return settings.evaluate_every or max(1, settings.steps // 10)


def evaluation_batch(dataset: Dataset) -> int:
    """One batch size, hence one program, for the evaluation of every left-out domain's splits (about their smallest)."""
    sizes = np.bincount(dataset.train_domains)
    return max(1, min(EVALUATION_BATCH, int(0.2 * (sizes.sum() - sizes.max())), int(0.8 * sizes.min())))


def logits_of(recipe: Recipe, params: Any, stats: Any, dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Logits [N, C] of the samples at these positions, in float64."""
    images, batch = dataset.train_images[rows], evaluation_batch(dataset)
    return predict(recipe.model, params, stats, images, batch_size=batch).astype(np.float64)


def accuracy(recipe: Recipe, params: Any, stats: Any, dataset: Dataset, rows: np.ndarray) -> float:
    """Top-1 accuracy on the samples at these positions."""
    return float(np.mean(logits_of(recipe, params, stats, dataset, rows).argmax(1) == dataset.train_labels[rows]))


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


# ----------------------------------------------------------------------------------------------------------------------- results


def results_of(settings: DomainsSettings, dataset: Dataset, held: list[int], runs: list[dict]) -> dict:
    """The whole of domains.json."""
    names = [dataset.domain_names[n] for n in held]
    methods: dict[str, dict] = {}
    for typed in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == typed]
        of = lambda key, own=own: [[run[key] for run in own if run["domain"] == name] for name in names]
        accuracies, lasts = np.array(of("accuracy")), np.array(of("last_accuracy"))
        methods[typed] = {
            "domains": {name: summary(row) for name, row in zip(names, accuracies, strict=True)},
            "mean": summary(accuracies.mean(0)),  # over domains, by seed
            "last_step": summary(lasts.mean(0)),
            "seconds_per_step": float(np.mean([run["seconds_per_step"] for run in own])),
            "runs": own,
        }
    data = {
        "name": dataset.name, "samples": len(dataset.train_labels), "domain_names": list(dataset.domain_names),
        "class_names": list(dataset.class_names), "domain_counts": np.bincount(dataset.train_domains).tolist(),
        "image_shape": list(dataset.image_shape), "views": list(dataset.views), "notes": [*dataset.notes, *missing_classes(dataset)],
    }  # fmt: skip
    return {
        "command": shared.command_line(), "versions": shared.versions(), "data": data, "settings": dataclasses.asdict(settings),
        "selection": SELECTION, "held_out": names, "methods": methods,
    }  # fmt: skip


def shown(entry: dict) -> str:
    """A summary in percent, ± over seeds where there are several."""
    spread = f" ± {100 * entry['std']:.1f}" if len(entry["values"]) > 1 else ""
    return f"{100 * entry['mean']:.1f}{spread}"


def rows_of(results: dict) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the table."""
    names = results["held_out"]
    rows = [
        [typed, *(shown(entry["domains"][name]) for name in names), shown(entry["mean"])]
        for typed, entry in results["methods"].items()
    ]
    return ["method", *names, "mean"], rows


def markdown(results: dict) -> str:
    """The table, with what was chosen how, as Markdown."""
    head, rows = rows_of(results)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    seeds = results["settings"]["seeds"]
    over = f", mean ± std over {seeds} seeds" if seeds > 1 else ", one seed"
    return "\n".join([*lines, "", results["selection"] + f" In percent{over}.", "", f"`{results['command']}`", ""])


def print_results(results: dict, console: Console) -> None:
    """The table, for people."""
    head, rows = rows_of(results)
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(Text(name), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # brackets are settings, not markup
    console.print(table)
    console.print(results["selection"], highlight=False)


if __name__ == "__main__":
    shared.start(main)
