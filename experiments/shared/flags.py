"""The flags that every script has, and how a command line becomes settings."""

import dataclasses
import inspect
import pathlib
import runpy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from rich.console import Console

import perturbjax
from perturbjax import taxonomy
from perturbjax.checks import nearest
from perturbjax.training import Devices, recipe_flags, start_processes

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Flags that every script has."""

    data: str = "digits"
    """digits (ships with scikit-learn), an .npz file, a folder of images, cifar10, cifar100 or the authors' binary archive, tfds:NAME;
    texts: a .csv, .tsv or .jsonl, a folder with a file per class, an .npz."""
    view: str = "longtail(50)"
    """What is made of the data, seeded; + chains, none: as is. longtail(ratio), noise(kind, rate), labels(FILE, KEY),
    leave_out(domain), drop_duplicates, validation(share), thin(per_class), shrink(size)."""
    image_size: int | None = None
    """Edge to which the images of a folder are resized and cropped."""
    background: str = "white"
    """Colour on which transparent images lie (four channels are RGBA); none: files lose their opacity, arrays keep four channels."""
    skip_damaged: bool = False
    """Leave out the images of a folder that can't be decoded, instead of ending with their names."""
    text_length: int | None = None
    """Words of a text that are read; if not given: those of the longest training text, at most 200."""
    vocabulary: str | None = None
    """A BERT's vocab.txt; if not given, the words of the training texts are the vocabulary, in scripts without spaces (Chinese,
    Japanese, Thai ...) their characters; "spaces" or "characters" decides which."""
    vocabulary_size: int | None = None
    """Words of that vocabulary, at most; 25,000 if not given."""
    model: str = "mlp"
    """mlp, cnn, resnet8/20/32/44/56/110, la_net, se_resnet20/110, wrn16-8, wrn28-10, shake26, resnet50/101 (for large images); of texts
    bilstm, bert-base, which bring the taxonomy paper's protocol for texts along: view, epochs, optimiser and schedule below."""
    width: int | None = None
    """Channels of the model's first layer; the model's own if not given."""
    head: str | None = None
    """linear or cosine; if not given, cosine for the methods that need it (LDAM, ArcFace, ...) and linear for the others."""
    abstain: bool = False
    """One more output of the model, for abstention; methods that need it (dac) get it anyway."""
    dropout: float | None = None
    """Dropout rate inside the model's stages; the model's own (images 0, bilstm 0.5, bert-base 0.1) if not given."""
    shortcut: Literal["A", "B"] = "A"
    """Where blocks of resnet8 to 110 change the shape: A (zero channels, as in LDAM's code) or B (1x1 convolutions, as in ISDA's)."""
    stochastic_depth: float = 0.0
    """Rate at which the last block of a resnet or wrn is left out, rising linearly from the first one; 0.5 in the paper."""
    shakedrop: float = 0.0
    """The same for ShakeDrop, which shakes the block's branch at random where it would be left out."""
    vectors: str | None = None
    """A file of word vectors in GloVe's form, for the bilstm to start from."""
    weights: str | None = None
    """A .safetensors file of public weights, for bert-base, resnet50 or resnet101 to start from."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that are not trained, by the names of its parameters (stem stage1, stage2/block0, embedding); their BatchNorm keeps
    its statistics."""
    freeze_batchnorm: bool = False
    """Every BatchNorm of the model runs on its running statistics and keeps them; its scales and shifts are trained."""
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
    test_every: int = 1
    """Epochs between two evaluations on the test set, which change no other number; the last epoch always ends with one."""
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


