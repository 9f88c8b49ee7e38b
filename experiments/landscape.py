"""How flat is the minimum that each method finds? Eigenvalues, SAM's sharpness, and pictures of the loss around trained nets.

    python experiments/landscape.py                                                      # trains ce and sam on the digits, then looks
    python experiments/landscape.py --methods "ce, sam, pugd, lpl" --seeds 3 --plane 21
    python experiments/landscape.py --runs runs/compare-digits-longtail-50               # the nets of a comparison (or of train.py)
    python experiments/landscape.py --runs DIR --data CIFAR10.npz --part test --samples 5000 --top 5

The loss is the plain cross entropy of the trained net in evaluation mode. Writes landscape.json (numbers and curves), lines.svg (along
the gradient and along a random direction) and, with --plane, plane.svg (two random directions) to --out, each as .png too; prints a
table. Runs are trained as compare.py does, in --out/runs: interrupted or given again, the command goes on, and looks with new flags at
the nets that are there.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import shared
from experiments.shared import many
from perturbjax.analysis.landscape import (
    as_svg,
    gradient_direction,
    line_figure,
    line_losses,
    plane_figure,
    plane_losses,
    random_direction,
)
from perturbjax.analysis.sharpness import data_loss, hessian_spectrum, sam_sharpness
from perturbjax.checks import check_choice, check_number
from perturbjax.data import Dataset
from perturbjax.models.describe import from_description
from perturbjax.training import load_variables, predict


@dataclasses.dataclass(frozen=True)
class LandscapeSettings(many.TrainingSettings):
    """Flags of landscape.py."""

    methods: str = "ce, sam"
    """What is trained, as in compare.py; not with --runs."""
    seeds: int = 1
    """n: seeds 0 to n-1 of every method."""
    runs: tuple[str, ...] = ()
    """Folders of compare.py, train.py or this script: all finished runs in them. --data says where the data is, if it isn't known by name."""
    out: str | None = None
    """Folder for what is written; the first of --runs, or runs/landscape-DATA-VIEW, if not given."""
    part: str = "train"
    """Whose loss: train or test."""
    samples: int = 2048
    """At most so many samples, drawn with seed 0; 0: all."""
    radius: float = 0.05
    """ρ of SAM's sharpness, measured on batches of --batch-size."""
    top: int = 1
    """Eigenvalues of the Hessian."""
    steps: int = 40
    """Hessian products for them, at most."""
    points: int = 21
    """Points along each line."""
    climb: float = 0.5
    """How far along the gradient to either side."""
    reach: float = 1.0
    """How far along a random direction to either side; 1: as far as the filters are long."""
    plane: int = 0
    """Points along each edge of the plane; 0: no plane."""


@dataclasses.dataclass(frozen=True)
class Net:
    """A trained net and its data."""

    method: str
    seed: int
    folder: pathlib.Path
    model: Any
    params: Any
    stats: Any
    dataset: Dataset


def main(argv: list[str]) -> None:
    """Trains what is missing, looks, writes."""
    settings = shared.first_flags(argv, LandscapeSettings, __doc__, one_process=True)
    check(settings)
    with_nets(argv, settings, "landscape", look)


def with_nets(
    argv: list[str], settings: Any, script: str, look: Callable, *, check_model: Callable[[Any], Any] = lambda model: None
) -> None:
    """Calls look(nets, settings, folder to write to, console) on the nets of --runs, or on newly trained ones of --methods and --seeds.

    check_model: called on every model before that, and before anything is trained; raises ValueError for one that can't be looked at.
    """
    console = Console()
    if settings.runs:
        out, named = pathlib.Path(settings.out or settings.runs[0]), bool(shared.value_of(argv, "--data"))
        nets = [read(folder, settings, named=named) for folder in finished_runs(settings.runs)]
        for net in nets:
            check_model(net.model)
        out.mkdir(parents=True, exist_ok=True)
        look(nets, settings, out, console)
        return
    methods = shared.parse_methods(settings.methods, settings.plugin)
    own = {field.name for field in dataclasses.fields(many.TrainingSettings)}
    training = many.TrainingSettings(**{name: value for name, value in vars(settings).items() if name in own})
    datasets = [shared.load_view(training, seed) for seed in range(settings.seeds)]
    shared.check_runs(training, datasets[0], methods, shared.channel_stats(training))
    with shared.prepare_out(settings.out, script, settings.view, shared.identity(training, datasets[0])) as folder:
        shared.print_notes(datasets[0], console, training, folder.path)
        shared.print_classifiers(training, methods, console)
        planned = many.plan(training, datasets, methods, folder.path)
        for one in planned:
            check_model(one.recipe.model)
        trained, diverged = many.train_all(training, datasets, methods, folder.path, console)
        nets = [net_in(one.folder, one.typed, one.run.seed, one.run.dataset) for one in planned if one.typed in trained]
        look(nets, settings, folder.path, console)
        shared.raise_diverged(diverged)


