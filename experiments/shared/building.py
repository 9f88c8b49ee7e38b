"""From flags to what is trained: data, methods, model and recipe."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.shared.flags import Settings, devices_of
from experiments.shared.folders import slug
from perturbjax import spec, taxonomy
from perturbjax.checks import check_number
from perturbjax.data import VIEWS, Augmentation, Dataset, apply_views, check, check_duplicates, load, write_copies
from perturbjax.data.duplicates import has_copies
from perturbjax.data.text import Tokenizer, read_vectors
from perturbjax.frozen import check_frozen
from perturbjax.models import TEXT_NAMES, bert_fields, create, load_bert, load_resnet, resnet_fields, with_vectors
from perturbjax.parameter.swad import is_swad
from perturbjax.training import (
    DeviceData,
    Devices,
    FineTuning,
    Recipe,
    Schedule,
    TrainState,
    init_state,
    sample_data,
    split_methods,
)
from perturbjax.training.feed import call_length, streams
from perturbjax.training.step import as_arrays, compiled_step, pixels

COPIES = "duplicates.csv"
"""The list of samples that are there several times, in a run's folder."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method as typed, ready to be built inside a trace: hashable by its structure only."""

    structure: tuple
    plugins: tuple[str, ...] = ()
    head: str = "linear"
    """The last layer that the links need."""
    abstain: bool = False
    """Whether they need one more output."""
    fine_tuning: FineTuning | None = None
    """What they ask of the trainer for the last part."""
    replays: int = 1
    """How often they ask for each batch."""
    second_view: bool = False
    """Whether they ask for each sample augmented twice."""
    swad_rule: str = "paper"
    """Which window SWAD averages over, where it is among them."""

    def __call__(self, numbers: Any) -> tuple:
        """The perturbations and optax links for these numbers."""
        made = spec.build(self.structure, numbers, taxonomy.registry(self.plugins), taxonomy.helpers())
        return tuple(one for one in made if one != ())


def parse_methods(text: str, plugins: tuple[str, ...] = ()) -> dict[str, tuple[Method, tuple]]:
    """Methods by their name as typed: (structure, numbers). Unknown names and settings are errors with the nearest valid one."""
    registry, helpers, found = taxonomy.registry(plugins), taxonomy.helpers(), {}
    for typed, chain in spec.parse_list(text):
        if typed in found:
            raise ValueError(f"--methods needs every method once, got {typed!r} twice. Remove one of them.")
        structure, numbers = spec.split_numbers(chain, registry, helpers)
        method = Method(structure, plugins)
        needs = {need for link in split_methods(method(numbers))[0] for need in link.needs}
        head = "cosine" if "cosine" in needs else "linear"
        asked = {"head": head, "abstain": "outputs" in needs} | asked_of_trainer(structure, numbers, registry)
        found[typed] = (dataclasses.replace(method, **asked), numbers)
    return found


def asked_of_trainer(structure: tuple, numbers: tuple, registry: Mapping[str, Callable]) -> dict[str, Any]:
    """What the methods of a chain ask of the trainer (`asks` of @method), as fields of a Method."""
    value, found = lambda x: numbers[x.index] if isinstance(x, spec.Slot) else x, dict[str, Any]()
    for call in structure:
        asks = getattr(registry[call.name], "asks", lambda settings: {})  # ce is no perturbation
        found |= asks({name: value(x) for name, x in call.kwargs})
    if "fine_tuning" in found:
        found["fine_tuning"] = FineTuning(**found["fine_tuning"])
    return found


def load_view(
    settings: Settings, seed: int, views: tuple[Callable, ...] | None = None, *, refuse_duplicates: bool = True
) -> Dataset:
    """The data with the settings' view drawn with this seed (or these views of it), checked.

    refuse_duplicates: raise ValueError where the test set is known from training, once all copies are listed in a file.
    """
    dataset = viewed(settings, seed, views_of(settings.view) if views is None else views)
    try:
        return check_duplicates(dataset, refuse=refuse_duplicates)
    except ValueError as error:
        out = getattr(settings, "out", None)
        file = pathlib.Path(out) / COPIES if out else pathlib.Path("runs") / f"duplicates-{slug(dataset.name)}.csv"
        raise ValueError(f"{error} All copies, with their labels, are listed in {list_copies(dataset, file)}.") from error


def viewed(settings: Settings, seed: int, views: tuple[Callable, ...]) -> Dataset:
    """The same, without a look for duplicates."""
    form = {"text_length": settings.text_length, "vocabulary": settings.vocabulary, "vocabulary_size": settings.vocabulary_size}
    form |= {"background": settings.background, "skip_damaged": settings.skip_damaged}
    return check(apply_views(source(settings.data, settings.image_size, **form), views, seed))


