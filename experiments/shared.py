"""What the scripts share: flags, data, recipes from method specs, one trained run as a record, and the results' form."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import platform
import re
import runpy
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from perturbjax import spec, taxonomy
from perturbjax.analysis import evaluate, load_results, mean_by_class, relative_loss_variation, summary
from perturbjax.analysis.attack import PGD, Split, Universal, parse_attacks
from perturbjax.checks import check_number, nearest
from perturbjax.data import VIEWS, Augmentation, Dataset, apply_views, check, check_duplicates, load
from perturbjax.data.text import Tokenizer, read_vectors
from perturbjax.loss.teacher import load_teacher
from perturbjax.models import bert_fields, create, load_bert, load_resnet, resnet_fields, with_vectors
from perturbjax.parameter.swad import is_swad
from perturbjax.training import (
    Devices,
    History,
    Interrupted,
    Options,
    OtherSettings,
    Recipe,
    RunFolder,
    Schedule,
    init_state,
    recipe_flags,
    sample_data,
    split_methods,
    start_processes,
)
from perturbjax.training.checkpoint import dump_json

CONFIGS = pathlib.Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Flags that every script has."""

    data: str = "digits"
    """digits (ships with scikit-learn), an .npz file, a folder of images, cifar10, cifar100 or the authors' binary archive, tfds:NAME;
    texts: a .csv or .jsonl, a folder with a file per class, an .npz."""
    view: str = "longtail(50)"
    """What is made of the data, seeded; + chains, none: as is. longtail(ratio), noise(kind, rate), labels(FILE, KEY),
    leave_out(domain), drop_duplicates, validation(share), thin(per_class), shrink(size)."""
    image_size: int | None = None
    """Edge to which the images of a folder are resized and cropped."""
    text_length: int | None = None
    """Words of a text that are read; if not given: those of the longest training text, at most 200."""
    vocabulary: str | None = None
    """A BERT's vocab.txt; if not given, the words of the training texts are the vocabulary."""
    vocabulary_size: int | None = None
    """Words of that vocabulary, at most; 25,000 if not given."""
    model: str = "mlp"
    """mlp, cnn, resnet8/20/32/44/56/110, se_resnet20/110, wrn16-8, wrn28-10, shake26, resnet50/101 (for large images); of texts bilstm,
    bert-base, which bring the taxonomy paper's protocol for texts along: view, epochs, optimiser and schedule below."""
    width: int | None = None
    """Channels of the model's first layer; the model's own if not given."""
    head: str | None = None
    """linear or cosine; if not given, cosine for the methods that need it (LDAM, ArcFace, ...) and linear for the others."""
    abstain: bool = False
    """One more output of the model, for abstention; methods that need it (dac) get it anyway."""
    dropout: float | None = None
    """Dropout rate inside the model's stages; the model's own (images 0, bilstm 0.5, bert-base 0.1) if not given."""
    stochastic_depth: float = 0.0
    """Rate at which the last block of a resnet or wrn is left out, rising linearly from the first one; 0.5 in the paper."""
    shakedrop: float = 0.0
    """The same for ShakeDrop, which shakes the block's branch at random where it would be left out."""
    vectors: str | None = None
    """A file of word vectors in GloVe's form, for the bilstm to start from."""
    weights: str | None = None
    """A .safetensors file of public weights, for bert-base, resnet50 or resnet101 to start from."""
    bfloat16: bool = False
    """Compute the layers in bfloat16; parameters, logits and losses stay float32."""
    remat: bool = False
    """Recompute the blocks' insides in the backward pass: less memory, more time."""
    recipe: str | None = None
    """ldam or strong: a training protocol by name, which sets the flags below; flags given beside it count."""
    epochs: int = 60
    """Passes over the training data."""
    batch_size: int = 64
    """Samples per step; the last partial batch of an epoch is dropped."""
    accumulate: int = 1
    """Steps whose gradients are averaged for one update."""
    learning_rate: float = 0.1
    """Base learning rate."""
    optimizer: str = "sgd"
    """sgd, adam or adamw (for texts, with a learning rate about 1e-3)."""
    momentum: float = 0.9
    """Momentum; 0 switches it off. Of adam and adamw: β₁."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """Weight decay on all parameters; coupled, but for adamw."""
    schedule: str = "cosine"
    """cosine (to zero), step or constant, after the warm-up."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    milestones: tuple[float, ...] = ()
    """Epochs after which the step schedule lowers the learning rate."""
    decay: float | tuple[float, ...] = 0.1
    """One factor for every milestone, or the whole factor from each milestone on."""
    augment: bool | None = None
    """Random crops (padding an eighth of the width) and flips; if not given: for colour images only."""
    pad: int | None = None
    """Pixels of padding before the random crop; --augment decides if not given."""
    flip: bool | None = None
    """Random flips; --augment decides if not given."""
    cutout: int = 0
    """Edge of Cutout's square; 0: none."""
    randaugment: int = 0
    """RandAugment's operations per image; 0: none."""
    magnitude: float = 9.0
    """RandAugment's magnitude, 0 to 30."""
    plugin: tuple[str, ...] = ()
    """Python files with methods of your own (functions under @pj.method)."""
    devices: int | None = None
    """Devices that share every batch; if not given: all GPUs or TPUs, one CPU, all of several processes."""
    parallel: str = "jit"
    """jit (the numbers of one device) or pmap (per-device code: BatchNorm and mixing within each device's share)."""
    stream: bool | None = None
    """Send images to the device batch by batch; if not given: when they don't fit there."""
    steps_per_call: int | None = None
    """Steps in one device call; 1 on CPU and 100 elsewhere if not given."""
    checkpoint_seconds: float = 60.0
    """At least so long between two checkpoints; there is always one at the end."""
    log_every: int = 0
    """Steps between two lines of metrics.jsonl within an epoch; 0: one line per epoch."""
    tensorboard: bool = False
    """Write TensorBoard events too (pip install tensorboardX)."""
    coordinator: str | None = None
    """host:port of process 0, for training on several machines; give it, --num-processes and --process-id to each process."""
    num_processes: int = 1
    """Processes that train together."""
    process_id: int = 0
    """Number of this process, from 0."""