def check(settings: LandscapeSettings) -> None:
    """Raises ValueError for flags that can't be."""
    check_choice("--part", "part", settings.part, ("train", "test"))
    least = dict(seeds=1, samples=0, radius=0, top=1, steps=1, points=2, climb=0, reach=0, plane=0)
    for name, low in least.items():
        check_number(f"--{name}", low=low, **{name: getattr(settings, name)})


def finished_runs(folders: tuple[str, ...]) -> list[pathlib.Path]:
    """The folders of finished runs, themselves or anywhere below."""
    found: dict[pathlib.Path, None] = {}
    # The trainings of audit.py have no run.json: their data can't be made again from it.
    whole = lambda run: (run / "finished.npz").exists() and (run / "run.json").exists()
    for folder in map(pathlib.Path, folders):
        below = sorted(file.parent for file in folder.rglob("model.json") if whole(file.parent))
        if not below:
            raise ValueError(
                f"--runs needs folders with finished runs of compare.py or train.py, got {str(folder)!r}, which has none. "
                "Write --runs and the --out of such a command."
            )
        found |= dict.fromkeys(below)
    return list(found)


def read(folder: pathlib.Path, settings: LandscapeSettings, *, named: bool) -> Net:
    """The net of a run's folder, and its data made again from the run's settings. named: --data was given."""
    kept = json.loads((folder / "run.json").read_text())["settings"]
    fields = {field.name for field in dataclasses.fields(shared.Settings)}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items() if name in fields}
    own["data"] = settings.data if named else kept["data"]
    dataset = shared.load_view(shared.Settings(**own), kept["seed"])
    if dataset.subset_hash != kept["subset_hash"]:
        raise ValueError(
            f"--runs needs the data that {folder} was trained on, got {own['data']!r}, whose labels or choice of samples are others. "
            "Name it with --data."
        )
    return net_in(folder, kept["method"], kept["seed"], dataset)


def net_in(folder: pathlib.Path, method: str, seed: int, dataset: Dataset) -> Net:
    """The net of a finished run."""
    model = from_description(json.loads((folder / "model.json").read_text()))
    variables = jax.tree.map(jnp.asarray, load_variables(folder))
    return Net(method, seed, folder, model, variables["params"], variables["batch_stats"], dataset)


def look(nets: list[Net], settings: LandscapeSettings, out: pathlib.Path, console: Console) -> None:
    """Measures every net; writes and prints the results."""
    entries = [measured(net, settings) for net in nets]
    report = {
        "command": shared.command_line(),
        "versions": shared.versions(),
        "settings": dataclasses.asdict(settings),
        "nets": entries,
    }
    (out / "landscape.json").write_text(json.dumps(report, indent=2) + "\n")
    write(out / "lines", drawn_lines(entries), "Loss along lines around the trained nets")
    if settings.plane:
        first = {name: own[0] for name, own in by_method(entries).items()}  # of every method the first seed
        planes = {name: tuple(np.array(entry["plane"][key]) for key in ("x", "y", "losses")) for name, entry in first.items()}
        write(out / "plane", plane_figure(planes), "Loss over a plane around the trained nets")
    console.print(shown(entries, settings))
    files = "landscape.json, lines.svg and .png" + (", plane.svg and .png" if settings.plane else "")
    console.print(f"Wrote {files} to {out}", highlight=False, soft_wrap=True)


