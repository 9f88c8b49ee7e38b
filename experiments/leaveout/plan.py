"""What domains.py is to do: its flags, the data of all domains, the methods and their recipes, checked before anything is trained."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp

from experiments import shared
from experiments.shared.building import IMAGENET
from experiments.shared.flags import MODEL_FLAGS
from perturbjax import spec
from perturbjax.checks import check_choice, check_number
from perturbjax.data import Dataset, apply_views
from perturbjax.data.domains import missing_classes, pooled
from perturbjax.training import DeviceData, Recipe, init_state
from perturbjax.training.feed import call_length

DRAWS = ("thin", "longtail")
"""Views that keep some of the samples: they act on the pooled ones."""
NOT_HERE = ("recipe", "epochs", "stream", "checkpoint_seconds", "log_every", "test_every", "tensorboard")


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
    allow_missing_classes: bool = False
    """Go on with domains that have no samples of some classes, which is an error otherwise."""
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


def load_pooled(settings: DomainsSettings) -> Dataset:
    """All samples as the view makes them. What draws samples draws from all of them, those of the file's test part included."""
    others = shared.views_of(settings.view, lambda name: name not in DRAWS)
    draws = shared.views_of(settings.view, lambda name: name in DRAWS)
    return apply_views(pooled(shared.load_view(settings, 0, others)), draws, 0)


def check_flags(settings: DomainsSettings) -> None:
    """Raises ValueError for flags that can't be."""
    if settings.model in MODEL_FLAGS:
        raise ValueError(f"--model needs a model of images for domains.py, got {settings.model!r}. Write --model cnn.")
    shared.refuse(settings, NOT_HERE, "domains.py", "Leave it out; --steps is the length.")
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
    return {name: value for name, value in whole.items() if name not in ("held_out", "allow_missing_classes")}


def check_classes(settings: DomainsSettings, dataset: Dataset) -> None:
    """Raises ValueError for a domain that lacks a class, unless the settings allow it."""
    if (found := missing_classes(dataset)) and not settings.allow_missing_classes:
        raise ValueError(
            f"domains.py needs samples of every class in every domain. {' '.join(found)} Write --allow-missing-classes to go on without: "
            "the domain's own accuracy is then that of its other classes."
        )


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
    if base.replays != 1:
        raise ValueError(
            f"domains.py needs methods that take each batch once, got one that asks for {base.replays} times in a row. For free_at "
            "write at(num_steps=1)."
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
            steps = min(call_length(settings.steps_per_call, False), evaluate_every(settings), settings.steps)
            shared.check_step(settings, recipe, state, wanted, dataset, steps=steps)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{typed}: {error}") from error


def evaluate_every(settings: DomainsSettings) -> int:
    """Steps between two evaluations."""
    return settings.evaluate_every or max(1, settings.steps // 10)


def sample(dataset: Dataset) -> DeviceData:
    """The data set with its first image only."""
    counts = jnp.asarray(dataset.class_counts, jnp.int32)
    return DeviceData(jnp.asarray(dataset.train_images[:1]), jnp.asarray(dataset.train_labels[:1]), counts)
