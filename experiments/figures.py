"""Figures of the papers, from what the other scripts wrote.

python experiments/figures.py norms --audit DIR --out norms.svg              # ‖v‖₁ of right and wrong labels, after audit.py
python experiments/figures.py sensitivity --results DIR/results.json --setting weight --out weight.svg
                                                                             # after compare.py --methods "ce, logpert(weight=0.1), …"
python experiments/figures.py epochs --results DIR/results.json --out epochs.svg         # accuracy by epoch
python experiments/figures.py weights --out weights.svg                      # what samples count for in self-paced learning
python experiments/figures.py ratio --run DIR --data digits --view none --tau 0.5 --out ratio.svg
                                                                             # ℓ̃/ℓ of self-paced logits, after train.py --out DIR
python experiments/figures.py gradients --out gradients.svg                  # what methods do to each class's gradient (LPG's Figure 1)
python experiments/figures.py activations --out activations.svg              # and to its activations (LPA's Figure 1)
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

from experiments import shared
from experiments.activations import Activations, draw_activations
from experiments.gradients import Gradients, draw_gradients
from perturbjax import spec
from perturbjax.analysis.figures import line_plot, loss_ratios, norm_plot, self_paced_weights, sensitivity_plot
from perturbjax.analysis.plots import curve_plot
from perturbjax.analysis.ranking import headline
from perturbjax.loss.teacher import load_teacher
from perturbjax.training.step import pixels


@dataclasses.dataclass(frozen=True)
class Norms:
    """Distribution of the logit perturbations that samples needed (the taxonomy paper's Figure 7)."""

    audit: str
    """Folder that audit.py wrote."""
    out: str = "norms.svg"
    """File to write."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Accuracy against a setting (the taxonomy paper's Figures 9 and 10)."""

    results: str
    """results.json of a comparison of one method at several values of the setting."""
    setting: str
    """Its name; METHOD.SETTING where several methods of a chain have it."""
    out: str = "sensitivity.svg"
    """File to write."""


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Test accuracy by epoch, mean and standard deviation over seeds (the taxonomy paper's Figure 8)."""

    results: str
    """results.json of a comparison."""
    out: str = "epochs.svg"
    """File to write."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """What samples count for by their loss, in self-paced learning and its variants (the taxonomy paper's Figure 11)."""

    threshold: float = 2.0
    """λ_t of self-paced learning, τ of self-paced logits: a loss."""
    weight: float = 0.175
    """LogPert's λ."""
    out: str = "weights.svg"
    """File to write."""


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Perturbed over original loss of the training samples, under self-paced logits (the taxonomy paper's Figure 12)."""

    run: str
    """Folder of a run: train.py's --out, or one of compare.py's --out/runs."""
    data: str = "digits"
    """What it was trained on, as for train.py."""
    view: str = "none"
    """As for train.py."""
    seed: int = 0
    """Of the view."""
    tau: float = 0.5
    """τ: samples of this loss and more are lifted."""
    scale: float = 2.5
    """ε over the largest logit; the paper wants more than 2."""
    out: str = "ratio.svg"
    """File to write."""


FIGURES: dict[str, type] = {
    kind.__name__.lower(): kind for kind in (Norms, Sensitivity, Epochs, Weights, Ratio, Gradients, Activations)
}
"""The flags of each figure."""


def main(argv: list[str]) -> None:
    """Draws one figure."""
    import tyro

    chosen = tyro.extras.subcommand_cli_from_dict(FIGURES, args=argv, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    shared.check_file("--out", chosen.out)  # some of them train first
    drawn: dict[type, Callable] = {
        Norms: draw_norms, Sensitivity: draw_sensitivity, Epochs: draw_epochs, Weights: draw_weights, Ratio: draw_ratio,
        Gradients: draw_gradients, Activations: draw_activations,
    }  # fmt: skip
    pathlib.Path(chosen.out).write_text(drawn[type(chosen)](chosen) + "\n")
    print(f"Wrote {chosen.out}")


def draw_norms(settings: Norms) -> str:
    """Reads audit.csv."""
    file = pathlib.Path(settings.audit) / "audit.csv"
    if not file.is_file():
        raise FileNotFoundError(
            f"figures norms needs a folder of audit.py, got {settings.audit!r}, where audit.csv is missing."
        )
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    wrong = np.array([row["true"] != row["given"] for row in rows]) if "true" in rows[0] else None
    return norm_plot(np.array([float(row["logpert"]) for row in rows]), wrong)


def draw_sensitivity(settings: Sensitivity) -> str:
    """Reads results.json; methods that have the setting as a number make the curves, the first one that hasn't is the level line."""
    results = json.loads(pathlib.Path(settings.results).read_text())
    methods, key = results["methods"], headline(results)
    curves: dict[str, list[tuple[float, float, float]]] = {}
    reference = None
    for typed, entry in methods.items():
        accuracy = entry[key]
        found = without(typed, settings.setting)
        if found is not None:
            curves.setdefault(found[0], []).append((found[1], accuracy["mean"], accuracy["std"] or 0.0))
        elif reference is None:
            reference = (typed, accuracy["mean"])
    if not curves:
        raise ValueError(
            f"figures sensitivity needs methods with the setting {settings.setting!r} as a number, got {', '.join(methods)}. "
            f'Compare e.g. --methods "ce, logpert({settings.setting}=0.1), logpert({settings.setting}=0.2)".'
        )
    return sensitivity_plot(curves, settings.setting, reference, key.replace("_", " "))


def draw_epochs(settings: Epochs) -> str:
    """Reads results.json."""
    return curve_plot(json.loads(pathlib.Path(settings.results).read_text()), 5.2)


def draw_weights(settings: Weights) -> str:
    """Needs no run: computed from the methods' own functions."""
    losses = np.linspace(0.01, 2 * settings.threshold, 400)
    curves = self_paced_weights(losses, settings.threshold, weight=settings.weight)
    return line_plot({name: (losses, curve) for name, curve in curves.items()}, "loss", "weight")


def draw_ratio(settings: Ratio) -> str:
    """Asks the run's net for the logits of the training samples."""
    dataset = shared.load_view(shared.Settings(data=settings.data, view=settings.view), settings.seed)
    net = load_teacher(settings.run)
    batches = np.array_split(np.arange(len(dataset.train_labels)), max(1, len(dataset.train_labels) // 500))
    logits = [np.asarray(net.apply(net.variables, pixels(jnp.asarray(dataset.train_images[rows])))) for rows in batches]
    losses, ratios = loss_ratios(np.concatenate(logits), dataset.train_labels, tau=settings.tau, scale=settings.scale)
    return line_plot({f"τ = {settings.tau:g}": (losses, ratios)}, "loss before", "loss after / loss before")


def values_of(methods: Iterable[str], setting: str) -> list[tuple[str, float]]:
    """(method without the setting, value) of every method that has the setting as a number."""
    return [found for typed in methods if (found := without(typed, setting)) is not None]


def without(typed: str, setting: str) -> tuple[str, float] | None:
    """(the method as typed without the setting, the setting's value); None if it doesn't have it as a number.

    setting: SETTING, or METHOD.SETTING where several methods of a chain have it.
    """
    [(_, chain)] = spec.parse_list(typed)
    method, _, setting = setting.rpartition(".")
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
    having = [i for i, call in enumerate(chain) if method in ("", call.name) and number(dict(call.kwargs).get(setting))]
    if len(having) > 1:
        raise ValueError(
            f"figures sensitivity needs the setting of one method, got {setting!r} of {len(having)} in {typed}. "
            f"Write --setting {chain[having[0]].name}.{setting}."
        )
    if not having:
        return None
    call = chain[having[0]]
    left = dataclasses.replace(call, kwargs=tuple(pair for pair in call.kwargs if pair[0] != setting))
    rest = [left if i == having[0] else other for i, other in enumerate(chain)]
    return spec.canonical(rest), float(dict(call.kwargs)[setting])


if __name__ == "__main__":
    shared.start(main)