def list_copies(dataset: Dataset, file: pathlib.Path) -> pathlib.Path:
    """Writes the list of samples that are there several times, in one of several processes; the file's path."""
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_copies(file, dataset)
    return file


def views_of(text: str, wanted: Callable[[str], bool] = lambda name: True) -> tuple[Callable, ...]:
    """The views of a chain as typed, those of a wanted name."""
    chain = () if text.strip() in ("", "none") else spec.resolve(spec.parse_chain(text), VIEWS)
    return tuple(VIEWS[call.name](**dict(call.kwargs)) for call in chain if wanted(call.name))


@functools.cache
def source(name: str, image_size: int | None = None, **form: Any) -> Dataset:
    """The data set without views, read once."""
    return load(name, image_size=image_size, **form)


def print_notes(
    dataset: Dataset,
    console: Console,
    settings: Settings,
    folder: pathlib.Path,
    *,
    steps: int | None = None,
    notes: Sequence[str] | None = None,
) -> None:
    """What people should know of the data, and batches that change nothing.

    Where samples are there several times, they are listed in a file in the run's folder.

    Args:
      steps: of a run; None: by --epochs. notes: on the data (`notes_of`); None: those of its reader.
    """
    total = settings.epochs * (len(dataset.train_labels) // settings.batch_size) if steps is None else steps
    unused = total % settings.accumulate
    left = (
        f"The last {unused} of {total} steps change nothing: --accumulate {settings.accumulate} makes one update of every "
        f"{settings.accumulate}.",
    )
    copies = (
        (f"All copies, with their labels, are listed in {list_copies(dataset, folder / COPIES)}.",)
        if has_copies(dataset)
        else ()
    )
    for note in (*(dataset.notes if notes is None else notes), *copies, *(left if unused else ())):
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)


def classifiers(settings: Settings, methods: dict) -> str | None:
    """Which method has which last layer, if they differ: "linear: ce, la; cosine: ldam"."""
    found: dict[str, list[str]] = {}
    for typed, (method, _) in methods.items():
        found.setdefault(settings.head or method.head, []).append(typed)
    return "; ".join(f"{head}: {', '.join(names)}" for head, names in found.items()) if len(found) > 1 else None