MODEL_FLAGS: dict[str, dict[str, Any]] = {
    model: dict(
        view="none", epochs=6, optimizer="adamw", learning_rate=rate, weight_decay=0.01, schedule="constant", warmup_epochs=0.0
    )
    for model, rate in {"bilstm": 1e-3, "bert-base": 2e-5}.items()
}
"""Flags that a model sets where nothing is said: of texts, the taxonomy paper's protocol (AdamW with its usual decay, batch 64)."""


RUNTIME = (
    "out", "plugin", "devices", "parallel", "stream", "steps_per_call", "checkpoint_seconds", "log_every", "tensorboard", "coordinator",
    "num_processes", "process_id", "cost_rounds", "vmapped", "attack",
)  # fmt: skip
"""Flags that say where and how fast, not what: a run may go on with others."""
CHOICE = ("methods", "seeds", "over", "cross", "reference")
"""Flags that choose among runs: each run has its own folder, and its method and seed among its settings."""


def first_flags(argv: Sequence[str], settings: type, epilogue: str) -> Any:
    """The settings of a command line: those of --config NAME first, flags on top.

    --list and --config act before the rest; unknown flags end the program with the nearest one (tyro).
    """
    import tyro  # here: a machine without it can still import this module

    argv = list(argv)
    if "--list" in argv:
        print_methods(taxonomy.registry(value_of(argv, "--plugin")))
        raise SystemExit(0)
    defaults: dict[str, Any] = {}
    smoke = "--smoke" in argv
    if smoke:
        argv.remove("--smoke")
    if names := value_of(argv, "--config", remove=True):
        chosen = read_config(names[-1])
        chosen |= chosen.pop("smoke", {}) if smoke else {}
        fields = {field.name for field in dataclasses.fields(settings)}
        chosen.pop("smoke", None), chosen.pop("paper", None)
        unknown = sorted(set(chosen) - fields)
        if unknown:
            raise ValueError(
                f"config {names[-1]} needs this script's flags only, got {unknown[0]!r}. {nearest(unknown[0], fields)}"
            )
        defaults = chosen
    elif smoke:
        raise ValueError("--smoke needs a config, got none. Write --config small_longtail --smoke.")
    model = (value_of(argv, "--model") or [defaults.get("model")])[-1]
    defaults = MODEL_FLAGS.get(model, {}) | defaults
    typed = value_of(argv, "--recipe")
    if named := (typed or [defaults.get("recipe")])[-1]:
        flags = flags_of_recipe(named, (value_of(argv, "--epochs") or [defaults.get("epochs")])[-1])
        # The nearer word counts: a flag of the config beside its own recipe, a recipe on the command line before the config.
        defaults = defaults | flags if typed else flags | defaults
    chosen = tyro.cli(
        settings, args=argv, default=settings(**defaults), description=epilogue, config=(tyro.conf.OmitArgPrefixes,)
    )
    begin(chosen)
    return chosen


