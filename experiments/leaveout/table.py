"""What domains.py reports: domains.json, and DomainBed's table on the terminal and as Markdown."""

import dataclasses

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments import shared
from experiments.leaveout.plan import DomainsSettings
from perturbjax.analysis import is_balanced, summary
from perturbjax.analysis.ranking import headline
from perturbjax.data import Dataset
from perturbjax.data.domains import missing_classes

SELECTION = (
    "Accuracy on 80 % of the left-out domain, at the step with the best mean accuracy on 20 % of each training domain "
    "(training-domain validation); SWAD: weights averaged over the window found on those 20 %."
)

MORE = ("balanced_accuracy", "macro_f1")
"""What earlier versions' runs don't have."""

TITLES = {"accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy"}
ORDER = ", which orders the methods since a left-out domain is not balanced"


def results_of(settings: DomainsSettings, dataset: Dataset, held: list[int], runs: list[dict]) -> dict:
    """The whole of domains.json."""
    names = [dataset.domain_names[n] for n in held]
    methods: dict[str, dict] = {}
    for typed in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == typed]
        of = lambda key, own=own: [[run[key] for run in own if run["domain"] == name] for name in names]
        more = {key: by_domain(names, of(key)) for key in MORE if all(key in run for run in own)}
        methods[typed] = {
            **by_domain(names, of("accuracy")),
            "last_step": summary(np.mean(of("last_accuracy"), axis=0)),
            **{key: more.get(key) for key in MORE},
            "seconds_per_step": float(np.mean([run["seconds_per_step"] for run in own])),
            "runs": own,
        }
    data = {
        "name": dataset.name, "samples": len(dataset.train_labels), "domain_names": list(dataset.domain_names),
        "class_names": list(dataset.class_names), "domain_counts": np.bincount(dataset.train_domains).tolist(),
        "test_balanced": not uneven_domains(dataset, held), "image_shape": list(dataset.image_shape), "views": list(dataset.views),
        "notes": [*dataset.notes, *missing_classes(dataset), *uneven_domains(dataset, held)],
    }  # fmt: skip
    return {
        "command": shared.command_line(), "versions": shared.versions(), "data": data, "settings": dataclasses.asdict(settings),
        "selection": SELECTION, "held_out": names, "methods": methods,
    }  # fmt: skip


def shown(entry: dict) -> str:
    """A summary in percent, ± over seeds where there are several."""
    spread = f" ± {100 * entry['std']:.1f}" if len(entry["values"]) > 1 else ""
    return f"{100 * entry['mean']:.1f}{spread}"


def by_domain(names: list[str], rows: list[list[float]]) -> dict:
    """{"domains": a summary over seeds for each, "mean": over domains, by seed} of numbers [domain][seed]."""
    return {
        "domains": {name: summary(row) for name, row in zip(names, rows, strict=True)},
        "mean": summary(np.mean(rows, axis=0)),
    }


def uneven_domains(dataset: Dataset, held: list[int]) -> list[str]:
    """A sentence about the left-out domains whose classes are not balanced; none if all are."""
    of = lambda n: np.bincount(dataset.train_labels[dataset.train_domains == n], minlength=dataset.num_classes)
    uneven = [dataset.domain_names[n] for n in held if not is_balanced(of(n))]
    if not uneven:
        return []
    return [
        f"The classes of {', '.join(map(repr, uneven))} are not balanced, so accuracy there is mostly that of the frequent ones. "
        "Balanced accuracy, the mean over the classes that a domain has, counts each class the same."
    ]


def tables_of(results: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows) of each table: accuracy by domain, which is DomainBed's, and balanced accuracy.

    The latter comes first and orders the methods where a left-out domain is not balanced; runs of earlier versions don't have it.
    """
    methods, names = results["methods"], results["held_out"]
    first = headline(results)
    table = lambda key, typed: methods[typed] if key == "accuracy" else methods[typed].get(key)
    mean = lambda typed: table(first, typed)["mean"]["mean"]
    order = list(methods) if first == "accuracy" else sorted(methods, key=mean, reverse=True)
    found = []
    for key in sorted(TITLES, key=lambda key: key != first):
        shown_by = {typed: table(key, typed) for typed in order}
        if None in shown_by.values():
            continue
        f1 = key != "accuracy"
        rows = [
            [typed, *(shown(own["domains"][name]) for name in names), shown(own["mean"])]
            + ([shown(methods[typed]["macro_f1"]["mean"])] if f1 else [])
            for typed, own in shown_by.items()
        ]
        found.append((TITLES[key], ["method", *names, "mean", *(["macro F1"] if f1 else [])], rows))
    return found


def markdown(results: dict) -> str:
    """The tables, with what was chosen how, as Markdown."""
    lines: list[str] = []
    for number, (title, head, rows) in enumerate(tables_of(results)):
        table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        if number == 0:  # the file begins with its table
            lines += [*table, "", f"The table above is {title.lower()}{ORDER * (headline(results) != 'accuracy')}.", ""]
        else:
            lines += [f"{title}:", "", *table, ""]
    seeds = results["settings"]["seeds"]
    over = f", mean ± std over {seeds} seeds" if seeds > 1 else ", one seed"
    return "\n".join([*lines, results["selection"] + f" In percent{over}.", "", f"`{results['command']}`", ""])


def print_results(results: dict, console: Console) -> None:
    """The tables, for people."""
    for number, (title, head, rows) in enumerate(tables_of(results)):
        order = ORDER if number == 0 and headline(results) != "accuracy" else ""
        console.print(f"{title} in %{order}:", highlight=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for place, name in enumerate(head):
            table.add_column(Text(name), justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*map(Text, row))  # brackets are settings, not markup
        console.print(table)
    console.print(results["selection"], highlight=False)