def print_classifiers(settings: Settings, methods: dict, console: Console) -> None:
    """Says so if the methods don't have the same last layer: what is compared is then the layer too."""
    if (different := classifiers(settings, methods)) is not None:
        console.print(
            f"note: the methods have different classifiers ({different}), which are a part of their differences. "
            "Write --head cosine for one classifier.",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip


@functools.cache
def channel_stats(settings: Settings) -> tuple | None:
    """Channel means and deviations of the view drawn with seed 0: one normalisation, hence one compiled step, for all seeds."""
    dataset = viewed(settings, 0, views_of(settings.view))  # the runs' own data have been looked through for duplicates
    return dataset.channel_stats() if dataset.tokenizer is None else None


def make_recipe(settings: Settings, dataset: Dataset, method: Method, stats: tuple | None = None) -> Recipe:
    """The static part of a run. stats: means and deviations of the channels; None: the data set's own."""
    own, initial = pretrained(settings, dataset)
    own |= branch_options(settings) | freezing(settings)
    if dataset.tokenizer is None:
        mean, std = stats or dataset.channel_stats()
        own = {"mean": mean, "std": tuple(s if s > 0 else 1.0 for s in std)} | own  # a constant channel stays constant
    else:
        own |= {"vocabulary_size": len(dataset.tokenizer.words)}
    model = create(
        settings.model, num_classes=dataset.num_classes, width=settings.width,
        head=settings.head or getattr(method, "head", "linear"), dropout=settings.dropout,
        dtype=jnp.bfloat16 if settings.bfloat16 else jnp.float32, remat=settings.remat,
        abstain=settings.abstain or getattr(method, "abstain", False), **own,
    )  # fmt: skip
    if settings.freeze:
        example = sample_data(dataset).images
        check_frozen("--freeze", parameter_shapes(model, example.shape, example.dtype), settings.freeze)
    return Recipe(
        model=model, build=method, num_classes=dataset.num_classes, num_examples=len(dataset.train_labels),
        batch_size=settings.batch_size, epochs=settings.epochs,
        schedule=Schedule(settings.schedule, settings.warmup_epochs, settings.milestones, settings.decay),
        momentum=settings.momentum > 0, nesterov=settings.nesterov, augmentation=augmentation(settings, dataset, own.get("mean")),
        accumulate=settings.accumulate, optimizer=settings.optimizer, initial=initial,
        num_domains=None if dataset.train_domains is None else len(dataset.domain_names),
        fine_tuning=getattr(method, "fine_tuning", None), replays=getattr(method, "replays", 1),
        second_view=getattr(method, "second_view", False),
    )  # fmt: skip


def branch_options(settings: Settings) -> dict[str, Any]:
    """The model's fields for what happens on its residual branches, and beside them."""
    given = {name: value for name in ("stochastic_depth", "shakedrop") if (value := getattr(settings, name))}
    large = settings.model in ("resnet50", "resnet101")
    for name in given:
        if large or not settings.model.startswith(("resnet", "la_net", "se_resnet", "wrn")):
            raise ValueError(
                f"--{name.replace('_', '-')} needs --model resnet8 to resnet110, la_net, se_resnet… or wrn…, got {settings.model}. "
                "Write --model resnet20, or leave it out."
            )
    if settings.shortcut == "A":
        return given
    if large or not settings.model.startswith("resnet"):
        raise ValueError(
            f"--shortcut {settings.shortcut} needs --model resnet8 to resnet110, got {settings.model}. Leave it out."
        )
    return given | {"shortcut": settings.shortcut}


def freezing(settings: Settings) -> dict[str, Any]:
    """The model's fields for what is not trained."""
    if settings.freeze_batchnorm and settings.model in ("mlp", *TEXT_NAMES):
        raise ValueError(
            f"--freeze-batchnorm needs a model with BatchNorm (cnn, resnet…, wrn…, shake26), got {settings.model}. Leave it out."
        )
    batchnorm = {"frozen_batchnorm": True} if settings.freeze_batchnorm else {}
    return batchnorm | ({"frozen": tuple(settings.freeze)} if settings.freeze else {})


@functools.cache
def parameter_shapes(model: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The parameters of a model for inputs [1, ...] like these, without numbers in them."""
    init = lambda images: model.init(jax.random.key(0), pixels(images), train=False)["params"]
    return jax.eval_shape(init, jax.ShapeDtypeStruct(shape, dtype))


PRETRAINED = {"vectors": ("bilstm",), "weights": ("bert-base", "resnet50", "resnet101")}


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # what public weights of images were trained with


def pretrained(settings: Settings, dataset: Dataset) -> tuple[dict[str, Any], Callable | None]:
    """(the model's fields that public weights or word vectors fix, initial variables -> those with these in place)."""
    for flag, models in PRETRAINED.items():
        if getattr(settings, flag) is not None and (
            settings.model not in models or (dataset.tokenizer is None) != settings.model.startswith("resnet")
        ):
            needed = " or of images resnet50, resnet101" if flag == "weights" else ""
            raise ValueError(
                f"--{flag} needs texts and --model {models[0]}{needed}, got {dataset.kind} and {settings.model}. Leave it out."
            )
    if settings.weights is not None and dataset.tokenizer is None:
        if dataset.image_shape[-1] != 3:
            raise ValueError(f"--weights needs colour images, got {dataset.image_shape[-1]} channels. Leave it out.")
        check_blocks(settings)
        return IMAGENET, functools.partial(load_resnet, settings.weights)
    if settings.vectors is not None:
        vectors, found = word_vectors(settings.vectors, dataset.tokenizer)
        return {"embedding": vectors.shape[1]}, of_params(functools.partial(with_vectors, vectors=vectors, found=found))
    if settings.weights is not None:
        fields = bert_fields(settings.weights)
        words, given = fields.pop("vocabulary_size"), len(dataset.tokenizer.words)
        if settings.vocabulary is None or words != given:
            got = "none" if settings.vocabulary is None else f"{given} in {settings.vocabulary}"
            raise ValueError(f"--weights needs --vocabulary, their own vocab.txt of {words} pieces, got {got}.")
        return fields, of_params(functools.partial(load_bert, settings.weights))
    return {}, None


def check_blocks(settings: Settings) -> None:
    """Raises ValueError for a file with the weights of another ResNet than the one that is named."""
    blocks = {name: create(name, num_classes=2, **IMAGENET).blocks for name in PRETRAINED["weights"] if name != "bert-base"}
    needed, found = blocks[settings.model], resnet_fields(settings.weights)["blocks"]
    if found != needed:
        fitting = [name for name, own in blocks.items() if own == found]
        way = f"Write --model {fitting[0]}." if fitting else f"Give a {settings.model}'s."
        raise ValueError(
            f"--weights needs those of a net with {needed} blocks for --model {settings.model}, got {found} in {settings.weights!r}. {way}"
        )


def of_params(change: Callable) -> Callable:
    """The function of variables that changes their parameters."""
    return lambda variables: {**variables, "params": change(variables["params"])}


@functools.lru_cache(maxsize=1)
def word_vectors(file: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of the vocabulary, read once."""
    return read_vectors(file, tokenizer.words)


def augmentation(settings: Settings, dataset: Dataset, mean: tuple[float, ...] | None) -> Augmentation:
    """What the flags ask for; crops and flips are for colour images if nothing is said. Cutout leaves the channels' means."""
    if dataset.tokenizer is not None:
        if settings.augment or settings.pad or settings.flip or settings.cutout or settings.randaugment:
            raise ValueError("--augment, --pad, --flip, --cutout and --randaugment need images, got texts. Leave them out.")
        return Augmentation()
    usual = dataset.image_shape[-1] == 3 if settings.augment is None else settings.augment
    pad = max(1, dataset.image_shape[0] // 8) if usual else 0
    cutout = (
        settings.cutout if settings.recipe is None else min(settings.cutout, dataset.image_shape[0] // 2)
    )  # a recipe's is for 32
    return Augmentation(
        pad=pad if settings.pad is None else settings.pad, flip=usual if settings.flip is None else settings.flip,
        cutout=cutout, randaugment=settings.randaugment, magnitude=settings.magnitude, grey=mean,
    )  # fmt: skip


def make_numbers(settings: Settings, numbers: tuple) -> dict:
    """The numeric arguments of the step."""
    return {
        "method": numbers,
        "learning_rate": settings.learning_rate,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
    }


def check_runs(
    settings: Settings, dataset: Dataset, methods: Mapping[str, tuple[Method, tuple]], stats: tuple | None = None
) -> None:
    """Builds every method and traces its training step, so that a wrong setting ends the program before anything is trained.

    stats: as for `make_recipe`; those that the runs will have make the trace theirs.
    """
    check_number("--epochs", low=1, epochs=settings.epochs)
    check_number("--batch-size", low=1, batch_size=settings.batch_size)
    check_number("--learning-rate", low=0, open_low=True, high=1e30, learning_rate=settings.learning_rate)
    check_number("--momentum", low=0, high=1, momentum=settings.momentum)
    check_number("--weight-decay", low=0, high=1e30, weight_decay=settings.weight_decay)
    check_number("--dropout", low=0, high=0.999, dropout=settings.dropout)
    check_number("--checkpoint-seconds", low=0, infinite=True, checkpoint_seconds=settings.checkpoint_seconds)
    check_number("--log-every", low=0, log_every=settings.log_every)
    check_number("--test-every", low=1, test_every=settings.test_every)
    check_number("--warmup-epochs", low=0, high=settings.epochs, warmup_epochs=settings.warmup_epochs)
    for flag, value in (("--width", settings.width), ("--devices", settings.devices)):
        check_number(flag, low=1, **{flag.strip("-"): value})
    for typed, (method, numbers) in methods.items():
        try:
            recipe = make_recipe(settings, dataset, method, stats)
            state = init_state(recipe, make_numbers(settings, numbers), sample_data(dataset), 0)
            if any(is_swad(x) for x in jax.tree.leaves(state.opt_state, is_leaf=is_swad)):
                raise ValueError(
                    "swad needs validation losses and a window, got a script without them. Write experiments/domains.py."
                )
            check_step(settings, recipe, state, make_numbers(settings, numbers), dataset)
        except (ValueError, TypeError) as error:  # of shapes, JAX raises either
            raise ValueError(f"{typed}: {error}") from error


def check_step(
    settings: Settings, recipe: Recipe, state: TrainState, numbers: dict, dataset: Dataset, *, steps: int | None = None
) -> None:
    """Traces a call of the training step: settings that only the step can refuse raise here, and nothing is computed.

    JAX keeps the trace: the run that calls the same step with data of these shapes does not trace it again. steps: of one call.
    """
    devices, streamed = devices_of(settings), streams(dataset, settings.stream)
    per_call = steps or min(call_length(settings.steps_per_call, streamed), recipe.steps_per_epoch)
    like = lambda x, *before: jax.ShapeDtypeStruct((*before, *np.shape(x)[len(before) > 0 :]), x.dtype)
    index = jax.ShapeDtypeStruct((per_call, recipe.batch_size), jnp.int32)
    data = DeviceData(
        None if streamed else like(dataset.train_images), like(dataset.train_labels),
        jax.ShapeDtypeStruct((dataset.num_classes,), jnp.int32),
        None if dataset.train_domains is None else like(dataset.train_domains),
    )  # fmt: skip
    images = like(dataset.train_images, *index.shape) if streamed else None
    # Under pmap the step of one device stands for it: what is per device changes no setting.
    step: Any = compiled_step(recipe, Devices() if devices.mapped else devices)
    step.eval_shape(state, as_arrays(numbers), data, index, images)