def flags_of_recipe(name: str, epochs: str | int | None) -> dict[str, Any]:
    """A named recipe's flags for a run of that many epochs (None: its own number)."""
    try:
        flags = recipe_flags(name, None if epochs is None else int(epochs))
    except ValueError as error:
        raise ValueError(f"--recipe {name} --epochs {epochs}: {error}") from error
    del flags["pad"], flags["flip"]  # --augment has both, and pads by the images' own size
    if flags["head"] == "linear":
        del flags["head"]  # the method decides
    return flags | {"recipe": name, "augment": True}


def begin(settings: Settings) -> None:
    """Joins the other processes, if there are any, before anything else touches JAX."""
    if settings.coordinator is not None:
        start_processes(settings.coordinator, settings.num_processes, settings.process_id)
    elif settings.num_processes != 1 or settings.process_id:
        raise ValueError("--num-processes and --process-id need --coordinator host:port, got none.")


def options(settings: Settings, folder: pathlib.Path | None = None) -> Options:
    """How to train, from the flags; with --tensorboard, events go to `folder`/tensorboard."""
    several = jax.process_count() > 1
    if several and settings.devices not in (None, jax.device_count()):
        raise ValueError(
            f"--devices needs all {jax.device_count()} devices with several processes, got {settings.devices}. Leave it out."
        )
    every = jax.device_count() if several or jax.default_backend() != "cpu" else 1
    main = jax.process_index() == 0
    return Options(
        devices=Devices(settings.devices or every, settings.parallel),
        steps_per_call=settings.steps_per_call,
        stream=settings.stream,
        checkpoint_seconds=settings.checkpoint_seconds,
        log_every=settings.log_every,
        on_line=tensorboard(folder / "tensorboard") if settings.tensorboard and folder is not None and main else None,
        say=(lambda text: print(text, file=sys.stderr)) if main else (lambda text: None),
    )


def tensorboard(folder: pathlib.Path) -> Callable[[dict], None]:
    """A function that writes a line of the log as TensorBoard scalars."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs tensorboardX, got no such module. Write: pip install tensorboardX") from error
    writers: dict[str, Any] = {}

    def write(line: dict) -> None:
        run = "-".join(str(line[key]) for key in ("method", "seed") if key in line)
        if run not in writers:  # what an interrupted run wrote after its checkpoint is hidden
            writers[run] = SummaryWriter(str(folder / slug(run)), purge_step=line["step"])
        for name, value in line.items():
            if isinstance(value, float):
                writers[run].add_scalar(name, value, line["step"])
        writers[run].flush()

    return write


def identity(settings: Settings, dataset: Dataset, **more: Any) -> dict[str, Any]:
    """The settings and data that make a run what it is, for its folder; `more` is what the run adds to them."""
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in (*RUNTIME, *CHOICE)}
    # The data by name, since its path may change; its labels and the choice of samples by their hash.
    found = {"data": dataset.name, "train_size": len(dataset.train_labels), "subset_hash": dataset.subset_hash}
    found |= {"images_hash": images_hash(dataset.train_images), "plugin_hash": [file_hash(path) for path in settings.plugin]}
    return kept | found | more


def images_hash(images: np.ndarray, at_most: int = 4096) -> str:
    """12 hex digits of the images, or of that many of them at equal distances."""
    step = -(-len(images) // at_most)
    return hashlib.sha256(np.ascontiguousarray(images[::step]).tobytes()).hexdigest()[:12]


def file_hash(path: str) -> str:
    """12 hex digits of a file."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:12]


def value_of(argv: list[str], flag: str, *, remove: bool = False) -> list[str]:
    """The values given to a flag, as `--flag value` or `--flag=value`."""
    found, kept, i = [], [], 0
    while i < len(argv):
        if argv[i] == flag and i + 1 < len(argv):
            found.append(argv[i + 1])
            i += 2
        elif argv[i].startswith(flag + "="):
            found.append(argv[i].split("=", 1)[1])
            i += 1
        else:
            kept.append(argv[i])
            i += 1
    if remove:
        argv[:] = kept
    return found