def measured(net: Net, settings: LandscapeSettings) -> dict:
    """The numbers of one net, as landscape.json has them."""
    data = net.dataset
    images, labels = (
        (data.train_images, data.train_labels) if settings.part == "train" else (data.test_images, data.test_labels)
    )
    rows = np.random.default_rng(0).permutation(len(labels))[: settings.samples or None]  # mixed classes in every batch
    images, labels = images[rows], labels[rows]
    loss = data_loss(net.model, images, labels, stats=net.stats, batch_size=settings.batch_size)
    whole = data_loss(net.model, images, labels, stats=net.stats)
    spectrum = hessian_spectrum(whole, net.params, top=settings.top, steps=settings.steps)
    key, other = jax.random.split(jax.random.key(0))
    first, second = random_direction(net.params, key), random_direction(net.params, other)
    up = np.linspace(-settings.climb, settings.climb, settings.points)
    across = np.linspace(-settings.reach, settings.reach, settings.points)
    lines = {
        "gradient": (up, line_losses(whole, net.params, gradient_direction(whole, net.params), up)),
        "random": (across, line_losses(whole, net.params, first, across)),
    }
    found = {
        "method": net.method,
        "seed": net.seed,
        "folder": str(net.folder),
        "samples": len(labels),
        "loss": whole(net.params),
        "accuracy": float(np.mean(predict(net.model, net.params, net.stats, images).argmax(1) == labels)),
        "lambda_max": spectrum.values.tolist(),
        "lambda_error": spectrum.errors.tolist(),
        "hessian_products": spectrum.products,
        "sharpness": sam_sharpness(loss, net.params, radius=settings.radius),
        "lines": {name: {"places": t.tolist(), "losses": losses.tolist()} for name, (t, losses) in lines.items()},
    }
    if settings.plane:
        edge = np.linspace(-settings.reach, settings.reach, settings.plane)
        losses = plane_losses(whole, net.params, first, second, edge, edge)
        found["plane"] = {"x": edge.tolist(), "y": edge.tolist(), "losses": losses.tolist()}
    return found


def by_method(entries: list[dict]) -> dict[str, list[dict]]:
    """The entries of each method, in the order in which they come."""
    return {name: [e for e in entries if e["method"] == name] for name in dict.fromkeys(e["method"] for e in entries)}


def drawn_lines(entries: list[dict]) -> Figure:
    """Both kinds of line, a panel each."""
    panels = {}
    for title, key in (("along the gradient", "gradient"), ("along a random direction", "random")):
        panels[title] = {
            name: (np.array(own[0]["lines"][key]["places"]), np.array([e["lines"][key]["losses"] for e in own]))
            for name, own in by_method(entries).items()
        }
    return line_figure(panels)


def write(path: pathlib.Path, figure: Figure, label: str) -> None:
    """The figure as path.svg and path.png."""
    path.with_suffix(".svg").write_text(as_svg(figure, path.name, label) + "\n")
    figure.savefig(path.with_suffix(".png"), dpi=160)


def shown(entries: list[dict], settings: LandscapeSettings) -> Table:
    """The table on the terminal: means over seeds."""
    title = f"{settings.part} data; sharpness at ρ = {settings.radius:g}; far: the loss at the higher end of the random line"
    table = Table("method", "loss", "accuracy %", "λ max", "sharpness", "far", box=None, caption=title, caption_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def cell(values: list[float]) -> str:
        spread = f" ± {np.std(values, ddof=1):.1g}" if len(values) > 1 else ""
        return f"{np.mean(values):.3g}{spread}"

    for name, own in by_method(entries).items():
        ends = [max(e["lines"]["random"]["losses"][0], e["lines"]["random"]["losses"][-1]) for e in own]
        table.add_row(
            Text(name), cell([e["loss"] for e in own]), cell([100 * e["accuracy"] for e in own]),
            cell([e["lambda_max"][0] for e in own]), cell([e["sharpness"] for e in own]), cell(ends),
        )  # fmt: skip
    return table


if __name__ == "__main__":
    shared.start(main)
