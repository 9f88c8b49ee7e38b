"""What domains.py reports: domains.json, and DomainBed's table on the terminal and as Markdown."""

import dataclasses

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import shared
from experiments.leaveout.plan import DomainsSettings
from perturbjax.analysis import summary
from perturbjax.data import Dataset
from perturbjax.data.domains import missing_classes

SELECTION = (
    "Accuracy on 80 % of the left-out domain, at the step with the best mean accuracy on 20 % of each training domain "
    "(training-domain validation); SWAD: weights averaged over the window found on those 20 %."
)


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
