"""Figures of the papers, from what the other scripts wrote.

python experiments/figures.py norms --audit DIR --out norms.svg              # ‖v‖₁ of right and wrong labels, after audit.py
python experiments/figures.py sensitivity --results DIR/results.json --setting weight --out weight.svg
                                                                             # after compare.py --methods "ce, logpert(weight=0.1), …"
"""

import csv
import dataclasses
import json
import pathlib
from typing import Annotated

import numpy as np

from experiments import shared
from perturbjax import spec
from perturbjax.analysis.figures import norm_plot, sensitivity_plot


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
    """Its name."""
    out: str = "sensitivity.svg"
    """File to write."""


def main(argv: list[str]) -> None:
    """Draws one figure."""
    import tyro

    norms = Annotated[Norms, tyro.conf.subcommand("norms")]
    sensitivity = Annotated[Sensitivity, tyro.conf.subcommand("sensitivity")]
    chosen = tyro.cli(norms | sensitivity, args=argv, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    svg = draw_norms(chosen) if isinstance(chosen, Norms) else draw_sensitivity(chosen)
    pathlib.Path(chosen.out).write_text(svg + "\n")
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
    methods = json.loads(pathlib.Path(settings.results).read_text())["methods"]
    curves: dict[str, list[tuple[float, float, float]]] = {}
    reference = None
    for typed, entry in methods.items():
        accuracy = entry["accuracy"]
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
    return sensitivity_plot(curves, settings.setting, reference)


def without(typed: str, setting: str) -> tuple[str, float] | None:
    """(the method as typed without the setting, the setting's value); None if it doesn't have it as a number."""
    [(_, chain)] = spec.parse_list(typed)
    value, names = None, []
    for call in chain:
        given = dict(call.kwargs)
        if isinstance(given.get(setting), int | float):
            value = float(given.pop(setting))
        rest = ", ".join(f"{name}={x}" for name, x in given.items())
        names.append(f"{call.name}({rest})" if rest else call.name)
    return None if value is None else ("+".join(names), value)


if __name__ == "__main__":
    shared.start(main)
