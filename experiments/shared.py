"""What the scripts share: flags, data, recipes from method specs, one trained run as a record, and the results' form."""

import dataclasses
import functools
import importlib.metadata
import pathlib
import platform
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from perturbjax import spec, taxonomy
from perturbjax.analysis import evaluate, mean_by_class, relative_loss_variation, summary
from perturbjax.checks import nearest
from perturbjax.data import VIEWS, Dataset, apply_views, check, load
from perturbjax.models import create
from perturbjax.training import History, Recipe, device_data, init_state

CONFIGS = pathlib.Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Flags that every script has."""

    data: str = "digits"
    """digits (ships with scikit-learn), or a path to an .npz file."""
    view: str = "longtail(50)"
    """What is made of the data, seeded: longtail(ratio), noise(kind, rate), thin(per_class), shrink(size); + chains them, none: as is."""
    model: str = "mlp"
    """mlp, cnn, resnet8/20/32/44/56/110, wrn16-8, wrn28-10."""
    width: int | None = None
    """Channels of the model's first layer; the model's own if not given."""
    head: str = "linear"
    """linear or cosine."""
    dropout: float = 0.0
    """Dropout rate inside the model's stages."""
    bfloat16: bool = False
    """Compute the layers in bfloat16; parameters, logits and losses stay float32."""
    epochs: int = 60
    """Passes over the training data."""
    batch_size: int = 64
    """Samples per step; the last partial batch of an epoch is dropped."""
    learning_rate: float = 0.1
    """Base learning rate of SGD."""
    momentum: float = 0.9
    """Momentum; 0 switches it off."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """Coupled weight decay, on all parameters."""
    schedule: str = "cosine"
    """cosine (to zero) or constant, after the warm-up."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    augment: bool | None = None
    """Random crops (padding an eighth of the width) and flips; if not given: for colour images only."""
    plugin: tuple[str, ...] = ()
    """Python files with methods of your own (functions under @pj.method)."""


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
    return tyro.cli(
        settings, args=argv, default=settings(**defaults), description=epilogue, config=(tyro.conf.OmitArgPrefixes,)
    )


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
        found[typed] = (Method(structure, plugins), numbers)
    return found


def load_view(settings: Settings, seed: int) -> Dataset:
    """The data with the settings' view drawn with this seed, checked."""
    views = ()
    if settings.view.strip() not in ("", "none"):
        chain = spec.resolve(spec.parse_chain(settings.view), VIEWS)
        views = tuple(VIEWS[call.name](**dict(call.kwargs)) for call in chain)
    return check(apply_views(source(settings.data), views, seed))


@functools.cache
def source(name: str) -> Dataset:
    """The data set without views, read once."""
    return load(name)


def make_recipe(settings: Settings, dataset: Dataset, method: Method) -> Recipe:
    """The static part of a run."""
    mean, std = dataset.channel_stats()
    std = tuple(s if s > 0 else 1.0 for s in std)  # a constant channel stays constant
    augment = dataset.image_shape[-1] == 3 if settings.augment is None else settings.augment
    model = create(
        settings.model, num_classes=dataset.num_classes, mean=mean, std=std, width=settings.width, head=settings.head,
        dropout=settings.dropout, dtype=jnp.bfloat16 if settings.bfloat16 else jnp.float32,
    )  # fmt: skip
    return Recipe(
        model=model, build=method, num_classes=dataset.num_classes, num_examples=len(dataset.train_labels),
        batch_size=settings.batch_size, epochs=settings.epochs, schedule=settings.schedule,
        warmup_epochs=settings.warmup_epochs, momentum=settings.momentum > 0, nesterov=settings.nesterov,
        pad=max(1, dataset.image_shape[0] // 8) if augment else 0, flip=augment,
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
    for typed, (method, numbers) in methods.items():
        try:
            init_state(make_recipe(settings, dataset, method), make_numbers(settings, numbers), device_data(dataset), 0)
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
        "per_class": mean_by_class([run["per_class"] for run in runs]),
        "cost_ratio": None,
        "gradient_evaluations": float(np.mean([h.gradient_evaluations for h in histories])),
        "inner_evaluations": float(np.mean([h.inner_evaluations for h in histories])),
        "seconds": float(np.sum([h.seconds for h in histories])),
        "learning_curve": {
            "epoch": list(range(1, len(histories[0].accuracy) + 1)),
            "accuracy": [h.accuracy for h in histories],
        },
        "relative_loss_variation": mean_by_class(variations) if variations else None,
        "difference": None,
        "metrics": histories[-1].metrics,
    }


def results_of(settings: Any, datasets: Sequence[Dataset], seeds: Sequence[int], methods: dict) -> dict:
    """The whole of results.json."""
    first = datasets[0]
    return {
        "command": command_line(),
        "versions": versions(),
        "data": {
            "name": pathlib.Path(settings.data).name,
            "train_size": len(first.train_labels),
            "test_size": len(first.test_labels),
            "class_counts": [int(n) for n in first.class_counts],
            "class_names": list(first.class_names),
            "subset_hash": [d.subset_hash for d in datasets],
            "views": list(first.views),
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


def prepare_out(out: str | None, script: str, settings: Settings) -> pathlib.Path:
    """The output folder, made and tried for writing before any training."""
    name = f"{script}-{slug(pathlib.Path(settings.data).stem)}-{slug(settings.view)}"
    folder = pathlib.Path("runs") / name if out is None else pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--out needs a folder that can be written, got {str(folder)!r} ({error.strerror}). Name another one."
        ) from error
    return folder


def start(main: Callable[[list[str]], None]) -> None:
    """Runs a script's main: a clear error becomes one line and exit code 2; Ctrl-C says what was lost."""
    cache = pathlib.Path.home() / ".cache" / "perturbjax" / "xla"
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted: nothing was written. The same command starts again.", file=sys.stderr)
        raise SystemExit(130) from None