def read_config(name: str) -> dict[str, Any]:
    """The settings in experiments/configs/NAME.py (its function `config`)."""
    known = sorted(path.stem for path in CONFIGS.glob("*.py"))
    if name not in known:
        raise ValueError(f"--config needs a file of experiments/configs, got {name!r}. {nearest(name, known)}")
    return dict(runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]())


def print_methods(registry: Mapping[str, Callable]) -> None:
    """--list: every method with its coordinates and one line."""
    from rich.table import Table

    shown = Table("name", "target", "direction", "inference", "granularity", "what it does", box=None, pad_edge=False)
    for factory in dict.fromkeys(registry.values()):
        summary_line = (factory.__doc__ or "").strip().splitlines()[0]
        if at := getattr(factory, "coordinates", None):
            coordinates = ["+".join(at.target), taxonomy.sign(at.direction), at.inference, "+".join(at.granularity)]
        else:
            coordinates = ["–"] * 4
        shown.add_row(getattr(factory, "alias", None) or factory.__name__, *coordinates, summary_line)
    wide = Console()
    (wide if wide.is_terminal else Console(width=160)).print(shown)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method as typed, ready to be built inside a trace: hashable by its structure only."""

    structure: tuple
    plugins: tuple[str, ...] = ()
    head: str = "linear"
    """The last layer that the links need."""
    abstain: bool = False
    """Whether they need one more output."""

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
        found[typed] = (dataclasses.replace(method, head=head, abstain="outputs" in needs), numbers)
    return found


def load_view(settings: Settings, seed: int) -> Dataset:
    """The data with the settings' view drawn with this seed, checked."""
    views = ()
    if settings.view.strip() not in ("", "none"):
        chain = spec.resolve(spec.parse_chain(settings.view), VIEWS)
        views = tuple(VIEWS[call.name](**dict(call.kwargs)) for call in chain)
    form = {"text_length": settings.text_length, "vocabulary": settings.vocabulary, "vocabulary_size": settings.vocabulary_size}
    found = source(settings.data, settings.image_size, **form)
    return check_duplicates(check(apply_views(found, views, seed)))


@functools.cache
def source(name: str, image_size: int | None = None, **form: Any) -> Dataset:
    """The data set without views, read once."""
    return load(name, image_size=image_size, **form)


def print_notes(dataset: Dataset, console: Console) -> None:
    """What the data's reader wants people to know."""
    for note in dataset.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)


@functools.cache
def channel_stats(settings: Settings) -> tuple | None:
    """Channel means and deviations of the view drawn with seed 0: one normalisation, hence one compiled step, for all seeds."""
    dataset = load_view(settings, 0)
    return dataset.channel_stats() if dataset.tokenizer is None else None


def make_recipe(settings: Settings, dataset: Dataset, method: Method, stats: tuple | None = None) -> Recipe:
    """The static part of a run. stats: means and deviations of the channels; None: the data set's own."""
    own, initial = pretrained(settings, dataset)
    own |= branch_options(settings)
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
    return Recipe(
        model=model, build=method, num_classes=dataset.num_classes, num_examples=len(dataset.train_labels),
        batch_size=settings.batch_size, epochs=settings.epochs,
        schedule=Schedule(settings.schedule, settings.warmup_epochs, settings.milestones, settings.decay),
        momentum=settings.momentum > 0, nesterov=settings.nesterov, augmentation=augmentation(settings, dataset, own.get("mean")),
        accumulate=settings.accumulate, optimizer=settings.optimizer, initial=initial,
        num_domains=None if dataset.train_domains is None else len(dataset.domain_names),
    )  # fmt: skip


def branch_options(settings: Settings) -> dict[str, float]:
    """The model's fields for what happens on its residual branches."""
    given = {name: value for name in ("stochastic_depth", "shakedrop") if (value := getattr(settings, name))}
    for name in given:
        if not settings.model.startswith(("resnet", "se_resnet", "wrn")) or settings.model in ("resnet50", "resnet101"):
            raise ValueError(
                f"--{name.replace('_', '-')} needs --model resnet8 to resnet110, se_resnet… or wrn…, got {settings.model}. "
                "Write --model resnet20, or leave it out."
            )
    return given


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
        return IMAGENET | {"blocks": resnet_fields(settings.weights)["blocks"]}, functools.partial(
            load_resnet, settings.weights
        )
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