def first_flags(
    argv: Sequence[str], settings: type, epilogue: str, *, script: str | None = None, one_process: bool = False
) -> Any:
    """The settings of a command line: those of --config NAME first, flags on top.

    --list and --config act before the rest; unknown flags end the program with the nearest one (tyro).
    script: its file's name, if its settings are in another file.
    one_process: the script can't be spread over several, and says so.
    """
    import tyro  # here: a machine without it can still import this module

    script = script or pathlib.Path(inspect.getfile(settings)).name
    argv = list(argv)
    if "--list" in argv:
        print_methods(taxonomy.registry(value_of(argv, "--plugin", several=True)))
        raise SystemExit(0)
    defaults: dict[str, Any] = {}
    smoke = "--smoke" in argv
    if smoke:
        argv.remove("--smoke")
    if names := value_of(argv, "--config", remove=True):
        chosen = config_flags(names[-1], script, smoke=smoke)
        fields = {field.name for field in dataclasses.fields(settings)}
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
    if one_process and (host := getattr(chosen, "coordinator", None)) is not None:  # before it waits for the others
        raise ValueError(
            f"{script} needs one process, got --coordinator {host}. Leave out --coordinator, --num-processes and --process-id."
        )
    begin(chosen)
    return chosen


def refuse(settings: Settings, names: Sequence[str], script: str, way: str) -> None:
    """Raises ValueError for a flag that was given, but that this script has no use for. way: what to do instead."""
    defaults = type(settings)()
    for name in names:
        if (value := getattr(settings, name)) != getattr(defaults, name):
            raise ValueError(f"--{name.replace('_', '-')} is not for {script}, got {value!r}. {way}")


def check_file(flag: str, path: str) -> None:
    """Raises ValueError for a file whose folder is missing, before anything is computed for it."""
    if not pathlib.Path(path).parent.is_dir():
        raise ValueError(f"{flag} needs a file in a folder that is there, got {path!r}. Make the folder first.")


def begin(settings: Settings) -> None:
    """Joins the other processes, if there are any, before anything else touches JAX."""
    if settings.coordinator is not None:
        start_processes(settings.coordinator, settings.num_processes, settings.process_id)
    elif settings.num_processes != 1 or settings.process_id:
        raise ValueError("--num-processes and --process-id need --coordinator host:port, got none.")


def devices_of(settings: Settings) -> Devices:
    """What --devices and --parallel mean here; to be asked after `begin`. Raises ValueError for what can't be."""
    several = jax.process_count() > 1
    if several and settings.devices not in (None, jax.device_count()):
        raise ValueError(
            f"--devices needs all {jax.device_count()} devices with several processes, got {settings.devices}. Leave it out."
        )
    every = jax.device_count() if several or jax.default_backend() != "cpu" else 1
    return Devices(settings.devices or every, settings.parallel)


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


def value_of(argv: list[str], flag: str, *, remove: bool = False, several: bool = False) -> list[str]:
    """The values given to a flag, as `--flag value` or `--flag=value`; several: as `--flag value value` too."""
    found, kept, i = [], [], 0
    while i < len(argv):
        if argv[i] == flag and i + 1 < len(argv):
            found.append(argv[i + 1])
            i += 2
            while several and i < len(argv) and not argv[i].startswith("--"):
                found.append(argv[i])
                i += 1
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


def config_flags(name: str, script: str, *, smoke: bool = False) -> dict[str, Any]:
    """A config's flags for this script; smoke: those of its small version on top. Raises ValueError if it is another script's."""
    chosen = read_config(name)
    small = chosen.pop("smoke", {})
    if (own := chosen.pop("script", None)) not in (None, script):
        raise ValueError(f"--config {name} needs {own}, got {script}. Write: python experiments/{own} --config {name}")
    return chosen | (small if smoke else {})


def print_methods(registry: Mapping[str, Callable]) -> None:
    """--list: every method with its coordinates and one line, and its name in Python where that is another one."""
    from rich.table import Table

    shown = Table("name", "target", "direction", "inference", "granularity", "what it does", box=None, pad_edge=False)
    for factory in dict.fromkeys(registry.values()):
        name = getattr(factory, "alias", None) or factory.__name__
        summary_line = (factory.__doc__ or "").strip().splitlines()[0]
        if name != factory.__name__ and getattr(perturbjax, factory.__name__, None) is factory:
            summary_line += f" (pj.{factory.__name__})"
        if at := getattr(factory, "coordinates", None):
            coordinates = ["+".join(at.target), taxonomy.sign(at.direction), at.inference, "+".join(at.granularity)]
        else:
            coordinates = ["–"] * 4
        shown.add_row(name, *coordinates, summary_line)
    wide = Console()
    (wide if wide.is_terminal else Console(width=160)).print(shown)