def check_runs(settings: Settings, dataset: Dataset, methods: Mapping[str, tuple[Method, tuple]]) -> None:
    """Builds every method once on the host, so that a wrong setting ends the program before anything is trained."""
    check_number("--learning-rate", low=0, open_low=True, high=1e30, learning_rate=settings.learning_rate)
    check_number("--momentum", low=0, high=1, momentum=settings.momentum)
    check_number("--weight-decay", low=0, high=1e30, weight_decay=settings.weight_decay)
    check_number("--dropout", low=0, high=0.999, dropout=settings.dropout)
    check_number("--checkpoint-seconds", low=0, checkpoint_seconds=settings.checkpoint_seconds)
    check_number("--log-every", low=0, log_every=settings.log_every)
    check_number("--warmup-epochs", low=0, high=settings.epochs, warmup_epochs=settings.warmup_epochs)
    for flag, value in (("--width", settings.width), ("--devices", settings.devices)):
        check_number(flag, low=1, **{flag.strip("-"): value})
    for typed, (method, numbers) in methods.items():
        try:
            recipe = make_recipe(settings, dataset, method)
            state = init_state(recipe, make_numbers(settings, numbers), sample_data(dataset), 0)
            if any(is_swad(x) for x in jax.tree.leaves(state.opt_state, is_leaf=is_swad)):
                raise ValueError(
                    "swad needs validation losses and a window, got a script without them. Write experiments/domains.py."
                )
        except ValueError as error:
            raise ValueError(f"{typed}: {error}") from error


def record(histories: Sequence[History], datasets: Sequence[Dataset]) -> dict:
    """The results of one method over its seeds, in results.json's form; cost_ratio and difference are left open."""
    runs = [evaluate(h.logits, d.test_labels, d.class_counts) for h, d in zip(histories, datasets, strict=True)]
    over = lambda key: None if runs[0][key] is None else summary([run[key] for run in runs])
    variations = [
        relative_loss_variation(*h.losses, d.num_classes)
        for h, d in zip(histories, datasets, strict=True)
        if h.losses is not None
    ]
    return {
        "accuracy": over("accuracy"),
        "best_epoch_accuracy": summary([max(h.accuracy) for h in histories]),
        "top5": over("top5"),
        "ece": over("ece"),
        "head": over("head"),
        "medium": over("medium"),
        "tail": over("tail"),
        "memorised": None if histories[0].memorised is None else summary([h.memorised for h in histories]),
        "per_class": mean_by_class([run["per_class"] for run in runs]),
        "cost_ratio": None,
        "gradient_evaluations": float(np.mean([h.gradient_evaluations for h in histories])),
        "inner_evaluations": float(np.mean([h.inner_evaluations for h in histories])),
        "seconds": float(np.sum([h.seconds for h in histories])),
        "examples_per_second": float(np.mean([h.examples_per_second for h in histories])),
        "peak_memory_bytes": max(h.peak_memory for h in histories),
        "learning_curve": {
            "epoch": list(range(1, len(histories[0].accuracy) + 1)),
            "accuracy": [h.accuracy for h in histories],
        },
        "relative_loss_variation": mean_by_class(variations) if variations else None,
        "difference": None,
        "metrics": histories[-1].metrics,
    }


def attacks_of(settings: Any, dataset: Dataset) -> dict[str, PGD | Universal]:
    """The attacks that --attack names, checked before anything is trained."""
    found = parse_attacks(settings.attack)
    if found and dataset.tokenizer is not None:
        raise ValueError("--attack needs images, got texts. Leave it out.")
    if found and jax.process_count() > 1:
        raise ValueError(
            "--attack needs one process, got several. Give the same command without --coordinator once the training is finished."
        )
    return found


def attacked_before(results: dict, attacks: Mapping[str, Any]) -> bool:
    """Whether the results hold all these attacks on every method."""
    return all(set(attacks) <= set(entry.get("attacks") or {}) for entry in results["methods"].values())


def attacked(
    attacks: Mapping[str, PGD | Universal], runs: Sequence[tuple[pathlib.Path, Dataset, int]], console: Console
) -> dict[str, dict]:
    """{attack as typed: mean, std, values} of one method's finished runs, (folder, data, seed).

    Each number is kept in its run's attack.json, by the attack's settings and the data, and not computed again.
    """
    found: dict[str, list[float]] = {typed: [] for typed in attacks}
    for folder, dataset, seed in runs:
        file = folder / "attack.json"
        kept, net = read_json(file), None
        for typed, attack in attacks.items():
            key = f"{attack!r} seed={seed} data={attacked_data(dataset)}"
            if key not in kept:
                with console.status(f"attacking {folder.parent.name}/{folder.name}: {typed}"):
                    net = net or load_teacher(folder)
                    split = Split(
                        dataset.train_images,
                        dataset.train_labels,
                        dataset.test_images,
                        dataset.test_labels,
                        dataset.num_classes,
                    )
                    kept[key] = attack.accuracy(net, split, seed)
                dump_json(file, kept)
            found[typed].append(kept[key])
    return {typed: summary(values) for typed, values in found.items()}


def attacked_data(dataset: Dataset) -> str:
    """Training and test set, as hashes."""
    labels = hashlib.sha256(dataset.train_labels.tobytes() + dataset.test_labels.tobytes()).hexdigest()[:12]
    return "-".join((images_hash(dataset.train_images), images_hash(dataset.test_images), labels))


def read_json(file: pathlib.Path) -> dict:
    """What the file holds; {} if it is missing or damaged, since it can be made again."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def results_of(settings: Any, datasets: Sequence[Dataset], seeds: Sequence[int], methods: dict) -> dict:
    """The whole of results.json."""
    first = datasets[0]
    return {
        "command": command_line(),
        "versions": versions(),
        "data": {
            "name": first.name,
            "train_size": len(first.train_labels),
            "test_size": len(first.test_labels),
            "class_counts": [int(n) for n in first.class_counts],
            "class_names": list(first.class_names),
            "subset_hash": [d.subset_hash for d in datasets],
            "views": list(first.views),
            "notes": list(first.notes),
            "image_shape": list(first.image_shape),
        },
        "settings": dataclasses.asdict(settings) | {"seeds": list(seeds)},
        "methods": methods,
    }


def command_line() -> str:
    """The command that made a result, without this machine's paths."""
    script = pathlib.Path(sys.argv[0])
    shown = f"experiments/{script.name}" if script.suffix == ".py" else script.name
    return f"python {shown} {shlex.join(sys.argv[1:])}".strip()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("perturbjax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {"python": platform.python_version(), "backend": jax.default_backend()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout on the path
            found[name] = "not installed"
    return found


def slug(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "none"


def prepare_out(out: str | None, script: str, view: str, identity: dict) -> RunFolder:
    """The output folder, made, locked and claimed for these settings before any training.

    Without --out: runs/SCRIPT-DATA-VIEW, or that name with -2, -3 …, the first one that is new or was begun with these settings.
    """
    if out is not None:
        return claimed(pathlib.Path(out), identity)
    name = f"{script}-{slug(identity['data'])}-{slug(view)}"
    for number in itertools.count(1):
        with contextlib.suppress(OtherSettings):
            return claimed(pathlib.Path("runs") / (name if number == 1 else f"{name}-{number}"), identity)
    raise AssertionError  # the count has no end


def read_results(file: pathlib.Path) -> dict | None:
    """results.json; None if it is missing or damaged, since it can be made again from the runs."""
    try:
        return load_results(file)
    except (OSError, ValueError):
        return None


def finished_run(folder: RunFolder) -> History | None:
    """What a finished run left; None if it isn't finished. A damaged file is put aside: the last checkpoint has the run."""
    if not folder.finished.exists():
        return None
    try:
        return History.load(folder.finished)
    except ValueError:
        aside = folder.finished.with_name("damaged-" + folder.finished.name)
        print(f"{folder.finished} is damaged: put aside as {aside.name}.", file=sys.stderr)
        folder.finished.rename(aside)
        return None


def claimed(path: pathlib.Path, identity: dict) -> RunFolder:
    """The folder, begun with these settings; unlocked again if it was begun with others."""
    folder = RunFolder(path)
    try:
        folder.claim(identity)
    except ValueError:  # whatever is wrong with it
        folder.close()
        raise
    return folder


def start(main: Callable[[list[str]], None]) -> None:
    """Runs a script's main: a clear error becomes one line and exit code 2; SIGTERM and Ctrl-C say how to go on."""
    cache = pathlib.Path.home() / ".cache" / "perturbjax" / "xla"
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    before = signal.signal(signal.SIGTERM, stop_early)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that a second Ctrl-C could hurry
        print(stop, file=sys.stderr)
        raise SystemExit(128 + stop.signal_number) from None
    except KeyboardInterrupt:
        print("interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_early(number: int, frame: Any) -> None:
    """SIGTERM outside training, which has a handler of its own: there is nothing to save."""
    raise Interrupted("stopped outside training: finished runs are kept. The same command goes on.", number)
